"""GRPO on denoising steps (Flow-GRPO, DanceGRPO): advantages within a prompt's group, a clipped ratio, a KL to the base.

A = (reward - mean of the prompt's) / (their std, or the round's, + 1e-4), rho = pi_theta / pi_old at a step:
loss = max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) + kl KL(pi_theta || pi_ref).

The papers' steps are of a flow's SDE, with std s_t sqrt(-dt); ours are DDIM's, so read sigma_t for it, and for -dt
the share of the training timesteps that the step crosses (they add up to 1), hence s_t^2 = sigma_t^2 / -dt.
It trains on `samples.train`: a prompt's group is its drawn samples under a builder without fusion, its targets and
bases under D-Fusion, and pi_old is the plain policy at the start of the round (so rho is 1 at the first update).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator

from bench_dfusion.algorithm import AlgorithmConfig, Loss, Rows, StepwiseAlgorithm
from bench_dfusion.consistent import ConsistentSamples
from bench_dfusion.objectives.advantages import Spread, advantages
from bench_dfusion.objectives.policy_gradient import (
    PolicyGradientConfig,
    at_each_step,
    clipped_share,
    clipped_terms,
    old_log_probs,
    sample_steps,
)
from bench_dfusion.objectives.stepwise import all_means, stored_steps
from bench_dfusion.policy import Policy
from bench_dfusion.samplers import gaussian_kl


class GRPOConfig(PolicyGradientConfig):
    spread: Spread = Field(
        "prompt",
        description="what divides reward − prompt's mean: the standard deviation of the prompt's rewards (papers), or "
        "of the round's (option of Flow-GRPO's code)",
    )
    kl: float = Field(
        0.04,
        ge=0,
        description="weight of the KL to the base (advantages per nat; Flow-GRPO: 0.04 or 0.01, DanceGRPO: 0)",
    )
    kl_form: Literal["flow", "exact"] = Field(
        "flow",
        description="exact: |mu - mu_ref|^2 / (2 sigma_t^2); flow: that times -dt, as Flow-GRPO's code divides by "
        "2 s_t^2 (its weights belong to this form)",
    )
    guard: bool = Field(
        False,
        description="GRPO-Guard: log rho gets |mu - mu_old|^2 / (2 sigma_t^2) added and is multiplied by sigma_t, and "
        "the clipped loss is divided by -dt, so that every step is clipped and weighted alike (2510.22319; a clip "
        "chosen without it is too wide)",
    )

    @model_validator(mode="after")
    def _possible(self) -> GRPOConfig:
        if self.guard and self.old_log_prob == "behaviour":
            raise ValueError("guard needs the means of pi_old, and those of the fused prediction are not kept")
        return self


class GRPO(StepwiseAlgorithm):
    name = "grpo"
    summary = "group-relative policy gradient on drawn samples (vanilla) or targets and bases (dfusion); GRPO-Guard as an option"
    paper = "Liu et al. 2025 (Flow-GRPO, 2505.05470); Xue et al. 2025 (DanceGRPO, 2505.07818); GRPO-Guard (2510.22319)"
    Config: ClassVar[type[AlgorithmConfig]] = GRPOConfig
    config: GRPOConfig

    def prepare(self, policy: Policy, samples: ConsistentSamples, generator: torch.Generator) -> Rows:
        rows = sample_steps(policy, samples, self.config)
        rows["old"] = old_log_probs(policy, samples, rows, self.config.old_log_prob)
        rows["size"] = policy.schedule.size.cpu()[rows["step"]]
        advantage = advantages(samples.samples, samples.train, self.config.advantage_clip, self.config.spread)
        rows["advantage"] = at_each_step(advantage, rows)
        if self.config.guard:
            rows["old_mean"] = all_means(policy, samples, rows["row"], rows["step"])
        if self.config.kl:
            with policy.reference():
                rows["ref_mean"] = all_means(policy, samples, rows["row"], rows["step"])
        return rows

    def loss(self, policy: Policy, samples: ConsistentSamples, rows: Rows) -> Loss:
        config, at = self.config, stored_steps(policy, samples, rows["row"], rows["step"])
        rows = {key: value.to(at.mean.device) for key, value in rows.items()}
        log_ratio = at.log_prob - rows["old"]
        metrics = {"approx_kl": 0.5 * (log_ratio.detach() ** 2).mean()}
        if config.guard:
            log_ratio = (log_ratio + gaussian_kl(at.mean, rows["old_mean"], at.std)) * at.std
        metrics["clipped"] = clipped_share(log_ratio, config.clip)
        terms = clipped_terms(log_ratio, rows["advantage"], config.clip)
        if config.guard:
            terms = terms / rows["size"]
        if config.kl:
            kl = gaussian_kl(at.mean, rows["ref_mean"], at.std)
            metrics["kl"] = kl.detach().mean()
            terms = terms + config.kl * (kl if config.kl_form == "exact" else kl * rows["size"])
        return Loss((rows["weight"] * terms).mean(), metrics)
