"""GARDO: a KL where the reward is doubted alone, a reference that follows the policy, more advantage for what is new.

He et al. 2025 (2512.24138), around grpo or nft. The reward is doubted where a picture beats more of the round's others by
it than by auxiliary rewards, which are those of weight 0 in the sum: `--reward clip:1,aesthetic:0,hpsv2:0`.
Their code ranks the other way round and so gates the opposite samples; here as in the paper. Taken from their code: the
bounds of the share, and that the mean doubt of the doubted pictures moves it (over all pictures the mean is always 0).
"""

from __future__ import annotations

import math
from collections import deque
from contextlib import AbstractContextManager
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from bench_dfusion.algorithm import AlgorithmConfig
from bench_dfusion.builders.contract import Components, ConsistentSamples
from bench_dfusion.diffusion.policy import Policy
from bench_dfusion.objectives.advantages import prompt_groups
from bench_dfusion.rewards.contract import Reward, embedded
from bench_dfusion.rewards.sums import WeightedSum

REMEMBERED = 20  # rounds whose mean doubt is compared with
FACTOR = 0.1  # by which the share of gated samples grows or shrinks
BOUNDS = (0.02, 0.2)  # of that share (official code)


class GardoConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    share: float = Field(
        0.1,
        ge=0,
        le=1,
        description="share of a round's samples that the KL holds, at first; from 0.02 to 0.2 it then grows or shrinks by a "
        "tenth where the mean doubt leaves the range of the last 20 rounds (1; paper: 0.1); 0: no KL",
    )
    reset_kl: float | None = Field(
        1e-4,
        gt=0,
        description="the reference becomes the policy where their mean KL (nft: squared distance of predictions) at a round's "
        "start is above this (nats per number of the latent; paper: 1e-4); None: never for that",
    )
    reset_updates: int | None = Field(
        100, ge=1, description="and after so many updates (count; paper: 100); None: never for that"
    )
    diversity: Literal["least", "relative", "none"] = Field(
        "least",
        description="what positive advantages are multiplied by: the least distance, 1 − cosine, to another picture of the "
        "prompt, by the embedding of the first reward of the sum that has one (paper); the same over its mean in the prompt, "
        "which keeps their scale (official code); or nothing",
    )


class GardoOption(AlgorithmConfig):
    """Of the algorithms that take it; theirs has `kl`, the weight of their KL."""

    gardo: GardoConfig | None = Field(
        None,
        exclude_if=lambda value: value is None,  # cells of before this option keep their hash
        description="GARDO (2512.24138), with auxiliary rewards of weight 0 in the sum (--reward clip:1,aesthetic:0): "
        "gardo.share (0.1), .reset_kl (1e-4), .reset_updates (100), .diversity (least, relative, none); None: without",
    )

    @property
    def needs_components(self) -> bool:
        return self.gardo is not None or super().needs_components

    @property
    def needs_auxiliary(self) -> bool:
        return self.gardo is not None

    @property
    def needs_embedding(self) -> bool:
        return self.gardo is not None and self.gardo.diversity != "none"

    @model_validator(mode="after")
    def _with_a_kl(self) -> GardoOption:
        if self.gardo is not None and not getattr(self, "kl", 0):
            raise ValueError("gardo holds some samples by the KL: set kl too")
        return self


