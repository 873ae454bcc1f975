"""The forward process: final latents noised again, and how far the network's prediction is from the truth there.

For algorithms that learn from finished pictures and need no trajectory (Ho et al. 2020, eq. 4 and 14).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, TypeAdapter, ValidatorFunctionWrapHandler, WrapValidator
from torch import Tensor

from bench_dfusion.algorithm import AlgorithmConfig, Rows
from bench_dfusion.builders.contract import ConsistentSamples, Share
from bench_dfusion.diffusion import samplers
from bench_dfusion.diffusion.policy import Policy, in_batches


def _where(value: Any, union: ValidatorFunctionWrapHandler) -> Any:
    if value == "sampler":
        return value
    if isinstance(value, str):
        raise ValueError("a share [from, to) of the training timesteps, or sampler")
    return TypeAdapter(Share).validate_python(value)  # and not the union, whose errors name its members


Where = Annotated[tuple[float, float] | Literal["sampler"], WrapValidator(_where)]


class LevelsConfig(AlgorithmConfig):
    """Options of the algorithms that noise single samples' final latents again."""

    timesteps: int = Field(
        4, ge=1, description="noise levels drawn for each sample (or group) in a round (count; DGPO's code: 4)"
    )
    levels: Where = Field(
        (0.0, 1.0),
        description="share of the training timesteps drawn from, [from, to), 0 the cleanest (DDPM: all), or sampler: the "
        "timesteps of the track's sampler alone, all of its steps alike (DiffusionNFT, AWM and DGPO draw from these, or "
        "from most of them)",
    )


@dataclass
class Noised:
    """Final latents noised to levels t [B] of the policy's: x_t, clean and noise are [B, C, H, W]."""

    x_t: Tensor
    t: Tensor
    clean: Tensor
    noise: Tensor
    prompts: list[str]

    def output(self, policy: Policy) -> Tensor:
        """The network's (guided) output [B, C, H, W], float32."""
        return policy.predict(self.x_t, policy.levels.timesteps[self.t], self.prompts)

    def target(self, policy: Policy) -> Tensor:
        """What it should be: epsilon, v or the velocity, as the network predicts."""
        return samplers.training_target(policy.levels, self.t, self.clean, self.noise)

    def error(self, policy: Policy, output: Tensor) -> Tensor:
        """d [B]: the mean squared error of an output."""
        return mean_square(output - self.target(policy))

    def clean_of(self, policy: Policy, output: Tensor) -> Tensor:
        """x_0 [B, C, H, W] that an output says."""
        return samplers.predict_clean(policy.levels, self.t, self.x_t, output)[0]


def mean_square(difference: Tensor) -> Tensor:
    """The mean of the squares over all but the first dimension, [B]."""
    return (difference**2).flatten(1).mean(1)


def self_normalised(difference: Tensor) -> Tensor:
    """mean e^2 / max(mean |e|, 1e-5) of differences e [B, ...], the divisor without gradient: [B] (DiffusionNFT's code)."""
    return mean_square(difference) / difference.abs().flatten(1).mean(1).clamp(min=1e-5).detach()


def draw_levels(policy: Policy, rows: int, levels: Where, generator: torch.Generator) -> Rows:
    """For each of `rows` a level of the policy's and a noise's seed. Levels are uniform over the share `levels` of the
    training timesteps (0 the cleanest) or over the steps of the policy's sampler."""
    first, total = 0, policy.training_levels
    if isinstance(levels, str):
        first, total, levels = total, len(policy.levels) - total, (0.0, 1.0)
    low, high = levels
    u = torch.rand(rows, generator=generator)
    return {
        "t": first + ((low + u * (high - low)) * total).long().clamp(max=total - 1),
        "noise": torch.randint(2**62, (rows,), generator=generator),
    }


def at_levels(policy: Policy, samples: Tensor, config: LevelsConfig, generator: torch.Generator) -> Rows:
    """Each of sample rows [M] at `config.timesteps` levels of its own: `row`, `t` and `noise`, [M · timesteps]."""
    row = samples.repeat_interleave(config.timesteps)
    return {"row": row, **draw_levels(policy, len(row), config.levels, generator)}


def noised(policy: Policy, samples: ConsistentSamples, rows: Tensor, t: Tensor, seeds: Tensor) -> Noised:
    """The final latents of sample rows [B] at levels t [B] of the policy's, with the noise of `seeds` [B]."""
    trajectory = samples.samples.trajectory
    clean = trajectory.final[rows].to(policy.device)
    noise = samplers.sample_noise(seeds, 0, tuple(clean.shape[1:]))[:, 0].to(policy.device)
    t = t.to(policy.device)
    x_t = samplers.add_noise(policy.levels, t, clean, noise)
    return Noised(x_t, t, clean, noise, [trajectory.prompts[i] for i in rows.tolist()])


def all_outputs(policy: Policy, samples: ConsistentSamples, rows: Tensor, t: Tensor, seeds: Tensor) -> Tensor:
    """The network's outputs at many noised rows, without gradients, in the policy's batches: [R, C, H, W] on the CPU."""
    shape = policy.adapter.latent_shape
    return in_batches(policy, lambda *part: noised(policy, samples, *part).output(policy), rows, t, seeds, shape=shape)


def all_errors(policy: Policy, samples: ConsistentSamples, rows: Tensor, t: Tensor, seeds: Tensor) -> Tensor:
    """The denoising errors d of many noised rows, likewise: [R] on the CPU."""

    def errors(*part: Tensor) -> Tensor:
        at = noised(policy, samples, *part)
        return at.error(policy, at.output(policy))

    return in_batches(policy, errors, rows, t, seeds)
