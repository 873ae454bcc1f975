"""Diffusion-KTO: a sample is desirable or not by itself; no pairs.

d(x) = mean squared error of the network's prediction at a noised x_0, g = d_ref - d_theta,
z = max(0, mean of g over the rows of an optimiser step), without gradient; y = +1 above the mean reward of the prompt, -1 below:
loss = w_y (1 - sigmoid(y beta (g - z))).
It trains on all drawn samples of vanilla, on targets and bases of dfusion; a sample at its prompt's mean is left out.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from bench_dfusion.algorithm import Algorithm, AlgorithmConfig, Between, Loss, Rows
from bench_dfusion.builders.contract import ConsistentSamples
from bench_dfusion.diffusion.policy import Policy
from bench_dfusion.objectives.advantages import advantages
from bench_dfusion.objectives.denoising import LevelsConfig, all_errors, at_levels, noised


class KTOConfig(LevelsConfig):
    beta: Annotated[float, Between(10.0, 5000.0)] = Field(
        5000.0, gt=0, description="strength of the implicit KL, per mean squared error (as Diffusion-DPO: 5000)"
    )
    desirable: float = Field(1.0, ge=0, description="weight of desirable samples (1; Ethayarajh et al. 2024: 1)")
    undesirable: float = Field(1.0, ge=0, description="weight of undesirable samples (1; Ethayarajh et al. 2024: 1)")


class KTO(Algorithm):
    name = "kto"
    summary = (
        "KTO on the denoising error: drawn samples (vanilla) or targets and bases (dfusion), good or bad, unpaired"
    )
    paper = "Li et al. 2024 (Diffusion-KTO), eq. 8"
    Config: ClassVar[type[AlgorithmConfig]] = KTOConfig
    offline = True
    config: KTOConfig

    def prepare(self, policy: Policy, samples: ConsistentSamples, generator: torch.Generator) -> Rows:
        label = advantages(samples.samples, samples.train, clip=1.0).sign()
        rows = at_levels(policy, samples.train[label != 0], self.config, generator)
        rows["label"] = label[label != 0].repeat_interleave(self.config.timesteps)
        with policy.reference():
            rows["ref"] = all_errors(policy, samples, rows["row"], rows["t"], rows["noise"])
        return rows

    def batch(self, policy: Policy, samples: ConsistentSamples, rows: Rows) -> Rows:
        error = all_errors(policy, samples, rows["row"], rows["t"], rows["noise"])
        z = (rows["ref"] - error).mean().clamp(min=0)
        return {**rows, "z": z.expand(len(error))}

    def loss(self, policy: Policy, samples: ConsistentSamples, rows: Rows) -> Loss:
        at = noised(policy, samples, rows["row"], rows["t"], rows["noise"])
        error = at.error(policy, at.output(policy))
        ref, label, z = (rows[name].to(error.device) for name in ("ref", "label", "z"))
        gain = ref - error
        terms = kto_terms(gain, label, z, self.config.beta, self.config.desirable, self.config.undesirable)
        return Loss(terms.mean(), {"gain": gain.detach().mean(), "accuracy": (label * gain > 0).float().mean()})


def kto_terms(gain: Tensor, label: Tensor, z: Tensor, beta: float, desirable: float, undesirable: float) -> Tensor:
    """The loss of each sample [B] from d_ref - d_theta, its label ±1 and z [B] (or one z)."""
    weight = torch.where(label > 0, desirable, undesirable)
    return weight * (-label * beta * (gain - z)).sigmoid()  # 1 - sigmoid(x) = sigmoid(-x)
