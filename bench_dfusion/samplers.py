"""Step mathematics of the denoising process as a policy: pure functions on tensors.

DDIM with eta > 0 (Song et al. 2020, eqs. 12 and 16) is a Gaussian policy for every step, as in DDPO
(Black et al. 2023, §4.2): x_s ~ N(mu_theta(x_t), sigma_t^2 I).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MIN_STD = 1e-4  # below it a step counts as deterministic and has no log-prob


@dataclass(frozen=True)
class Schedule:
    """The steps a sampler takes, noisiest first; every tensor is float32 or int64 of shape [T].

    `alpha_t`, `alpha_s` are the cumulative products before and after the step, `std` its sigma_t.
    """

    timesteps: Tensor
    alpha_t: Tensor
    alpha_s: Tensor
    std: Tensor
    prediction_type: str

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def stochastic(self) -> Tensor:
        """Which steps [T] have a density."""
        return self.std > MIN_STD

    def to(self, device: torch.device) -> Schedule:
        t, a_t, a_s, std = (x.to(device) for x in (self.timesteps, self.alpha_t, self.alpha_s, self.std))
        return Schedule(t, a_t, a_s, std, self.prediction_type)


def ddim_schedule(scheduler: Any, steps: int, eta: float) -> Schedule:
    """The schedule of a diffusers DDIM-compatible scheduler's configuration.

    The step after timestep t goes to the next timestep of the schedule, the last one to timestep 0
    (never `final_alpha_cumprod`). Raises ValueError on settings under which the steps are not the
    Gaussian policy of the papers.
    """
    config: Mapping[str, Any] = scheduler.config
    if config.get("clip_sample") or config.get("thresholding"):
        raise ValueError(
            "the scheduler clips predictions (clip_sample or thresholding): the step's mean is then not the "
            "network's and its log-prob has no useful gradient; save the scheduler with clip_sample=False, "
            "thresholding=False"
        )
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(f"prediction_type {prediction!r} is not supported (epsilon, v_prediction)")
    if not 0 < eta <= 1:
        raise ValueError(f"eta must be in (0, 1], not {eta}: at 0 the sampler is deterministic and no policy")
    scheduler.set_timesteps(steps)
    timesteps = torch.as_tensor(scheduler.timesteps).long().cpu()
    if len(timesteps) != steps:
        raise ValueError(
            f"the scheduler made {len(timesteps)} steps of {steps}: only first-order samplers are policies"
        )
    cumulative = scheduler.alphas_cumprod.double().cpu()
    if cumulative[timesteps[0]] < 1e-8 and prediction == "epsilon":
        raise ValueError(
            "a zero-terminal-SNR schedule needs v_prediction: epsilon says nothing of x_0 at the first step"
        )
    after = torch.cat([timesteps[1:], torch.zeros(1, dtype=torch.long)])
    a_t, a_s = cumulative[timesteps], cumulative[after]
    std = eta * ((1 - a_s) / (1 - a_t)).sqrt() * (1 - a_t / a_s).clamp(min=0).sqrt()
    return Schedule(timesteps, a_t.float(), a_s.float(), std.float(), prediction)


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


def predict_clean(schedule: Schedule, step: Tensor, x_t: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """(x_0, epsilon) that a network's output says, both shaped like x_t [B, ...]; `step` [B] are step indices."""
    clean = clean_from_output(schedule.alpha_t, step, x_t, output, schedule.prediction_type)
    if schedule.prediction_type == "epsilon":
        return clean, output
    a = _column(schedule.alpha_t[step], x_t)
    return clean, a.sqrt() * output + (1 - a).sqrt() * x_t


def clean_from_output(alphas_cumprod: Tensor, t: Tensor, x_t: Tensor, output: Tensor, prediction_type: str) -> Tensor:
    """x_0 that a network's output (epsilon or v) says at x_t [B, ...]; `t` [B] indexes `alphas_cumprod`."""
    a = _column(alphas_cumprod[t], x_t)
    if prediction_type == "epsilon":
        return (x_t - (1 - a).sqrt() * output) / a.sqrt()
    return a.sqrt() * x_t - (1 - a).sqrt() * output


def step_mean(schedule: Schedule, step: Tensor, x_t: Tensor, output: Tensor) -> Tensor:
    """mu_theta of x_s given x_t [B, ...] and the network's (guided) output, in float32 (Song et al. eq. 12)."""
    x_t, output = x_t.float(), output.float()
    clean, epsilon = predict_clean(schedule, step, x_t, output)
    a_s = _column(schedule.alpha_s[step], x_t)
    std = _column(schedule.std[step], x_t)
    return a_s.sqrt() * clean + (1 - a_s - std**2).clamp(min=0).sqrt() * epsilon


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


def add_noise(alphas_cumprod: Tensor, t: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    """The forward process: sqrt(a_t) x_0 + sqrt(1 - a_t) eps, `t` [B] training timesteps."""
    a = _column(alphas_cumprod[t], clean)
    return a.sqrt() * clean + (1 - a).sqrt() * noise


def training_target(alphas_cumprod: Tensor, t: Tensor, clean: Tensor, noise: Tensor, prediction_type: str) -> Tensor:
    """What the network should output at (t, noise): epsilon, or v = sqrt(a) eps - sqrt(1 - a) x_0."""
    if prediction_type == "epsilon":
        return noise
    a = _column(alphas_cumprod[t], clean)
    return a.sqrt() * noise - (1 - a).sqrt() * clean


def sample_noise(seeds: Tensor, steps: int, shape: tuple[int, ...]) -> Tensor:
    """Start noise and each step's z: [B, steps + 1, *shape] float32 on the CPU.

    Each sample's numbers come from a generator seeded by its own seed alone, so they do not depend on
    the batch, the process or the device it is drawn with.
    """
    return torch.stack(
        [torch.randn(steps + 1, *shape, generator=torch.Generator().manual_seed(int(s))) for s in seeds.tolist()]
    )
