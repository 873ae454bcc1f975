"""Pairs of one start noise: what branches before the first step, with one new ending.

A drawn sample's partner starts from the very same noise and takes its step noise from a seed of its own, derived
from the sample's. The higher reward of the two wins. Which samples get a partner does not depend on their reward: both
are draws of one distribution, and their order owes nothing to regression to the mean.
D3PO's sampling script gives every image of a prompt one start noise; here each pair has its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field

from bench_dfusion.builders.branch import best_against_worst, check_branching, parents
from bench_dfusion.builders.contract import Builder, BuilderConfig, ConsistentSamples, PairConfig, Samples, Score
from bench_dfusion.diffusion.policy import Policy
from bench_dfusion.util.seeds import seed_of


class SameNoiseConfig(PairConfig):
    every: int = Field(
        1,
        ge=1,
        description="of the drawn samples, in their order, each so many-th gets a partner (count; ours: all. A round costs "
        "1 + 1 / every reward queries for each drawn sample)",
    )


class SameNoise(Builder):
    name = "same-noise"
    summary = "winner and loser from one start noise, ordered by reward"
    paper = "Yang et al. 2023 (D3PO), the official sampling script"
    Config: ClassVar[type[BuilderConfig]] = SameNoiseConfig
    config: SameNoiseConfig

    def queries(self, drawn: int) -> int:
        return drawn + len(parents(drawn, self.config.every))

    def check(self, policy: Policy, prompts: Sequence[str]) -> None:
        check_branching(policy, 0, "at the start noise")

    def build(self, policy: Policy, drawn: Samples, score: Score) -> ConsistentSamples:
        rows = parents(len(drawn), self.config.every)
        seeds = [[seed_of("same-noise", seed)] for seed in drawn.trajectory.seeds[rows].tolist()]
        return best_against_worst(policy, drawn, score, rows, 0, torch.tensor(seeds), self.config.margin)
