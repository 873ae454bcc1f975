"""A policy small enough to train in a test: one attention layer on latents of a few numbers, a real DDIMScheduler; a reward;
samples of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from bench_dfusion.builders.contract import ConsistentSamples, Samples
from bench_dfusion.diffusion.policy import Policy, Trajectory
from bench_dfusion.models import layout
from bench_dfusion.models.base import Adapter, Conditioning
from bench_dfusion.rewards.contract import Reward, RewardConfig
from bench_dfusion.util import files

WIDTH = 8


def ddim(**settings: Any) -> DDIMScheduler:
    """Stable Diffusion's schedule, without the clipping that training refuses."""
    stable = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
    }
    return DDIMScheduler(**{**stable, **settings})


class Attention(nn.Module):
    """Softmax attention of every position to every other, with the projections' names that LoRA looks for."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.to_q(x) @ self.to_k(x).transpose(1, 2) / WIDTH**0.5).softmax(-1)
        return self.to_out[0](weights @ self.to_v(x))


class Network(nn.Module):
    """Latents [B, C, H, W], timesteps [B] and text [B, WIDTH] to an output like the latents. `calls` remembers inputs."""

    def __init__(self, channels: int, scale: float):
        super().__init__()
        self.into, self.attn1, self.out = nn.Linear(channels, WIDTH), Attention(), nn.Linear(WIDTH, channels)
        self.scale = scale
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        self.calls.append((x.detach().clone(), timestep.clone()))
        frequencies = torch.arange(WIDTH, device=x.device) / WIDTH
        time = torch.cos(timestep[:, None] / 1000 * 6 * frequencies)  # the first entry is 1 at any time: a bias
        positions = self.into(x.flatten(2).transpose(1, 2)) + (time + text)[:, None]
        output = self.out(positions + self.attn1(positions))
        return self.scale * output.transpose(1, 2).reshape(x.shape)


class FakeAdapter(Adapter):
    """Prompts are embedded by their letters, pictures are the first three channels."""

    pipelines = ()
    network_name = "net"

    def __init__(self, shape: tuple[int, int, int], scale: float, seed: int, scheduler: Any):
        self._shape = shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = Network(shape[0], scale)
        super().__init__(SimpleNamespace(net=network, scheduler=scheduler, tokenizer=None, components={"net": network}))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self._shape

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        letters = [torch.Generator().manual_seed(sum(p.encode())) for p in prompts]
        return {"text": torch.stack([torch.randn(WIDTH, generator=g) for g in letters])}

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        return self.network(latents, timestep, conditioning["text"])

    def map_sides(self) -> tuple[int, ...]:
        return (self._shape[-1],)

    def fused_layers(self) -> tuple[str, ...]:
        return ("attn1",)

    def save_lora(self, folder: Path, layers: Mapping[str, Tensor], scale: Mapping[str, Any]) -> None:
        files.save_tensors(folder / layout.LORA, {f"net.{name}": value for name, value in layers.items()})

    def decode(self, latents: Tensor) -> Tensor:
        return latents.repeat(1, 3, 1, 1)[:, :3].sigmoid()


def fake_policy(
    *,
    shape: tuple[int, int, int] = (2, 2, 2),
    steps: int = 4,
    scale: float = 1.0,
    seed: int = 0,
    scheduler: Any = None,
    **options: Any,
) -> Policy:
    """A policy whose network is drawn from `seed`; `scale` 0.1 leaves it nearly the exact one of N(0, 1) data,
    whose v is 0."""
    adapter = FakeAdapter(shape, scale, seed, scheduler or ddim())
    return Policy(adapter, steps=steps, **{"batch": 16, "seed": seed, **options})


class Red(Reward):
    """The mean of the first channel."""

    name, summary, paper, unit = "red", "", "", ""
    differentiable = True

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images[..., 0].float().div(255).flatten(1).mean(1)

    def score_tensors(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images[:, 0].flatten(1).mean(1)

    def fingerprint(self) -> str:
        return "red"


RED = Red(RewardConfig())


def shake(policy: Policy, size: float = 0.1, seed: int = 1) -> None:
    """Move the LoRA off zero, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters.values():
            p.add_(size * torch.randn(p.shape, generator=generator))


def draw(policy: Policy, prompts: Sequence[str], rewards: Sequence[float] | None = None, first: int = 0) -> Samples:
    """Samples of the policy with given rewards, or with reward 0, 1, 2, ..."""
    trajectory = policy.sample(list(prompts), torch.arange(first, first + len(prompts)))
    values = torch.arange(len(prompts)).float() if rewards is None else torch.tensor(rewards)
    return Samples(trajectory, policy.decode(trajectory.final), values)


def with_targets(policy: Policy, drawn: Samples) -> ConsistentSamples:
    """What a fusing builder returns: a target for each drawn sample, drawn by another prediction than the plain one."""

    def fuse(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + 0.5

    hook = policy.adapter.network.get_submodule("attn1.to_v").register_forward_hook(fuse)
    try:
        trajectory: Trajectory = policy.sample(drawn.prompts, drawn.trajectory.seeds)
    finally:
        hook.remove()
    n = len(drawn)
    samples = Samples.cat([drawn, Samples(trajectory, policy.decode(trajectory.final), drawn.rewards + 1)])
    bases, targets = torch.arange(n), torch.arange(n, 2 * n)
    return ConsistentSamples(
        samples,
        drawn=n,
        pairs=torch.stack([targets, bases], 1),
        train=torch.cat([targets, bases]),
        triples=torch.stack([bases, bases, targets], 1),
    )
