"""python spread.py FOLDER OUT whole|shard|offload: a policy's samples, log-probs and gradients, as tests/test_sharding.py wants
them; in each of several processes with RANK and WORLD_SIZE set. Every process makes all of them itself."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from tiny import policy_of

from bench_dfusion.tracks.schema import MemorySection
from bench_dfusion.util import parallel

PROMPTS = ["a cat on a mat", "two dogs"] * 2


def main(folder: Path, out: Path, how: str) -> None:
    parallel.join("cpu")
    memory = MemorySection(shard=how == "shard", offload_network=how == "offload", gradient_checkpointing=True)
    policy = policy_of(folder, guidance=3.0, memory=memory, resolution=32 if "flux" in folder.name else None)
    held = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in policy.adapter.network.parameters())
    parallel.size = lambda: 1  # nothing is dealt out
    drawn = policy.sample(PROMPTS, torch.arange(4))
    for step in (0, 1):
        steps = torch.full((4,), step)
        value = policy.log_prob(drawn.latents[:, step], drawn.latents[:, step + 1], steps, PROMPTS)
        with policy.reference():
            frozen = policy.log_prob(drawn.latents[:, step], drawn.latents[:, step + 1], steps, PROMPTS)
        (value * torch.arange(1.0, 5)).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters.values() if p.grad is not None])
    found = {"latents": drawn.latents, "value": value.detach(), "frozen": frozen, "gradient": gradient}
    torch.save({**found, "held": held, "trained": sum(p.numel() for p in policy.parameters.values())}, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2] + os.environ.get("RANK", "")), sys.argv[3])
