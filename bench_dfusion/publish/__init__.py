"""What is made public: boards as a dataset, a run's weights as a model, and the check of what others published."""

from __future__ import annotations

from typing import Any

from bench_dfusion import _moved

_BEFORE = {
    "Published",
    "summary",
    "to_directory",
    "check",
    "to_hub",
    "connect",
    "bars_on_a_terminal",
    "persist",
}  # what was in the module of this name


def __getattr__(name: str) -> Any:
    if name not in _BEFORE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _moved.attribute(__name__, name, ("publish.repository",))
