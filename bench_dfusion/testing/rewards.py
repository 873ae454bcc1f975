"""The contract of a reward, as checks on pictures of noise and colour."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench_dfusion.rewards.contract import Reward, RewardConfig
from bench_dfusion.testing import contracts
from bench_dfusion.util import foreign

ALONE: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4}  # what the size of a batch may change by rounding
SLOPE = 0.05  # by how much, relative, finite differences in float32 may miss a gradient
STEPS = (1e-2, 3e-3, 1e-3)


@dataclass(frozen=True)
class Case:
    """A reward's class with its options, and what it is asked to score."""

    cls: type[Reward]
    options: Mapping[str, Any]
    prompts: tuple[str, ...]
    size: int
    images: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(len(self.prompts), 3, 4, 4, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, size=(self.size, self.size), mode="bilinear")
        object.__setattr__(self, "images", (smooth * 255).round().byte().permute(0, 2, 3, 1).contiguous())

    def made(self) -> Reward:
        reward = self.cls(self.cls.Config(**self.options))
        reward.check(list(self.prompts))
        return reward


def check_reward(
    cls: type[Reward],
    options: Mapping[str, Any] | None = None,
    *,
    prompts: Sequence[str] = ("a red ring", "two blue rings", "a cyan square"),
    size: int = 64,
    skip: Collection[str] = (),
) -> None:
    """Check that a reward keeps its contract. Raises ContractError, which names every check that fails and why.

    options  the reward's, by name
    prompts  such as it can score, three or more; there is a picture of `size`² pixels for each
    skip     names of checks that are left out
    """
    case = Case(cls, options or {}, tuple(prompts), size)
    contracts.run(f"reward {getattr(cls, 'name', cls.__name__)}", CHECKS, case, skip)


def declared(case: Case) -> None:
    """A reward has name, summary, paper and unit, a Config below RewardConfig, and a description of every option."""
    assert issubclass(case.cls.Config, RewardConfig), f"{case.cls.__name__}.Config is no RewardConfig"
    contracts.described(case.cls, ("name", "summary", "paper", "unit"))


def scores(case: Case) -> None:
    """`score` returns a finite number for each picture, float32 [B], within `limits`."""
    found = case.made().score(case.images.clone(), list(case.prompts))
    assert isinstance(found, Tensor), f"score returned {type(found).__name__}, not a tensor"
    assert found.dtype == torch.float32, f"scores are {found.dtype}, not float32"
    assert found.shape == (len(case.prompts),), f"shape {tuple(found.shape)} for {len(case.prompts)} pictures"
    assert found.device.type == "cpu", f"scores are on {found.device}"
    assert not found.requires_grad, "score returns a gradient: that is score_tensors' part"
    assert found.isfinite().all(), f"scores {found.tolist()} are not finite"
    low, high = case.cls.limits
    assert low is None or found.min() >= low, f"{float(found.min())} is below the limit {low}"
    assert high is None or found.max() <= high, f"{float(found.max())} is above the limit {high}"


def each_alone(case: Case) -> None:
    """The score of a picture does not depend on the pictures that it is scored with, nor on their order."""
    reward = case.made()
    together = reward.score(case.images.clone(), list(case.prompts))
    alone = torch.cat([reward.score(case.images[i : i + 1].clone(), [p]) for i, p in enumerate(case.prompts)])
    torch.testing.assert_close(
        alone, together, **ALONE, msg=lambda m: f"alone {alone.tolist()}, together {together.tolist()}"
    )
    turned = reward.score(case.images.flip(0), list(case.prompts[::-1])).flip(0)
    torch.testing.assert_close(
        turned, together, **ALONE, msg=lambda m: f"turned round {turned.tolist()}, {together.tolist()}"
    )


def repeatable(case: Case) -> None:
    """The same picture has the same score at each call, in each instance, whatever the seeds."""
    reward = case.made()
    first = reward.score(case.images.clone(), list(case.prompts)).clone()
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    again = reward.score(case.images.clone(), list(case.prompts))
    other = case.made().score(case.images.clone(), list(case.prompts))
    assert torch.equal(first, again), f"{first.tolist()} and then {again.tolist()}"
    assert torch.equal(first, other), f"another instance says {other.tolist()}, not {first.tolist()}"


def leaves_alone(case: Case) -> None:
    """`score` changes neither the pictures nor the prompts, and none of torch's global settings."""
    reward, images, prompts = case.made(), case.images.clone(), list(case.prompts)
    before = [repr(read()) for read, _ in foreign.SETTINGS]
    reward.score(images, prompts)
    changed = [read for (read, _), was in zip(foreign.SETTINGS, before, strict=True) if repr(read()) != was]
    assert torch.equal(images, case.images), "score wrote into the pictures"
    assert prompts == list(case.prompts), "score wrote into the list of prompts"
    assert not changed, f"score left {len(changed)} of torch's global settings changed"


def fingerprinted(case: Case) -> None:
    """`fingerprint` is a text that is the same for every instance with the same options."""
    first, second = case.made().fingerprint(), case.made().fingerprint()
    assert isinstance(first, str) and len(first) >= 8, f"the fingerprint is {first!r}"
    assert first == second, f"two instances have the fingerprints {first[:12]} and {second[:12]}"


def applicable(case: Case) -> None:
    """`score_applicable` returns the scores, and for each picture whether the reward applies."""
    reward = case.made()
    found, applies = reward.score_applicable(case.images.clone(), list(case.prompts))
    plain = reward.score(case.images.clone(), list(case.prompts))
    assert applies.dtype == torch.bool and applies.shape == found.shape, (
        f"applies is {applies.dtype} {tuple(applies.shape)}"
    )
    torch.testing.assert_close(found[applies], plain[applies], **ALONE, msg=lambda m: "other scores than score's")


def differentiable(case: Case) -> None:
    """Where `differentiable` is set, `score_tensors` of pictures [B, 3, H, W] in [0, 1] is `score`, with its gradient; else
    it raises NotImplementedError."""
    reward, prompts = case.made(), list(case.prompts)
    pixels = case.images.permute(0, 3, 1, 2).float() / 255
    if not case.cls.differentiable:
        try:
            reward.score_tensors(pixels, prompts)
        except NotImplementedError:
            return
        raise AssertionError("score_tensors is there, and differentiable is not set")
    pixels.requires_grad_()
    found = reward.score_tensors(pixels, prompts)
    assert found.shape == (len(prompts),), f"score_tensors returned shape {tuple(found.shape)}"
    plain = reward.score(case.images.clone(), prompts)
    torch.testing.assert_close(
        found.detach().cpu().float(),
        plain,
        rtol=1e-2,
        atol=1e-2,
        msg=lambda m: f"{found.tolist()} with gradients, {plain.tolist()} without",
    )
    assert found.requires_grad, "the scores of score_tensors have no gradient"
    (gradient,) = torch.autograd.grad(found.sum(), pixels)
    assert gradient.isfinite().all(), "the gradient is not finite"
    norm = gradient.norm()
    assert norm > 0, "the gradient is zero everywhere"
    along = gradient / norm

    def at(offset: float) -> float:
        with torch.no_grad():
            return float(reward.score_tensors(pixels.detach() + offset * along, prompts).double().sum())

    slopes = [(at(h) - at(-h)) / (2 * h) for h in STEPS]
    off = min(abs(slope / float(norm) - 1) for slope in slopes)
    assert off < SLOPE, f"along its gradient the score rises by {slopes}, and the gradient's norm is {float(norm):.4g}"


CHECKS = (declared, scores, each_alone, repeatable, leaves_alone, fingerprinted, applicable, differentiable)
