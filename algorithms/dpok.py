"""DPOK: DDPO's policy gradient, and the exact KL to the base at every step.

loss = (DDPO's term) + kl KL(pi_theta || pi_ref), KL = |mu_theta - mu_ref|^2 / (2 sigma_t^2) averaged over the latent
like the log-probs, at the stored x_t: two Gaussians of one sigma_t. The base's means are computed once a round.
It trains on `samples.train` as `ddpo` does: the drawn samples of a builder without fusion, D-Fusion's targets and
bases otherwise, pi_old being the plain policy at the start of the round. Advantages are DDPO's in place of the
paper's raw reward or learned value function.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from bench_dfusion.algorithms.ddpo import DDPO, DDPOConfig
from pydantic import Field

from bench_dfusion.algorithm import AlgorithmConfig, Between, Loss, Rows
from bench_dfusion.builders.contract import ConsistentSamples
from bench_dfusion.builders.stored_steps import all_means, stored_steps
from bench_dfusion.diffusion.policy import Policy
from bench_dfusion.diffusion.samplers import gaussian_kl


class DPOKConfig(DDPOConfig):
    kl: Annotated[float, Between(0.01, 10.0)] = Field(
        0.1,
        ge=0,
        description="weight of the KL to the base (advantages of 1 standard deviation per nat; ours: 1 lets a reward "
        "rise by about 1 sd in all, 0.1 barely holds). The authors' weights do not carry over: their code takes "
        "(eps - eps_ref)^2 without 1/(2 sigma^2). The D3PO repository's DPOK is another formula",
    )


class DPOK(DDPO):
    name = "dpok"
    summary = (
        "ddpo, on drawn samples (vanilla) or targets and bases (dfusion), plus the exact KL to the base at every step"
    )
    paper = "Fan et al. 2023 (DPOK), §4.2 and Algorithm 1"
    Config: ClassVar[type[AlgorithmConfig]] = DPOKConfig
    config: DPOKConfig

    def prepare(self, policy: Policy, samples: ConsistentSamples, generator: torch.Generator) -> Rows:
        rows = super().prepare(policy, samples, generator)
        with policy.reference():
            rows["ref_mean"] = all_means(policy, samples, rows["row"], rows["step"])
        return rows

    def loss(self, policy: Policy, samples: ConsistentSamples, rows: Rows) -> Loss:
        at = stored_steps(policy, samples, rows["row"], rows["step"])
        terms, metrics = self.policy_gradient(at, rows)
        kl = gaussian_kl(at.mean, rows["ref_mean"].to(at.mean.device), at.std)
        metrics["kl"] = kl.detach().mean()
        return Loss((rows["weight"].to(kl.device) * (terms + self.config.kl * kl)).mean(), metrics)
