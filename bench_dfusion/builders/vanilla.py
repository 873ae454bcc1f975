"""Pairs by rank without fusion: the control that every table needs."""

from __future__ import annotations

from typing import ClassVar

import torch

from bench_dfusion.builders.contract import (
    Builder,
    BuilderConfig,
    ConsistentSamples,
    PairConfig,
    Samples,
    Score,
    references_and_bases,
    winning_pairs,
)
from bench_dfusion.diffusion.policy import Policy


class Vanilla(Builder):
    """No fusion: the references themselves are the winners. The control every table needs."""

    name = "vanilla"
    summary = "no fusion: the references themselves win over their bases (the control)"
    paper = "Yang et al. 2023 (D3PO's pairs by rank)"
    Config: ClassVar[type[BuilderConfig]] = PairConfig
    config: PairConfig

    def queries(self, drawn: int) -> int:
        return drawn

    def build(self, policy: Policy, drawn: Samples, score: Score) -> ConsistentSamples:
        references, bases = references_and_bases(drawn)
        pairs, dropped = winning_pairs(drawn, references, bases, self.config.margin)
        return ConsistentSamples(
            drawn,
            drawn=len(drawn),
            pairs=pairs,
            train=torch.arange(len(drawn)),
            triples=torch.stack([references, bases, references], 1),
            dropped=dropped,
        )
