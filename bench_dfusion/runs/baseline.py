"""What the base scores on the prompts that are trained on.

Rounds have different prompts, whose rewards differ by more than training moves them: a round is compared with the base on
its own prompts, never with another round. The base's pictures are drawn the first time a prompt comes up, on noise that
depends on (prompt, picture) alone; no method learns from them, so they are beside the budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from scipy import stats
from torch import Tensor

from bench_dfusion.tracks.schema import Track

SHARE = 0.05  # of the budget, in pictures, that the base is measured on
COLLAPSE = 4.0  # standard deviations of a prompt's rewards below the base
CERTAIN = 1e-6  # one-sided p-value of a fall: a policy that has not changed is never told to have collapsed


def pictures_per_prompt(track: Track, rounds: int) -> int:
    """How many of the base's pictures are scored for each prompt of a run: `SHARE` of the budget over the prompts that it
    sees, at least 1 and at most as many as a round has of a prompt. Of a track with rungs the first one's budget counts,
    wherever a run ends; `rounds` are its own (count)."""
    seen = min(len(track.prompts.train), rounds * track.budget.prompts_per_round)
    return max(1, min(track.budget.samples_per_prompt, round(SHARE * track.budget.ladder[0] / seen)))


@dataclass
class Baseline:
    """The base's rewards by prompt; all of it is in a checkpoint.

    rewards   those of the base's pictures of each prompt
    first     (sum of squares, degrees of freedom) of the first round's rewards around their prompts' means: then the
              policy was the base
    low       whether the last round lay so far below the base that a second one ends the run
    network_evaluations   forwards that drew the pictures
    """

    rewards: dict[str, list[float]] = field(default_factory=dict)
    first: tuple[float, int] = (0.0, 0)
    low: bool = False
    network_evaluations: int = 0

    @property
    def queries(self) -> int:
        """The base's pictures that were scored (count)."""
        return sum(map(len, self.rewards.values()))

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """The prompts that the base has not been measured on, each once."""
        return [p for p in dict.fromkeys(prompts) if p not in self.rewards]

    def take(self, prompts: Sequence[str], rewards: Tensor) -> None:
        """Keep the rewards [B] of the base's pictures of `prompts`."""
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            self.rewards.setdefault(prompt, []).append(reward)

    def mean(self, prompts: Sequence[str]) -> float:
        """The base's mean reward on prompts, each counted as often as it is there."""
        means = {p: sum(self.rewards[p]) / len(self.rewards[p]) for p in set(prompts)}
        return math.fsum(means[p] for p in prompts) / len(prompts)

    def collapsed(self, prompts: Sequence[str], rewards: Tensor) -> str | None:
        """The evidence that a round of drawn samples, `rewards` [B] of `prompts`, lies so far below the base that training
        has broken the policy; None where it does not, or where the round before it did not.

        Far: more than `COLLAPSE` standard deviations within a prompt, the largest of the base's, the round's and both
        together, and a t-test's p below `CERTAIN`. Simulated on unchanged policies: docs/reliability.md.
        """
        own: dict[str, list[float]] = {}
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            own.setdefault(prompt, []).append(reward)
        if not self.first[1]:
            self.first = _squares(own.values())
        here = _squares(own.values())
        base = _squares(self.rewards[p] for p in own)
        every = _squares(self.rewards.values())
        pooled = (every[0] + self.first[0], every[1] + self.first[1])
        deviation = max(math.sqrt(total / df) if df else 0.0 for total, df in (here, base, pooled))
        fall = self.mean(prompts) - float(rewards.double().mean())
        error = deviation * math.sqrt(1 / len(rewards) + 1 / sum(len(self.rewards[p]) for p in own))
        before, self.low = self.low, False
        if fall > COLLAPSE * deviation > 0:
            self.low = float(stats.t.sf(fall / error, pooled[1])) < CERTAIN
        if not (before and self.low):
            return None
        return (
            f"mean reward {float(rewards.mean()):.4f}, on the same prompts the base has {self.mean(prompts):.4f}: "
            f"{fall / deviation:.1f} standard deviations within a prompt, in two rounds after each other"
        )


def _squares(groups: Iterable[list[float]]) -> tuple[float, int]:
    """The sum of squares of values around their groups' means, and its degrees of freedom."""
    total, df = 0.0, 0
    for group in groups:
        mean = math.fsum(group) / len(group)
        total += math.fsum((value - mean) ** 2 for value in group)
        df += len(group) - 1
    return total, df
