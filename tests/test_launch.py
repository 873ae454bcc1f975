"""What a sweep shares with its nodes: whole files, one try that counts, and a node that has lost its cell gives up."""

from __future__ import annotations

import io
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import TINY, command
from test_sweep import jobs

from bench_dfusion.errors import UsageError
from bench_dfusion.results import records
from bench_dfusion.sweeps import local, node, queue, storage
from bench_dfusion.sweeps.job import Job
from bench_dfusion.sweeps.local import Local
from bench_dfusion.sweeps.storage import Life, Storage, begin
from bench_dfusion.version import __version__

SWEEP = ("sweep", "micro", "--algo", "dpo", "--reward", "clip")


@pytest.fixture(params=["file", "memory"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(f"file://{tmp_path}/shared dir" if request.param == "file" else f"memory://{tmp_path}")


def content(shared: Storage, name: str) -> bytes:
    return bytes(shared.fs.cat_file(f"{shared.root}/{name}"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--ray-address", "auto"), "--ray-address is of --launcher ray"),
        (("--gpus-per-cell", "0"), "--gpus-per-cell is of --launcher ray"),
        (("--storage", "/tmp/x"), "--storage is of --launcher ray"),
        (("--launcher", "slurm"), "--launcher"),
        (
            ("--launcher", "ray", "--set", "track.evaluation.base_images_per_prompt=8"),
            "the checked base of micro-custom-v1 is not in ",
        ),
        (("--launcher", "ray", "--device", "cpu"), "--device and --workers are of this machine"),
        (("--launcher", "ray", "--workers", "2"), "--device and --workers are of this machine"),
        (("--launcher", "ray", "--cpus-per-cell", "0"), "--cpus-per-cell"),
        (("--launcher", "ray", "--ray-address", "127.0.0.1:1"), "no Ray cluster at 127.0.0.1:1: "),
        (("--launcher", "ray", "--gpus-per-cell", "1.5"), "give a part of one GPU, or whole ones"),
        (("--launcher", "ray", "--storage", "memory://x"), "give one that all nodes share"),
        (("--launcher", "ray", "--storage", "nowhere://x"), "storage nowhere://x"),
        (("--launcher", "ray"), "--launcher ray needs Ray: pip install -e '.[ray]'"),
    ],
)
def test_what_makes_no_sense_is_refused(
    words: tuple[str, ...], expected: str, refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as where it is not installed
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "")
    assert expected in refused(*SWEEP, *words, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_cell_that_is_another_one_here_is_refused(refused, tmp_path: Path) -> None:
    said = refused("run", "--algo", "dpo", "--reward", "clip", "--expect", "0123456789abcdef", cwd=tmp_path)
    assert "and 01234567 where it was planned" in said


# --- the local launcher; the worker's own loop, around a few lines of Python in the place of `bench-dfusion run`

CELL = """
import ctypes, os, signal, sys, time, types
from pathlib import Path
from bench_dfusion import registry
from bench_dfusion import cli
from bench_dfusion.cli import worker

class Loaded:
    cells = 0

def main(loaded):
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    loaded.cells += 1
    print("cell", loaded.cells, "of", os.getpid(), "on", sys.argv[sys.argv.index("--device") + 1])
    ctypes.CDLL(None).printf(b"by a library in C\\n")
    does = Path(sys.argv[sys.argv.index("--config") + 1]).read_text()
    exec(does)
    sys.exit(0)

cli.main = main
module = sys.modules["bench_dfusion.runs.loaded"] = types.ModuleType("loaded")
module.Loaded = Loaded
worker.main(int(sys.argv[1]))
"""
WAIT = "print('waits', flush=True)\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('stopped'); sys.exit(130)"


@pytest.fixture
def cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Job]:
    """`cell("code")`: the job of a cell that runs this code."""
    monkeypatch.setattr(local, "_command", lambda fd: [sys.executable, "-c", CELL, str(fd)])
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # what is still in a buffer at a cell's end is the cell's
    (planned,), made = jobs(tmp_path, algorithms=["dpo"], seeds=1), itertools.count()

    def of(code: str = "") -> Job:
        number = next(made)
        (tmp_path / str(number)).write_text(code)
        job = Job(planned.cell, tmp_path / f"out{number}", ["--config", str(tmp_path / str(number))])
        (job.folder / "error.json").parent.mkdir(parents=True)
        (job.folder / "error.json").touch()
        return job

    return of


def ends(where: Local, *own: Job) -> list[str | None]:
    """How the started cells end."""
    until, found = time.monotonic() + 60, {}
    while len(found) < len(own) and time.monotonic() < until:
        found |= {j.folder: ended.how for j in own if j.folder not in found and (ended := where.ended(j)) is not None}
        time.sleep(0.02)
    return [found.get(j.folder) for j in own]


def log(job: Job) -> str:
    return (job.folder / "log.txt").read_text()


def begun(job: Job, word: str = "waits") -> int:
    """The process of a cell that waits."""
    until = time.monotonic() + 60
    while word not in log(job) and time.monotonic() < until:
        time.sleep(0.02)
    return int(log(job).split()[3])


def test_the_local_launcher_fills_its_devices_and_no_more(cell) -> None:
    a, b = cell(WAIT), cell("os.kill(os.getpid(), signal.SIGKILL)")
    with Local(["cuda:0", "cuda:1"]) as where:
        assert where.places == 2
        where.start(a)
        where.start(b)
        assert not where.ready() and [p.device for p in where.running.values()] == ["cuda:0", "cuda:1"]
        assert ends(where, b) == ["signal SIGKILL"] and where.ended(a) is None
        assert where.ready() and where.free[0].device == "cuda:1"
        begun(a)
        where.stop([a])
    assert "on cuda:0" in log(a) and "stopped" in log(a)


def test_one_process_runs_cell_after_cell_and_each_log_is_its_cells_own(cell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    own = [cell(), cell("print(os.environ['OMP_NUM_THREADS']); sys.exit(1)"), cell("os.write(2, b'raw ')"), cell()]
    with Local(["cpu"], workers=2) as where:
        for number, job in enumerate(own):
            where.free.rotate(min(1, number))  # the same place again
            where.start(job)
            assert not (job.folder / "error.json").exists()
            assert ends(where, job) == ["status 1" if number == 1 else "status 0"]
        said = [log(job).removeprefix("raw ").split() for job in own]
        assert [words[1] for words in said] == ["1", "2", "3", "4"]
        assert len({words[3] for words in said}) == 1, "one process"
        assert [log(job).count("by a library in C\n") for job in own] == [1] * 4
        assert str(max(1, (os.cpu_count() or 1) // 2)) in said[1][6:] and log(own[2]).startswith("raw ")
    assert not Path(f"/proc/{said[0][3]}").exists(), "it ends with the sweep"


@pytest.mark.parametrize(
    ("does", "how", "says"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "signal SIGKILL", ""),
        ("os.abort()", "signal SIGABRT", ""),
        ("raise MemoryError('of the device')", "status 1", "MemoryError: of the device"),
        ("print('a mistake'); sys.exit(2)", "status 2", "a mistake"),
        ("registry.others.add('mine.py')", "status 0", ""),
        ("os._exit(0)", "status 0", ""),
        # SIGTERM, for where the tests run in a shell's background SIGINT is ignored.
        ("os.kill(os.getpid(), signal.SIGTERM)", "status 130", "stopped; the same command goes on"),
    ],
)
def test_after_a_cell_that_may_have_left_something_the_next_has_a_new_process(
    cell, does: str, how: str, says: str
) -> None:
    before, bad, after = cell(), cell(does), cell()
    with Local(["cpu"]) as where:
        for job, expected in ((before, "status 0"), (bad, how), (after, "status 0")):
            where.start(job)
            assert ends(where, job) == [expected]
    assert says in log(bad) and "Traceback" not in log(after)
    assert log(after).split()[1] == "1" and begun(after, "of") != begun(before, "of")


def test_a_sweep_goes_on_after_a_process_that_died(cell) -> None:
    planned = [
        cell("ctypes.CDLL(None).printf(b'first')"),
        cell("os.kill(os.getpid(), signal.SIGKILL)"),
        cell("ctypes.CDLL(None).printf(b'last')"),
    ]
    with Local(["cpu"]) as where:
        assert not queue.Sweep(planned, where).run(), "these leave no records"
    assert [job.error for job in planned] == ["first (status 0)", "it said nothing (signal SIGKILL)", "last (status 0)"]
    assert not any(job.locked() for job in planned)


def test_a_process_killed_between_cells_costs_no_cell(cell) -> None:
    first, second = cell(), cell()
    with Local(["cpu"]) as where:
        where.start(first)
        assert ends(where, first) == ["status 0"]
        os.kill(begun(first, "of"), signal.SIGKILL)
        time.sleep(0.2)
        where.start(second)
        assert ends(where, second) == ["status 0"]


def test_a_process_whose_sweep_was_killed_ends_after_its_cell(cell, tmp_path: Path) -> None:
    job = cell(f"while not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.02)\nprint('done')")
    sweep = f"""
import time
from pathlib import Path
from types import SimpleNamespace
from bench_dfusion.sweeps import local
local._command = lambda fd: {[sys.executable, "-c", CELL]!r} + [str(fd)]
job = SimpleNamespace(folder=Path({str(job.folder)!r}), words={job.words!r}, out=Path({str(job.out)!r}))
local.Local(["cpu"]).start(job)
print(flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", sweep], stdout=subprocess.PIPE) as process:
        process.stdout.readline()  # type: ignore[union-attr]
        process.kill()
    (tmp_path / "go").touch()
    number = begun(job, "done")
    until = time.monotonic() + 20
    while Path(f"/proc/{number}").exists() and time.monotonic() < until:
        time.sleep(0.02)
    assert not Path(f"/proc/{number}").exists()


def test_a_file_is_whole_or_as_it_was(shared: Storage, tmp_path: Path) -> None:
    class Cut(io.BytesIO):
        """A node that dies in the middle of an upload."""

        def read(self, *size: int | None) -> bytes:
            if self.tell():
                raise ConnectionError
            return super().read(3)

    shared.put(io.BytesIO(b"old content"), "cell/record.json")
    with pytest.raises(ConnectionError):
        shared.put(Cut(b"new content"), "cell/record.json")
    assert content(shared, "cell/record.json") == b"old content" and shared.names("cell") == ["record.json"]
    shared.get("cell/record.json", tmp_path / "here" / "record.json")
    assert [p.read_bytes() for p in (tmp_path / "here").iterdir()] == [b"old content"]
    with pytest.raises(FileNotFoundError):
        shared.get("cell/nothing", tmp_path / "here" / "nothing")
    assert len(list((tmp_path / "here").iterdir())) == 1, "no half file either"
    assert shared.read("cell/lease.json") == {} and shared.names("nowhere") == []
    shared.remove("cell")
    shared.remove("cell")
    assert shared.names("") == []


def test_a_checkpoint_follows_what_it_stands_for(
    shared: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path = tmp_path / "run"
    for name in ("checkpoint.safetensors", "pairs/0/a.png", "record.json", ".lock", "triples.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("first")
    order: list[str] = []
    put = shared.put

    def slow(source, name: str) -> None:
        if not order:  # the run goes on while files are copied: a later checkpoint, whose pairs are not there
            (tmp_path / "later").write_text("second")
            (tmp_path / "later").replace(tmp_path / "checkpoint.safetensors")
        order.append(name)
        put(source, name)

    monkeypatch.setattr(shared, "put", slow)
    known: dict[str, tuple[int, int]] = {}
    shared.push(tmp_path, "try", known)
    assert order == [f"try/{n}" for n in ("pairs/0/a.png", "triples.png", "checkpoint.safetensors", "record.json")]
    assert content(shared, "try/checkpoint.safetensors") == b"first"
    order.clear()
    (tmp_path / "pairs/0/a.png").unlink()
    order.append("")
    shared.push(tmp_path, "try", known)
    assert order[1:] == ["try/checkpoint.safetensors"] and content(shared, order[1]) == b"second"
    assert shared.names("try") == ["checkpoint.safetensors", "record.json", "triples.png"]


def test_no_two_tries_have_one_name_and_the_next_goes_on_from_the_last_checkpoint(shared: Storage) -> None:
    one, two = Life(shared), Life(shared)
    first, source = begin(shared, "cell", one)
    assert first.startswith("try-0001-") and source is None
    second, source = begin(shared, "cell", one)
    assert second.startswith("try-0002-") and source is None, "the first may still write though it has left nothing"
    shared.put(io.BytesIO(b"2"), f"cell/{second}/checkpoint.safetensors")
    third, source = begin(shared, "cell", two)
    assert source == second and storage.lease(shared, "cell") == {"try": third, "sweep": two.name}
    shared.put(io.BytesIO(b"log"), f"cell/{third}/log.txt")
    fourth, source = begin(shared, "cell", one)
    assert source == second, "the third left no checkpoint"
    assert storage.tries_of(shared.names("cell")) == [second]
    shared.put(io.BytesIO(b"4"), f"cell/{fourth}/checkpoint.safetensors")
    assert begin(shared, "cell", two)[1] == fourth and storage.tries_of(shared.names("cell")) == [fourth]


def test_a_sweep_is_dead_when_its_sign_of_life_has_not_changed_for_long(
    shared: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(storage.time, "monotonic", lambda: now)
    one, two = Life(shared), Life(shared)
    assert not two.other(None) and not two.other(one.name), "no sign of life yet"
    one.beat()
    assert two.other(one.name) and not one.other(one.name)
    now += storage.SILENCE - 1
    assert two.other(one.name)
    one.beat()
    now += storage.SILENCE - 1
    assert two.other(one.name), "it has changed since"
    now += storage.SILENCE - 1
    assert two.other(one.name), "counted from when the change was seen"
    now += 1
    assert not two.other(one.name)
    one.beat()
    assert two.other(one.name), "it was only slow"
    one.end()
    assert not two.other(one.name)


# --- what a node does with a try; the process in the place of `bench-dfusion run` is a few lines of Python

RUN = """
import os, sys, time
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--out") + 1]) / "track" / "cell"
checkpoint = out / "checkpoint.safetensors"
print("from", checkpoint.read_text() if checkpoint.exists() else "the start", os.getpid(), flush=True)
checkpoint.write_text("round 1")
for base in out.parent.glob("base-*"):
    print(f"{base.name}: {base.read_text()}", flush=True)
if "wait" in sys.argv:
    while not Path("go").exists():
        time.sleep(0.01)
(out / "record.json").write_text("{}")
if "wait" in sys.argv:
    time.sleep(60)
sys.exit(3)
"""


@pytest.fixture
def order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`order("word")`: a new try of a cell, on a node that looks at its lease ten times a second."""
    monkeypatch.setattr(node, "BEAT", 0.1)
    monkeypatch.setattr(node, "LOOK", 0.02)
    monkeypatch.setattr(node, "COMMAND", (sys.executable, "-c", RUN))
    shared = Storage(f"file://{tmp_path}/shared")
    sweep = Life(shared)

    def of(*words: str) -> tuple[Storage, node.Order]:
        attempt, source = begin(shared, "track/cell", sweep)
        url = f"file://{tmp_path}/shared"
        return shared, node.Order(url, "track/cell", attempt, source, list(words), __version__, str(tmp_path), 1)

    return of


def test_a_try_leaves_its_files_and_the_next_goes_on_from_them(order) -> None:
    shared, first = order()
    assert node.work(first, "n1")[0] == 3
    names = ["checkpoint.safetensors", "log.txt", "record.json"]
    assert shared.names(f"track/cell/{first.attempt}") == names
    assert shared.read(f"track/cell/nodes/{first.attempt}.json") == {"node": "n1"}
    shared, second = order()
    assert node.work(second, "n1")[0] == 3
    assert content(shared, f"track/cell/{second.attempt}/log.txt").startswith(b"from round 1")


def test_a_node_has_the_checked_base_beside_the_cell(order) -> None:
    shared, own = order()
    shared.put(io.BytesIO(b"the base"), f"{node.BASES}/base-1.parquet")
    node.work(node.Order(**{**vars(own), "base": "base-1.parquet"}), "n1")
    assert b"base-1.parquet: the base" in content(shared, f"track/cell/{own.attempt}/log.txt")


def test_a_node_back_from_the_dead_gives_up_without_a_record(order, tmp_path: Path) -> None:
    shared, old = order("wait")
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(node.work(old, "n1")))
    thread.start()
    place = f"track/cell/{old.attempt}"
    while "checkpoint.safetensors" not in shared.names(place):
        time.sleep(0.02)
    process = int(content(shared, f"{place}/log.txt").split()[-1])
    _, new = order()
    (tmp_path / "go").touch()  # the old try's process ends its work now
    thread.join(20)
    assert found == [(None, 0.0)]
    assert not Path(f"/proc/{process}").exists(), "its process is ended"
    assert "record.json" not in shared.names(place)
    assert new.source == old.attempt and storage.lease(shared, "track/cell")["try"] == new.attempt
    assert node.work(old, "n1")[0] is None, "nor does it begin"


def test_a_stopped_try_ends_its_process_and_leaves_the_checkpoint(order, monkeypatch: pytest.MonkeyPatch) -> None:
    shared, own = order("wait")
    place = f"track/cell/{own.attempt}"
    started = threading.Event()

    class Interrupted:
        monotonic = staticmethod(time.monotonic)

        @staticmethod
        def sleep(seconds: float) -> None:
            time.sleep(seconds)
            if b"from" in (content(shared, f"{place}/log.txt") if shared.names(place) else b""):
                started.set()
                raise KeyboardInterrupt

    monkeypatch.setattr(node, "time", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        node.work(own, "n1")
    assert started.is_set() and "checkpoint.safetensors" in shared.names(place)
    process = int(content(shared, f"{place}/log.txt").split()[-1])
    assert not Path(f"/proc/{process}").exists()


def test_a_node_says_what_it_cannot_run(order, tmp_path: Path) -> None:
    _, own = order()
    with pytest.raises(UsageError, match="install the same on all nodes"):
        node.work(node.Order(**{**vars(own), "version": "0.0.1"}), "n1")
    with pytest.raises(UsageError, match="give a --storage all nodes share"):
        node.work(node.Order(**{**vars(own), "storage": f"file://{tmp_path}/not the same disk"}), "n1")


def test_a_cell_whose_worker_was_killed_ends_too(tmp_path: Path) -> None:
    child = "import os, sys, time; print(os.getpid(), flush=True)\n"
    child += "from bench_dfusion.cli import child; child.end_with(int(sys.argv[1]))"
    parent = f"import os, subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}, str(os.getpid())])"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as worker:
        number = int(worker.stdout.readline())  # type: ignore[union-attr]
        time.sleep(0.5)
        os.kill(number, 0)
        worker.send_signal(signal.SIGKILL)
    until = time.monotonic() + 20
    while Path(f"/proc/{number}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{number}").exists()


def test_unfinished_tries_in_the_sweeps_directory_are_in_no_table(tmp_path: Path) -> None:
    for folder in ("track/cell", ".storage/track/cell/try-0001-abc"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "cell.json").touch()
    assert records.below(tmp_path, "cell.json") == [tmp_path / "track/cell/cell.json"]
    assert len(records.below(tmp_path / ".storage", "cell.json")) == 1, "a hidden folder that is asked for"


@pytest.mark.slow
def test_the_slurm_array_of_the_docs_runs_its_cells(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "leaderboards.md").read_text()
    script = re.findall(r"```sh\n(#!/bin/bash.*?)```", text, re.S)[0]
    last = int(re.findall(r"--array=0-(\d+)", script)[0])
    (tmp_path / "cells.sh").write_text(script)
    (tmp_path / "bench-dfusion").write_text(f'#!/bin/sh\nexec {sys.executable} -m bench_dfusion.cli "$@"\n')
    (tmp_path / "bench-dfusion").chmod(0o755)
    own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TRACK": "micro", "RUNS": str(tmp_path / "runs")}
    for task in (0, last, last):  # the last is requeued
        env = {**os.environ, **own, "SLURM_ARRAY_TASK_ID": str(task)}
        subprocess.run(["bash", "cells.sh", "--builder", "vanilla", *TINY], cwd=tmp_path, env=env, check=True)
    assert {(r.algorithm, r.builder, r.seed) for _, r in records.find(tmp_path / "runs")} == {
        ("dpo", "vanilla", 0),
        ("ddpo", "vanilla", 4),
    }
    assert last == 2 * 5 - 1, "two algorithms of five seeds"
    assert "ddpo" in command("leaderboard", "runs", cwd=tmp_path).stdout
