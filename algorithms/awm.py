"""AWM: policy gradient with the denoising error in the place of the log-likelihood.

d = mean squared error of the network's prediction v at a noised x_0, l = -w(t) d^p / p, A = advantage among the
prompt's samples, rescaled to ±1, rho = e^{l - l_old} with l_old of the start of the round, same t and noise:
loss = max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) + kl |v - v_ref|^2 + kl_ema |v - v_ema|^2,
v_ema being of an average of the weights, as it is at the start of the round.
It trains on all drawn samples of vanilla, on targets and bases of dfusion.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from bench_dfusion.algorithm import Algorithm, AlgorithmConfig, Between, Loss, Rows
from bench_dfusion.builders.contract import ConsistentSamples
from bench_dfusion.diffusion.policy import Policy
from bench_dfusion.objectives.advantages import SPREADS, AdvantageConfig, Spread, advantages
from bench_dfusion.objectives.averages import EMA
from bench_dfusion.objectives.denoising import all_errors, all_outputs, at_levels, mean_square, noised
from bench_dfusion.objectives.policy_gradient import clipped_share, clipped_terms


class AWMConfig(AdvantageConfig):
    timesteps: int = Field(6, ge=1, description="noise levels drawn for each sample in a round (count; official: 6)")
    spread: Spread = Field("round", description=f"{SPREADS} (official: round, of all)")
    clip: float = Field(1.0, gt=0, le=1, description="the ratio is clipped to 1 ± this (1; official: 1)")
    weight: Literal["one", "time"] = Field(
        "one", description="w(t): 1, or t as a share of the training timesteps (official runs: time)"
    )
    power: float = Field(
        1.0, gt=0, le=1, description="p: 1 for the squared error, less for a robust one (1; official runs: 0.25)"
    )
    kl: Annotated[float, Between(1e-4, 0.1)] = Field(
        1e-3, ge=0, description="weight of the squared distance to the base's prediction (1; its beta, 0.001)"
    )
    kl_ema: Annotated[float, Between(0.01, 10.0)] = Field(
        1.0, ge=0, description="weight of the squared distance to the averaged weights' prediction (1; official: 1)"
    )
    decay_rate: float = Field(
        0.001, ge=0, description="the average's decay grows by this with each step (1; official: 0.001)"
    )
    decay_most: float = Field(0.3, ge=0, lt=1, description="and no further than this (1; official: 0.3)")


class AWM(Algorithm):
    name = "awm"
    summary = "advantage-weighted denoising error of drawn samples (vanilla) or targets and bases (dfusion), clipped"
    paper = "Xue et al. 2025 (Advantage Weighted Matching, 2509.25050)"
    Config: ClassVar[type[AlgorithmConfig]] = AWMConfig
    config: AWMConfig

    def __init__(self, config: AWMConfig):
        super().__init__(config)
        self._ema = EMA(config.decay_rate, config.decay_most)

    def stepped(self, policy: Policy) -> None:
        self._ema.steps += 1
        self._ema.update(policy)

    def prepare(self, policy: Policy, samples: ConsistentSamples, generator: torch.Generator) -> Rows:
        rows = at_levels(policy, samples.train, self.config, generator)
        clip = self.config.advantage_clip
        advantage = advantages(samples.samples, samples.train, clip, self.config.spread, self.config.components) / clip
        rows["advantage"] = advantage.repeat_interleave(self.config.timesteps)
        where = rows["row"], rows["t"], rows["noise"]
        rows["old"] = all_errors(policy, samples, *where)
        with policy.reference():
            rows["ref"] = all_outputs(policy, samples, *where)
        with policy.holding(self._ema.weights(policy)):
            rows["ema"] = all_outputs(policy, samples, *where)
        return rows

    def loss(self, policy: Policy, samples: ConsistentSamples, rows: Rows) -> Loss:
        at = noised(policy, samples, rows["row"], rows["t"], rows["noise"])
        output = at.output(policy)
        old, ref, ema, advantage = (rows[name].to(output.device) for name in ("old", "ref", "ema", "advantage"))
        time = policy.levels.time[at.t]
        weight = time if self.config.weight == "time" else torch.ones_like(time)
        power, clip = self.config.power, self.config.clip
        log_ratio = weight * (pseudo_log_prob(at.error(policy, output), power) - pseudo_log_prob(old, power))
        drift, pace = mean_square(output - ref), mean_square(output - ema)
        value = clipped_terms(log_ratio, advantage, clip) + self.config.kl * drift + self.config.kl_ema * pace
        return Loss(value.mean(), {"drift": drift.detach().mean(), "clipped": clipped_share(log_ratio, clip)})

    def state(self) -> dict[str, Tensor]:
        return self._ema.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._ema.load_state(state)


def pseudo_log_prob(error: Tensor, power: float) -> Tensor:
    """-d^p / p [B]; 1e-10 keeps the slope of p < 1 finite."""
    return -((error + 1e-10) ** power) / power
