"""Diffusion-DPO: the preference through the denoising error on the pair's final latents.

d(x) = mean squared error of the network's prediction at a noised x_0, same t and same noise for both:
loss = -log sigmoid(-(beta / 2) [(d_theta(w) - d_ref(w)) - (d_theta(l) - d_ref(l))]),
or another of TRL's loss types with r = (d_ref - d_theta) / 2 as the log-ratios (`bench_dfusion/objectives/preference.py`).
It needs no trajectory, so it works on any pair of pictures.

With `sdpo` the loser's d_theta keeps its value and has lambda times its gradient. Lambda is Diffusion-SDPO's with
g_w, g_l the gradients of the winners' and the losers' summed d_theta in the network's output, over the rows of one
step of the optimiser.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from bench_dfusion.algorithm import Algorithm, AlgorithmConfig, Between, Loss, Rows
from bench_dfusion.builders.contract import ConsistentSamples
from bench_dfusion.diffusion.policy import Policy
from bench_dfusion.objectives.denoising import LevelsConfig, Noised, all_errors, draw_levels, noised
from bench_dfusion.objectives.preference import PreferenceConfig, loser_scale, preference_terms, scale_gradient


class DiffusionDPOConfig(PreferenceConfig, LevelsConfig):
    beta: Annotated[float, Between(10.0, 5000.0)] = Field(
        5000.0, gt=0, description="strength of the implicit KL, per mean squared error (paper: 5000)"
    )
    timesteps: int = Field(4, ge=1, description="noise levels drawn for each pair (count; paper: 1)")


class DiffusionDPO(Algorithm):
    name = "diffusion-dpo"
    summary = "DPO on the denoising error of final latents; needs pairs, not trajectories"
    paper = "Wallace et al. 2023 (Diffusion-DPO), eq. 14"
    Config: ClassVar[type[AlgorithmConfig]] = DiffusionDPOConfig
    needs_pairs = True
    offline = True
    config: DiffusionDPOConfig

    def prepare(self, policy: Policy, samples: ConsistentSamples, generator: torch.Generator) -> Rows:
        winner, loser = samples.pairs.repeat_interleave(self.config.timesteps, 0).T
        rows = draw_levels(policy, len(winner), self.config.levels, generator)
        both = torch.cat([winner, loser]), rows["t"].repeat(2), rows["noise"].repeat(2)
        with policy.reference():
            rows["ref_w"], rows["ref_l"] = all_errors(policy, samples, *both).chunk(2)
        rows["winner"], rows["loser"] = winner, loser
        return rows

    def batch(self, policy: Policy, samples: ConsistentSamples, rows: Rows) -> Rows:
        if self.config.sdpo is None:
            return rows

        def scores(rows: Rows) -> tuple[Tensor, Tensor]:
            at = _both(policy, samples, rows)
            with torch.no_grad():
                output = at.output(policy)
            return at.error(policy, output.requires_grad_()), output

        scale = loser_scale(scores, rows, policy.batch, self.config.sdpo)
        return {**rows, "loser_scale": scale.expand(len(rows["t"]))}

    def loss(self, policy: Policy, samples: ConsistentSamples, rows: Rows) -> Loss:
        config, at = self.config, _both(policy, samples, rows)
        output = at.output(policy)
        errors = at.error(policy, output)
        gain_w, gain_l = (torch.cat([rows["ref_w"], rows["ref_l"]]).to(errors.device) - errors).chunk(2)
        metrics = {"margin": (gain_w - gain_l).detach().mean(), "accuracy": (gain_w > gain_l).float().mean()}
        if config.sdpo is not None:
            scale = rows["loser_scale"].to(gain_l.device)
            metrics["loser_scale"], gain_l = scale.mean(), scale_gradient(gain_l, scale)
        terms = diffusion_dpo_terms(gain_w, gain_l, config.beta, config.losses, config.label_smoothing)
        return Loss(terms.mean(), metrics)


def _both(policy: Policy, samples: ConsistentSamples, rows: Rows) -> Noised:
    """The winners' final latents noised, then the losers'."""
    both = torch.cat([rows["winner"], rows["loser"]])
    return noised(policy, samples, both, rows["t"].repeat(2), rows["noise"].repeat(2))


def diffusion_dpo_terms(
    gain_w: Tensor,
    gain_l: Tensor,
    beta: float,
    losses: Mapping[str, float] = {"sigmoid": 1.0},
    smoothing: float = 0.0,
) -> Tensor:
    """The loss of each pair [B] from d_ref - d_theta of winner and loser [B] (Wallace et al. eq. 14)."""
    return preference_terms(gain_w / 2, gain_l / 2, beta, losses, smoothing)
