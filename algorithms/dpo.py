"""Step-wise DPO: a preference between two trajectories is a preference at each of their steps.

r(x) = log pi_theta(x_s | x_t, c) - log pi_ref(x_s | x_t, c), per step, for winner and loser:
loss = -log sigmoid(beta [log clamp(e^{r_w}, 1 - eps, 1 + eps) - log clamp(e^{r_l}, 1 - eps, 1 + eps)]).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from bench_dfusion.algorithm import (
    Algorithm,
    AlgorithmConfig,
    Loss,
    Rows,
    StepwiseConfig,
    all_log_probs,
    every_step,
    step_log_prob,
    step_weights,
    window_steps,
)
from bench_dfusion.consistent import ConsistentSamples
from bench_dfusion.policy import Policy


class DPOConfig(StepwiseConfig):
    beta: float = Field(
        0.1, gt=0, description="strength of the implicit KL, in units of averaged log-probs (D3PO and D-Fusion: 0.1)"
    )
    ratio_clamp: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="ratios are clamped to 1 ± this, which also stops their gradient; 0: off (D3PO: 0.1)",
    )


class DPO(Algorithm):
    name = "dpo"
    summary = "step-wise DPO on the pairs' denoising steps, as D-Fusion trains"
    paper = "Yang et al. 2023 (D3PO), eq. 12; Hu et al. 2025 (D-Fusion)"
    Config: ClassVar[type[AlgorithmConfig]] = DPOConfig
    needs_pairs = True
    config: DPOConfig

    def prepare(self, policy: Policy, samples: ConsistentSamples, generator: torch.Generator) -> Rows:
        steps = window_steps(policy, self.config.window)
        weights = step_weights(policy, steps, self.config.step_weight)
        rows = every_step(torch.arange(len(samples.pairs)), steps, weights)
        winner, loser = samples.pairs[rows["row"]].T
        # Every (sample, step) once, however many pairs it is in.
        total = len(policy.schedule)
        keys, place = torch.cat([winner * total + rows["step"], loser * total + rows["step"]]).unique(
            return_inverse=True
        )
        with policy.reference():
            reference = all_log_probs(policy, samples, keys // total, keys % total)
        rows["ref_w"], rows["ref_l"] = reference[place].chunk(2)
        rows["winner"], rows["loser"] = winner, loser
        return rows

    def loss(self, policy: Policy, samples: ConsistentSamples, rows: Rows) -> Loss:
        both = step_log_prob(
            policy, samples, torch.cat([rows["winner"], rows["loser"]]), torch.cat([rows["step"], rows["step"]])
        )
        reference = torch.cat([rows["ref_w"], rows["ref_l"]]).to(both.device)
        ratio_w, ratio_l = (both - reference).chunk(2)
        terms = dpo_terms(ratio_w, ratio_l, self.config.beta, self.config.ratio_clamp)
        metrics = {"margin": (ratio_w - ratio_l).detach().mean(), "accuracy": (ratio_w > ratio_l).float().mean()}
        return Loss((rows["weight"].to(terms.device) * terms).mean(), metrics)


def dpo_terms(ratio_w: Tensor, ratio_l: Tensor, beta: float, clamp: float) -> Tensor:
    """The loss of each pair and step [B] from its log-ratios r_w, r_l [B] (D3PO eq. 12; clamp as in its code)."""
    if clamp:  # log clamp(e^r, 1 - c, 1 + c), in logs so that no ratio overflows
        low, high = math.log1p(-clamp), math.log1p(clamp)
        ratio_w, ratio_l = ratio_w.clamp(low, high), ratio_l.clamp(low, high)
    return -F.logsigmoid(beta * (ratio_w - ratio_l))
