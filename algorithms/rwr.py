"""RWR: every sample is imitated, the better the more.

d(x) = mean squared error of the network's prediction at a noised x_0, A = advantage among the prompt's samples:
w = N softmax(A / tau) over the prompt's N samples, so that a prompt's weights have mean 1;
loss = mean of w d_theta. Small tau imitates the best alone, large tau all alike.
It trains on all drawn samples of vanilla, on targets and bases of dfusion.
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
from bench_dfusion.objectives.denoising import at_levels, noised


class RWRConfig(AdvantageConfig):
    tau: Annotated[float, Between(0.1, 10.0)] = Field(
        1.0, gt=0, description="temperature of the weights, in advantages (spreads of the reward; own choice: 1)"
    )


class RWR(Algorithm):
    name = "rwr"
    summary = "reward-weighted imitation of all drawn samples (vanilla) or of targets and bases (dfusion)"
    paper = "Peters & Schaal 2007 (RWR); for diffusion Black et al. 2023, §4.1"
    Config: ClassVar[type[AlgorithmConfig]] = RWRConfig
    offline = True
    config: RWRConfig

    def prepare(self, policy: Policy, samples: ConsistentSamples, generator: torch.Generator) -> Rows:
        rows = at_levels(policy, samples.train, self.config, generator)
        advantage = advantages(
            samples.samples, samples.train, self.config.advantage_clip, self.config.spread, self.config.components
        )
        weight = rwr_weights(advantage, prompt_groups(samples.samples, samples.train), self.config.tau)
        rows["weight"] = weight.repeat_interleave(self.config.timesteps)
        return rows

    def loss(self, policy: Policy, samples: ConsistentSamples, rows: Rows) -> Loss:
        at = noised(policy, samples, rows["row"], rows["t"], rows["noise"])
        error = at.error(policy, at.output(policy))
        return Loss((rows["weight"].to(error.device) * error).mean(), {"error": error.detach().mean()})


def rwr_weights(advantage: Tensor, group: Tensor, tau: float) -> Tensor:
    """The weight of each sample [M] from its advantage and its prompt's number [M]: mean 1 in every prompt."""
    weight = torch.empty_like(advantage)
    for number in group.unique():
        own = group == number
        weight[own] = own.sum() * (advantage[own] / tau).softmax(0)
    return weight
