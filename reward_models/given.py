"""No reward: the preferences came with the pairs, and nobody says which scorer made them (people, say)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bench_dfusion.rewards.contract import Reward, RewardConfig


class Given(Reward):
    name = "given"
    summary = "no scorer: the preferences of offline pairs as they are (run --pairs)"
    paper = "none"
    unit = "none"

    def check(self, prompts: Sequence[str]) -> None:
        raise ValueError("the reward given scores nothing: it stands for the preferences of offline pairs (--pairs)")

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        raise NotImplementedError(f"{self.name} scores nothing")

    @classmethod
    def weights_bytes(cls, config: RewardConfig) -> int | None:
        return 0

    def fingerprint(self) -> str:
        return "given"
