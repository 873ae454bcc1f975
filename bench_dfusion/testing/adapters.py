"""The contract of a model family's adapter, as checks on a pipeline's directory, whose weights may be random."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from bench_dfusion.diffusion import lora
from bench_dfusion.diffusion.policy import Policy
from bench_dfusion.models.base import Adapter
from bench_dfusion.models.loading import load_adapter
from bench_dfusion.models.options import ModelSection
from bench_dfusion.testing import contracts
from bench_dfusion.testing.fakes import shake

UNUSED = 0.1  # share of a LoRA's tensors that may have no gradient
PROMPTS = ["a red ring", "two blue rings of another size"]
STEPS = 4
ROUNDING: dict[str, Any] = {"rtol": 2e-3, "atol": 2e-4}  # what the size of a batch may change


@dataclass(frozen=True)
class Case:
    cls: type[Adapter]
    folder: Path

    def made(self) -> Adapter:
        return load_adapter(ModelSection(id=str(self.folder)), kind=self.cls)[0]

    def policy(self, **options: Any) -> Policy:
        return Policy(self.made(), **{"steps": STEPS, "batch": 4, **options})


def check_adapter(cls: type[Adapter], folder: str | Path, *, skip: Collection[str] = ()) -> None:
    """Check that an adapter keeps its contract. Raises ContractError, which names every check that fails and why.

    folder  a pipeline's directory, as `save_pretrained` writes it: small networks with random weights do
    skip    names of checks that are left out
    """
    contracts.run(f"adapter {cls.__name__}", CHECKS, Case(cls, Path(folder)), skip)


def _close(a: Tensor, b: Tensor, what: str) -> None:
    torch.testing.assert_close(a, b, **ROUNDING, msg=lambda m: f"{what}: {m.splitlines()[0]}")


def _noise(adapter: Adapter, rows: int = 2) -> Tensor:
    return torch.randn(rows, *adapter.latent_shape, generator=torch.Generator().manual_seed(0))


def declared(case: Case) -> None:
    """An adapter names the pipeline classes that it serves, the part that denoises, and layers for a LoRA that are there."""
    assert case.cls.pipelines, f"{case.cls.__name__}.pipelines is empty: name the diffusers classes that it serves"
    adapter = case.made()
    own = type(adapter.pipe).__name__
    assert own in case.cls.pipelines, f"the directory holds a {own}, and pipelines are {', '.join(case.cls.pipelines)}"
    assert hasattr(adapter.pipe, case.cls.network_name), f"the pipeline has no part {case.cls.network_name!r}"
    modules = [name for name, _ in adapter.network.named_modules()]
    for target in case.cls.lora_targets:
        assert any(name.endswith(target) for name in modules), f"no module of the network ends with {target!r}"


def encodes(case: Case) -> None:
    """`encode` returns tensors with a row for each prompt, which do not depend on the prompts beside it."""
    adapter = case.made()
    with torch.no_grad():
        together = adapter.encode(PROMPTS)
        alone = [adapter.encode([prompt]) for prompt in PROMPTS]
    for name, values in together.items():
        assert len(values) == len(PROMPTS), f"{name} has {len(values)} rows for {len(PROMPTS)} prompts"
        for row, own in enumerate(alone):
            _close(own[name][0].float(), values[row].float(), f"{name} of prompt {row} alone and beside another")


def predicts(case: Case) -> None:
    """`predict` returns what the network says of each latent, shaped like it; it depends on the latent, the time and the
    prompt, and on no other row."""
    policy = case.policy()
    x, times = _noise(policy.adapter), policy.schedule.timesteps[[0, -1]]
    with torch.no_grad():
        found = policy.predict(x, times, PROMPTS)
        alone = torch.cat([policy.predict(x[i : i + 1], times[i : i + 1], PROMPTS[i : i + 1]) for i in range(2)])
        turned = policy.predict(x, times.flip(0), PROMPTS)
        other = policy.predict(x, times, PROMPTS[::-1])
    assert found.shape == x.shape, f"latents {tuple(x.shape)}, output {tuple(found.shape)}"
    _close(alone, found, "rows alone and together")
    assert not torch.allclose(turned, found), "the output does not depend on the time"
    assert not torch.allclose(other, found), "the output does not depend on the prompt"


def schedules(case: Case) -> None:
    """`schedule` falls from noise to pictures, and `levels` are the noise levels of training, the cleanest first."""
    policy = case.policy()
    schedule, levels = policy.schedule, policy.adapter.levels()
    assert len(schedule) == STEPS, f"{len(schedule)} steps where {STEPS} were asked for"
    assert (schedule.time.diff() < 0).all(), f"the times {schedule.time.tolist()} do not fall"
    assert (levels.time.diff() > 0).all(), "the levels do not begin with the cleanest"
    assert schedule.prediction_type == levels.prediction_type, "schedule and levels predict different things"


def decodes(case: Case) -> None:
    """`decode` makes pictures [B, 3, side, side] in [0, 1] of latents, with gradients, and `encode_images` goes back."""
    adapter = case.made()
    x = _noise(adapter).requires_grad_()
    pictures = adapter.decode(x)
    side = adapter.image_side
    assert pictures.shape == (2, 3, side, side), f"pictures {tuple(pictures.shape)}, image_side {side}"
    assert pictures.min() >= 0 and pictures.max() <= 1, (
        f"from {float(pictures.min()):.3g} to {float(pictures.max()):.3g}"
    )
    (gradient,) = torch.autograd.grad(pictures.sum(), x)
    assert gradient.isfinite().all() and gradient.any(), "decode passes no gradient"
    with torch.no_grad():
        back = adapter.encode_images(pictures.detach())
    assert back.shape == x.shape, f"encode_images gives {tuple(back.shape)} for latents {tuple(x.shape)}"


def samples(case: Case) -> None:
    """A sample depends on its own seed and prompt alone, not on the batch that it is drawn in."""
    seeds = torch.tensor([3, 4])
    policy = case.policy()
    together = policy.sample(PROMPTS, seeds).final
    alone = torch.cat([policy.sample([p], seeds[i : i + 1]).final for i, p in enumerate(PROMPTS)])
    _close(alone, together, "alone and together")
    assert not torch.allclose(together[0], together[1]), "two seeds give one sample"


def trains(case: Case) -> None:
    """A LoRA on `lora_targets` gets a gradient from a step's log-prob; with it off the network is the base."""
    policy = case.policy()
    trajectory = policy.sample(PROMPTS, torch.tensor([3, 4]))
    step = torch.zeros(2, dtype=torch.long)
    x_t, x_s = trajectory.latents[:, 0], trajectory.latents[:, 1]
    with torch.no_grad():
        base = policy.predict(x_t, policy.schedule.timesteps[step], PROMPTS)
    shake(policy)
    policy.log_prob(x_t, x_s, step, PROMPTS).sum().backward()
    without = [name for name, p in policy.parameters.items() if p.grad is None or not p.grad.any()]
    # A last block may have projections whose results nobody reads.
    assert len(without) <= UNUSED * len(policy.parameters), (
        f"{len(without)} of {len(policy.parameters)} tensors of the LoRA get no gradient, {without[0]} for one"
    )
    with torch.no_grad():
        moved = policy.predict(x_t, policy.schedule.timesteps[step], PROMPTS)
        with policy.reference():
            reference = policy.predict(x_t, policy.schedule.timesteps[step], PROMPTS)
    assert not torch.allclose(moved, base), "the LoRA changes nothing"
    _close(reference, base, "the reference and the base")


def saves(case: Case) -> None:
    """`save_lora` writes a file that `diffusion.lora` reads again as the same LoRA."""
    policy = case.policy()
    shake(policy)
    with TemporaryDirectory() as work:
        policy.save(Path(work))
        adapter = case.made()
        read = lora.read(lora.locate(Path(work)), adapter)
        other = Policy(adapter, steps=STEPS, batch=4, config=read.config)
        other.load_state(read.state)
    for name, value in policy.state().items():
        assert name in other.state(), f"the layer {name} was not saved"
        _close(other.state()[name], value, f"the layer {name}")


CHECKS = (declared, encodes, predicts, schedules, decodes, samples, trains, saves)