class Gardo:
    """What an algorithm keeps between rounds for GARDO."""

    def __init__(self, config: GardoConfig):
        self.config, self.share, self.updates = config, config.share, 0
        self._doubts: deque[float] = deque(maxlen=REMEMBERED)
        self._reference: dict[str, Tensor] | None = None  # the base until the first reset
        self._embed: Reward | None = None

    def setup(self, reward: Reward) -> None:
        """Take the sum's first reward that embeds pictures."""
        parts = reward.components.values() if isinstance(reward, WeightedSum) else ()
        self._embed = next((part for part in parts if hasattr(part, "embed")), None)

    def gate(self, samples: ConsistentSamples) -> Tensor:
        """Which of `samples.train` [M] the KL holds; the share moves with what was seen."""
        components = samples.samples.components
        assert components is not None
        doubts = doubt(samples.samples.rewards[samples.train], auxiliary(components)[samples.train])
        self._follow(doubts)
        held = torch.zeros(len(doubts), dtype=torch.bool)
        most = doubts.argsort(descending=True, stable=True)[: math.ceil(self.share * len(doubts))]
        held[most] = doubts[most] > 0
        return held

    def _follow(self, doubts: Tensor) -> None:
        if not (doubts > 0).any():
            return
        mean = float(doubts[doubts > 0].mean())
        if self._doubts and mean > max(self._doubts):
            self.share *= 1 + FACTOR
        elif self._doubts and mean < min(self._doubts):
            self.share *= 1 - FACTOR
        if self.config.share:
            low, high = BOUNDS
            self.share = min(max(self.share, min(low, self.config.share)), max(high, self.config.share))
        self._doubts.append(mean)

    def advantages(self, advantages: Tensor, samples: ConsistentSamples) -> Tensor:
        """Advantages [M] of `samples.train`, the positive ones weighted by how new a picture is."""
        if self.config.diversity == "none" or self._embed is None or not len(advantages):
            return advantages
        with self._embed.scoring():
            vectors = embedded(self._embed, samples.samples.images[samples.train])
        groups = prompt_groups(samples.samples, samples.train)
        weights = novelty(vectors, groups, self.config.diversity == "relative")
        return torch.where(advantages > 0, advantages * weights, advantages)

    def reference(self, policy: Policy) -> AbstractContextManager[None]:
        """Inside, the policy is the reference."""
        return policy.reference() if self._reference is None else policy.holding(self._reference)

    def resets(self, policy: Policy, distance: float) -> bool:
        """Whether the reference has become the policy, which is `distance` from it, at a round's start."""
        config = self.config
        far = config.reset_kl is not None and distance > config.reset_kl
        old = config.reset_updates is not None and self.updates >= config.reset_updates
        if far or old:
            self._reference, self.updates = policy.weights(), 0
        return far or old

    def state(self) -> dict[str, Tensor]:
        found = {
            "gardo.share": torch.tensor(self.share, dtype=torch.float64),
            "gardo.updates": torch.tensor(self.updates),
            "gardo.doubts": torch.tensor(list(self._doubts), dtype=torch.float64),
        }
        return found | {f"gardo.reference.{name}": value for name, value in (self._reference or {}).items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.share, self.updates = float(state["gardo.share"]), int(state["gardo.updates"])
        self._doubts = deque(state["gardo.doubts"].tolist(), maxlen=REMEMBERED)
        prefix = "gardo.reference."
        self._reference = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)} or None


def auxiliary(components: Components) -> Tensor:
    """The scores [B, rewards] of the rewards of weight 0."""
    columns = [i for i, weight in enumerate(components.weights.values()) if weight == 0]
    return components.scores[:, columns]


def beaten(scores: Tensor) -> Tensor:
    """For each of scores [M] the share of those that are no nan that it is above, float64 [M]."""
    return (scores[:, None] > scores).double().sum(1) / (~scores.isnan()).sum().clamp(min=1)


def doubt(rewards: Tensor, others: Tensor) -> Tensor:
    """U of each sample [M]: the share it beats by its reward [M] less the mean share by other rewards [M, rewards], of
    those that apply (others are nan); 0 where none does."""
    shares = torch.stack([beaten(column) for column in others.T], 1)
    applies = ~others.isnan()
    mean = (shares * applies).sum(1) / applies.sum(1).clamp(min=1)
    return torch.where(applies.any(1), beaten(rewards) - mean, 0.0)


def novelty(vectors: Tensor, groups: Tensor, relative: bool) -> Tensor:
    """The least 1 - cosine of each of embeddings [M, D] to another of its group [M]; 1 where it is alone. `relative`: over
    the group's mean, and 1 where that is 0."""
    unit = torch.nn.functional.normalize(vectors.double(), dim=1)
    found = torch.ones(len(vectors), dtype=torch.float64)
    for group in groups.unique():
        own = (groups == group).nonzero()[:, 0]
        if len(own) > 1:
            apart = (1 - unit[own] @ unit[own].T).clamp(min=0).fill_diagonal_(math.inf)
            least = apart.min(1).values
            if relative:
                least = least / least.mean() if least.mean() > 0 else torch.ones_like(least)
            found[own] = least
    return found.float()
