"""Cells as processes of this machine, so many at a time on each device."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench_dfusion import launch

if TYPE_CHECKING:
    from bench_dfusion.sweeps import Job


def devices_of(named: str | None) -> list[str]:
    """The devices a sweep runs on: those named (comma-separated), or every GPU, or the CPU."""
    if named:
        return [d.strip() for d in named.split(",") if d.strip()]
    import torch

    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]


class Local:
    """Runs `workers` cells at a time on each of `devices`."""

    def __init__(self, devices: Sequence[str], workers: int = 1):
        self.places, self.workers = len(devices) * workers, workers
        self.free = deque(d for _ in range(workers) for d in devices)
        self.running: dict[Path, tuple[subprocess.Popen[bytes], str]] = {}  # by the cell's directory; with the device

    def ready(self) -> bool:
        return bool(self.free)

    def taken(self, job: Job) -> bool:
        return job.locked()

    def start(self, job: Job) -> None:
        device = self.free.popleft()
        command = [sys.executable, "-m", "bench_dfusion.cli", "run", *job.words, "--out", str(job.out)]
        environment = dict(os.environ)
        if device == "cpu":  # processes that share the cores' threads stall each other
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.workers)))
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / "error.json").unlink(missing_ok=True)
        with open(job.folder / "log.txt", "wb") as log:
            process = subprocess.Popen(
                [*command, "--device", device],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        self.running[job.folder] = process, device
        job.state, job.started = "running", time.monotonic()

    def ended(self, job: Job) -> str | None:
        process, device = self.running[job.folder]
        code = process.poll()
        if code is None:
            return None
        del self.running[job.folder]
        self.free.append(device)
        return launch.how(code)

    def stop(self, jobs: Sequence[Job]) -> None:
        processes = [self.running[j.folder][0] for j in jobs if j.folder in self.running]
        for process in processes:
            if process.poll() is None:
                process.terminate()  # a shell in the background has made SIGINT deaf
        until = time.monotonic() + launch.GRACE
        for process in processes:
            launch.wait(process, until - time.monotonic())
