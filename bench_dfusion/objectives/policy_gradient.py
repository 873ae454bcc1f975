"""What the policy-gradient algorithms share: options, rows with old log-probs, the clipped loss."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from bench_dfusion.algorithm import Between, Rows, StepwiseConfig, all_log_probs, every_step, step_weights, window_steps
from bench_dfusion.builders.contract import ConsistentSamples
from bench_dfusion.diffusion.policy import Policy


class PolicyGradientConfig(StepwiseConfig):
    clip: Annotated[float, Between(1e-5, 0.1)] = Field(
        1e-4, gt=0, lt=1, description="the ratio is clipped to 1 ± this (DDPO, Flow-GRPO: 1e-4)"
    )
    advantage_clip: float = Field(
        5.0, gt=0, description="advantages are clipped to ± this, in standard deviations (DDPO, Flow-GRPO: 5)"
    )
    old_log_prob: Literal["plain", "behaviour"] = Field(
        "plain",
        description="pi_old of fused samples: the plain policy at the start of the round, or the fused prediction "
        "that drew them (as the official code stores it; the first ratio is then not 1)",
    )
    ratio_scale: Literal["one", "sigma", "cps"] = Field(
        "one",
        exclude_if=lambda value: value == "one",  # cells of before this option keep their hash
        description="what a step's log rho is multiplied by before the clip: 1; sigma_t, after which every step is clipped "
        "alike; or 2 sigma_t^2 (cps), after which it is the difference of mean (x_s - mu)^2, the log-prob of the codes with "
        "coefficients-preserving sampling (2509.05952; their clip 1e-5 belongs to it). The gradient is scaled with it: "
        "by 1 late steps weigh most, by cps the noisy ones",
    )


def sample_steps(policy: Policy, samples: ConsistentSamples, config: StepwiseConfig) -> Rows:
    """Every sample that is trained on at every step of the window, sample by sample."""
    steps = window_steps(policy, config.window)
    return every_step(samples.train, steps, step_weights(policy, steps, config.step_weight))


def at_each_step(values: Tensor, rows: Rows) -> Tensor:
    """Values [M] of the samples that are trained on, for each row of `sample_steps` [M·W]."""
    return values.repeat_interleave(len(rows["row"]) // max(1, len(values)))


def old_log_probs(policy: Policy, samples: ConsistentSamples, rows: Rows, kind: str) -> Tensor:
    """log pi_old of each row: as drawn, and for samples that a builder made the policy's as it is now, if `plain`."""
    old = samples.samples.trajectory.log_probs[rows["row"], rows["step"]].clone()
    made = rows["row"] >= samples.drawn
    if kind == "plain" and made.any():
        old[made] = all_log_probs(policy, samples, rows["row"][made], rows["step"][made])
    return old


def scaled(log_ratio: Tensor, std: Tensor, scale: str) -> Tensor:
    """log rho [B] in the unit that `ratio_scale` names, from sigma_t [B]."""
    if scale == "one":
        return log_ratio
    return log_ratio * (std if scale == "sigma" else 2 * std**2)


def clipped_terms(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """The loss of each row [B], clipped as in PPO (Black et al. 2023, §4.3)."""
    ratio = _ratio(log_ratio)
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


def unclipped_terms(log_ratio: Tensor, advantage: Tensor) -> Tensor:
    """-A rho of each row [B]."""
    return -advantage * _ratio(log_ratio)


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-20, 20).exp()  # an infinite ratio would turn a dropped row's zero gradient into nan


def clipped_share(log_ratio: Tensor, clip: float) -> Tensor:
    """The share of rows [B] whose ratio has left 1 ± clip, without gradient."""
    return ((log_ratio.detach().exp() - 1).abs() > clip).float().mean()
