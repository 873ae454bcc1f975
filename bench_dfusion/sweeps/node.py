"""What a node does with a cell: `bench-dfusion run` in a directory of its own, and copies of it into the storage."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bench_dfusion.errors import UsageError
from bench_dfusion.sweeps import launcher
from bench_dfusion.sweeps.storage import BEAT, Storage, lease
from bench_dfusion.version import __version__

LOOK = 0.5  # s between looks at the process
COMMAND = (sys.executable, "-m", "bench_dfusion.cli.child")  # ends when this process does
BASES = "bases"  # in the storage


@dataclass(frozen=True)
class Order:
    """One try of a cell."""

    storage: str  # its URL
    cell: str  # the cell's directory
    attempt: str  # the try's name
    source: str | None  # the earlier try that it goes on from
    words: list[str]  # arguments of `bench-dfusion run`, all but --out
    version: str  # of the sweep's bench-dfusion
    folder: str  # where the sweep runs: relative paths among the words start here, if the node has it
    threads: int
    base: str | None = None  # file name of the track's checked base in the storage


def work(order: Order, machine: str) -> tuple[int | None, float]:
    """Run a try to its end; returns the process's exit status, None where another try has taken its place, and seconds.

    `machine` is the cluster's name for this node, which the sweep finds in the storage.

    Raises UsageError where this node cannot run what the sweep means. KeyboardInterrupt ends the process, and what it
    leaves is in the storage.
    """
    host = os.uname().nodename
    if order.version != __version__:
        raise UsageError(
            f"bench-dfusion {__version__} on {host}, {order.version} where the sweep runs: install the same on all nodes"
        )
    storage = Storage(order.storage)
    held = lease(storage, order.cell)
    if not held:
        raise UsageError(f"{host} does not find the cell's lease in {order.storage}: give a --storage all nodes share")
    storage.write(f"{order.cell}/nodes/{order.attempt}.json", {"node": machine})
    start = time.monotonic()
    known: dict[str, tuple[int, int]] = {}
    place = f"{order.cell}/{order.attempt}"
    with tempfile.TemporaryDirectory(prefix="bench-dfusion-") as scratch:
        folder = Path(scratch) / order.cell
        folder.mkdir(parents=True)
        if order.base is not None:
            storage.get(f"{BASES}/{order.base}", folder.parent / order.base)
        if order.source is not None:
            storage.pull(f"{order.cell}/{order.source}", folder)
        with open(folder / "log.txt", "wb") as log:
            process = subprocess.Popen(
                [*COMMAND, str(os.getpid()), "run", *order.words, "--out", scratch],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=order.folder if Path(order.folder).is_dir() else scratch,
                env={**os.environ, "OMP_NUM_THREADS": str(order.threads)},
            )
        try:
            look = start
            while process.poll() is None:
                if time.monotonic() >= look:
                    look = time.monotonic() + BEAT
                    if not _keep(storage, order, folder, known):
                        return None, 0.0
                time.sleep(LOOK)
        except KeyboardInterrupt:
            process.terminate()
            launcher.wait(process)
            storage.push(folder, place, known)
            raise
        finally:
            if process.poll() is None:
                process.terminate()
                launcher.wait(process)
        if lease(storage, order.cell).get("try") != order.attempt:
            return None, 0.0
        storage.push(folder, place, known)
        return process.returncode, time.monotonic() - start


def _keep(storage: Storage, order: Order, folder: Path, known: dict[str, tuple[int, int]]) -> bool:
    """Copy what is new into the storage; whether this try still counts."""
    try:
        if lease(storage, order.cell).get("try") != order.attempt:
            return False
        storage.push(folder, f"{order.cell}/{order.attempt}", known)
    except Exception as error:  # the store is away for a while: the run goes on, and the next look comes
        print(f"bench-dfusion: {order.storage}: {type(error).__name__}: {error}", file=sys.stderr)
    return True
