"""FDFO: the reward's difference between two endings of one prompt as a finite difference along their difference.

Of a pair (1, 2): delta = (x0_1 - x0_2) / 2 and R = (r_1 - r_2) / 2 for member 1, both with the other sign for member 2.
f is the velocity that the network says at a stored x_t of a member's own trajectory, epsilon - x_0, whatever it predicts;
f_old is the plain policy's at the start of the round. A step along u = delta / (mean delta^2 + 1e-6) would be f_old - u:
rho = exp(-mean (f - f_old)^2 - 2 mean (f - f_old) u), which is 1 at first,
loss = -R rho + |R| / (2 c) (rho - 1)^2 + kl mean (f - f_base)^2, mean over both members and all steps, unweighted.
The optimum is rho = 1 + c sign R: R only weighs the rows against each other.

D-Fusion's base and target are such a pair, with fusion as the perturbation: all targets are taken, those that lost too.
Of other builders the pairs are the best and the worst ending, or the references and their bases.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from bench_dfusion.algorithm import Algorithm, AlgorithmConfig, Between, Loss, Rows, window_steps
from bench_dfusion.builders.contract import ConsistentSamples, Share
from bench_dfusion.builders.stored_steps import stored_output
from bench_dfusion.diffusion import samplers
from bench_dfusion.diffusion.policy import Policy, in_batches
from bench_dfusion.objectives.denoising import mean_square

EPSILON = 1e-6  # where both members are one picture


class FDFOConfig(AlgorithmConfig):
    trust: Annotated[float, Between(0.01, 0.3)] = Field(
        0.03, gt=0, description="c: how far from 1 the ratio rho may go (1; official: 0.03); the optimum is 1 ± c"
    )
    kl: float = Field(0.0, ge=0, description="weight of the squared distance to the base's velocity (1; official: 0)")
    window: Share = Field(
        (0.0, 1.0),
        description="share of the steps trained on, [from, to) within 0 and 1, in sampling order, 0 the noisiest (1; "
        "official: all)",
    )
    space: Literal["velocity", "output"] = Field(
        "velocity",
        description="where distances are measured: the velocity (official, whose networks predict it), or the network's own "
        "output, in which early steps of epsilon networks count less (1)",
    )


class FDFO(Algorithm):
    name = "fdfo"
    summary = "the reward's finite difference along base and target (dfusion), or along winner and loser (vanilla)"
    paper = "Finite-Difference Flow Optimization 2026 (2603.12893)"
    Config: ClassVar[type[AlgorithmConfig]] = FDFOConfig
    config: FDFOConfig

    def prepare(self, policy: Policy, samples: ConsistentSamples, generator: torch.Generator) -> Rows:
        steps = window_steps(policy, self.config.window, density=False)
        one, two = samples.triples[:, 2], samples.triples[:, 1]
        row, other = torch.cat([one, two]), torch.cat([two, one])
        rewards = samples.samples.rewards
        rows = {
            "row": row.repeat_interleave(len(steps)),
            "other": other.repeat_interleave(len(steps)),
            "step": steps.repeat(len(row)),
            "difference": ((rewards[row] - rewards[other]) / 2).repeat_interleave(len(steps)),
        }
        where, shape = (rows["row"], rows["step"]), policy.adapter.latent_shape

        def velocities(*part: Tensor) -> Tensor:
            return velocity_at(policy, samples, *part)

        rows["old"] = in_batches(policy, velocities, *where, shape=shape)
        if self.config.kl:
            with policy.reference():
                rows["base"] = in_batches(policy, velocities, *where, shape=shape)
        return rows

    def loss(self, policy: Policy, samples: ConsistentSamples, rows: Rows) -> Loss:
        device, final = policy.device, samples.samples.trajectory.final
        velocity = velocity_at(policy, samples, rows["row"], rows["step"])
        delta = (final[rows["row"]] - final[rows["other"]]).to(device) / 2
        moved = velocity - rows["old"].to(device)
        weight = torch.ones(len(moved), device=device)
        if self.config.space == "output":
            weight = samplers.velocity_slope(policy.schedule, rows["step"].to(device)) ** -2
        ratio = fdfo_ratio(moved, delta, weight)
        terms = fdfo_terms(ratio, rows["difference"].to(device), self.config.trust)
        metrics = {"moved": mean_square(moved).detach().mean(), "ratio": ratio.detach().mean()}
        if self.config.kl:
            drift = weight * mean_square(velocity - rows["base"].to(device))
            metrics["drift"] = drift.detach().mean()
            terms = terms + self.config.kl * drift
        return Loss(terms.mean(), metrics)


def velocity_at(policy: Policy, samples: ConsistentSamples, rows: Tensor, steps: Tensor) -> Tensor:
    """f = epsilon - x_0 [B, C, H, W] that the network says at stored latents: rows [B] of the samples, step numbers [B]."""
    x_t, output = stored_output(policy, samples, rows, steps)
    clean, noise = samplers.predict_clean(policy.schedule, steps.to(policy.device), x_t, output)
    return noise - clean


def fdfo_ratio(moved: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
    """rho [B] of f - f_old and delta [B, ...]; `weight` [B] of the squares."""
    along = delta / (mean_square(delta) + EPSILON).view(-1, *[1] * (delta.ndim - 1))
    return torch.exp(-weight * (mean_square(moved) + 2 * (moved * along).flatten(1).mean(1)))


def fdfo_terms(ratio: Tensor, difference: Tensor, trust: float) -> Tensor:
    """The loss of each row [B] from rho and R [B], without what holds to the base."""
    return -difference * ratio + difference.abs() / (2 * trust) * (ratio - 1) ** 2
