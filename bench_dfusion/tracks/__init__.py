"""Tracks for real checkpoints, as entry points: functions that return the path of a TOML file."""

from pathlib import Path

HERE = Path(__file__).parent


def paper() -> Path:
    """D-Fusion's own settings for any supported checkpoint (--model) and your prompts (--prompts)."""
    return HERE / "paper-v1.toml"
