"""Step-wise DPO: a preference between two trajectories is a preference at each of their steps.

r(x) = log pi_theta(x_s | x_t, c) - log pi_ref(x_s | x_t, c), per step, for winner and loser:
loss = -log sigmoid(beta [log clamp(e^{r_w}, 1 - eps, 1 + eps) - log clamp(e^{r_l}, 1 - eps, 1 + eps)]),
or another of TRL's loss types of r_w and r_l (`bench_dfusion/objectives/preference.py`), without the clamp.

With `sdpo` the loser's error -log pi_theta keeps its value and has lambda times its gradient. Lambda is
Diffusion-SDPO's with g_w, g_l the gradients of the winners' and the losers' summed step_weight * -log pi_theta in
the network's output, over the rows of one step of the optimiser.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from bench_dfusion.algorithm import (
    AlgorithmConfig,
    Between,
    Loss,
    Rows,
    StepwiseAlgorithm,
    StepwiseConfig,
    all_log_probs,
    every_step,
    step_weights,
    window_steps,
)
from bench_dfusion.builders.contract import ConsistentSamples
from bench_dfusion.builders.stored_steps import Steps, stored_steps
from bench_dfusion.diffusion.policy import Policy
from bench_dfusion.objectives.preference import PreferenceConfig, loser_scale, preference_terms, scale_gradient


class DPOConfig(PreferenceConfig, StepwiseConfig):
    beta: Annotated[float, Between(0.01, 100.0)] = Field(
        0.1,
        gt=0,
        description="strength of the implicit KL, in units of log-probs averaged over the latent (D3PO: 0.1; D-Fusion "
        "publishes none); TRL's betas are for log-probs summed over a text: no loss type's published value carries over",
    )
    ratio_clamp: float | None = Field(
        None,
        ge=0,
        lt=1,
        validate_default=True,
        description="ratios are clamped to 1 ± this, which also stops their gradient; 0: off (D3PO: 0.1, the default "
        "with loss type sigmoid; the others it would saturate, so with them it is off)",
    )

    @field_validator("ratio_clamp")
    @classmethod
    def _for_sigmoid(cls, value: float | None, info: ValidationInfo) -> float:
        alone = info.data.get("loss_type") in ("sigmoid", ("sigmoid",))
        if value and not alone:
            raise ValueError(f"it goes with loss_type sigmoid alone: it would saturate {info.data.get('loss_type')}")
        return (0.1 if alone else 0.0) if value is None else value


class DPO(StepwiseAlgorithm):
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

    def batch(self, policy: Policy, samples: ConsistentSamples, rows: Rows) -> Rows:
        if self.config.sdpo is None:
            return rows

        def scores(rows: Rows) -> tuple[Tensor, Tensor]:
            at = self._steps(policy, samples, rows, leaf=True)
            return rows["weight"].repeat(2).to(at.log_prob.device) * at.log_prob, at.output

        scale = loser_scale(scores, rows, policy.batch, self.config.sdpo)
        return {**rows, "loser_scale": scale.expand(len(rows["row"]))}

    def loss(self, policy: Policy, samples: ConsistentSamples, rows: Rows) -> Loss:
        config, at = self.config, self._steps(policy, samples, rows)
        weight = rows["weight"].to(at.log_prob.device)
        reference = torch.cat([rows["ref_w"], rows["ref_l"]]).to(at.log_prob.device)
        ratio_w, ratio_l = (at.log_prob - reference).chunk(2)
        metrics = {"margin": (ratio_w - ratio_l).detach().mean(), "accuracy": (ratio_w > ratio_l).float().mean()}
        if config.sdpo is not None:
            scale = rows["loser_scale"].to(ratio_l.device)
            metrics["loser_scale"], ratio_l = scale.mean(), scale_gradient(ratio_l, scale)
        clamp = config.ratio_clamp or 0.0
        terms = dpo_terms(ratio_w, ratio_l, config.beta, clamp, config.losses, config.label_smoothing)
        return Loss((weight * terms).mean(), metrics)

    def _steps(self, policy: Policy, samples: ConsistentSamples, rows: Rows, leaf: bool = False) -> Steps:
        """The winners' steps, then the losers'."""
        both = torch.cat([rows["winner"], rows["loser"]])
        return stored_steps(policy, samples, both, rows["step"].repeat(2), leaf)


def dpo_terms(
    ratio_w: Tensor,
    ratio_l: Tensor,
    beta: float,
    clamp: float,
    losses: Mapping[str, float] = {"sigmoid": 1.0},
    smoothing: float = 0.0,
) -> Tensor:
    """The loss of each pair and step [B] from its log-ratios r_w, r_l [B] (D3PO eq. 12; clamp as in its code)."""
    if clamp:  # log clamp(e^r, 1 - c, 1 + c), in logs so that no ratio overflows
        low, high = math.log1p(-clamp), math.log1p(clamp)
        ratio_w, ratio_l = ratio_w.clamp(low, high), ratio_l.clamp(low, high)
    return preference_terms(ratio_w, ratio_l, beta, losses, smoothing)
