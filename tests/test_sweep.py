"""Sweeps as processes: every cell registered first, failing ones reported, killed ones resumed, nothing lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from processes import SETTINGS, TINY, command

import bench_dfusion
from bench_dfusion import plugin_files, registry
from bench_dfusion.errors import UsageError
from bench_dfusion.results import leaderboard, records, tables
from bench_dfusion.runs import status
from bench_dfusion.sweeps import job, queue
from bench_dfusion.sweeps.local import Local

FAILING = '''
import os, signal
from pathlib import Path
from typing import Any
from bench_dfusion.reward_models.oracle import Oracle

class Failing(Oracle):
    name = "failing"
    summary = "an oracle that raises when it is asked"
    def score(self, images, prompts):
        raise RuntimeError("no [bold]score[/bold] today")

class Dying(Oracle):
    name = "dying"
    summary = "an oracle that ends its process"
    def score(self, images, prompts):
        os.kill(os.getpid(), signal.SIGKILL)

class Killing(Oracle):
    """Kills the sweep and itself at the numbers of calls in DIE_AT."""
    name = "killing"
    summary = "an oracle that ends the sweep"
    def score(self, images, prompts):
        log = Path(os.environ["DIE_HERE"]) / "calls"
        calls = len(log.read_text()) if log.exists() else 0
        with open(log, "a") as file:
            file.write(".")
        if str(calls) in os.environ["DIE_AT"].split(","):
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().score(images, prompts)
'''


def jobs(out: Path, **changes) -> list[job.Job]:
    options = {"seeds": 2, "settings": SETTINGS} | changes
    algorithms = options.pop("algorithms", ["dpo", "ddpo"])
    rewards = options.pop("rewards", ["oracle"])
    return queue.plan("micro", algorithms, ["vanilla"], rewards, options.pop("seeds"), out, **options)[0]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("mikro", "--algo", "dpo", "--reward", "clip"), "unknown track 'mikro'; did you mean micro"),
        (("micro", "--algo", "dpo,dop", "--reward", "clip"), "unknown algorithm 'dop'; did you mean dpo"),
        (("micro", "--algo", "dpo,", "--reward", "clip"), "--algo 'dpo,': write different names with commas"),
        (("micro", "--algo", "dpo,dpo", "--reward", "clip"), "--algo 'dpo,dpo': write different names"),
        (("micro", "--algo", "dpo", "--reward", "clip", "--seeds", "0"), "--seeds must be 1 or more"),
        (
            ("micro", "--algo", "draft", "--reward", "oracle"),
            "draft follows the reward's gradient, and oracle has none",
        ),
        (("micro", "--algo", "dpo", "--reward", "clip", "--set", "algo.gamma=1"), "unknown option algo 'gamma'"),
        (("micro", "--algo", "dpo", "--reward", "clip", "--workers", "0"), "--workers"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_written(
    words: tuple[str, ...], expected: str, refused, tmp_path: Path
) -> None:
    assert expected in refused("sweep", *words, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_cell_is_registered_before_the_first_runs_and_shown_until_it_has_a_record(tmp_path: Path) -> None:
    planned = jobs(tmp_path)
    assert [(j.row[0], j.cell.seed) for j in planned] == [("dpo", 0), ("ddpo", 0), ("dpo", 1), ("ddpo", 1)]
    queue.register(planned)
    (board,) = leaderboard.boards(tmp_path)
    frame = tables.table(board)
    assert frame["missing"].tolist() == [2, 2] and frame["seeds"].tolist() == [0, 0]
    assert set(frame["note"]) == {"incomplete: 2 of 2 cells have no record"}
    options: dict[str, Any] = {"track_source": "micro", "seed": 1, "settings": SETTINGS, "out": tmp_path}
    record = bench_dfusion.run(algo="dpo", builder="vanilla", reward="oracle", **options)
    (board,) = leaderboard.boards(tmp_path)
    assert board.records == (record,) and len(board.unfinished) == 3
    again = jobs(tmp_path)
    queue.register(again)
    assert [j.state for j in again] == ["waiting", "waiting", "finished", "waiting"]


def test_seeds_come_from_the_track_and_what_cannot_fit_is_said(tmp_path: Path) -> None:
    planned, left_out = queue.plan(
        "micro", ["draft"], ["vanilla"], ["clip", "oracle"], None, tmp_path, settings=[*SETTINGS, "track.seeds=3"]
    )
    assert [(j.row, j.cell.seed) for j in planned] == [(("draft", "vanilla", "clip"), n) for n in range(3)]
    assert len(left_out) == 1 and left_out[0].startswith("draft/vanilla/oracle: draft follows the reward's gradient")
    with pytest.raises(UsageError, match="oracle has none"):
        queue.plan("micro", ["draft"], ["vanilla"], ["oracle"], 2, tmp_path)


def test_the_time_left_is_that_of_like_cells_then_of_all_then_of_what_runs(tmp_path: Path) -> None:
    planned = jobs(tmp_path)
    sweep = queue.Sweep(planned, Local(["cpu"], workers=2))
    assert sweep.time_left() == float("inf")
    now = time.monotonic()
    planned[0].state, planned[0].started = "running", now - 10
    planned[0].folder.mkdir(parents=True)
    status.Reporter(planned[0].folder).say("train", 1, 4)
    assert sweep.time_left() == pytest.approx((30 + 3 * 40) / 2, abs=0.5)
    planned[1].state, planned[1].seconds = "finished", 100.0
    assert sweep.time_left() == pytest.approx((90 + 2 * 100) / 2, abs=0.5)
    planned[0].state, planned[0].seconds = "finished", 20.0
    assert sweep.time_left() == pytest.approx((20 + 100) / 2, abs=0.5)


def test_a_failing_cell_is_reported_and_stops_nothing_and_the_next_sweep_tries_it_again(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    words = ("sweep", "micro", "--algo", "ddpo", "--builder", "vanilla", "--reward", "failing,oracle", "--seeds", "1")
    words += ("--plugin", "failing.py", *TINY, "--set=track.budget.reward_queries=8")
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 1
    assert "[1/2] ddpo/vanilla/failing, seed 0: error: RuntimeError: no [bold]score[/bold] today" in done.stderr
    assert "[2/2] ddpo/vanilla/oracle, seed 0: finished, oracle" in done.stderr
    assert "incomplete: 1 of 1 cells have no record, 1 ended in an error" in done.stdout
    assert "no [bold]score[/bold] today (status 1)" in done.stdout
    (path,) = tmp_path.rglob("error.json")
    assert json.loads(path.read_text())["error"].endswith("(status 1)")
    assert "RuntimeError" in (path.parent / "log.txt").read_text()
    (tmp_path / "failing.py").write_text(
        FAILING.replace("raise RuntimeError", "return super().score(images, prompts) #")
    )
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 0 and "incomplete" not in done.stdout
    assert len(records.find(tmp_path)) == 2 and not list(tmp_path.rglob("error.json"))


def test_a_killed_sweep_ends_with_the_same_records(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    words = ("sweep", "micro", "--algo", "ddpo", "--builder", "dfusion", "--reward", "killing", "--seeds", "2")
    # 2 rounds of two calls a cell; die in the first round of the first cell and in the second round of the second
    env = {"DIE_HERE": str(tmp_path), "DIE_AT": "1,9"}
    codes = []
    for _ in range(4):
        codes.append(command(*words, *TINY, "--plugin=failing.py", cwd=tmp_path, env=env).returncode)
        if codes[-1] == 0:
            break
        assert len(list(tmp_path.rglob("cell.json"))) == 2, "registered before the first ran"
    assert codes == [-signal.SIGKILL] * 2 + [0]
    found = {r.seed: r for _, r in records.find(tmp_path)}
    assert found.keys() == {0, 1}
    monkeypatch.setattr(registry, "_from_files", {})
    monkeypatch.chdir(tmp_path)
    plugin_files.load_file(Path("failing.py"))
    monkeypatch.setenv("DIE_HERE", str(tmp_path))
    monkeypatch.setenv("DIE_AT", "")
    for seed, ours in found.items():
        options = {"seed": seed, "settings": SETTINGS, "track_source": "micro", "out": tmp_path / "calm"}
        calm = bench_dfusion.run(algo="ddpo", builder="dfusion", reward="killing", **options)
        same, expected = ours.comparable(), calm.comparable()
        for content in (same, expected):
            content["given"].pop("set")  # the test's settings are written otherwise on a command line
        assert same == expected


def test_ctrl_c_stops_the_running_cell_cleanly_and_says_how_to_go_on(tmp_path: Path) -> None:
    words = ["sweep", "micro", "--algo", "ddpo", "--builder", "vanilla", "--reward", "oracle", "--seeds", "2", *TINY]
    process = subprocess.Popen(
        [sys.executable, "-m", "bench_dfusion.cli", *words], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 240
    while (
        len(list(tmp_path.rglob("checkpoint.safetensors"))) < 2 and process.poll() is None and time.monotonic() < until
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped; the same command goes on" in output
    whole, stopped = jobs(tmp_path / "runs", algorithms=["ddpo"], seeds=2)
    assert whole.take_record() and not stopped.record.exists()
    assert not stopped.locked(), "the cell's own process has ended too"
    said = [(cell.folder / "log.txt").read_text() for cell in (whole, stopped)]
    assert "seed 0: 3 held-out prompts" in said[0] and "stopped" not in said[0]
    assert "stopped; the same command goes on" in said[1] and "seed 0" not in said[1], "and not by a kill"


@pytest.mark.slow
def test_a_process_that_dies_takes_one_cell_with_it(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    words = ("sweep", "micro", "--algo", "ddpo", "--builder", "vanilla", "--reward", "oracle,dying", "--seeds", "2")
    done = command(*words, "--plugin", "failing.py", *TINY, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("dying, seed") == 2, done.stderr
    assert "ddpo/vanilla/dying, seed 0: error: it said nothing (signal SIGKILL)" in done.stderr
    assert [r.reward for _, r in records.find(tmp_path)] == ["oracle", "oracle"]


@pytest.mark.slow
def test_micro_fast_killed_twice_ends_with_the_records_of_an_uninterrupted_sweep(tmp_path: Path) -> None:
    words = ["sweep", "micro-fast", "--algo", "dpo,ddpo", "--builder", "dfusion,vanilla", "--reward", "clip"]
    whole = [sys.executable, "-m", "bench_dfusion.cli", *words, "--seeds", "1", "--out"]
    for kills, name in ((0, "calm"), (2, "killed")):
        for kill in range(kills):
            # In the middle of training, of the first cell and then of a later one; the whole group, children too.
            process = subprocess.Popen([*whole, name], cwd=tmp_path, start_new_session=True)
            done = len(list((tmp_path / name).rglob("record.json"))) + 2 * kill
            while process.poll() is None:
                folders = [p.parent for p in (tmp_path / name).rglob("checkpoint.safetensors")]
                ended = [f for f in folders if (f / "record.json").exists()]
                if len(ended) >= done and len(folders) > len(ended):
                    os.killpg(process.pid, signal.SIGKILL)
                    break
                time.sleep(0.1)
            assert process.wait() == -signal.SIGKILL
        assert subprocess.run([*whole, name], cwd=tmp_path).returncode == 0
    calm, killed = (
        {path.parent.name: record.comparable() for path, record in records.find(tmp_path / name)}
        for name in ("calm", "killed")
    )
    assert len(calm) == 4 and killed == calm
