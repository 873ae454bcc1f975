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

from bench_dfusion import samplers
from bench_dfusion.algorithm import Algorithm, AlgorithmConfig, Loss, Rows, Share
from bench_dfusion.consistent import ConsistentSamples
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
        k, n = self.config.timesteps, len(samples.pairs)
        pairs = samples.pairs.repeat_interleave(k, 0)
        total = len(policy.alphas_cumprod)
        low, high = self.config.levels
        u = torch.rand(n * k, generator=generator)
        rows: Rows = {
            "winner": pairs[:, 0],
            "loser": pairs[:, 1],
            "t": ((low + u * (high - low)) * total).long().clamp(max=total - 1),
            "noise": torch.randint(2**62, (n * k,), generator=generator),
        }
        parts = []
        with policy.reference():
            for i in range(0, n * k, policy.batch):
                part = {key: value[i : i + policy.batch] for key, value in rows.items()}
                parts.append(torch.stack(self._errors(policy, samples, part), 1).cpu())
        rows["reference"] = torch.cat(parts) if parts else torch.zeros(0, 2)
        return rows

    def loss(self, policy: Policy, samples: ConsistentSamples, rows: Rows) -> Loss:
        error_w, error_l = self._errors(policy, samples, rows)
        reference_w, reference_l = rows["reference"].to(error_w.device).T
        gain_w, gain_l = reference_w - error_w, reference_l - error_l
        terms = diffusion_dpo_terms(gain_w, gain_l, self.config.beta)
        metrics = {"margin": (gain_w - gain_l).detach().mean(), "accuracy": (gain_w > gain_l).float().mean()}
        return Loss(terms.mean(), metrics)

    @staticmethod
    def _errors(policy: Policy, samples: ConsistentSamples, rows: Rows) -> tuple[Tensor, Tensor]:
        """d [B] of winner and loser at the row's t and noise, which both share."""
        trajectory = samples.samples.trajectory
        both = torch.cat([rows["winner"], rows["loser"]])
        clean = trajectory.final[both].to(policy.device)
        noise = samplers.sample_noise(rows["noise"], 0, tuple(clean.shape[1:]))[:, 0].repeat(2, 1, 1, 1)
        noise, t = noise.to(policy.device), rows["t"].repeat(2).to(policy.device)
        noised = samplers.add_noise(policy.alphas_cumprod, t, clean, noise)
        output = policy.predict(noised, t, [trajectory.prompts[i] for i in both.tolist()])
        target = samplers.training_target(policy.alphas_cumprod, t, clean, noise, policy.schedule.prediction_type)
        error_w, error_l = ((output - target) ** 2).flatten(1).mean(1).chunk(2)
        return error_w, error_l


def diffusion_dpo_terms(gain_w: Tensor, gain_l: Tensor, beta: float) -> Tensor:
    """The loss of each pair [B] from d_ref - d_theta of winner and loser [B] (Wallace et al. eq. 14)."""
    return -F.logsigmoid(0.5 * beta * (gain_w - gain_l))
