"""Whether the Hub can be reached: without a network its client asks for each file six times, for minutes."""

from __future__ import annotations

import functools
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

TIMEOUT = 5.0  # s


def look(source: str) -> str:
    """`source`, a directory or a Hub id: before the first of the Hub, its cache alone is settled on where no connection
    to it can be made, as HF_HUB_OFFLINE=1 would."""
    if not Path(source).exists():
        _settle()
    return source


@functools.cache
def _settle() -> None:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or getproxies():  # behind a proxy only the client itself can tell
        return
    address = urlsplit(constants.ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), TIMEOUT).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:  # it copied the constant when it was imported
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
