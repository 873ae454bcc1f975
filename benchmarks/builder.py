"""D-Fusion's builder against the plain order of the official code: trajectories, time, and the same targets.

    python benchmarks/builder.py [--prompts 6] [--samples 16] [--rounds 3]

The plain order makes three passes for the bases of a batch: the references once more from their noise, with keys,
values and masks kept; the bases once more; then the targets with what was kept. That is 2.5 trajectories for a base
(a reference serves two). Ours reads references and bases off what was stored when they were drawn, and denoises a
reference beside its two targets: 1.5. Both run in the same batches of the embedded model, in turns in one process.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import measuring
import torch
from torch import Tensor

from bench_dfusion.builders.contract import Samples, references_and_bases
from bench_dfusion.builders.dfusion.attention import AttentionHooks
from bench_dfusion.builders.dfusion.builder import DFusion, DFusionConfig
from bench_dfusion.diffusion import samplers
from bench_dfusion.diffusion.policy import Policy, Trajectory
from bench_dfusion.models.loading import load_adapter
from bench_dfusion.runs.trainer import make_policy
from bench_dfusion.tracks import schema
from bench_dfusion.tracks.schema import Track
from bench_dfusion.util.seeds import seed_of


@torch.no_grad()
def plain_order(policy: Policy, builder: DFusion, drawn: Trajectory, references: Tensor, bases: Tensor) -> Tensor:
    """The targets' latents [M, T + 1, ...], three passes after one another for each batch."""
    order, parts = references.argsort(stable=True), []
    for rows in order.split(policy.batch):
        parts.append(_plain(policy, builder, drawn, references[rows], bases[rows]))
    return torch.cat(parts)[order.argsort()]


def _plain(policy: Policy, builder: DFusion, drawn: Trajectory, references: Tensor, bases: Tensor) -> Tensor:
    taps: AttentionHooks = builder._taps(policy)
    unique, which = references.unique(return_inverse=True)
    fused = range(*(round(share * len(policy.schedule)) for share in builder.config.steps))
    tokens = [builder._tokens(policy, drawn.prompts[i]) for i in unique.tolist()]
    kept = {}

    def noise_of(rows: Tensor) -> Tensor:
        return samplers.sample_noise(drawn.seeds[rows], len(policy.schedule), tuple(drawn.latents.shape[2:]))

    def reference_mean(i: int, x_t: Tensor, step: Tensor) -> Tensor:
        prompts = [drawn.prompts[j] for j in unique.tolist()]
        if i not in fused:
            return policy.mean(x_t, step, prompts)
        with taps.recording():
            mean = policy.mean(x_t, step, prompts)
        both = torch.cat([which + b * len(unique) for b in range(policy.branches)])
        mask = builder.mask(taps.maps[-len(unique) :], tokens, ["otsu"] * len(unique))[which].repeat(policy.branches, 1)
        kept[i] = {name: (k[both], v[both]) for name, (k, v) in taps.keys_values.items()}, mask
        return mean

    def target_mean(i: int, x_t: Tensor, step: Tensor) -> Tensor:
        prompts = [drawn.prompts[j] for j in bases.tolist()]
        if i not in fused:
            return policy.mean(x_t, step, prompts)
        with taps.fusing(*kept[i]):
            return policy.mean(x_t, step, prompts)

    noise = noise_of(unique)
    policy.denoise(noise[:, 0], noise[:, 1:], [drawn.prompts[i] for i in unique.tolist()], reference_mean)
    prompts, noise = [drawn.prompts[i] for i in bases.tolist()], noise_of(bases)
    policy.denoise(noise[:, 0], noise[:, 1:], prompts)
    return policy.denoise(noise[:, 0], noise[:, 1:], prompts, target_mean)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    settings = Track.model_validate(schema.read("micro"))
    policy = make_policy(settings, load_adapter(settings.model)[0], 0, torch.device("cpu"))
    builder = DFusion(DFusionConfig(**settings.builders["dfusion"]))
    prompts = [p for p in settings.prompts.train[: args.prompts] for _ in range(args.samples)]
    drawn = policy.sample(prompts, torch.tensor([seed_of("builder", i) for i in range(len(prompts))]))
    rewards = torch.rand(len(prompts), generator=torch.Generator().manual_seed(0))
    references, bases = references_and_bases(Samples(drawn, torch.zeros(len(prompts), 1), rewards))
    steps, ratios, counts, apart = len(policy.schedule), [], {}, 0.0
    for number in range(args.rounds):
        seconds, found = {}, {}
        for name in ("ours", "plain") if number % 2 else ("plain", "ours"):
            before, start = policy.network_evaluations, time.perf_counter()
            if name == "ours":
                found[name] = builder.targets(policy, drawn, references, bases)[0].latents
            else:
                found[name] = plain_order(policy, builder, drawn, references, bases)
            seconds[name] = time.perf_counter() - start
            counts[name] = (policy.network_evaluations - before) / policy.branches / steps / len(bases)
        ratios.append(seconds["plain"] / seconds["ours"])
        apart = max(apart, float((found["ours"] - found["plain"]).abs().max() / found["plain"].abs().max()))
        print({k: round(v, 2) for k, v in seconds.items()}, round(ratios[-1], 3), flush=True)
    result = {
        "bases": len(bases),
        "trajectories for a base": counts,
        "times faster than the plain order": measuring.spread(ratios),
        "largest difference of the targets": apart,
    }
    measuring.write("builder", result, args.out)


if __name__ == "__main__":
    main()
