"""Advantages: how much better a sample is than the others of its prompt, in the same round or the last ones."""

from __future__ import annotations

from collections import deque
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from bench_dfusion.algorithm import AlgorithmConfig
from bench_dfusion.builders.contract import Samples
from bench_dfusion.objectives.denoising import LevelsConfig

EPSILON = 1e-4  # added to the spread (Flow-GRPO's code)

Spread = Literal["prompt", "round", "rank"]
SPREADS = (
    "what divides reward − prompt's mean: prompt: the standard deviation of the prompt's rewards, round: of the round's, "
    "both over N; rank: of the prompt's win rates, which take the rewards' place: the share of the prompt's other samples "
    "that one beats, ties counting half (Pref-GRPO, 2508.20751)"
)


class ComponentsConfig(AlgorithmConfig):
    """Options of the algorithms whose advantages compare a prompt's samples."""

    components: Literal["sum", "each"] = Field(
        "sum",
        exclude_if=lambda value: value == "sum",  # cells of before this option keep their hash
        description="with a weighted sum of rewards: sum: the advantage of the sum; each (GDPO, 2601.05242): the weighted "
        "sum of each reward's own advantage, divided by its standard deviation over all the round's samples, so that no "
        "reward drowns another by its scale; standard deviations are then over N − 1 (as in TRL)",
    )

    @property
    def needs_components(self) -> bool:
        return self.components == "each"


class AdvantageConfig(ComponentsConfig, LevelsConfig):
    """Options of the algorithms that weigh noised final latents by their advantage."""

    advantage_clip: float = Field(
        5.0, gt=0, description="advantages are clipped to ± this, in spreads (count; Flow-GRPO's code and after it: 5)"
    )
    spread: Spread = Field("prompt", description=f"{SPREADS} (Flow-GRPO's code has the first two)")


def prompt_groups(samples: Samples, rows: Tensor) -> Tensor:
    """For each of sample rows [M] the number of its prompt, counted in order of appearance, int64 [M]."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(samples.prompts[i], len(numbers)) for i in rows.tolist()]).long()


def advantages(
    samples: Samples, rows: Tensor, clip: float, spread: Spread = "prompt", components: str = "sum"
) -> Tensor:
    """(reward − mean of the prompt's) / (spread + 1e-4) of sample rows [M], clipped; exactly 0 where all are alike.

    With `rank` the same of the prompt's win rates: so it is one for all rewards of one order. With the components `each`
    the sum over rewards of weight · this, divided by its own standard deviation + 1e-4 over all rows; a sample to which a
    reward does not apply counts 0 for it.
    """
    groups = prompt_groups(samples, rows)
    if components == "sum":
        return _in_spreads(samples.rewards[rows], groups, spread, 0).float().clamp(-clip, clip)
    if samples.components is None:
        raise ValueError("these samples hold no score of each reward of a sum")
    total = torch.zeros(len(rows)).double()
    for weight, scores in zip(samples.components.weights.values(), samples.components.scores[rows].T, strict=True):
        applies = ~scores.isnan()
        total[applies] += weight * _in_spreads(scores[applies], groups[applies], spread, 1)
    if len(rows) > 1:
        total /= total.std() + EPSILON  # its mean is 0 in every prompt
    return total.float().clamp(-clip, clip)


def _in_spreads(rewards: Tensor, groups: Tensor, spread: Spread, correction: int) -> Tensor:
    """Rewards [M] less the mean of their group, in spreads, float64 [M]; 0 in a group of one."""
    rewards = rewards.double()  # in which the mean of equal float32 numbers is exactly that number
    result = torch.zeros_like(rewards)
    for group in groups.unique():
        own = rewards[groups == group]
        if len(own) > correction:
            own = win_rates(own) if spread == "rank" else own
            std = (rewards if spread == "round" else own).std(correction=correction)
            result[groups == group] = (own - own.mean()) / (std + EPSILON)
    return result


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
