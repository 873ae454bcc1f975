"""Saved tiny pipelines that tests share; `tiny.policy_of` loads them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: as many test processes as cores, one thread each


@pytest.fixture(scope="session")
def sd_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion that predicts epsilon."""
    from tiny import tiny_sd  # imports as much as a real checkpoint does: only where it is used

    return tiny_sd(tmp_path_factory.mktemp("tiny") / "sd")


@pytest.fixture(scope="session")
def sd_v_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network under a scheduler that says it predicts v."""
    from tiny import tiny_sd

    return tiny_sd(tmp_path_factory.mktemp("tiny") / "sd-v", "v_prediction")


@pytest.fixture(scope="session")
def pixart_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny PixArt of the embedded model's classes."""
    from tiny import tiny_pixart

    return tiny_pixart(tmp_path_factory.mktemp("tiny") / "pixart")
