"""Does torch.compile pay? A network's calls as they are and compiled, in turns.

    python benchmarks/compiled.py [--model micro] [--set KEY=VALUE] [--batch 48] [--rounds 5] [--device cpu]

Timed are a batch's forward without gradients (a sampling step), its forward and backward (a training step), and the same
forward with D-Fusion's taps in place, whose processors Python must enter. `first` is the first compiled call, which
compiles; `breaks even` is the number of such calls after which that was worth it, none if never.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring
import torch
from torch import Tensor

from bench_dfusion.builders.dfusion.attention import AttentionHooks
from bench_dfusion.diffusion.policy import Policy
from bench_dfusion.models.loading import load_adapter
from bench_dfusion.runs import config
from bench_dfusion.runs.trainer import make_policy


def calls(policy: Policy, batch: int) -> dict[str, Callable[[], Tensor]]:
    """What is timed; each returns the prediction."""
    numbers = ("one", "two", "three", "four")
    prompts = [f"{numbers[i % 4]} red circles" for i in range(batch)]
    x = torch.randn(batch, *policy.adapter.latent_shape, generator=torch.Generator().manual_seed(0)).to(policy.device)
    step = torch.full((batch,), len(policy.schedule) // 2, device=policy.device)
    taps = AttentionHooks(policy.adapter, policy.adapter.fused_layers(), policy.adapter.map_side())

    def forward() -> Tensor:
        with torch.no_grad():
            return policy.mean(x, step, prompts)

    def train() -> Tensor:
        found = policy.mean(x, step, prompts)
        found.sum().backward()
        for p in policy.parameters.values():
            p.grad = None
        return found.detach()

    def tapped() -> Tensor:
        with torch.no_grad(), taps.recording():
            return policy.mean(x, step, prompts)

    return {"sampling step": forward, "training step": train, "step with D-Fusion's taps": tapped}


def timed(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.perf_counter()
    found = call()
    if found.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="micro", help="of the run: micro, a pipeline's directory or a Hub id")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of bench-dfusion run")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    settings = [] if args.model == "micro" else [f"track.model.id={args.model}", "track.model.sha256=null"]
    track = config.resolve(
        track_source="micro",
        algo="dpo",
        builder="vanilla",
        reward="jpeg-compressibility",
        settings=[*settings, *args.set],
    ).track
    device = torch.device(args.device)
    policies = []
    for _ in range(2):
        adapter, _ = load_adapter(track.model, device, track.memory)
        policies.append(make_policy(track, adapter, 0, device))
    plain, compiled = (calls(policy, args.batch) for policy in policies)
    policies[1].adapter.network.compile()
    result: dict[str, Any] = {}
    for name in plain:
        timed(plain[name])
        first, found = timed(compiled[name])
        timed(compiled[name])
        difference = float((found - plain[name]()).abs().max())
        times = [(timed(plain[name])[0], timed(compiled[name])[0]) for _ in range(args.rounds)]
        saved = sorted(a - b for a, b in times)[args.rounds // 2]
        result[name] = {
            "as it is": measuring.spread([a for a, _ in times]),
            "compiled": measuring.spread([b for _, b in times]),
            "faster": measuring.spread([a / b for a, b in times]),
            "first": round(first, 1),
            "breaks even": round(first / saved) if saved > 0 else None,
            "largest difference": difference,
        }
        print(name, result[name], flush=True)
        measuring.write("compiled", {"model": args.model, "batch": args.batch, "calls": result}, args.out)


if __name__ == "__main__":
    main()
