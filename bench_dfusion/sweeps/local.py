"""Cells as processes of this machine, so many at a time on each device, each process for many cells."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from bench_dfusion.sweeps import launcher
from bench_dfusion.sweeps.job import Job
from bench_dfusion.sweeps.launcher import Ended


def devices_of(named: str | None) -> list[str]:
    """The devices a sweep runs on: those named (comma-separated), or every GPU, or the CPU."""
    if named:
        return [d.strip() for d in named.split(",") if d.strip()]
    import torch

    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]


class Worker:
    """A process that runs one cell after another (see `launch.worker`)."""

    def __init__(self, log: Path, environment: Mapping[str, str]):
        self._answers, theirs = os.pipe()
        os.set_blocking(self._answers, False)
        try:
            with open(log, "ab") as file:  # what it says before it has read its first order
                self.process = subprocess.Popen(
                    _command(theirs),
                    stdin=subprocess.PIPE,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    pass_fds=[theirs],
                )
        except BaseException:
            os.close(self._answers)
            raise
        finally:
            os.close(theirs)

    def begin(self, words: Sequence[str], log: Path) -> None:
        """Run a cell."""
        assert self.process.stdin
        line = json.dumps({"words": list(words), "log": str(log.absolute())})
        with suppress(BrokenPipeError):  # it has ended, which the next look says
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()

    def status(self) -> int | None:
        """The exit status of the cell, or of the process where that has ended; None while the cell runs."""
        with suppress(BlockingIOError):
            answer = os.read(self._answers, 4096)
            if answer:
                return int(json.loads(answer)["status"])
        return self.process.poll()

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def dismiss(self) -> None:
        """No further cell: it ends by itself."""
        assert self.process.stdin
        with suppress(BrokenPipeError):
            self.process.stdin.close()

    def close(self) -> None:
        """End it."""
        self.dismiss()
        launcher.wait(self.process)
        os.close(self._answers)


def _command(answers: int) -> list[str]:
    return [sys.executable, "-m", "bench_dfusion.cli.worker", str(answers)]


@dataclass
class Place:
    """Where one cell at a time runs."""

    device: str
    worker: Worker | None = None  # that of the last cell here, and of the next


class Local:
    """Runs `workers` cells at a time on each of `devices`; a context, at whose end no process is left."""

    def __init__(self, devices: Sequence[str], workers: int = 1):
        self.places, self.workers = len(devices) * workers, workers
        self.free = deque(Place(d) for _ in range(workers) for d in devices)
        self.running: dict[Path, Place] = {}  # by the cell's directory

    def __enter__(self) -> Local:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        workers = [place.worker for place in self.free if place.worker is not None]
        for worker in workers:
            worker.dismiss()  # all at once: each takes a moment to end
        for place in self.free:
            self._give_up(place)

    def ready(self) -> bool:
        return bool(self.free)

    def taken(self, job: Job) -> bool:
        return job.locked()

    def start(self, job: Job) -> None:
        place = self.free.popleft()
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / "error.json").unlink(missing_ok=True)
        log = job.folder / "log.txt"
        log.write_bytes(b"")
        if place.worker is not None and not place.worker.alive:  # killed while it waited
            self._give_up(place)
        if place.worker is None:
            environment = dict(os.environ)
            if place.device == "cpu":  # processes that share the cores' threads stall each other
                environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.workers)))
            place.worker = Worker(log, environment)
        place.worker.begin(["run", *job.words, "--out", str(job.out), "--device", place.device], log)
        self.running[job.folder] = place
        job.state, job.started = "running", time.monotonic()

    def ended(self, job: Job) -> Ended | None:
        place = self.running[job.folder]
        assert place.worker
        status = place.worker.status()
        if status is None:
            return None
        del self.running[job.folder]
        if not place.worker.alive:
            self._give_up(place)
        self.free.append(place)
        return Ended(launcher.how(status), status)

    def stop(self, jobs: Sequence[Job]) -> None:
        places = [self.running.pop(j.folder) for j in jobs if j.folder in self.running]
        processes = [place.worker.process for place in places if place.worker]
        for process in processes:
            if process.poll() is None:
                process.terminate()  # a shell in the background has made SIGINT deaf
        until = time.monotonic() + launcher.GRACE
        for process in processes:
            launcher.wait(process, until - time.monotonic())
        self.free.extend(places)

    def _give_up(self, place: Place) -> None:
        if place.worker is not None:
            place.worker.close()
            place.worker = None
