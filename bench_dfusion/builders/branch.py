"""Branches: new endings of drawn trajectories from one shared latent, and the best of each against the worst.

After B2-DiffuRL (Hu et al., CVPR 2025), whose pairs differ by what the policy did after the branch point alone.
As there: endings share the latents and log-probs before the branch point, each goes on with noise of its own, and
the best-scored of a branch point meets the worst. The parent is one of its endings, so no query is spent on a
prefix alone.

Not as there:
- The branch point stays where `at` puts it. The paper's other half, backward progressive training, moves it from
  late to early while training goes on; a builder does not know the round.
- A pair is kept by `margin` on the training reward. The official code keeps best and worst each by its own
  threshold on rewards standardised over a prompt's history (0.5 in its run script).
- The official code trains on the steps after the branch point only. Which steps train is the algorithm's option:
  `algo.window = [at, 1]` does the same. On the shared steps a pair's two log-ratios are equal, so preference losses
  have no gradient there; policy gradients have one, of the mean advantage of the endings.
- There every trajectory branches; here each `every`-th one, whatever its reward.

A branch's seed is derived from its parent's, and step i takes the i-th step noise of that seed: a branch depends on
its parent and its own number, not on the batch. Its log-probs are the plain policy's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from bench_dfusion.builders.contract import (
    Builder,
    BuilderConfig,
    ConsistentSamples,
    PairConfig,
    Samples,
    Score,
    winning_pairs,
)
from bench_dfusion.diffusion import samplers
from bench_dfusion.diffusion.policy import Policy, Trajectory
from bench_dfusion.util import parallel
from bench_dfusion.util.seeds import seed_of


class BranchConfig(PairConfig):
    at: float = Field(
        0.3,
        ge=0,
        lt=1,
        description="where trajectories branch, as a share of the steps in sampling order, 0 the start noise, rounded "
        "to a step (official: .3 at first, to 0 over the training)",
    )
    branches: int = Field(
        2,
        ge=1,
        description="new endings of a trajectory that branches, beside its own (count; official: 3 endings with its "
        "own by default, 5 in the run script)",
    )
    every: int = Field(
        2,
        ge=1,
        description="of the drawn samples, in their order, each so many-th branches (count; official: all. A round costs "
        "1 + branches / every reward queries for each drawn sample; 2 by default)",
    )


class Branch(Builder):
    name = "branch"
    summary = "endings of one trajectory from a shared latent: the best wins over the worst"
    paper = "Hu et al. 2025 (B2-DiffuRL, CVPR), branch-based sampling"
    Config: ClassVar[type[BuilderConfig]] = BranchConfig
    config: BranchConfig

    def queries(self, drawn: int) -> int:
        return drawn + len(parents(drawn, self.config.every)) * self.config.branches

    def check(self, policy: Policy, prompts: Sequence[str]) -> None:
        check_branching(policy, self._step(policy), f"at {self.config.at}")

    def build(self, policy: Policy, drawn: Samples, score: Score) -> ConsistentSamples:
        rows = parents(len(drawn), self.config.every)
        seeds = [
            [seed_of("branch", seed, k) for k in range(self.config.branches)]
            for seed in drawn.trajectory.seeds[rows].tolist()
        ]
        return best_against_worst(
            policy, drawn, score, rows, self._step(policy), torch.tensor(seeds), self.config.margin
        )

    def _step(self, policy: Policy) -> int:
        return round(self.config.at * len(policy.schedule))


def parents(drawn: int, every: int) -> Tensor:
    """The drawn rows that branch [P]."""
    return torch.arange(0, drawn, every)


def check_branching(policy: Policy, step: int, where: str) -> None:
    """Raise ValueError if nothing random comes after the branch point: all endings would be one."""
    if not policy.schedule.stochastic[step:].any():
        raise ValueError(f"no stochastic step is left to branch {where}, step {step} of {len(policy.schedule)}")


@torch.no_grad()
def endings(policy: Policy, drawn: Trajectory, rows: Tensor, step: int, seeds: Tensor) -> Trajectory:
    """Trajectories of `rows` [M] up to the latent before step number `step`, denoised on with the noise of `seeds` [M]."""

    def end(part: tuple[Tensor, Tensor]) -> Trajectory:
        own, new = part
        parent = drawn[own]
        noise = samplers.sample_noise(new, len(policy.schedule), tuple(parent.latents.shape[2:]))[:, 1 + step :]
        shared = parent.latents[:, step].to(policy.device)
        latents, log_probs = policy.denoise(shared, noise.to(policy.device), parent.prompts)
        return Trajectory(
            torch.cat([parent.latents[:, :step], latents.cpu()], 1),
            torch.cat([parent.log_probs[:, :step], log_probs.cpu()], 1),
            new.clone(),
            parent.prompts,
        )

    parts = zip(rows.split(policy.batch), seeds.split(policy.batch), strict=True)
    return Trajectory.cat(parallel.each(end, list(parts)))


def best_against_worst(
    policy: Policy, drawn: Samples, score: Score, rows: Tensor, step: int, seeds: Tensor, margin: float
) -> ConsistentSamples:
    """New endings of drawn `rows` [P] with `seeds` [P, K], and of each row's K + 1 endings best ≻ worst.

    Of equal rewards the earliest is best and the latest worst. Rows to train on are all endings, and a triple is
    (best, worst, best): there is no reference beside them.
    """
    count, each = seeds.shape
    trajectory = endings(policy, drawn.trajectory, rows.repeat_interleave(each), step, seeds.flatten())
    images = policy.decode(trajectory.final)
    samples = Samples.cat([drawn, Samples(trajectory, images, score(images, trajectory.prompts))])
    new = len(drawn) + torch.arange(count * each).view(count, each)
    group = torch.cat([rows[:, None], new], 1)  # [P, K + 1] rows of the endings, the parent's first
    rewards = samples.rewards[group]
    best = group.gather(1, rewards.argmax(1, keepdim=True))[:, 0]
    worst = group.flip(1).gather(1, rewards.flip(1).argmin(1, keepdim=True))[:, 0]
    pairs, dropped = winning_pairs(samples, best, worst, margin)
    return ConsistentSamples(
        samples,
        drawn=len(drawn),
        pairs=pairs,
        train=group.flatten(),
        triples=torch.stack([best, worst, best], 1),
        dropped=dropped,
    )
