"""DDPO: policy gradient on denoising steps, with importance sampling and a clipped ratio, or by the score function.

A = advantage of a sample among those of its prompt, rho = pi_theta / pi_old at a step:
loss = max(-A rho, -A clip(rho, 1 - eps, 1 + eps)), or -A log pi_theta with one update a round.
It trains on `samples.train`: the drawn samples of a builder without fusion, D-Fusion's targets and bases otherwise.
There pi_old is the plain policy at the start of the round (so rho is 1 at the first update, and both forms have
the same first gradient).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from bench_dfusion.algorithm import AlgorithmConfig, Loss, Rows, StepwiseAlgorithm
from bench_dfusion.builders.contract import ConsistentSamples
from bench_dfusion.builders.stored_steps import Steps, stored_steps
from bench_dfusion.diffusion.policy import Policy
from bench_dfusion.objectives.advantages import PromptAdvantages
from bench_dfusion.objectives.policy_gradient import (
    PolicyGradientConfig,
    at_each_step,
    clipped_share,
    clipped_terms,
    old_log_probs,
    sample_steps,
    scaled,
)


class DDPOConfig(PolicyGradientConfig):
    estimator: Literal["importance", "score"] = Field(
        "importance",
        description="importance: the clipped ratio to pi_old (paper: DDPO-IS); score: -A log pi (DDPO-SF), which is "
        "on-policy only, so updates and inner_epochs must be 1",
    )
    buffer: int = Field(16, ge=2, description="rewards remembered for each prompt (count; ddpo-pytorch: 16)")
    min_count: int = Field(
        16,
        ge=2,
        description="below so many remembered rewards the round's own mean and spread serve (count; ddpo-pytorch: 16)",
    )

    @model_validator(mode="after")
    def _possible(self) -> DDPOConfig:
        if self.min_count > self.buffer:
            raise ValueError(f"min_count {self.min_count} exceeds buffer {self.buffer}: it would never be reached")
        if self.estimator == "score" and (self.updates, self.inner_epochs) != (1, 1):
            raise ValueError(
                "the estimator score is on-policy only: set updates = 1 and inner_epochs = 1, "
                f"not {self.updates} and {self.inner_epochs}, or use importance"
            )
        if self.estimator == "score" and self.old_log_prob == "behaviour":
            raise ValueError("the estimator score has no pi_old: leave old_log_prob out, or use importance")
        if self.estimator == "score" and self.ratio_scale != "one":
            raise ValueError("the estimator score has no ratio: leave ratio_scale out, or use importance")
        return self


class DDPO(StepwiseAlgorithm):
    name = "ddpo"
    summary = "clipped policy gradient on the denoising steps of drawn samples (vanilla) or targets and bases (dfusion)"
    paper = "Black et al. 2023 (DDPO), §4.3 DDPO-IS and DDPO-SF"
    Config: ClassVar[type[AlgorithmConfig]] = DDPOConfig
    config: DDPOConfig

    def __init__(self, config: DDPOConfig):
        super().__init__(config)
        self._advantages = PromptAdvantages(config.buffer, config.min_count, config.advantage_clip)

    def prepare(self, policy: Policy, samples: ConsistentSamples, generator: torch.Generator) -> Rows:
        rows = sample_steps(policy, samples, self.config)
        if self.config.estimator == "importance":
            rows["old"] = old_log_probs(policy, samples, rows, self.config.old_log_prob)
        prompts = [samples.samples.prompts[i] for i in samples.train.tolist()]
        advantage = self._advantages(prompts, samples.samples.rewards[samples.train])
        rows["advantage"] = at_each_step(advantage, rows)
        return rows

    def loss(self, policy: Policy, samples: ConsistentSamples, rows: Rows) -> Loss:
        terms, metrics = self.policy_gradient(stored_steps(policy, samples, rows["row"], rows["step"]), rows)
        return Loss((rows["weight"].to(terms.device) * terms).mean(), metrics)

    def policy_gradient(self, at: Steps, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each sample and step [B] under pi_theta, and figures."""
        log_prob = at.log_prob
        advantage = rows["advantage"].to(log_prob.device)
        if self.config.estimator == "score":
            return -advantage * log_prob, {"log_prob": log_prob.detach().mean()}
        log_ratio = log_prob - rows["old"].to(log_prob.device)
        metrics = {"approx_kl": 0.5 * (log_ratio.detach() ** 2).mean()}
        log_ratio = scaled(log_ratio, at.std, self.config.ratio_scale)
        metrics["clipped"] = clipped_share(log_ratio, self.config.clip)
        return clipped_terms(log_ratio, advantage, self.config.clip), metrics

    def state(self) -> dict[str, Tensor]:
        return self._advantages.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._advantages.load_state(state)
