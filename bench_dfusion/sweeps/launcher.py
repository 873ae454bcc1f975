"""Where a sweep's cells run: processes of this machine (`local`) or tasks of a Ray cluster (`cluster`)."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from bench_dfusion.sweeps.job import Job

BUSY = os.EX_TEMPFAIL  # the exit status of a command whose cell another process is running
GRACE = 30.0  # s that a stopped cell has to end by itself


class Lost(Exception):
    """The try of a cell is lost and not the cell: another may begin. The message is why."""


@dataclass(frozen=True)
class Ended:
    """How a try of a cell ended: in words, and the exit status of its process where that is known."""

    how: str
    code: int | None = None


class Launcher(Protocol):
    """What `Sweep` asks of a place to run cells. All is called from one thread."""

    @property
    def places(self) -> int:
        """The number of cells that run at a time, at least 1."""

    def ready(self) -> bool:
        """Whether it takes another cell now."""

    def taken(self, job: Job) -> bool:
        """Whether somebody else is running the cell."""

    def start(self, job: Job) -> None:
        """Begin a try: `job.state` becomes queued, running (with `job.started`), or elsewhere where others were faster."""

    def ended(self, job: Job) -> Ended | None:
        """None while the cell is queued or runs, then how it ended, its files and log in its directory. Raises Lost."""

    def stop(self, jobs: Sequence[Job]) -> None:
        """End the tries of these jobs; they can go on later."""


def how(code: int) -> str:
    """How a process with this exit status ended, in words."""
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"


def wait(process: subprocess.Popen[bytes], seconds: float = GRACE) -> None:
    """Wait for a process that was told to end, and kill it when its time is over."""
    try:
        process.wait(max(0.1, seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
