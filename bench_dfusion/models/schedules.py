"""Noise levels and schedules: which latents a model's steps start from and where they go, as tables of coefficients.

Every latent is x_t = signal · x_0 + noise · epsilon, and every step a Gaussian x_s ~ N(mu_theta(x_t), std^2 I) with
mu = signal_s · x_0 + direction · epsilon, of what the network says of x_0 and epsilon. DDIM with eta > 0
(Song et al. 2020, eqs. 12 and 16; as a policy Black et al. 2023, §4.2), Flow-GRPO's SDE (Liu et al. 2025) and
coefficients-preserving sampling (2509.05952) differ in the coefficients alone. Without noise each is the ODE's step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

MIN_STD = 1e-4  # below it a step counts as deterministic and has no log-prob


@dataclass(frozen=True)
class Levels:
    """Noise levels: tensors of shape [N], float32 but for DDPM's timesteps, which are int64.

    timesteps      what the network is told
    signal, noise  x_t = signal · x_0 + noise · epsilon
    time           the place on the way from pictures to noise, in (0, 1]
    prediction_type   what the network predicts: "epsilon", "v_prediction" (Salimans & Ho 2022) or "velocity", epsilon - x_0
    """

    timesteps: Tensor
    signal: Tensor
    noise: Tensor
    time: Tensor
    prediction_type: str

    def __len__(self) -> int:
        return len(self.timesteps)

    def to(self, device: torch.device) -> Self:
        own: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in own.items()}
        return type(self)(**moved)


@dataclass(frozen=True)
class Schedule(Levels):
    """The levels that a sampler's T steps start from, noisiest first, and where each step goes.

    signal_s, direction  the mean of x_s is signal_s · x_0 + direction · epsilon
    std                  its standard deviation
    size                 the time that the step crosses
    """

    signal_s: Tensor
    direction: Tensor
    std: Tensor
    size: Tensor

    @property
    def stochastic(self) -> Tensor:
        """Which steps [T] have a density."""
        return self.std > MIN_STD


def noisy_at(schedule: Schedule, ode: Schedule, steps: Tensor) -> Schedule:
    """`schedule` with its noise at step indices `steps` [W] alone; the other steps are those of `ode`, the same levels
    without noise (MixGRPO, 2507.21802, §3.2). With all steps it is `schedule` to the bit."""
    noisy = torch.zeros(len(schedule), dtype=torch.bool, device=schedule.std.device)
    noisy[steps.to(noisy.device)] = True
    std, direction = torch.where(noisy, schedule.std, ode.std), torch.where(noisy, schedule.direction, ode.direction)
    return replace(schedule, std=std, direction=direction)


def ddpm_levels(scheduler: Any) -> Levels:
    """The training timesteps of a diffusers scheduler over discrete betas, the cleanest first (Ho et al. 2020)."""
    alpha = scheduler.alphas_cumprod.float().cpu()
    t = torch.arange(len(alpha))
    time = (t + 1) / len(alpha)
    return Levels(t, alpha.sqrt(), (1 - alpha).sqrt(), time, scheduler.config.get("prediction_type", "epsilon"))


def joined(levels: Levels, more: Levels) -> Levels:
    """The levels of both in one table, those of `more` after the others; both must be of one kind of prediction."""
    own = (f.name for f in fields(Levels) if f.name != "prediction_type")
    columns = {name: torch.cat([getattr(levels, name), getattr(more, name)]) for name in own}
    return Levels(**columns, prediction_type=levels.prediction_type)


def check_noise(kind: str, eta: float) -> None:
    """Raises ValueError where a sampler cannot have this noise."""
    if kind not in ("native", "cps"):
        raise ValueError(f"sampler kind {kind!r} is neither native nor cps")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], not {eta}")


def preserving(noise_s: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """(std, direction) of coefficients-preserving steps to levels of noise `noise_s` [T] (2509.05952): of the noise of a
    level sin(eta pi / 2) is new and cos(eta pi / 2) the old one's, so that direction² + std² = noise_s² exactly."""
    angle = eta * math.pi / 2
    return noise_s * math.sin(angle), noise_s * (math.cos(angle) if eta < 1 else 0.0)


