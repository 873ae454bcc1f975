"""What goes wrong around a run, put in on purpose: each ends in a clear error or a record that says so, and what was
stopped goes on to the record of an undisturbed run. docs/reliability.md has the table."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_dfusion.reward_models.clip import Clip
from processes import SETTINGS as SHORT
from processes import command
from rounds import stopped_in_round
from torch import Tensor

import bench_dfusion
from bench_dfusion.errors import UsageError
from bench_dfusion.models.pixart import PixArtAdapter
from bench_dfusion.results import records
from bench_dfusion.results.records import Record
from bench_dfusion.runs import baseline, trainer
from bench_dfusion.util import files

pytestmark = pytest.mark.slow
SETTINGS = [*SHORT, "track.budget.reward_queries=48"]  # four rounds of D-Fusion's samples
TINY = [f"--set={setting}" for setting in SETTINGS]


def run(out: Path, **options: Any) -> Record:
    return bench_dfusion.run(algo="dpo", reward="clip", out=out, settings=SETTINGS, **options)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Record:
    return run(tmp_path_factory.mktemp("calm"))


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """The directory of a run that was stopped in its second round."""
    with stopped_in_round(1):
        run(tmp_path)
    (checkpoint,) = tmp_path.rglob("checkpoint.safetensors")
    return checkpoint.parent


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("fault", ["truncated", "flipped", "flipped in the header", "empty", "of another cell"])
def test_a_damaged_checkpoint_is_refused_and_the_cell_starts_over(stopped: Path, fault: str, calm: Record) -> None:
    checkpoint = stopped / "checkpoint.safetensors"
    content = bytearray(checkpoint.read_bytes())
    if fault == "of another cell":
        tensors, meta = files.load_tensors(checkpoint)
        files.save_tensors(checkpoint, tensors, {**meta, "cell": "0" * 64})
    else:
        size = int.from_bytes(content[:8], "little")
        if fault == "truncated":
            content = content[: len(content) // 2]
        elif fault == "empty":
            content = bytearray()
        else:  # the last tensor's last byte, or a digit of what the header says of the progress
            content[-1 if fault == "flipped" else 8 + content[8 : 8 + size].index(b"queries") + 11] ^= 1
        checkpoint.write_bytes(content)
    with pytest.raises(UsageError, match=r"is damaged .*remove it|belongs to another configuration; remove"):
        run(stopped.parents[1])
    checkpoint.unlink()
    assert run(stopped.parents[1]).comparable() == calm.comparable()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_and_a_read_only_one(small_disk: Path, calm: Record) -> None:
    words = ("run", "--algo", "dpo", "--reward", "clip", *TINY, "--out", str(small_disk))
    done = command(*words, cwd=small_disk.parent)
    assert done.returncode == 2 and "No space left on device" in done.stderr and "Traceback" not in done.stderr
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    done = command(*words, cwd=small_disk.parent)
    assert done.returncode == 2 and "Read-only file system" in done.stderr and "Traceback" not in done.stderr
    subprocess.run(["mount", "-o", "remount,rw,size=64m", small_disk], check=True)
    done = command(*words, cwd=small_disk.parent)
    assert done.returncode == 0, done.stderr
    ((_, record),) = records.find(small_disk)
    assert record.comparable() == calm.comparable()


def test_a_file_in_the_place_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    done = command("run", "--algo", "dpo", "--reward", "clip", *TINY, cwd=tmp_path)
    assert done.returncode == 2 and "runs" in done.stderr and "Traceback" not in done.stderr


def test_a_second_run_in_the_same_directory_is_refused(stopped: Path) -> None:
    with files.locked(stopped / ".lock"), pytest.raises(UsageError, match="another process is running"):
        run(stopped.parents[1])


def test_a_record_of_a_later_version_is_no_record_of_ours(stopped: Path, calm: Record) -> None:
    content = calm.model_dump_json().replace('"schema_version":', '"schema_version":9', 1)
    (stopped / "record.json").write_text(content)
    with pytest.raises(UsageError, match="later|newer|schema"):
        run(stopped.parents[1])


# ---------------------------------------------------------------- rewards, networks, clocks


@pytest.mark.parametrize(
    ("bad", "evidence"),
    [
        (lambda scores: scores * float("nan"), "returned nan for"),
        (lambda scores: scores / 0, "returned inf for"),
        (lambda scores: scores[:-1], "returned shape"),
        (lambda scores: scores[:, None], "returned shape"),
    ],
)
def test_a_reward_that_is_no_number_fails_the_cell(
    bad: Any, evidence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Clip.score
    monkeypatch.setattr(Clip, "score", lambda self, images, prompts: bad(plain(self, images, prompts)))
    record = run(tmp_path)
    assert record.status == "failed" and evidence in str(record.evidence) and not record.verdicts


def test_a_reward_that_raises_loses_a_round_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calm: Record
) -> None:
    plain, calls = Clip.score, []

    def raising(self: Clip, images: Tensor, prompts: Any) -> Tensor:
        calls.append(len(images))
        if len(calls) == 6:  # beside the base's pictures of new prompts: the second round's targets, after its samples
            raise OSError("the scorer is away")
        return plain(self, images, prompts)

    monkeypatch.setattr(Clip, "score", raising)
    with pytest.raises(OSError, match="away"):
        run(tmp_path)
    before = len(calls)
    record = run(tmp_path)
    assert record.comparable() == calm.comparable()
    counted = record.cost.reward_queries + (record.cost.base_queries or 0) + 12  # 12 pictures judged
    assert before == 6 and 0 < sum(calls) - calls[5] - counted <= 12, "a round has 8 samples and 4 targets"


@pytest.mark.parametrize(("first_call", "where"), [(0, "round 0"), (30, "round 1|evaluation")])
def test_a_network_that_is_not_finite_fails_the_cell(
    first_call: int, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = PixArtAdapter.predict, iter(range(10**9))

    def predict(self: PixArtAdapter, *inputs: Any) -> Tensor:
        output = plain(self, *inputs)
        return output * float("nan") if next(calls) >= first_call else output

    monkeypatch.setattr(PixArtAdapter, "predict", predict)
    record = run(tmp_path)
    assert record.status == "failed" and "finite" in str(record.evidence), record.evidence
    assert torch.tensor([r.reward for r in record.rounds if r.reward is not None]).isfinite().all()


def test_a_network_that_breaks_in_the_evaluation_fails_the_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = PixArtAdapter.predict
    evaluate = trainer.Run.evaluate

    def broken(self: trainer.Run, rung: int) -> None:
        monkeypatch.setattr(PixArtAdapter, "predict", lambda *inputs: plain(*inputs) * float("inf"))
        evaluate(self, rung)

    monkeypatch.setattr(trainer.Run, "evaluate", broken)
    record = run(tmp_path)
    assert record.status == "failed"
    assert str(record.evidence).startswith("evaluation: the network's predictions are not finite (PixArt")
    assert len(record.rounds) == 4 and not record.verdicts


def test_a_reward_that_falls_far_below_the_base_fails_the_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, improve = Clip.score, trainer.Run._improve

    def broken(self: trainer.Run, samples: Any, number: int) -> dict[str, float]:
        monkeypatch.setattr(Clip, "score", lambda self, images, prompts: plain(self, images, prompts) - 100)
        return improve(self, samples, number)

    settings = [s for s in SETTINGS if "reward_queries" not in s] + ["track.budget.reward_queries=96"]
    monkeypatch.setattr(trainer.Run, "_improve", broken)
    monkeypatch.setattr(baseline, "pictures_per_prompt", lambda track, rounds: 4)
    train = ["track.prompts.train=" + '["three green rings", "a cyan square"]']  # both in the first round
    record = bench_dfusion.run(algo="sft", reward="clip", builder="vanilla", out=tmp_path, settings=settings + train)
    assert record.status == "failed" and "on the same prompts the base has" in str(record.evidence)
    assert str(record.evidence).startswith("round 2: ") and len(record.rounds) == 3


def test_a_clock_set_back_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calm: Record) -> None:
    backwards = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(backwards)))
    assert run(tmp_path).comparable() == calm.comparable()


# ---------------------------------------------------------------- killed at any moment


def test_sigkill_at_twenty_random_moments(tmp_path: Path, calm: Record) -> None:
    words = [sys.executable, "-m", "bench_dfusion.cli", "run", "--algo", "dpo", "--reward", "clip", *TINY]
    moments, killed = random.Random(0), 0
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    (tmp_path / "start").mkdir()
    start = time.monotonic()
    subprocess.run([*words, "--out", "start"], cwd=tmp_path, env=env, check=True, capture_output=True)
    whole = time.monotonic() - start
    for number in range(20):
        process = subprocess.Popen(
            [*words, "--out", str(number // 4)], cwd=tmp_path, env=env, stderr=subprocess.DEVNULL
        )
        time.sleep(moments.uniform(0.1, 1.0) * whole)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 10
    for out in map(str, range(5)):
        done = subprocess.run([*words, "--out", out], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        ((_, record),) = records.find(tmp_path / out)
        assert record.comparable() == calm.comparable()
