"""DGPO: a preference between the good and the bad samples of a prompt, as two groups.

d = mean squared error of the network's prediction v at a noised x_0, A = advantage among the prompt's samples G,
whose signs part it into G+ and G-; all of G share the timestep and the noise:
S = sum over G of A beta (d_theta - d_ref) / |G|,
loss = sigmoid(S) mean over G of A d_theta + kl mean over G of |v_theta - v_ref|^2, sigmoid(S) without gradient.
The gradient is that of -log sigmoid(-S) / beta; the value is not. d_theta has no gradient where e^{d_old - d_theta}
has left 1 ± clip on A's side, d_old being of the start of the round.
G are all drawn samples of a prompt from vanilla, its targets and bases from dfusion; a prompt whose rewards are all
alike is left out.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from bench_dfusion.algorithm import Algorithm, AlgorithmConfig, Between, Loss, Rows
from bench_dfusion.builders.contract import ConsistentSamples
from bench_dfusion.diffusion.policy import Policy
from bench_dfusion.objectives.advantages import AdvantageConfig, advantages, prompt_groups
from bench_dfusion.objectives.denoising import all_errors, all_outputs, draw_levels, mean_square, noised
from bench_dfusion.objectives.groups import each_member, group_rows, padded


class DGPOConfig(AdvantageConfig):
    beta: Annotated[float, Between(1.0, 1000.0)] = Field(
        100.0, gt=0, description="strength of the implicit KL, per mean squared error (official: 100)"
    )
    clip: float = Field(
        0.05, gt=0, lt=1, description="a sample counts no more once e^{d_old - d} leaves 1 ± this (1; official: 0.05)"
    )
    kl: float = Field(
        0.02, ge=0, description="weight of the squared distance to the base's prediction (1; official: 0.02)"
    )


class DGPO(Algorithm):
    name = "dgpo"
    summary = "DPO between a prompt's good and bad drawn samples (vanilla) or targets and bases (dfusion), as groups"
    paper = "Luo et al. 2025 (DGPO, 2510.08425)"
    Config: ClassVar[type[AlgorithmConfig]] = DGPOConfig
    config: DGPOConfig

    def prepare(self, policy: Policy, samples: ConsistentSamples, generator: torch.Generator) -> Rows:
        advantage = advantages(
            samples.samples, samples.train, self.config.advantage_clip, self.config.spread, self.config.components
        )
        group = prompt_groups(samples.samples, samples.train)
        members = [m for m in ((group == g).nonzero()[:, 0] for g in group.unique()) if advantage[m].any()]
        rows = group_rows(samples.train, members, self.config.timesteps, advantage=advantage)
        self.samples_per_row = rows["member"].shape[1]
        rows |= draw_levels(policy, len(rows["member"]), self.config.levels, generator)
        real, flat = each_member(rows)
        rows["old"] = padded(real, all_errors(policy, samples, *flat))
        rows["ref"] = torch.zeros(*real.shape, *policy.adapter.latent_shape)
        with policy.reference():
            rows["ref"][real] = all_outputs(policy, samples, *flat)
        return rows

    def loss(self, policy: Policy, samples: ConsistentSamples, rows: Rows) -> Loss:
        real, flat = each_member(rows)
        at = noised(policy, samples, *flat)
        output, ref = at.output(policy), rows["ref"][real].to(policy.device)
        real, old, advantage = (x.to(policy.device) for x in (real, rows["old"], rows["advantage"]))

        error, ref_error = (padded(real, at.error(policy, said)) for said in (output, ref))
        terms = dgpo_terms(error, ref_error, old, advantage, real.sum(1), self.config.beta, self.config.clip)
        drift = padded(real, mean_square(output - ref)).sum(1) / real.sum(1)
        metrics = {"gain": (advantage * (ref_error - error)).detach().mean(), "drift": drift.detach().mean()}
        return Loss((terms + self.config.kl * drift).mean(), metrics)


def dgpo_terms(
    error: Tensor, ref: Tensor, old: Tensor, advantage: Tensor, size: Tensor, beta: float, clip: float
) -> Tensor:
    """The loss of each group [R] of `size` members [R] from d_theta, d_ref, d_old and A [R, members], 0 where padded."""
    ratio = (old - error).exp()
    left = torch.where(advantage > 0, ratio > 1 + clip, ratio < 1 - clip)
    error = torch.where(left, error.detach(), error)
    score = (advantage * beta * (error - ref)).sum(1) / size
    return score.sigmoid().detach() * (advantage * error).sum(1) / size
