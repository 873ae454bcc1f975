"""What stands in for a reward, a whole schedule and pictures while a run is traced."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench_dfusion.diffusion.policy import Policy
from bench_dfusion.rewards.contract import Reward, RewardConfig


class StandIn(Reward):
    """The reward of a trace: later pictures score higher, so that every pair is kept; what it does is not counted."""

    name, summary, paper, unit = "stand-in", "none", "none", "1"
    differentiable = True

    def __init__(self) -> None:
        super().__init__(RewardConfig())
        self._scored = 0

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        first, self._scored = self._scored, self._scored + len(images)
        return torch.arange(first, self._scored, dtype=torch.float32)

    def score_tensors(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.flatten(1).mean(1)

    def fingerprint(self) -> str:
        return "none"


class StandInAfter(StandIn):
    """Scores above all of the first samples."""

    def __init__(self, first: int):
        super().__init__()
        self._scored = first


def shortened(policy: Policy, steps: int) -> Policy:
    """The same policy with fewer steps of its schedule."""
    short, total = copy.copy(policy), len(policy.schedule)
    keep = torch.linspace(0, total - 1, min(steps, total)).round().long()
    fields = {f.name: getattr(policy.schedule, f.name) for f in dataclasses.fields(policy.schedule)}
    kept: dict[str, Any] = {n: v[keep] for n, v in fields.items() if isinstance(v, Tensor) and v.shape[:1] == (total,)}
    short.schedule = dataclasses.replace(policy.schedule, **kept)
    return short


def without_decoding(policy: Policy) -> Policy:
    """The same policy that makes no pictures: decoding is a phase of its own."""
    blank = copy.copy(policy)
    blank.decode = lambda latents: torch.zeros(len(latents), 1, 1, 3, dtype=torch.uint8)  # type: ignore[method-assign]
    return blank
