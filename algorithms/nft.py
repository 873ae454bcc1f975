"""DiffusionNFT: the forward process learns from good and bad samples by what an implicit good and bad policy predict.

A = advantage among the prompt's samples, r = clip(A / (2 c) + 1/2, 0, 1) with c the advantages' clip; the old policy
is an average of the weights. With x̂ the x_0 that a network says at a noised x_0 (linear in its output, so this holds
for epsilon, v and velocity alike):
x̂+ = beta x̂_theta + (1 - beta) x̂_old, x̂- = (1 + beta) x̂_old - beta x̂_theta,
L± = mean (x̂± - x_0)^2 / max(mean |x̂± - x_0|, 1e-5), the divisor without gradient,
loss = c [r L+ + (1 - r) L-] / beta + kl mean (output - output_ref)^2.
It collects with the old policy and trains on all drawn samples of vanilla, on targets and bases of dfusion. Sampler
and guidance are the track's, as for every algorithm; the paper samples by an ODE with guidance 1.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from bench_dfusion.algorithm import Algorithm, AlgorithmConfig, Between, Loss, Rows
from bench_dfusion.builders.contract import ConsistentSamples
from bench_dfusion.diffusion.policy import Policy
from bench_dfusion.objectives.advantages import SPREADS, AdvantageConfig, Spread, advantages
from bench_dfusion.objectives.averages import EMA
from bench_dfusion.objectives.denoising import all_outputs, at_levels, mean_square, noised, self_normalised
from bench_dfusion.objectives.gardo import Gardo, GardoOption
from bench_dfusion.rewards.contract import Reward


class NFTConfig(GardoOption, AdvantageConfig):
    spread: Spread = Field("round", description=f"{SPREADS} (paper: round, a global one)")
    beta: Annotated[float, Between(0.1, 10.0)] = Field(
        1.0, gt=0, description="how far the implicit policies lie from the old one (1; its beta, 1)"
    )
    kl: Annotated[float, Between(1e-5, 0.1)] = Field(
        1e-4, ge=0, description="weight of the squared distance to the base's prediction (1; official: 1e-4)"
    )
    decay_rate: float = Field(
        0.001, ge=0, description="the old weights' decay grows by this with each step (1; official: 0.001)"
    )
    decay_most: float = Field(0.5, ge=0, lt=1, description="and no further than this (1; official: 0.5)")


class NFT(Algorithm):
    name = "nft"
    summary = "negative-aware fine-tuning on drawn samples (vanilla) or targets and bases (dfusion), no likelihoods"
    paper = "Zheng et al. 2025 (DiffusionNFT, 2509.16117); GARDO (2512.24138)"
    Config: ClassVar[type[AlgorithmConfig]] = NFTConfig
    config: NFTConfig

    def __init__(self, config: NFTConfig):
        super().__init__(config)
        self._old = EMA(config.decay_rate, config.decay_most)
        self._gardo = None if config.gardo is None else Gardo(config.gardo)

    def setup(self, policy: Policy, reward: Reward) -> None:
        if self._gardo is not None:
            self._gardo.setup(reward)

    def collecting(self, policy: Policy) -> AbstractContextManager[None]:
        self._old.update(policy)  # once a round, with what the round before has trained
        return policy.holding(self._old.weights(policy))

    def stepped(self, policy: Policy) -> None:
        self._old.steps += 1
        if self._gardo is not None:
            self._gardo.updates += 1

    def prepare(self, policy: Policy, samples: ConsistentSamples, generator: torch.Generator) -> Rows:
        rows = at_levels(policy, samples.train, self.config, generator)
        clip = self.config.advantage_clip
        advantage = advantages(samples.samples, samples.train, clip, self.config.spread, self.config.components)
        if self._gardo is not None:
            advantage = self._gardo.advantages(advantage, samples)
        rows["good"] = (advantage / (2 * clip) + 0.5).repeat_interleave(self.config.timesteps)
        where = rows["row"], rows["t"], rows["noise"]
        with policy.holding(self._old.weights(policy)):
            rows["old"] = all_outputs(policy, samples, *where)
        with policy.reference() if self._gardo is None else self._gardo.reference(policy):
            rows["ref"] = all_outputs(policy, samples, *where)
        if self._gardo is not None:
            rows["held"] = self._gardo.gate(samples).repeat_interleave(self.config.timesteps)
            now = all_outputs(policy, samples, *where)
            if len(now) and self._gardo.resets(policy, float(mean_square(now - rows["ref"]).mean())):
                rows["ref"] = now
        return rows

    def loss(self, policy: Policy, samples: ConsistentSamples, rows: Rows) -> Loss:
        at = noised(policy, samples, rows["row"], rows["t"], rows["noise"])
        output = at.output(policy)
        old, ref, good = (rows[name].to(output.device) for name in ("old", "ref", "good"))
        terms = nft_terms(at.clean_of(policy, output), at.clean_of(policy, old), at.clean, good, self.config.beta)
        drift = mean_square(output - ref)
        metrics = {"moved": mean_square(output - old).detach().mean(), "drift": drift.detach().mean()}
        if self._gardo is not None:
            held = rows["held"].to(output.device)
            drift, metrics["held"] = drift * held, held.float().mean()
        return Loss((self.config.advantage_clip * terms + self.config.kl * drift).mean(), metrics)

    def state(self) -> dict[str, Tensor]:
        return self._old.state() | ({} if self._gardo is None else self._gardo.state())

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._old.load_state(state)
        if self._gardo is not None:
            self._gardo.load_state(state)


def nft_terms(clean: Tensor, old: Tensor, truth: Tensor, good: Tensor, beta: float) -> Tensor:
    """[r L+ + (1 - r) L-] / beta of each sample [B] from x̂_theta, x̂_old, x_0 [B, ...] and r [B]."""
    positive = self_normalised(beta * clean + (1 - beta) * old - truth)
    negative = self_normalised((1 + beta) * old - beta * clean - truth)
    return (good * positive + (1 - good) * negative) / beta
