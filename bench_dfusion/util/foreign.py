"""Code of others (plugins, rewards, judges, a user's function) inside this process: whatever it changes for all of torch is
put back when it returns, so that no run depends on which scorer ran before."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch

from bench_dfusion.errors import PluginError

Setting = tuple[Callable[[], Any], Callable[[Any], Any]]  # how it is read, how it is set


def _attribute(owner: Any, name: str) -> Setting:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


def _autocast(device: str) -> tuple[Setting, Setting]:
    return (
        (lambda: torch.is_autocast_enabled(device), lambda value: torch.set_autocast_enabled(device, value)),
        (lambda: torch.get_autocast_dtype(device), lambda value: torch.set_autocast_dtype(device, value)),
    )


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _default_device() -> str | None:
    return None if torch.get_default_device().type == "cpu" else str(torch.get_default_device())


_backends: Any = torch.backends
_cuda: Any = torch.backends.cuda
SETTINGS: tuple[Setting, ...] = (
    (_default_device, torch.set_default_device),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (_deterministic, lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1])),
    _attribute(torch.utils.deterministic, "fill_uninitialized_memory"),
    *_autocast("cpu"),
    *_autocast("cuda"),
    (torch.get_num_threads, torch.set_num_threads),
    *(_attribute(_backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic")),
    *(
        _attribute(owner, "fp32_precision")
        for owner in (_backends, _cuda.matmul, _backends.cudnn.conv, _backends.cudnn.rnn, _backends.mkldnn.matmul)
    ),
    (_cuda.flash_sdp_enabled, _cuda.enable_flash_sdp),
    (_cuda.mem_efficient_sdp_enabled, _cuda.enable_mem_efficient_sdp),
    (_cuda.math_sdp_enabled, _cuda.enable_math_sdp),
    (_cuda.cudnn_sdp_enabled, _cuda.enable_cudnn_sdp),
    (np.geterr, lambda value: np.seterr(**value)),
    (os.getcwd, os.chdir),
)


def _generators() -> list[Setting]:
    """Of every source of random numbers, that of a device only where it is in use."""
    found: list[Setting] = [
        (torch.get_rng_state, torch.set_rng_state),
        (np.random.get_state, np.random.set_state),
        (random.getstate, random.setstate),
    ]
    if torch.cuda.is_initialized():
        found.append((torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all))
    return found


def settings() -> Callable[[], None]:
    """SETTINGS as they are now; what is returned puts them back."""
    before = [read() for read, _ in SETTINGS]

    def restore() -> None:
        for (read, write), value in zip(SETTINGS, before, strict=True):
            now: Any = None
            with suppress(OSError):  # a working directory that is gone
                now = read()
            if now != value:
                write(value)

    return restore


@contextmanager
def contained(what: str) -> Iterator[None]:
    """Around a call of `what`, code of others: gradients, default dtype and device, deterministic and precision flags,
    autocast, threads, seeds, numpy's errors and the working directory are afterwards what they were before.

    Raises PluginError, which names it, for what cannot be put back: inference mode left on.
    """
    restore = settings()
    generators = [(write, read()) for read, write in _generators()]
    inference = torch.is_inference_mode_enabled()
    try:
        yield
    finally:
        restore()
        for write, state in generators:
            write(state)
    if torch.is_inference_mode_enabled() != inference:
        raise PluginError(
            f"{what} leaves torch's inference mode on for the whole process: use `with torch.inference_mode():` there"
        )
