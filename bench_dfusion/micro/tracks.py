"""The embedded tracks, as entry points: functions that return the path of a TOML file."""

from pathlib import Path

HERE = Path(__file__).parent


def micro_v2() -> Path:
    """The embedded world, made so that methods can differ: minutes on a laptop, judged by its oracle, budgets as rungs."""
    return HERE / "micro-v2.toml"


def micro() -> Path:
    """The embedded world as it was first, micro-v1: the published table is of it."""
    return HERE / "micro-v1.toml"


def micro_fast() -> Path:
    """The embedded world in a minute, for CI and demonstrations."""
    return HERE / "micro-fast-v1.toml"
