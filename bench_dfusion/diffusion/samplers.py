"""Step mathematics of the denoising process as a policy: pure functions on tensors, of the coefficients in `schedules`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bench_dfusion.models.schedules import MIN_STD, Levels, Schedule


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


def _at(levels: Levels, index: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """(signal, noise) at levels `index` [B], to be multiplied with tensors shaped like `like` [B, ...]."""
    return _column(levels.signal[index], like), _column(levels.noise[index], like)


def predict_clean(levels: Levels, index: Tensor, x_t: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """(x_0, epsilon) that a network's output says at levels `index` [B], both shaped like x_t [B, ...]."""
    signal, noise = _at(levels, index, x_t)
    if levels.prediction_type == "epsilon":
        return (x_t - noise * output) / signal, output
    if levels.prediction_type == "velocity":
        return x_t - noise * output, x_t + signal * output
    return signal * x_t - noise * output, signal * output + noise * x_t


def velocity_slope(levels: Levels, index: Tensor) -> Tensor:
    """d (epsilon - x_0) / d output [B] at levels `index` [B]: what a change of the network's output makes of the velocity."""
    signal, noise = levels.signal[index], levels.noise[index]
    if levels.prediction_type == "velocity":
        return torch.ones_like(signal)
    return (signal + noise) / signal if levels.prediction_type == "epsilon" else signal + noise


def step_mean(schedule: Schedule, step: Tensor, x_t: Tensor, output: Tensor) -> Tensor:
    """mu_theta of x_s given x_t [B, ...] and the network's (guided) output, in float32; `step` [B] are step indices."""
    x_t, output = x_t.float(), output.float()
    clean, epsilon = predict_clean(schedule, step, x_t, output)
    return _column(schedule.signal_s[step], x_t) * clean + _column(schedule.direction[step], x_t) * epsilon


def gaussian_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(x; mean, std^2 I) *averaged* over all but the first dimension, [B]; `std` [B].

    Averaging is the convention of ddpo-pytorch, D3PO and D-Fusion: published betas and clip ranges assume it.
    Steps with std <= MIN_STD give 0.
    """
    safe = torch.where(std > MIN_STD, std, torch.ones_like(std))
    column = _column(safe, x)
    density = -((x.float() - mean.float()) ** 2) / (2 * column**2) - column.log() - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1) * (std > MIN_STD)


def gaussian_kl(mean: Tensor, other: Tensor, std: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(other, std^2)) averaged over all but the first dimension, [B]."""
    safe = torch.where(std > MIN_STD, std, torch.ones_like(std))
    return ((mean - other) ** 2).flatten(1).mean(1) / (2 * safe**2) * (std > MIN_STD)


def add_noise(levels: Levels, index: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    """The forward process x_t = signal · x_0 + noise · epsilon at levels `index` [B]."""
    a, b = _at(levels, index, clean)
    return a * clean + b * noise


def training_target(levels: Levels, index: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    """What the network should output there: epsilon, v = signal · epsilon - noise · x_0, or the velocity epsilon - x_0."""
    if levels.prediction_type == "epsilon":
        return noise
    if levels.prediction_type == "velocity":
        return noise - clean
    a, b = _at(levels, index, clean)
    return a * noise - b * clean


def sample_noise(seeds: Tensor, steps: int, shape: tuple[int, ...]) -> Tensor:
    """Start noise and each step's z: [B, steps + 1, *shape] float32 on the CPU.

    Each sample's numbers come from a generator seeded by its own seed alone, so they do not depend on
    the batch, the process or the device it is drawn with.
    """
    return torch.stack(
        [torch.randn(steps + 1, *shape, generator=torch.Generator().manual_seed(int(s))) for s in seeds.tolist()]
    )
