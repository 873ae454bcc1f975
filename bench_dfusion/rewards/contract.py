"""What a reward is; the same object is a judge where it evaluates a run it did not train."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from bench_dfusion.errors import PluginError
from bench_dfusion.util import foreign, parallel


class RewardConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Reward(ABC):
    """Scores pictures against prompts. One file under `reward_models/`, registered under `bench_dfusion.rewards`.

    name, summary, paper   one line each for `bench-dfusion list rewards`
    unit                   what a score means and its range
    limits                 the least and the greatest score there can be, None: no bound; records beyond are refused
    differentiable         whether gradients flow through `score_tensors`
    one_judge              whether it is the same judge whatever its options: a run that trained on it with some options
                           is not ranked by it with others
    by_batch               whether the scores of a batch of `config.batch` images do not depend on the other batches, so
                           that several processes can share them
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    unit: ClassVar[str]
    limits: ClassVar[tuple[float | None, float | None]] = (None, None)
    Config: ClassVar[type[RewardConfig]] = RewardConfig
    differentiable: ClassVar[bool] = False
    one_judge: ClassVar[bool] = False
    by_batch: ClassVar[bool] = False
    offloaded = False  # whether its networks stay on the CPU between scores (see `offload`)

    def __init__(self, config: RewardConfig, device: torch.device | str = "cpu"):
        self.config = config
        self.device = torch.device(device)

    @abstractmethod
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores float32 [B] on the CPU for images uint8 [B, H, W, 3] and B prompts."""

    def score_tensors(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The same score with gradients: images [B, 3, H, W] in [0, 1] to [B]. Only where `differentiable`."""
        raise NotImplementedError(f"{self.name} has no gradient")

    def score_applicable(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """`score`, and whether it applies to each sample (bool [B]): what a weighted sum takes."""
        return self.score(images, prompts), torch.ones(len(images), dtype=torch.bool)

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of everything a score depends on: weights, preprocessing, rules."""

    def versions(self) -> dict[str, str]:
        """Versions that a score depends on beside those of the project's own packages, for the record."""
        return {}

    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of every scorer in it by name: its own, of a weighted sum those of its components."""
        return {self.name: self.fingerprint()}

    def check(self, prompts: Sequence[str]) -> None:
        """Raise ValueError, before any compute, if this reward cannot score a prompt."""

    @classmethod
    def impossible(cls, means: Sequence[tuple[RewardConfig, float]], prompt: str, pictures: int) -> str | None:
        """Why these means of the scores of `pictures` pictures of a prompt cannot be, each with the options that it was
        scored under, all of the same pictures; None where they can, or where nobody can tell."""
        return None

    # memory

    @classmethod
    def weights_bytes(cls, config: RewardConfig) -> int | None:
        """The memory that its weights take on the device, known before they are loaded; None: not known."""
        return None

    def networks(self) -> list[nn.Module]:
        """Its networks in this process."""
        return [value for value in vars(self).values() if isinstance(value, nn.Module)]

    def offload(self) -> None:
        """From now on its networks are on its device only inside `scoring`, else on the CPU."""
        self.offloaded = True
        self._move("cpu")

    rest = offload  # the name it had

    def wake(self) -> None:
        """Undo `offload`: its networks stay on its device."""
        if self.offloaded:
            self.offloaded = False
            self._move(self.device)

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Inside, its networks are on its device."""
        if self.offloaded:
            self._move(self.device)
        try:
            yield
        finally:
            if self.offloaded:
                self._move("cpu")

    def _move(self, device: torch.device | str) -> None:
        for network in self.networks():
            network.to(device)


def scored_in_shards(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """`scored`, its batches sharded over the run's processes where that changes no score, else by the first."""
    if not reward.by_batch or parallel.size() == 1:
        return parallel.once(lambda: scored(reward, images, prompts))
    size: int = reward.config.batch  # type: ignore[attr-defined]
    starts = range(0, len(images), size)
    return torch.cat(parallel.each(lambda i: scored(reward, images[i : i + size], prompts[i : i + size]), starts))


# What follows is how rewards are called, whoever wrote them: on copies, so that nothing written into pictures or scores
# reaches what is kept, and contained.


def made(cls: type[Reward], config: RewardConfig, device: torch.device | str, prompts: Sequence[str] = ()) -> Reward:
    """The reward on a device. Raises ValueError where it cannot score one of `prompts`."""
    with foreign.contained(f"reward {cls.name}"):
        reward = cls(config, device)
        if prompts:  # the reward of offline pairs scores none
            reward.check(list(prompts))
    return reward


def scored(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """`reward.score`. Raises PluginError where it returns no numbers."""
    with foreign.contained(f"reward {reward.name}"):
        return _own(reward.score(images.clone(), list(prompts)), f"reward {reward.name}").float()


def fault(scores: Tensor, prompts: Sequence[str]) -> str | None:
    """What is wrong with the scores of a picture of each prompt: their shape, or the first that is not finite."""
    if scores.shape != (len(prompts),):
        return f"returned shape {tuple(scores.shape)} for {len(prompts)} images"
    if not scores.isfinite().all():
        bad = int((~scores.isfinite()).nonzero()[0])
        return f"returned {scores[bad].item()} for {prompts[bad]!r}"
    return None


def scored_where_applicable(reward: Reward, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """`reward.score_applicable`, as `scored`."""
    with foreign.contained(f"reward {reward.name}"):
        scores, applies = reward.score_applicable(images.clone(), list(prompts))
        what = f"reward {reward.name}"
        return _own(scores, what).float(), _own(applies, what).bool()


def scored_with_gradient(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """`reward.score_tensors`. Raises PluginError where its scores have no gradient."""
    with foreign.contained(f"reward {reward.name}"), torch.enable_grad():
        scores = reward.score_tensors(images, list(prompts))
    if images.requires_grad and not scores.requires_grad:
        raise PluginError(f"reward {reward.name} says it is differentiable, but its scores have no gradient")
    return scores


def embedded(reward: Any, images: Tensor) -> Tensor:
    """`reward.embed`: embeddings [B, D] on the CPU of pictures uint8 [B, H, W, 3]. Raises PluginError where one is not finite."""
    with foreign.contained(f"reward {reward.name}"), torch.no_grad():
        found = _own(reward.embed(images.permute(0, 3, 1, 2).float() / 255), f"reward {reward.name}")
    if not found.isfinite().all():
        raise PluginError(f"reward {reward.name}: its image embedding is not finite")
    return found


def _own(values: Any, what: str) -> Tensor:
    """A copy on the CPU, without gradient: some scorers return the same tensor each time, filled anew."""
    try:
        return torch.as_tensor(values).detach().to("cpu", copy=True)
    except (TypeError, ValueError, RuntimeError):
        raise PluginError(f"{what} returned {type(values).__name__}, not a tensor of numbers") from None
