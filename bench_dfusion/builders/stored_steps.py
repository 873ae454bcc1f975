"""Stored denoising steps under the policy as it is now: what the network says there, and the Gaussian that follows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench_dfusion.builders.contract import ConsistentSamples
from bench_dfusion.diffusion import samplers
from bench_dfusion.diffusion.policy import Policy, in_batches


@dataclass
class Steps:
    """B steps x_t -> x_s ~ N(mean, std^2).

    output    the network's (guided) output [B, ...]
    mean, std the Gaussian's, [B, ...] and [B]
    log_prob  of the stored x_s [B], averaged over the latent
    """

    output: Tensor
    mean: Tensor
    std: Tensor
    log_prob: Tensor


def stored_output(policy: Policy, samples: ConsistentSamples, rows: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """The stored latents x_t at steps (rows [B] of the samples, step numbers [B]) and the network's output there, [B, ...]."""
    trajectory = samples.samples.trajectory
    x_t = trajectory.latents[rows, steps].to(policy.device)
    timesteps = policy.schedule.timesteps[steps.to(policy.device)]
    return x_t, policy.predict(x_t, timesteps, [trajectory.prompts[i] for i in rows.tolist()])


def stored_steps(policy: Policy, samples: ConsistentSamples, rows: Tensor, steps: Tensor, leaf: bool = False) -> Steps:
    """The stored steps (rows [B] of the samples, step numbers [B]) under the policy, as `Policy.log_prob` has them.

    leaf   gradients end at the network's output: they are wanted there and not for the parameters
    """
    step, x_s = steps.to(policy.device), samples.samples.trajectory.latents[rows, steps + 1].to(policy.device)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not leaf):
        x_t, output = stored_output(policy, samples, rows, steps)
    output = output.requires_grad_() if leaf else output
    mean, std = samplers.step_mean(policy.schedule, step, x_t, output), policy.schedule.std[step]
    return Steps(output, mean, std, samplers.gaussian_log_prob(x_s, mean, std))


def all_means(policy: Policy, samples: ConsistentSamples, rows: Tensor, steps: Tensor) -> Tensor:
    """The means of many stored steps without gradients, in the policy's batches: [R, ...] on the CPU."""
    shape = policy.adapter.latent_shape
    return in_batches(policy, lambda *part: stored_steps(policy, samples, *part).mean, rows, steps, shape=shape)
