"""Weights dealt out to processes, or kept in the host's memory, give the samples and gradients of whole ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_parallel import run
from tiny import policy_of

from bench_dfusion.models import sharding
from bench_dfusion.tracks.schema import MemorySection

HERE = Path(__file__).parent


def test_offloaded_weights_give_the_same_samples(pixart_dir: Path) -> None:
    prompts, seeds = ["a red circle", "two blue rings"], torch.arange(2)
    expected = policy_of(pixart_dir).sample(prompts, seeds)
    try:
        policy = policy_of(pixart_dir, memory=MemorySection(offload_network=True))
        assert type(policy.adapter.network).__name__.startswith("FSDP")
        assert torch.equal(policy.sample(prompts, seeds).latents, expected.latents)
    finally:
        torch.distributed.destroy_process_group()


def found(folder: Path, out: Path, how: str, processes: int = 1) -> list[dict[str, Any]]:
    """What each process of tests/spread.py leaves."""
    words = [str(HERE / "spread.py"), str(folder), str(out / how), how]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*(launcher if processes > 1 else [sys.executable]), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "FSDP2-wrapped" not in done.stderr
    return [torch.load(path) for path in sorted(out.glob(f"{how}*"))]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pixart", "sd", "sdxl", "sd3", "flux"])
def test_samples_and_gradients_are_those_of_whole_weights(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(f"{name}_dir")
    (whole,) = found(folder, tmp_path, "whole")
    shards = found(folder, tmp_path, "shard", 2)
    (offloaded,) = found(folder, tmp_path, "offload")
    assert len(shards) == 2
    for other in (*shards, offloaded):
        for what in ("latents", "value", "frozen"):
            assert torch.equal(other[what], whole[what]), what
        torch.testing.assert_close(other["gradient"], whole["gradient"], rtol=1e-5, atol=1e-5)
    assert whole["gradient"].abs().max() > 0
    frozen = whole["held"] - whole["trained"]
    assert all(0 < s["held"] - s["trained"] < 0.6 * frozen for s in shards)
    assert abs(sum(s["held"] - s["trained"] for s in shards) - frozen) < 0.1 * frozen  # but for what is padded


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algo", "builder"), [("dpo", "dfusion"), ("kto", "branch"), ("nft", "vanilla"), ("draft", "vanilla")]
)
def test_a_run_ends_as_with_whole_weights(algo: str, builder: str, tmp_path: Path) -> None:
    """The track's batches are as many as the processes or not: a process without one keeps step."""
    settings = {"whole": [], "shard": ["shard"], "offload": ["offload_network"], "both": ["shard", "offload_network"]}
    ends = []
    for how, processes in (("whole", 1), ("shard", 2), ("shard", 3), ("offload", 1), ("offload", 2), ("both", 2)):
        (folder := tmp_path / f"{how}{processes}").mkdir()
        words = [f"--set=track.memory.{option}=true" for option in settings[how]]
        record, lora = run(folder, algo, builder, processes, *words)
        said = record.comparable()
        del said["given"], said["resolved"]  # they name the memory options
        ends.append((said, lora, record.cost.network_evaluations))
    for end in ends[1:]:
        assert end == ends[0]


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear names no blocks: leave memory.shard and memory.offload_network off"):
        sharding.blocks(torch.nn.Linear(1, 1))
