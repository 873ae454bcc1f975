"""A run in several processes ends as in one: the same record and LoRA to the last bit, and a clear end where one dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from processes import TINY, command

from bench_dfusion.results import records
from bench_dfusion.results.records import Record
from bench_dfusion.rewards.contract import Reward, RewardConfig, scored_in_shards
from bench_dfusion.util import files, parallel

# Batches smaller than a round's samples, so that there is something to deal out.
WORDS = ("run", "--reward", "clip", "--device", "cpu", *TINY, "--set=track.batch=3", "--keep-pairs=none")
LORA = "pytorch_lora_weights.safetensors"


def left(folder: Path) -> tuple[Record, str]:
    ((path, record),) = records.find(folder)
    return record, files.sha256(path.with_name(LORA))


def run(cwd: Path, algo: str, builder: str, processes: int, *words: str) -> tuple[Record, str]:
    done = command(*WORDS, "--algo", algo, "--builder", builder, f"--processes={processes}", *words, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("record.json") == 1
    return left(cwd)


def same(cwd: Path, algo: str, builder: str, *numbers: int) -> None:
    found = []
    for n in (1, *numbers):
        (cwd / str(n)).mkdir()
        found.append(run(cwd / str(n), algo, builder, n))
    alone, alone_lora = found[0]
    assert alone.cost.updates > 0
    for n, (record, lora) in zip(numbers, found[1:], strict=True):
        assert record.comparable() == alone.comparable() and lora == alone_lora
        cost, expected = record.cost, alone.cost
        assert (cost.reward_queries, cost.network_evaluations) == (
            expected.reward_queries,
            expected.network_evaluations,
        )
        assert cost.device == f"{n} × cpu"


class Counting(Reward):
    """Scores 100 · its calls so far + the image's first byte."""

    name = summary = paper = unit = "counting"

    class Config(RewardConfig):
        batch: int = 2

    calls = 0

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        assert len(images) == len(prompts)
        self.calls += 1
        return 100.0 * self.calls + images[:, 0, 0, 0].float()

    def fingerprint(self) -> str:
        return ""


@pytest.mark.parametrize("by_batch", [True, False])
def test_a_rewards_batches_are_dealt_out_where_they_score_alone(
    by_batch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, prompts = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 1, 1, 3), list("abcde")
    own: list[list[torch.Tensor]] = []

    def gather(found: list[torch.Tensor]) -> list[list[torch.Tensor]]:
        own.append(found)
        return [found * 2] * 2 if by_batch else [found] * 2

    monkeypatch.setattr(parallel, "_gather", gather)
    monkeypatch.setattr(Counting, "by_batch", by_batch)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        scored_in_shards(Counting(Counting.Config()), images, prompts)
    first, second = own
    if by_batch:
        assert [s.tolist() for s in first] == [[100, 101], [204]] and [s.tolist() for s in second] == [[102, 103]]
    else:
        assert first.tolist() == [100 + i for i in range(5)] and second is None


def test_two_processes_end_as_one(tmp_path: Path) -> None:
    same(tmp_path, "dpo", "dfusion", 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algo", "builder"), [("dpo", "dfusion"), ("kto", "branch"), ("nft", "vanilla"), ("draft", "vanilla")]
)
def test_any_number_of_processes_ends_as_one(algo: str, builder: str, tmp_path: Path) -> None:
    same(tmp_path, algo, builder, 2, 3)


@pytest.mark.slow
def test_torchrun_launches_it_too(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    words = [*launcher, "bench_dfusion.cli", *WORDS, "--algo=dpo", "--out=torchrun"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found, own = left(tmp_path / "torchrun")
    (tmp_path / "alone").mkdir()
    alone, lora = run(tmp_path / "alone", "dpo", "dfusion", 1)
    assert found.comparable() == alone.comparable() and own == lora and found.cost.device == "2 × cpu"


@pytest.mark.slow
def test_a_mistake_is_said_once_and_before_others_start(tmp_path: Path) -> None:
    done = command(*WORDS, "--algo=dpq", "--processes=3", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("did you mean dpo") == 1 and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_which_any_number_resumes(tmp_path: Path) -> None:
    (tmp_path / "calm").mkdir()
    expected, lora = run(tmp_path / "calm", "dpo", "dfusion", 1)
    words = [sys.executable, "-m", "bench_dfusion.cli", *WORDS, "--algo=dpo", "--processes=2"]
    parent = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("runs/*/*/checkpoint.safetensors")):
        assert parent.poll() is None
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(parent.pid)], capture_output=True, text=True).stdout.split()
    second = next(c for c in children if b"RANK=1\0" in Path(f"/proc/{c}/environ").read_bytes())
    os.kill(int(second), signal.SIGKILL)
    _, said = parent.communicate(timeout=60)
    assert parent.returncode not in (0, None) and "process 1 failed" in said
    assert not [c for c in children if Path(f"/proc/{c}/exe").exists()]
    assert not records.find(tmp_path / "runs")
    done = command(*WORDS, "--algo=dpo", "--processes=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record, own = left(tmp_path / "runs")
    assert record.comparable() == expected.comparable() and own == lora
