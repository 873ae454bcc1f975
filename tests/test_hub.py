"""Where there is no network, the Hub's client is told once instead of asking for minutes."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from huggingface_hub import constants

from bench_dfusion.util import hub


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "getproxies", dict)
    hub._settle.cache_clear()


def test_a_hub_that_cannot_be_reached_settles_on_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:  # bound, and nobody listens
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        assert hub.look(str(tmp_path)) == str(tmp_path) and not constants.HF_HUB_OFFLINE  # a directory asks nobody
        assert hub.look("owner/name") == "owner/name" and constants.HF_HUB_OFFLINE


def test_a_hub_that_answers_or_lies_behind_a_proxy_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        hub.look("owner/name")
        assert not constants.HF_HUB_OFFLINE
    hub._settle.cache_clear()
    monkeypatch.setattr(hub, "getproxies", lambda: {"https": "http://proxy:3128"})
    hub.look("owner/name")
    assert not constants.HF_HUB_OFFLINE
