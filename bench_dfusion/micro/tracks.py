"""The embedded tracks, as entry points: functions that return the path of a TOML file."""

from pathlib import Path

HERE = Path(__file__).parent


def micro() -> Path:
    """The embedded world: minutes on a laptop, judged by its oracle."""
    return HERE / "micro-v1.toml"


def micro_fast() -> Path:
    """The embedded world in a minute, for CI and demonstrations."""
    return HERE / "micro-fast-v1.toml"
