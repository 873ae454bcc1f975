"""Tracks: their schema, how they are read, prompts and where they come from; the TOML files beside are those shipped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent


def __getattr__(name: str) -> Callable[[], Path]:
    """A shipped track as the function that it was before tracks were found by their files: `tracks.paper()`."""
    from bench_dfusion.registry import shipped_tracks

    path = shipped_tracks().get(name.replace("_", "-"))
    if path is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return lambda: path
