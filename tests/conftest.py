"""What tests share: the command in this process, and saved tiny pipelines (`tiny.policy_of` loads them)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from hub_server import Hub

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: as many test processes as cores, one thread each


@pytest.fixture(autouse=True)
def _network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What one test finds out about the network, the next does not know."""
    from huggingface_hub import constants

    from bench_dfusion.util import hub

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", constants.HF_HUB_OFFLINE)
    if "datasets" in sys.modules:
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", constants.HF_HUB_OFFLINE)
    yield
    hub._settle.cache_clear()


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
def sd21_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion of 2.1's shape, which predicts v."""
    from tiny import tiny_sd21

    return tiny_sd21(tmp_path_factory.mktemp("tiny") / "sd21")


@pytest.fixture(scope="session")
def sdxl_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion XL."""
    from tiny import tiny_sdxl

    return tiny_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl")


@pytest.fixture(scope="session")
def sd3_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion 3.5."""
    from tiny import tiny_sd3

    return tiny_sd3(tmp_path_factory.mktemp("tiny") / "sd3")


@pytest.fixture(scope="session")
def flux_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FLUX.1-dev; its pictures are 256 pixels wide unless a resolution is given."""
    from tiny import tiny_flux

    return tiny_flux(tmp_path_factory.mktemp("tiny") / "flux")


@pytest.fixture(scope="session")
def pixart_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny PixArt of the embedded model's classes."""
    from tiny import tiny_pixart

    return tiny_pixart(tmp_path_factory.mktemp("tiny") / "pixart")


class Said(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """`said("list", "tracks", cwd=folder)` runs `bench-dfusion list tracks` in this process, without the Hub."""
    from bench_dfusion import cli

    def call(*words: object, cwd: Path | None = None) -> Said:
        monkeypatch.setattr("sys.argv", ["bench-dfusion", *map(str, words)])
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        if cwd is not None:
            monkeypatch.chdir(cwd)
        capsys.readouterr()  # what the test itself has said
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return Said(int(stopped.value.code or 0), *capsys.readouterr())

    return call


@pytest.fixture
def refused(said: Callable[..., Said]) -> Callable[..., str]:
    """As `said`, for what ends with status 2 and one line on stderr, which it returns; `bars`: below progress bars."""

    def call(*words: object, cwd: Path | None = None, bars: bool = False) -> str:
        status, out, err = said(*words, cwd=cwd)
        lines = err.strip().splitlines()
        assert status == 2 and not out and (bars or len(lines) == 1), (status, out, err)
        assert lines[-1].startswith("bench-dfusion: ")
        return lines[-1]

    return call


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A loopback Hub and a token for it; what passes is tried again at once."""
    from hub_server import TOKEN, Hub
    from huggingface_hub import constants

    from bench_dfusion.publish import repository

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(repository, "WAIT", 0.02)
    with Hub() as server:
        yield server


@pytest.fixture
def hub_home(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is downloaded is asked of `hub` and lies below this directory, as HF_ENDPOINT and HF_HOME would have it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home"))
    return tmp_path / "home"
