"""Consistent samples: what a builder hands to an algorithm, and the builder's own contract."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from torch import Tensor

from bench_dfusion.diffusion.policy import Policy, Trajectory
from bench_dfusion.tracks.schema import PromptsSection

Score = Callable[[Tensor, Sequence[str]], Tensor]  # (images uint8 [B, H, W, 3], prompts) -> float32 [B]


def _share(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= value[0] < value[1] <= 1:
        raise ValueError(f"a share is [from, to) with 0 <= from < to <= 1, not {list(value)}")
    return value


Share = Annotated[tuple[float, float], AfterValidator(_share)]


@dataclass
class Components:
    """What each reward of a weighted sum says of B samples.

    weights  its weight in the sum, by name, in the order of the columns
    scores   float32 [B, rewards], each in its own unit; nan where one does not apply
    """

    weights: dict[str, float]
    scores: Tensor


@dataclass
class Samples:
    """Scored samples: their trajectories, pictures uint8 [B, H, W, 3] and training rewards float32 [B].

    components   where the training reward is a weighted sum; the loop adds them to what a builder returns
    """

    trajectory: Trajectory
    images: Tensor
    rewards: Tensor
    components: Components | None = None

    def __len__(self) -> int:
        return len(self.trajectory)

    @property
    def prompts(self) -> list[str]:
        return self.trajectory.prompts

    @staticmethod
    def cat(parts: Sequence[Samples]) -> Samples:
        return Samples(
            Trajectory.cat([p.trajectory for p in parts]),
            torch.cat([p.images for p in parts]),
            torch.cat([p.rewards for p in parts]),
        )


@dataclass
class ConsistentSamples:
    """What a builder returns for one round.

    samples   every sample of the round: those drawn first, then what the builder made, in the order it had them scored
    drawn     how many were drawn from the plain policy; the log-probs of the others are behaviour log-probs
    pairs     int64 [P, 2]: (winner, loser) rows of `samples`, of one prompt each
    train     int64 [M]: the rows that algorithms without pairs train on
    triples   int64 [K, 3]: (reference, base, target or winner) rows, for pictures
    masks     float32 [K, side, side]: the mean of the mask over the steps for each triple, empty without fusion
    dropped   pairs dropped because the winner did not score above the loser by the margin
    """

    samples: Samples
    drawn: int
    pairs: Tensor
    train: Tensor
    triples: Tensor
    masks: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 0))
    dropped: int = 0


class BuilderConfig(BaseModel):
    """Options every builder has."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PairConfig(BuilderConfig):
    """Options of the builders whose winner must score above its loser."""

    margin: float = Field(
        0.0,
        ge=0,
        description="a pair is kept if winner − loser exceeds this: at 0 ties are dropped (reward units; D-Fusion's code "
        "drops none)",
    )


class Builder(ABC):
    """Makes consistent samples from the drawn ones. Registered under `bench_dfusion.builders`."""

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    Config: ClassVar[type[BuilderConfig]] = BuilderConfig
    draws: ClassVar[bool] = True  # whether samples are drawn and scored for it

    def __init__(self, config: BuilderConfig):
        self.config = config

    @classmethod
    def pinned(cls, config: BuilderConfig, prompts: PromptsSection) -> BuilderConfig:
        """The config with what it names outside (a dataset, a file) fixed by its content or a hash. Raises ValueError
        where that cannot be used with the track's prompts."""
        return config

    @abstractmethod
    def queries(self, drawn: int) -> int:
        """The reward queries of a round that draws `drawn` samples, theirs included."""

    def offline(self, policy: Policy, seed: int, number: int, drawn: int) -> ConsistentSamples:
        """Round `number` of a builder that does not draw, as large as one that draws `drawn`; in the place of `build`."""
        raise NotImplementedError(f"{self.name} builds from drawn samples")

    @abstractmethod
    def build(self, policy: Policy, drawn: Samples, score: Score) -> ConsistentSamples: ...

    def trained_on(self, prompts: PromptsSection) -> Sequence[str]:
        """The prompts of the samples that it makes on a track."""
        return prompts.train

    def check(self, policy: Policy, prompts: Sequence[str]) -> None:
        """Raise ValueError, before any compute, if this builder cannot work with the policy or a prompt."""


def rank_by_prompt(samples: Samples) -> dict[str, list[int]]:
    """For each prompt the rows of its samples, best reward first (ties by row, so that it is repeatable)."""
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(samples.prompts):
        rows.setdefault(prompt, []).append(row)
    rewards = samples.rewards.tolist()
    return {prompt: sorted(own, key=lambda r: (-rewards[r], r)) for prompt, own in rows.items()}


def references_and_bases(samples: Samples) -> tuple[Tensor, Tensor]:
    """Rows (references, bases), both [M], paired by rank (Hu et al. 2025, §4).

    Of each prompt's N samples the top quarter are references, each serving two bases: reference i those
    at ranks 2i and 2i + 1 of the bottom half. Raises ValueError if N is not a multiple of 4.
    """
    references, bases = [], []
    for prompt, rows in rank_by_prompt(samples).items():
        n = len(rows)
        if n % 4:
            raise ValueError(f"D-Fusion needs a multiple of 4 samples of each prompt, not {n} (prompt {prompt!r})")
        for i, base in enumerate(rows[n // 2 :]):
            references.append(rows[i // 2])
            bases.append(base)
    return torch.tensor(references), torch.tensor(bases)


def winning_pairs(samples: Samples, winners: Tensor, losers: Tensor, margin: float) -> tuple[Tensor, int]:
    """Pairs [P, 2] whose winner scores above its loser by more than `margin`, and how many were dropped."""
    keep = samples.rewards[winners] - samples.rewards[losers] > margin
    return torch.stack([winners, losers], 1)[keep], int((~keep).sum())
