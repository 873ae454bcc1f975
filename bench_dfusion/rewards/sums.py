"""Weighted sums of rewards: `clip:0.7,aesthetic:0.3`.

score = sum over components of weight · (r − mean) / sd, each r in its own unit. `mean` and `sd` are constants, 0 and 1
unless the user sets them (`--set reward.clip.mean=0.3`): nothing is estimated from what a run draws, so two runs with
the same options train on the same reward. A sample to which a component does not apply counts 0 for it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from pydantic import Field, SerializeAsAny
from torch import Tensor, nn

from bench_dfusion import errors
from bench_dfusion.errors import UsageError
from bench_dfusion.rewards.contract import Reward, RewardConfig, made, scored_where_applicable, scored_with_gradient
from bench_dfusion.tracks import schema
from bench_dfusion.util import foreign, parallel

NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|[+-]?(?:inf|nan)"
PART = re.compile(rf"(.+?)([:-])({NUMBER})(?:[,+]|$)")
LONGEST = 100  # characters of a name: it is part of a directory's


def split(text: str) -> list[tuple[str, float]] | None:
    """The names and weights of a sum, None of what is none: `clip:0.7,aesthetic:0.3`, with + for the comma too, or its
    name `clip-0.7+aesthetic-0.3`. Raises UsageError where it is half a sum."""
    parts, end = [], 0
    while found := PART.match(text, end):
        parts.append(found)
        end = found.end()
    if not parts or (len(parts) == 1 and parts[0][2] == "-"):
        if "," in text:
            raise UsageError(f"reward {text!r}: of a sum every reward has a weight, NAME:WEIGHT,NAME:WEIGHT")
        return None
    rest = text[end:]
    if rest or text.endswith((",", "+")):
        raise UsageError(f"reward {text!r}: {rest or 'the end'!r} has no weight: NAME:WEIGHT,NAME:WEIGHT")
    for name in (p[1] for p in parts):
        if ".py:" not in name and ("," in name or "+" in name):
            raise UsageError(f"reward {text!r}: {re.split('[,+]', name)[0]!r} has no weight: NAME:WEIGHT,NAME:WEIGHT")
    if len(parts) == 1:
        raise UsageError(f"reward {text!r}: a sum has two rewards or more; for one alone leave the weight out")
    return [(p[1], float(p[3])) for p in parts]


def listed(text: str) -> list[str]:
    """A list of rewards split at its commas, but not within a sum: those with weights that follow one another are one."""
    found: list[str] = []
    weighted = re.compile(rf".+:(?:{NUMBER})$")
    last = False
    for part in (p.strip() for p in text.split(",")):
        own = weighted.match(part) is not None and "+" not in part
        if own and last:
            found[-1] += f",{part}"
        else:
            found.append(part)
        last = own
    return found


@dataclass(frozen=True)
class Component:
    reward: type[Reward]
    weight: float


class ComponentConfig(RewardConfig):
    weight: float = Field(description="its weight; 0 for an auxiliary reward, which only an algorithm that asks takes")
    mean: float = Field(0.0, description="subtracted from its score first (its unit)")
    sd: float = Field(1.0, gt=0, description="its score is divided by this (its unit)")
    options: SerializeAsAny[RewardConfig] = Field(description="its own options")


class SumConfig(RewardConfig):
    components: dict[str, ComponentConfig] = Field(description="the rewards summed, by name")


class WeightedSum(Reward):
    """The classes that `of` makes have the components in `parts`."""

    summary = "a weighted sum of rewards"
    paper = "none"
    Config: ClassVar[type[RewardConfig]] = SumConfig
    parts: ClassVar[dict[str, Component]]
    config: SumConfig

    @classmethod
    def configured(cls, options: Mapping[str, Any], defaults: Mapping[str, Mapping[str, Any]]) -> SumConfig:
        """The options NAME.OPTION over the track's defaults by reward. Raises UsageError."""
        for name, value in options.items():
            if name not in cls.parts:
                raise UsageError(errors.unknown("option reward", name, cls.parts))
            if not isinstance(value, dict):
                raise UsageError(f"reward.{name} is a section: write reward.{name}.OPTION=VALUE")
        found = {}
        for name, part in cls.parts.items():
            own = {**defaults.get(name, {}), **options.get(name, {})}
            affine = {key: own.pop(key) for key in ("mean", "sd") if key in own}
            inner = configure(part.reward, name, own, defaults, f"reward.{name}")
            values = {"weight": part.weight, "options": inner, **affine}
            found[name] = schema.validate(ComponentConfig, values, f"reward.{name}")
        return SumConfig(components=found)

    def __init__(self, config: SumConfig, device: torch.device | str = "cpu"):
        super().__init__(config, device)
        own = config.components
        self.components = {name: made(part.reward, own[name].options, device) for name, part in self.parts.items()}

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.score_apart(images, prompts)[0]

    def score_apart(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """`score`, and each component's own score float32 [B, components], nan where it does not apply."""
        total, any_applies = torch.zeros(len(images)), torch.zeros(len(images), dtype=torch.bool)
        apart = []
        for name, reward in self.components.items():
            scores, applies = scored_where_applicable(reward, images, prompts)
            if scores.shape != (len(images),):
                raise UsageError(
                    f"reward {name} returned shape {tuple(scores.shape)} for {len(images)} images: one score for each"
                )
            total += torch.where(applies, self._term(name, scores), 0.0)
            if self.config.components[name].weight:
                any_applies |= applies
            apart.append(torch.where(applies, scores, torch.nan))
        if not any_applies.all():
            prompt = prompts[int((~any_applies).nonzero()[0])]
            raise UsageError(f"reward {self.name}: none of its rewards applies to {prompt!r}")
        return total, torch.stack(apart, 1)

    def weights(self) -> dict[str, float]:
        """Each component's weight by name, in the order of `score_apart`."""
        return {name: self.config.components[name].weight for name in self.components}

    def score_tensors(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        parts = {n: scored_with_gradient(r, images.clone(), prompts) for n, r in self.components.items()}
        terms = [self._term(name, scores) for name, scores in parts.items()]
        return torch.stack(terms).sum(0)

    def _term(self, name: str, scores: Tensor) -> Tensor:
        c = self.config.components[name]
        return c.weight * (scores - c.mean) / c.sd

    def fingerprint(self) -> str:
        own = self.config.components
        terms = [[f, own[n].weight, own[n].mean, own[n].sd] for n, f in self.fingerprints().items()]
        return hashlib.sha256(json.dumps(terms).encode()).hexdigest()

    def fingerprints(self) -> dict[str, str]:
        return {name: reward.fingerprint() for name, reward in self.components.items()}

    def versions(self) -> dict[str, str]:
        return {k: v for reward in self.components.values() for k, v in reward.versions().items()}

    def check(self, prompts: Sequence[str]) -> None:
        for reward in self.components.values():
            reward.check(prompts)

    @classmethod
    def weights_bytes(cls, config: RewardConfig) -> int | None:
        own = cast(SumConfig, config).components
        found = [part.reward.weights_bytes(own[name].options) for name, part in cls.parts.items()]
        return None if None in found else sum(cast("list[int]", found))

    def networks(self) -> list[nn.Module]:
        return [network for reward in self.components.values() for network in reward.networks()]


def scored_apart(reward: WeightedSum, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """`reward.score_apart`, by the run's first process for all."""

    def found() -> tuple[Tensor, Tensor]:
        with foreign.contained(f"reward {reward.name}"):
            return reward.score_apart(images.clone(), list(prompts))

    return parallel.once(found)


def configure(
    cls: type[Reward],
    name: str,
    options: Mapping[str, Any],
    defaults: Mapping[str, Mapping[str, Any]],
    where: str = "reward",
) -> RewardConfig:
    """A reward's options, the user's over the track's default for `name`. Raises UsageError."""
    from bench_dfusion.rewards.user_function import UserFunction

    if issubclass(cls, WeightedSum):
        return cls.configured(options, defaults)
    if issubclass(cls, UserFunction):
        return cls.configured(options)
    return schema.validate(cls.Config, {**defaults.get(name, {}), **options}, where)  # type: ignore[no-any-return]


def of(parts: Sequence[tuple[str, type[Reward], float]]) -> type[WeightedSum]:
    """The class of a sum. Its name holds every component's name and weight, the heaviest first, so that a sum has one
    name however it is written. Raises UsageError."""
    parts = sorted(parts, key=lambda p: (-p[2], p[1].name))
    names = [cls.name for _, cls, _ in parts]
    for text, cls, weight in parts:
        if not math.isfinite(weight):
            raise UsageError(f"the weight of {text} must be a number, not {weight:g}")
        if names.count(cls.name) > 1:
            raise UsageError(f"{cls.name} is in the sum twice: add its weights")
    name = "+".join(f"{cls.name}-{weight:.12g}" for _, cls, weight in parts)
    if len(name) > LONGEST:
        raise UsageError(f"the sum's name {name} has {len(name)} characters, at most {LONGEST} fit a directory's")
    content = {
        "name": name,
        "unit": " + ".join(f"{weight:.12g} · {cls.name}" for _, cls, weight in parts),
        "differentiable": all(cls.differentiable for _, cls, _ in parts),
        "parts": {cls.name: Component(cls, weight) for _, cls, weight in parts},
    }
    return type("WeightedSumOf", (WeightedSum,), content)
