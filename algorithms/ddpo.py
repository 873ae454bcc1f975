"""DDPO: policy gradient on denoising steps, with importance sampling and a clipped ratio.

A = advantage of a sample among those of its prompt, rho = pi_theta / pi_old at a step:
loss = max(-A rho, -A clip(rho, 1 - eps, 1 + eps)). On D-Fusion's samples it trains on targets and bases,
and pi_old is the plain policy at the start of the round (so rho is 1 at the first update).
"""

from __future__ import annotations

from collections import deque
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
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


class DDPOConfig(StepwiseConfig):
    clip: float = Field(1e-4, gt=0, lt=1, description="the ratio is clipped to 1 ± this (paper: 1e-4)")
    advantage_clip: float = Field(
        5.0, gt=0, description="advantages are clipped to ± this, in standard deviations (paper: 5)"
    )
    buffer: int = Field(16, ge=2, description="rewards remembered for each prompt (count; method.md §3: 16)")
    min_count: int = Field(
        16,
        ge=2,
        description="below so many remembered rewards the round's own mean and spread serve (count; method.md §3: 16)",
    )
    old_log_prob: Literal["plain", "behaviour"] = Field(
        "plain",
        description="pi_old of fused samples: the plain policy at the start of the round, or the fused prediction "
        "that drew them (as the official code stores it; the first ratio is then not 1)",
    )

    @model_validator(mode="after")
    def _reachable(self) -> DDPOConfig:
        if self.min_count > self.buffer:
            raise ValueError(f"min_count {self.min_count} exceeds buffer {self.buffer}: it would never be reached")
        return self


class DDPO(Algorithm):
    name = "ddpo"
    summary = "clipped policy gradient on every denoising step, advantages per prompt"
    paper = "Black et al. 2023 (DDPO), §4.3 DDPO-IS"
    Config: ClassVar[type[AlgorithmConfig]] = DDPOConfig
    config: DDPOConfig

    def __init__(self, config: DDPOConfig):
        super().__init__(config)
        self._seen: dict[str, deque[float]] = {}

    def prepare(self, policy: Policy, samples: ConsistentSamples, generator: torch.Generator) -> Rows:
        steps = window_steps(policy, self.config.window)
        weights = step_weights(policy, steps, self.config.step_weight)
        rows = every_step(samples.train, steps, weights)
        trajectory = samples.samples.trajectory
        rows["old"] = trajectory.log_probs[rows["row"], rows["step"]].clone()
        made = rows["row"] >= samples.drawn
        if self.config.old_log_prob == "plain" and made.any():
            rows["old"][made] = all_log_probs(policy, samples, rows["row"][made], rows["step"][made])
        prompts = [trajectory.prompts[i] for i in samples.train.tolist()]
        advantage = self._advantages(prompts, samples.samples.rewards[samples.train])
        rows["advantage"] = advantage.repeat_interleave(len(steps))
        return rows

    def loss(self, policy: Policy, samples: ConsistentSamples, rows: Rows) -> Loss:
        log_prob = step_log_prob(policy, samples, rows["row"], rows["step"])
        log_ratio = log_prob - rows["old"].to(log_prob.device)
        terms = ddpo_terms(log_ratio, rows["advantage"].to(log_prob.device), self.config.clip)
        with torch.no_grad():
            metrics = {
                "approx_kl": 0.5 * (log_ratio**2).mean(),
                "clipped": ((log_ratio.exp() - 1).abs() > self.config.clip).float().mean(),
            }
        return Loss((rows["weight"].to(terms.device) * terms).mean(), metrics)

    def _advantages(self, prompts: list[str], rewards: Tensor) -> Tensor:
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            self._seen.setdefault(prompt, deque(maxlen=self.config.buffer)).append(reward)
        result = torch.empty(len(prompts))
        for i, prompt in enumerate(prompts):
            own = torch.tensor(list(self._seen[prompt]))
            own = own if len(own) >= self.config.min_count else rewards
            result[i] = (rewards[i] - own.mean()) / (own.std(correction=0) + 1e-6)
        return result.clamp(-self.config.advantage_clip, self.config.advantage_clip)

    def state(self) -> dict[str, Tensor]:
        return {f"seen.{prompt}": torch.tensor(list(own)) for prompt, own in self._seen.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._seen = {
            key.removeprefix("seen."): deque(own.tolist(), maxlen=self.config.buffer) for key, own in state.items()
        }


def ddpo_terms(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """The loss of each sample and step [B] (Black et al. 2023, §4.3, clipped as in PPO)."""
    ratio = log_ratio.clamp(-20, 20).exp()  # an infinite ratio would turn the clipped side's zero gradient into nan
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
