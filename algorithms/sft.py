"""SFT: the winners are the data, and the network is fine-tuned on them as it was pre-trained.

d(x) = mean squared error of the network's prediction at a noised x_0:
loss = mean of d_theta over the winners of the round's pairs, each counted once however many pairs it wins.
The losers are not used: it is the baseline that tells what a preference adds to imitation.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from bench_dfusion.algorithm import Algorithm, AlgorithmConfig, Loss, Rows
from bench_dfusion.builders.contract import ConsistentSamples
from bench_dfusion.diffusion.policy import Policy
from bench_dfusion.objectives.denoising import LevelsConfig, at_levels, noised


class SFTConfig(LevelsConfig):
    pass


class SFT(Algorithm):
    name = "sft"
    summary = "fine-tuning on the pairs' winners by the denoising error; losers are ignored"
    paper = "Ho et al. 2020 (DDPM), eq. 14; supervised baseline of Wallace et al. 2023, §5"
    Config: ClassVar[type[AlgorithmConfig]] = SFTConfig
    needs_pairs = True
    offline = True
    config: SFTConfig

    def prepare(self, policy: Policy, samples: ConsistentSamples, generator: torch.Generator) -> Rows:
        return at_levels(policy, samples.pairs[:, 0].unique(), self.config, generator)

    def loss(self, policy: Policy, samples: ConsistentSamples, rows: Rows) -> Loss:
        at = noised(policy, samples, rows["row"], rows["t"], rows["noise"])
        return Loss(at.error(policy, at.output(policy)).mean())
