"""What a sweep and its nodes share: files behind an fsspec URL, the tries of each cell, and who may speak for one.

    <cell>/lease.json               the try that counts, and the sweep that began it: the sweep alone writes it
    <cell>/try-0002-5f0c1d/...      what that try leaves: a copy of the cell's directory on its node
    <cell>/nodes/<try>.json         the node that has begun it
    sweeps/<sweep>.json             a number that a sweep keeps raising while it lives

A try writes below its own name, which no other try ever has, and only the try that the lease names is read for a
record. So what a lost node goes on to write is never taken, whatever the store: no compare-and-swap is needed for that.
Without one, two tries of a cell may both compute for a moment; each looks at the lease every BEAT seconds, and the one
that it does not name gives up.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from bench_dfusion.errors import UsageError
from bench_dfusion.util import files

BEAT = 10.0  # s between signs of life, and between a try's looks at its lease
SILENCE = 60.0  # s without a sign of life after which a sweep counts as dead
LAST = ("checkpoint.safetensors", "record.json")  # read as "all up to here is there": written in this order, at the end


class Storage:
    """A directory behind an fsspec URL; names are relative to it. A reader sees a file whole or not at all."""

    def __init__(self, url: str):
        """Raises UsageError for a URL that cannot be used."""
        from fsspec.core import url_to_fs

        try:
            self.fs, self.root = url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UsageError(f"storage {url}: {error}") from None
        self._token = secrets.token_hex(4)
        self._made: set[str] = set()

    def put(self, source: BinaryIO, name: str) -> None:
        parent, _, last = self._path(name).rpartition("/")
        if parent not in self._made:  # an object store asks the network for this
            self.fs.makedirs(parent, exist_ok=True)
            self._made.add(parent)
        temporary = f"{parent}/.{last}.{self._token}"
        with self.fs.open(temporary, "wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
        self.fs.mv(temporary, f"{parent}/{last}")

    def get(self, name: str, path: Path) -> None:
        """Download a file, whole or not at all. Raises FileNotFoundError."""
        with files.replacing(path) as file, self.fs.open(self._path(name), "rb") as source:
            shutil.copyfileobj(source, file, 1 << 20)

    def write(self, name: str, value: dict[str, Any]) -> None:
        with tempfile.TemporaryFile() as file:
            file.write(json.dumps(value).encode())
            file.seek(0)
            self.put(file, name)

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file's content, empty where there is no such file."""
        self.fs.invalidate_cache()
        try:
            content: dict[str, Any] = json.loads(self.fs.cat_file(self._path(name)))
        except FileNotFoundError:
            return {}
        return content

    def names(self, folder: str) -> list[str]:
        """The files below a folder, relative to it; none where there is no such folder."""
        self.fs.invalidate_cache()
        start = self._path(folder).rstrip("/") + "/"
        found = [path[len(start) :] for path in self.fs.find(start.rstrip("/")) if path.startswith(start)]
        return sorted(n for n in found if not n.rpartition("/")[2].startswith("."))

    def remove(self, name: str) -> None:
        """Remove a file or a folder as far as it can be: nothing depends on it."""
        self.fs.invalidate_cache()
        with suppress(OSError):
            self.fs.rm(self._path(name), recursive=True)

    def push(self, folder: Path, name: str, known: dict[str, tuple[int, int]]) -> None:
        """Copy what is new in a local folder, and remove what is gone; `known` is what is there already.

        Files of LAST are taken as they were before all others, and written after them.
        """
        last = {n: open(folder / n, "rb") for n in LAST if (folder / n).exists()}  # noqa: SIM115
        try:
            there = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
            there = {n: p for n, p in there.items() if not p.name.startswith(".") and n not in LAST}
            for n, path in there.items():
                try:
                    with open(path, "rb") as file:
                        self._push(file, name, n, known)
                except FileNotFoundError:  # the run removed it meanwhile
                    continue
            for n, file in last.items():
                self._push(file, name, n, known)
            for gone in known.keys() - there.keys() - last.keys():
                self.remove(f"{name}/{gone}")
                del known[gone]
        finally:
            for file in last.values():
                file.close()

    def _push(self, file: BinaryIO, folder: str, name: str, known: dict[str, tuple[int, int]]) -> None:
        state = os.fstat(file.fileno())
        mark = state.st_mtime_ns, state.st_size
        if known.get(name) != mark:
            self.put(file, f"{folder}/{name}")
            known[name] = mark

    def pull(self, name: str, folder: Path) -> None:
        """Copy a folder here, the files of LAST at the end."""
        names = self.names(name)
        for n in [*(n for n in names if n not in LAST), *(n for n in LAST if n in names)]:
            self.get(f"{name}/{n}", folder / n)

    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}".rstrip("/")


class Life:
    """A sweep's signs of life, and what it has seen of the others': no clock is compared with another machine's."""

    def __init__(self, storage: Storage):
        self.storage = storage
        self.token = secrets.token_hex(3)
        self.name = f"{socket.gethostname()}-{os.getpid()}-{self.token}"
        self._count = 0
        self._seen: dict[str, tuple[int | None, float]] = {}  # by sweep its number, and when it was first seen here

    def beat(self) -> None:
        self._count += 1
        self.storage.write(f"sweeps/{self.name}.json", {"beat": self._count})

    def end(self) -> None:
        self.storage.remove(f"sweeps/{self.name}.json")

    def other(self, name: str | None) -> bool:
        """Whether this names another sweep that may be alive: its number is there, and changed in the last SILENCE."""
        if name in (None, self.name):
            return False
        number = self.storage.read(f"sweeps/{name}.json").get("beat")
        if number is None:
            return False
        before, since = self._seen.get(str(name), (None, 0.0))
        if number != before:
            self._seen[str(name)] = number, time.monotonic()
            return True
        if time.monotonic() - since < SILENCE:
            return True
        self.storage.remove(f"sweeps/{name}.json")  # if it was only slow, it writes it again
        return False


def lease(storage: Storage, cell: str) -> dict[str, Any]:
    """Of a cell the try that counts (`try`) and the sweep that began it (`sweep`); empty before its first."""
    return storage.read(f"{cell}/lease.json")


def begin(storage: Storage, cell: str, sweep: Life) -> tuple[str, str | None]:
    """Make a new try the one that counts; returns its name, and that of the earlier try to go on from.

    Earlier tries but that one are removed.
    """
    names = storage.names(cell)
    tries = tries_of(names)
    source = next((t for t in reversed(tries) if f"{t}/checkpoint.safetensors" in names), None)
    used = [*tries, *([str(held["try"])] if (held := lease(storage, cell)) else [])]  # one may have left nothing yet
    number = 1 + max([int(t.split("-")[1]) for t in used], default=0)
    name = f"try-{number:04d}-{sweep.token}"
    storage.write(f"{cell}/lease.json", {"try": name, "sweep": sweep.name})
    for earlier in tries:
        if earlier != source:
            storage.remove(f"{cell}/{earlier}")
    return name, source


def tries_of(names: list[str]) -> list[str]:
    """The tries that a cell's files belong to, the oldest first."""
    return sorted({n.split("/")[0] for n in names if n.startswith("try-")})
