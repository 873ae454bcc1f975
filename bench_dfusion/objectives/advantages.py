"""Advantages: how much better a sample is than the others of its prompt, in the same round or the last ones."""

from __future__ import annotations

from collections import deque
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from bench_dfusion.consistent import Samples
from bench_dfusion.objectives.denoising import LevelsConfig

EPSILON = 1e-4  # added to the spread (Flow-GRPO's code)

Spread = Literal["prompt", "round", "rank"]
SPREADS = (
    "what divides reward − prompt's mean: prompt: the standard deviation of the prompt's rewards, round: of the round's, "
    "both over N; rank: of the prompt's win rates, which take the rewards' place: the share of the prompt's other samples "
    "that one beats, ties counting half (Pref-GRPO, 2508.20751)"
)


class AdvantageConfig(LevelsConfig):
    """Options of the algorithms that weigh noised final latents by their advantage."""

    advantage_clip: float = Field(
        5.0, gt=0, description="advantages are clipped to ± this, in spreads (count; Flow-GRPO's code and after it: 5)"
    )
    spread: Spread = Field("prompt", description=f"{SPREADS} (Flow-GRPO's code has the first two)")


def prompt_groups(samples: Samples, rows: Tensor) -> Tensor:
    """For each of sample rows [M] the number of its prompt, counted in order of appearance, int64 [M]."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(samples.prompts[i], len(numbers)) for i in rows.tolist()]).long()


def advantages(samples: Samples, rows: Tensor, clip: float, spread: Spread = "prompt") -> Tensor:
    """(reward − mean of the prompt's) / (spread + 1e-4) of sample rows [M], clipped; exactly 0 where all are alike.

    With `rank` the same of the prompt's win rates: so it is one for all rewards of one order.
    """
    groups = prompt_groups(samples, rows)
    rewards = samples.rewards[rows].double()  # in which the mean of equal float32 numbers is exactly that number
    result = torch.zeros(len(rows))
    for group in groups.unique():
        own = rewards[groups == group]
        own = win_rates(own) if spread == "rank" else own
        std = (rewards if spread == "round" else own).std(correction=0)
        result[groups == group] = ((own - own.mean()) / (std + EPSILON)).float()
    return result.clamp(-clip, clip)


def win_rates(rewards: Tensor) -> Tensor:
    """For each of rewards [M] the share of the others that it is above, those equal counting half, float64 [M]."""
    above = (rewards[:, None] > rewards).sum(1)
    equal = (rewards[:, None] == rewards).sum(1) - 1  # itself is none of the others
    return (above + 0.5 * equal).double() / max(1, len(rewards) - 1)


class PromptAdvantages:
    """A reward less the mean of the last rewards of its prompt, over their spread (Black et al. 2023, §5).

    Below `min_count` remembered rewards the mean and spread of all the rewards given serve. Exactly 0 where all are alike.
    """

    def __init__(self, buffer: int, min_count: int, clip: float):
        self.buffer, self.min_count, self.clip = buffer, min_count, clip
        self._seen: dict[str, deque[float]] = {}

    def __call__(self, prompts: list[str], rewards: Tensor) -> Tensor:
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            self._seen.setdefault(prompt, deque(maxlen=self.buffer)).append(reward)
        result = torch.empty(len(prompts))
        for i, prompt in enumerate(prompts):
            own = torch.tensor(list(self._seen[prompt]))
            own = own if len(own) >= self.min_count else rewards
            alike = bool(own.min() == own.max())  # then their mean may differ from them by rounding, and that be learnt
            result[i] = 0.0 if alike else (rewards[i] - own.mean()) / (own.std(correction=0) + 1e-6)
        return result.clamp(-self.clip, self.clip)

    def state(self) -> dict[str, Tensor]:
        return {f"seen.{prompt}": torch.tensor(list(own)) for prompt, own in self._seen.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._seen = {key.removeprefix("seen."): deque(own.tolist(), maxlen=self.buffer) for key, own in state.items()}
