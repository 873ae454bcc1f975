"""What the cells of one process share: the pipeline with its encoded prompts, rewards and judges.

No cell can tell whether another ran before it: what it is given is what it would load, and torch's settings and random
numbers are where loading would leave them. What another cell could tell apart is loaded anew: rewards of others' code,
which may keep what they were asked, and a pipeline whose parts were dropped or sharded.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch

from bench_dfusion import registry
from bench_dfusion.diffusion.policy import remove_lora
from bench_dfusion.models.base import Adapter
from bench_dfusion.models.loading import load_adapter
from bench_dfusion.results import records
from bench_dfusion.rewards.contract import Reward, RewardConfig, made
from bench_dfusion.rewards.sums import WeightedSum
from bench_dfusion.runs.config import Cell, judges_of
from bench_dfusion.tracks.schema import MemorySection, ModelSection
from bench_dfusion.util import foreign

RewardKey = tuple[Hashable, RewardConfig, torch.device]
PipelineKey = tuple[ModelSection, torch.device, MemorySection]


class _Pipeline(NamedTuple):
    key: PipelineKey
    adapter: Adapter
    sha256: str
    restore: Callable[[], None]  # torch's settings and random numbers, as loading left them


class Loaded:
    """One for a process. A cell calls `begin`, then takes each thing it needs; a first cell loads all."""

    def __init__(self) -> None:
        self._restore: Callable[[], None] | None = None  # as they were before the first cell
        self._pipeline: _Pipeline | None = None
        self._free: list[tuple[RewardKey, Reward]] = []
        self._given: list[tuple[RewardKey, Reward]] = []  # to the cell that runs

    def begin(self, cell: Cell, device: torch.device) -> None:
        """The cell before is over: forget what it trained, and free what this one does not need."""
        if self._restore is None:
            self._restore = _state()
            return
        self._restore()
        track = cell.track
        wanted = [_key(*options, device) for options in [(cell.reward, cell.reward_config), *judges_of(track).values()]]
        left, self._free, self._given = [*self._given, *self._free], [], []
        self._free = [(key, reward) for key in wanted if (reward := _taken(left, key)) is not None]
        del left
        if self._pipeline is not None:
            remove_lora(self._pipeline.adapter.network)
            if self._pipeline.key != (track.model, device, track.memory) or not _as_loaded(self._pipeline.adapter):
                self._pipeline = None
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        with suppress(OSError, AttributeError):  # glibc keeps what was freed, and it would count as this cell's
            ctypes.CDLL(None).malloc_trim(0)
        records.restart_peak_memory(device)

    def reward(
        self, cls: type[Reward], config: RewardConfig, device: torch.device, prompts: Sequence[str] = ()
    ) -> Reward:
        """As `reward.made`. No two calls of one cell are given the same object."""
        key = _key(cls, config, device)
        reward = _taken(self._free, key)
        if reward is None:
            reward = made(cls, config, device, prompts)
        else:
            reward.wake()
            if prompts:
                reward.check(list(prompts))
        if key[0] is not None:
            self._given.append((key, reward))
        return reward

    def pipeline(self, model: ModelSection, device: torch.device, memory: MemorySection) -> tuple[Adapter, str]:
        """As `loading.load_adapter`."""
        key = model, device, memory
        if self._pipeline is None or self._pipeline.key != key:
            self._pipeline = None
            adapter, digest = load_adapter(model, device, memory)
            self._pipeline = _Pipeline(key, adapter, digest, _state())
        else:
            self._pipeline.adapter.to(device)  # parts that a cell has left elsewhere
            self._pipeline.restore()
        return self._pipeline.adapter, self._pipeline.sha256


def _taken(rewards: list[tuple[RewardKey, Reward]], key: RewardKey) -> Reward | None:
    """The first reward of a key, taken out of the list."""
    return next((rewards.pop(i)[1] for i, (own, _) in enumerate(rewards) if own == key), None)


def _key(cls: type[Reward], config: RewardConfig, device: torch.device) -> RewardKey:
    return _identity(cls), config, device


def _identity(cls: type[Reward]) -> Hashable | None:
    """What is equal for two classes whose rewards nothing tells apart; None for code of others."""
    if issubclass(cls, WeightedSum):  # its class is made for each cell
        parts = [(name, part.weight, _identity(part.reward)) for name, part in cls.parts.items()]
        return None if any(own is None for *_, own in parts) else tuple(parts)
    known = getattr(sys.modules.get(cls.__module__), cls.__qualname__, None)
    return cls if known is cls and cls.__module__.startswith(registry.OURS) else None


def _as_loaded(adapter: Adapter) -> bool:
    """Whether a pipeline without its LoRA is what was loaded."""
    ours = type(adapter).__module__.startswith(registry.OURS)
    return ours and not (adapter.text_dropped or adapter.spreads or adapter.trained_whole)


def _state() -> Callable[[], None]:
    """torch's settings and random numbers as they are now; what is returned puts them back."""
    settings, numbers, seed = foreign.settings(), torch.get_rng_state(), torch.initial_seed()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def restore() -> None:
        settings()
        torch.set_rng_state(numbers)
        if on_gpus is not None:
            torch.cuda.set_rng_state_all(on_gpus)
        elif torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)

    return restore