def ddim_schedule(scheduler: Any, steps: int, eta: float, kind: str = "native") -> Schedule:
    """The schedule of a diffusers DDIM-compatible scheduler's configuration; `kind`: "native" (DDIM's noise) or "cps".

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
    check_noise(kind, eta)
    total = len(scheduler.alphas_cumprod)
    if steps > total:
        raise ValueError(f"track.sampler.steps is {steps}, and the schedule has {total} steps: take at most as many")
    try:
        scheduler.set_timesteps(steps)
    except (TypeError, ArithmeticError) as error:  # a setting that is null, or of another kind
        raise ValueError(f"the scheduler's settings make no {steps} steps: {error}") from None
    timesteps = torch.as_tensor(scheduler.timesteps).long().cpu()
    if len(timesteps) != steps:
        raise ValueError(
            f"the scheduler made {len(timesteps)} steps of {steps}: rounding does so at some numbers (take another one), "
            "and samplers that are not first-order at every number, which are no policies"
        )
    if not 0 <= timesteps.min() <= timesteps.max() < total:
        offset = config.get("steps_offset", 0)
        raise ValueError(
            f"with track.sampler.steps {steps} and the scheduler's steps_offset {offset} the first step is from timestep "
            f"{timesteps.max()}, and the last that there is is {total - 1}: take fewer steps"
        )
    if not timesteps.any():
        raise ValueError(
            f"with track.sampler.steps {steps} the only step is from timestep 0, where there is no noise: take more steps"
        )
    cumulative = scheduler.alphas_cumprod.double().cpu()
    if cumulative[timesteps[0]] < 1e-8 and prediction == "epsilon":
        raise ValueError(
            "a zero-terminal-SNR schedule needs v_prediction: epsilon says nothing of x_0 at the first step"
        )
    after = torch.cat([timesteps[1:], torch.zeros(1, dtype=torch.long)])
    a_t, a_s = cumulative[timesteps], cumulative[after]
    std = (eta * ((1 - a_s) / (1 - a_t)).sqrt() * (1 - a_t / a_s).clamp(min=0).sqrt()).float()
    a_t, a_s = a_t.float(), a_s.float()
    direction = (1 - a_s - std**2).clamp(min=0).sqrt()
    if kind == "cps":
        std, direction = preserving((1 - a_s).sqrt(), eta)
    return Schedule(
        timesteps,
        signal=a_t.sqrt(),
        noise=(1 - a_t).sqrt(),
        time=(timesteps + 1) / total,
        prediction_type=prediction,
        signal_s=a_s.sqrt(),
        direction=direction,
        std=std,
        size=(timesteps - after) / total,
    )


def flow_levels(sigmas: Tensor, timesteps: Tensor) -> Levels:
    """The levels of flow matching at `sigmas` [N], noisiest first as given: x_t = (1 - sigma) x_0 + sigma epsilon."""
    sigmas = sigmas.float()
    return Levels(timesteps.float(), 1 - sigmas, sigmas, sigmas, "velocity")


def flow_schedule(sigmas: Tensor, timesteps: Tensor, noise_level: float, kind: str = "native") -> Schedule:
    """Flow-GRPO's SDE (Liu et al. 2025, 2505.05470) over `sigmas` [T + 1] from noise to pictures.

    With t = sigmas[i], dt = sigmas[i + 1] - t < 0 and s = a sqrt(t / (1 - t)), a the noise level (published: 0.7):
    mu = x_t (1 + s² dt / 2t) + v (1 + s² (1 - t) / 2t) dt and std = s sqrt(-dt). Since epsilon = x_t + (1 - t) v
    that is (1 - t - dt) x_0 + (t + dt - std² / 2t) epsilon. At t = 1 the next sigma stands in s, as in their code.
    The last step goes to x_0 itself and has no noise, which would stay in the picture (0.1 in FLUX's 20 steps).
    With `kind` "cps" the noise is that of coefficients-preserving sampling, of eta `noise_level`.
    Raises ValueError where the sigmas do not fall or the noise level is not in [0, 1].
    """
    check_noise(kind, noise_level)
    sigmas = sigmas.double().cpu()
    t, after = sigmas[:-1], sigmas[1:]
    if not ((t > after).all() and t[0] <= 1 and after[-1] == 0):
        raise ValueError(f"a flow's sigmas fall from at most 1 to 0, and these are {sigmas.tolist()}")
    size = t - after
    std = noise_level * (t / (1 - torch.where(t == 1, after, t)) * size).sqrt() * (after > 0)
    direction = after - std**2 / (2 * t)
    if kind == "cps":
        std, direction = preserving(after, noise_level)
    levels = flow_levels(t, timesteps.cpu())
    rest: dict[str, Any] = {"signal_s": 1 - after, "direction": direction, "std": std, "size": size}
    return Schedule(**vars(levels), **{k: v.float() for k, v in rest.items()})
