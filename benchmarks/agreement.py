"""Where is the signal? Agreement of gradients over denoising steps, LoRA layers and kinds of samples.

    python benchmarks/agreement.py --out agreement.json [--samples 24] [--guidance 1] [--steps 8]

On the train prompts of the micro world with the oracle's graded score, at the base (LoRA zero). `signal` is
the cosine between the DDPO gradients of two independent halves of the samples, step by step: how much of a
batch's gradient is not noise. `fused` is the cosine between the DPO gradient of D-Fusion's winning pairs at a
step and the DDPO gradient of the drawn samples over the first half of the steps: whether learning from fused
trajectories goes where the reward grows. Gradients are those of the LoRA's B matrices (A's are zero at the base).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from bench_dfusion.builders.contract import Samples, references_and_bases
from bench_dfusion.builders.dfusion.builder import DFusion, DFusionConfig
from bench_dfusion.diffusion.policy import Policy, Trajectory
from bench_dfusion.micro import oracle
from bench_dfusion.models.loading import load_adapter
from bench_dfusion.runs.trainer import make_policy
from bench_dfusion.tracks import schema
from bench_dfusion.tracks.schema import Track
from bench_dfusion.util.progress import bar
from bench_dfusion.util.seeds import seed_of

LAYERS = {"all attention": "", "self-attention": "attn1", "cross-attention": "attn2", "cross-attention q, k, v": "QKV"}


def step_gradient(policy: Policy, trajectory: Trajectory, rows: Tensor, step: int, weights: Tensor) -> Tensor:
    """d/dB of sum_i w_i log p(step of sample i): [number of B's entries], float64."""
    for p in policy.parameters.values():
        p.grad = None
    for part in torch.arange(len(rows)).split(policy.batch):
        r, at = rows[part], torch.full((len(part),), step)
        x_t, x_s = trajectory.latents[r, step], trajectory.latents[r, step + 1]
        log_prob = policy.log_prob(x_t, x_s, at, [trajectory.prompts[i] for i in r.tolist()])
        (log_prob * weights[part]).sum().backward()
    return torch.cat([p.grad.flatten() for n, p in policy.parameters.items() if "lora_B" in n]).double()  # type: ignore[union-attr]


def masks(policy: Policy) -> dict[str, Tensor]:
    """Which entries of the gradient belong to a choice of layers."""
    names = [n for n, p in policy.parameters.items() if "lora_B" in n for _ in range(p.numel())]
    inside = {
        "QKV": lambda n: "attn2.to_" in n and "to_out" not in n,
        "": lambda n: True,
        "attn1": lambda n: "attn1" in n,
        "attn2": lambda n: "attn2" in n,
    }
    return {layers: torch.tensor([inside[key](n) for n in names]) for layers, key in LAYERS.items()}


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()).clamp(min=1e-30))


def graded(policy: Policy, trajectory: Trajectory) -> tuple[Tensor, Tensor]:
    images = policy.decode(trajectory.final)
    return images, torch.tensor(
        [oracle.judge(i, p).graded for i, p in zip(images.numpy(), trajectory.prompts, strict=True)]
    )


def advantages(rewards: Tensor) -> Tensor:
    """Of [prompts, samples], by prompt, flat."""
    return ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)).flatten()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()
    content = schema.read("micro")
    content["lora"] = {"rank": content["lora"]["rank"]}  # on every attention layer, so that layers can be compared
    for key in ("guidance", "steps"):
        if getattr(args, key):
            content["sampler"][key] = getattr(args, key)
    settings = Track.model_validate(content)
    adapter, _ = load_adapter(settings.model)
    policy = make_policy(settings, adapter, 0, torch.device("cpu"))
    std, total, n = policy.schedule.std, len(policy.schedule), args.samples
    prompts = [p for p in settings.prompts.train for _ in range(n)]
    seeds = torch.tensor([seed_of("agreement", p, i) for p in settings.prompts.train for i in range(n)])
    with bar("draw", len(prompts)) as progress:
        drawn = policy.sample(prompts, seeds, progress.advance)
    images, rewards = graded(policy, drawn)
    samples = Samples(drawn, images, rewards)
    references, bases = references_and_bases(samples)
    fused, _ = DFusion(DFusionConfig(**settings.builders["dfusion"])).targets(policy, drawn, references, bases)
    _, target_rewards = graded(policy, fused)
    both = Trajectory.cat([drawn, fused])
    targets = torch.arange(len(bases)) + len(drawn)
    wins = target_rewards > rewards[bases]
    pairs = torch.cat([targets[wins], bases[wins]])
    sign = torch.cat([torch.ones(int(wins.sum())), -torch.ones(int(wins.sum()))])
    on_fused = advantages(torch.cat([target_rewards.view(-1, n // 2), rewards[bases].view(-1, n // 2)], 1))
    order = torch.cat([targets.view(-1, n // 2), bases.view(-1, n // 2)], 1).flatten()

    own, rows, of = advantages(rewards.view(-1, n)), torch.arange(len(drawn)), masks(policy)
    halves, made = [], []
    with bar("gradients", total) as progress:
        for step in range(total):
            halves.append([step_gradient(policy, drawn, rows[h::2], step, own[h::2]) for h in (0, 1)])
            dpo = step_gradient(policy, both, pairs, step, sign)
            made.append((dpo, step_gradient(policy, both, order, step, on_fused)))
            progress.advance()
    first_half = sum(std[s] * (halves[s][0] + halves[s][1]) for s in range(total // 2))
    result = {
        "samples": len(drawn),
        "sampler": settings.sampler.model_dump(),
        "std": std.tolist(),
        "base": float(rewards.mean()),
        "targets over bases": float((target_rewards - rewards[bases]).mean()),
        "layers": {
            name: {
                "signal": [cosine(a * m, b * m) for a, b in halves],
                "signal of windows": {
                    f"{first}-{last}": cosine(
                        *(sum(std[s] * halves[s][h] for s in range(first, last)) * m for h in (0, 1))
                    )
                    for first, last in ((0, total // 4), (0, total // 2), (0, total), (total // 2, total))
                },
                "fused, dpo pairs": [cosine(dpo * m, first_half * m) for dpo, _ in made],
                "fused, ddpo": [cosine(ddpo * m, first_half * m) for _, ddpo in made],
                "norm": [float(((a + b) * m).norm()) for a, b in halves],
                "norm, dpo pairs": [float((dpo * m).norm()) for dpo, _ in made],
            }
            for name, m in of.items()
        },
    }
    args.out.write_text(json.dumps(result, indent=1))
    print("| layers | figure | " + " | ".join(f"step {s}" for s in range(total)) + " |")
    print("|---|---|" + "---|" * total)
    for name, figures in result["layers"].items():  # type: ignore[attr-defined]
        for figure in ("signal", "fused, dpo pairs", "fused, ddpo"):
            print(f"| {name} | {figure} | " + " | ".join(f"{x:+.2f}" for x in figures[figure]) + " |")
        print(f"| {name} | signal of windows | {figures['signal of windows']} |")


if __name__ == "__main__":
    main()
