"""DRaFT: the reward's own gradient, through the decoder and the last K denoising steps.

loss = -mean r(D(x_0)), where x_0 is denoised again from the stored latent of step T - K with the sample's own
noise; what came before is a constant (DRaFT-K). AlignProp draws K anew for each sample.
It trains on the drawn samples alone: a fused target has no plain gradient, so a fusing builder's targets are
scored for nothing here. Each sample it passes through the reward counts as one more reward query.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field

from bench_dfusion.algorithm import Algorithm, AlgorithmConfig, Among, Loss, Rows
from bench_dfusion.builders.contract import ConsistentSamples
from bench_dfusion.diffusion import samplers
from bench_dfusion.diffusion.policy import Policy
from bench_dfusion.rewards.contract import Reward, scored_with_gradient


class DRaFTConfig(AlgorithmConfig):
    last_steps: Annotated[int, Among(1, 2, 4)] = Field(
        1, ge=1, description="K, denoising steps that the gradient passes through (count; paper: 1 is best per cost)"
    )
    draw_last_steps: bool = Field(
        False, description="draw each sample's K uniformly from 1 to `last_steps` (AlignProp: to all steps)"
    )


class DRaFT(Algorithm):
    name = "draft"
    summary = "the reward's gradient through the last K steps; needs a differentiable reward, trains on drawn samples"
    paper = "Clark et al. 2023 (DRaFT-K), §4; Prabhudesai et al. 2023 (AlignProp), §4"
    Config: ClassVar[type[AlgorithmConfig]] = DRaFTConfig
    needs_gradient = True
    config: DRaFTConfig

    def setup(self, policy: Policy, reward: Reward) -> None:
        if self.config.last_steps > len(policy.schedule):
            raise ValueError(f"last_steps is {self.config.last_steps}, the sampler has {len(policy.schedule)} steps")
        self._reward = reward

    def queries(self, drawn: int) -> int:
        return drawn * self.config.inner_epochs

    def prepare(self, policy: Policy, samples: ConsistentSamples, generator: torch.Generator) -> Rows:
        n, k = samples.drawn, self.config.last_steps
        drawn = torch.randint(1, k + 1, (n,), generator=generator)
        return {"row": torch.arange(n), "last": drawn if self.config.draw_last_steps else torch.full((n,), k)}

    def loss(self, policy: Policy, samples: ConsistentSamples, rows: Rows) -> Loss:
        trajectory, total = samples.samples.trajectory, len(policy.schedule)
        scores = []
        for k in rows["last"].unique().tolist():
            own = rows["row"][rows["last"] == k]
            prompts = [trajectory.prompts[i] for i in own.tolist()]
            noise = samplers.sample_noise(trajectory.seeds[own], total, tuple(trajectory.latents.shape[2:]))
            x_t = trajectory.latents[own, total - k].to(policy.device)
            latents, _ = policy.denoise(x_t, noise[:, total - k + 1 :].to(policy.device), prompts)
            images = policy.adapter.decode(latents[:, -1])
            scores.append(scored_with_gradient(self._reward, images, prompts))
        score = torch.cat(scores).mean()
        return Loss(-score, {"score": score.detach()})
