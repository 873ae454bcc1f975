"""Many cells, one command: the queue, and the launchers that run them here or on other machines."""

from __future__ import annotations

from typing import Any

from bench_dfusion import _moved

_BEFORE = {"Job", "Sweep", "plan", "register"}  # what was in the module of this name


def __getattr__(name: str) -> Any:
    if name not in _BEFORE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _moved.attribute(__name__, name, ("sweeps.queue", "sweeps.job"))
