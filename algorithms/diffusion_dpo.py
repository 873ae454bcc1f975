"""Diffusion-DPO: the preference through the denoising error on the pair's final latents.

d(x) = mean squared error of the network's prediction at a noised x_0, same t and same noise for both:
loss = -log sigmoid(-(beta / 2) [(d_theta(w) - d_ref(w)) - (d_theta(l) - d_ref(l))]).
It needs no trajectory, so it works on any pair of pictures.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from bench_dfusion.algorithm import Algorithm, AlgorithmConfig, Loss, Rows, Share
from bench_dfusion.consistent import ConsistentSamples
from bench_dfusion.denoising import all_errors, draw_levels, noised
from bench_dfusion.policy import Policy


class DiffusionDPOConfig(AlgorithmConfig):
    beta: float = Field(5000.0, gt=0, description="strength of the implicit KL, per mean squared error (paper: 5000)")
    timesteps: int = Field(4, ge=1, description="noise levels drawn for each pair (count; paper: 1)")
    levels: Share = Field(
        (0.0, 1.0), description="share of the training timesteps drawn from, [from, to), 0 the cleanest (paper: all)"
    )


class DiffusionDPO(Algorithm):
    name = "diffusion-dpo"
    summary = "DPO on the denoising error of final latents; needs pairs, not trajectories"
    paper = "Wallace et al. 2023 (Diffusion-DPO), eq. 14"
    Config: ClassVar[type[AlgorithmConfig]] = DiffusionDPOConfig
    needs_pairs = True
    config: DiffusionDPOConfig

    def prepare(self, policy: Policy, samples: ConsistentSamples, generator: torch.Generator) -> Rows:
        winner, loser = samples.pairs.repeat_interleave(self.config.timesteps, 0).T
        rows = draw_levels(policy, len(winner), self.config.levels, generator)
        both = torch.cat([winner, loser]), rows["t"].repeat(2), rows["noise"].repeat(2)
        with policy.reference():
            rows["ref_w"], rows["ref_l"] = all_errors(policy, samples, *both).chunk(2)
        rows["winner"], rows["loser"] = winner, loser
        return rows

    def loss(self, policy: Policy, samples: ConsistentSamples, rows: Rows) -> Loss:
        both = torch.cat([rows["winner"], rows["loser"]])
        at = noised(policy, samples, both, rows["t"].repeat(2), rows["noise"].repeat(2))
        error_w, error_l = at.error(policy, at.output(policy)).chunk(2)
        gain_w, gain_l = rows["ref_w"].to(error_w.device) - error_w, rows["ref_l"].to(error_l.device) - error_l
        terms = diffusion_dpo_terms(gain_w, gain_l, self.config.beta)
        metrics = {"margin": (gain_w - gain_l).detach().mean(), "accuracy": (gain_w > gain_l).float().mean()}
        return Loss(terms.mean(), metrics)


def diffusion_dpo_terms(gain_w: Tensor, gain_l: Tensor, beta: float) -> Tensor:
    """The loss of each pair [B] from d_ref - d_theta of winner and loser [B] (Wallace et al. eq. 14)."""
    return -F.logsigmoid(0.5 * beta * (gain_w - gain_l))
