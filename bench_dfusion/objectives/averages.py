"""An exponential moving average of the trained weights, which survives a kill."""

from __future__ import annotations

import torch
from torch import Tensor

from bench_dfusion.diffusion.policy import Policy


class EMA:
    """The average of a policy's weights; the policy's own ones until the first `update`.

    Its decay grows with the optimiser's steps so far: min(start + rate · steps, most), and 0 where that is less.
    """

    def __init__(self, rate: float, most: float, start: float = 0.0):
        self.rate, self.most, self.start, self.steps = rate, most, start, 0
        self._weights: dict[str, Tensor] | None = None

    def weights(self, policy: Policy) -> dict[str, Tensor]:
        if self._weights is None:
            self._weights = policy.weights()
        return self._weights

    def update(self, policy: Policy) -> None:
        """average ← decay · average + (1 − decay) · weights."""
        decay = self.decay()
        old = self.weights(policy)
        self._weights = {k: decay * old[k].to(new) + (1 - decay) * new for k, new in policy.weights().items()}

    def decay(self) -> float:
        return max(0.0, min(self.start + self.rate * self.steps, self.most))

    def state(self) -> dict[str, Tensor]:
        return {"steps": torch.tensor(self.steps), **{f"average.{k}": v for k, v in (self._weights or {}).items()}}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.steps = int(state["steps"])
        prefix = "average."
        self._weights = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)} or None


class WarmedUpEMA(EMA):
    """An average whose decay after update n is min((1 + n) / (10 + n), most): `algo.ema`."""

    def __init__(self, most: float):
        super().__init__(0.0, most)

    def decay(self) -> float:
        return min((1 + self.steps) / (10 + self.steps), self.most)


Average, Warmed = EMA, WarmedUpEMA  # the names they had
