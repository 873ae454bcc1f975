"""Cells as tasks of a Ray cluster: one that is there, or one of this machine alone that ends with the sweep.

Ray places a try on a node with the resources it asks for, and says when the node is gone; everything else (what is
kept, which try counts) is in the storage. Ray itself never repeats a task: a new try has a name of its own.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench_dfusion.errors import UsageError, plain
from bench_dfusion.results import checked_base
from bench_dfusion.runs import status
from bench_dfusion.sweeps import launcher, node
from bench_dfusion.sweeps.job import Job
from bench_dfusion.sweeps.launcher import Ended
from bench_dfusion.sweeps.storage import BEAT, LAST, Life, Storage, begin, lease, tries_of
from bench_dfusion.util import files
from bench_dfusion.version import __version__

if TYPE_CHECKING:  # a node imports this too, and needs no torch for it
    from bench_dfusion.sweeps.job import Job

LOSSES = 10  # lost tries of a cell after which it may be what kills its nodes
# Errors of Ray that say nothing of the cell
LOST = {
    "WorkerCrashedError",
    "NodeDiedError",
    "LocalRayletDiedError",
    "OwnerDiedError",
    "ObjectLostError",
    "OutOfMemoryError",
}
STORE = 100_000_000  # bytes of a local cluster's object store, which holds nothing


@dataclass
class Try:
    """A try that was handed to Ray, or (no `ref`) a record found in the storage."""

    cell: str
    name: str
    ref: Any = None
    node: str = ""  # Ray's id of the node that has begun it
    dead: bool = False  # whether Ray has given that node up
    lock: ExitStack = field(default_factory=ExitStack)  # of the cell's directory here


class Cluster:
    """Runs cells on a Ray cluster; a context, within which it is connected.

    out       the sweep's directory
    address   as `ray.init` takes it; None: a cluster of this machine, for this sweep
    cpus      CPUs that a cell has
    gpus      GPUs that a cell has; None: 1 where the cluster has any
    storage   fsspec URL; None: `.storage` in `out`, where a cell's files stay until they have been copied

    Raises UsageError where Ray is not installed, does not answer, or the storage cannot be used.
    """

    def __init__(self, out: Path, address: str | None, cpus: int, gpus: float | None, storage: str | None):
        self.address, self.cpus, self.gpus = address, cpus, gpus
        self.keep = storage is not None
        self.url = storage or str(out / ".storage")
        if "://" not in self.url:
            self.url = f"file://{Path(self.url).absolute()}"
        if self.url.startswith("memory:"):
            raise UsageError(f"--storage {self.url} is one process's own: give one that all nodes share")
        if gpus is not None and gpus > 1 and gpus % 1:
            raise UsageError(f"--gpus-per-cell {gpus:g}: give a part of one GPU, or whole ones")
        self.storage = Storage(self.url)
        host, _, port = (address or "").removeprefix("ray://").rpartition(":")
        if host and port.isdigit():
            try:  # Ray itself would try for minutes
                socket.create_connection((host, int(port)), timeout=10).close()
            except (OSError, OverflowError) as error:
                raise UsageError(f"no Ray cluster at {address}: {error}") from None
        try:
            os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # read when Ray is imported
            import ray
        except ImportError:
            raise UsageError("--launcher ray needs Ray: pip install -e '.[ray]'") from None
        self.ray = ray
        self.life = Life(self.storage)
        self.tries: dict[Path, Try] = {}  # by the cell's directory here
        self.lost: dict[Path, int] = {}
        self.looked: dict[Path, tuple[float, bool]] = {}  # when and whether another sweep was seen to have a cell
        self.copying = threading.Lock()  # of files from the storage into a cell's directory here
        self.closing = threading.Event()
        self.places = 1
        self.gone: set[str] = set()  # the ids of nodes that Ray has given up
        self.bases: set[str] = set()  # names of the checked bases that are in the storage

    def __enter__(self) -> Cluster:
        before = signal.getsignal(signal.SIGTERM)
        local: dict[str, Any] = {}
        if self.address is None:
            settings = {"worker_niceness": 0}  # Ray's 15 would make a run slower than a local sweep's
            local = {"include_dashboard": False, "object_store_memory": STORE, "_system_config": settings}
        try:
            self.ray.init(address=self.address or "local", log_to_driver=False, logging_level="ERROR", **local)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise UsageError(f"no Ray cluster at {self.address}: {plain(str(error).strip())}") from None
        finally:
            signal.signal(signal.SIGTERM, before)  # Ray's own would end without stopping the cells
        if self.gpus is None:
            self.gpus = float(self.ray.cluster_resources().get("GPU", 0) > 0)
        try:
            self.life.beat()
        except Exception as error:
            self.ray.shutdown()
            raise UsageError(f"storage {self.url}: {type(error).__name__}: {plain(error)}") from None
        if not self._count():
            text = f"no node has {self.cpus} CPUs and {self.gpus:g} GPUs"
            if self.address is None:
                self.ray.shutdown()
                raise UsageError(f"{text}: lower --cpus-per-cell or --gpus-per-cell")
            print(f"{text} now; cells wait until one joins", file=sys.stderr)
        self.pulse = threading.Thread(target=self._pulse, daemon=True)
        self.pulse.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.pulse.join()
        with suppress(Exception):
            self.life.end()
            if not self.keep:
                self.storage.remove(node.BASES)
            if not self.keep and not self.storage.names(""):
                self.storage.remove("")
        self.ray.shutdown()

    def ready(self) -> bool:
        return len(self.tries) < 2 * self.places  # what waits tells an autoscaler to grow the cluster

    def taken(self, job: Job) -> bool:
        if job.locked():
            return True
        when, answer = self.looked.get(job.folder, (-BEAT, False))
        if time.monotonic() - when >= BEAT or not answer:
            held = lease(self.storage, job.cell.folder)
            answer = self.life.other(held.get("sweep")) and not self._has_record(job, held)
            self.looked[job.folder] = time.monotonic(), answer
        return answer

    def start(self, job: Job) -> None:
        cell = job.cell.folder
        job.folder.mkdir(parents=True, exist_ok=True)
        held = lease(self.storage, cell)
        own = Try(cell, held.get("try", ""))
        try:
            own.lock.enter_context(files.locked(job.folder / ".lock", "busy"))
        except UsageError:
            job.state = "elsewhere"
            return
        self.tries[job.folder] = own
        job.state = "queued"
        if self._has_record(job, held):  # of a sweep that ended before it could take it
            return
        (job.folder / "error.json").unlink(missing_ok=True)
        (job.folder / "log.txt").unlink(missing_ok=True)
        if (job.folder / LAST[0]).exists() and not any(n.endswith(LAST[0]) for n in self.storage.names(cell)):
            self.storage.push(job.folder, f"{cell}/try-0000-{self.life.token}", {})  # go on from a local run
        own.name, source = begin(self.storage, cell, self.life)
        words = [*job.words, "--expect", job.cell.hash, "--device", "cuda" if self.gpus else "cpu"]
        base = self._base(job)
        order = node.Order(self.url, cell, own.name, source, words, __version__, str(Path.cwd()), self.cpus, base)
        task = self.ray.remote(_work).options(
            num_cpus=self.cpus, num_gpus=self.gpus, max_retries=0, name=f"{job.name} {own.name}"
        )
        own.ref = task.remote(order)

    def _base(self, job: Job) -> str | None:
        """The name of the job's checked base, put into the storage; None where it has none, or the package has it."""
        path = checked_base.find(job.cell.track, job.folder.parent)
        if path is None or path.parent == checked_base.SHIPPED:
            return None
        if path.name not in self.bases:
            with open(path, "rb") as file:
                self.storage.put(file, f"{node.BASES}/{path.name}")
            self.bases.add(path.name)
        return path.name

    def ended(self, job: Job) -> Ended | None:
        own = self.tries[job.folder]
        if own.ref is None:
            return Ended(self._done(job, "its record was in the storage", pull=True))
        if own.node and job.state == "queued":
            job.state, job.started = "running", time.monotonic()
        if own.dead:  # Ray itself waits for a word of a task on a node that went silent
            self.ray.cancel(own.ref, force=True)
            return Ended(self._lost(job, "NodeDiedError"))
        if not self.ray.wait([own.ref], timeout=0)[0]:
            return None
        try:
            code, seconds = self.ray.get(own.ref)
        except self.ray.exceptions.RayError as error:
            if type(error).__name__ in LOST:
                return Ended(self._lost(job, type(error).__name__))
            cause = getattr(error, "cause", None) or error
            how = self._done(job, "on its node")
            with open(job.folder / "log.txt", "a") as log:
                log.write(f"\n{type(cause).__name__}: {plain(str(cause).strip())}\n")
            return Ended(how)
        if code is None:
            raise launcher.Lost(self._done(job, "another sweep has begun it too"))
        job.state, job.started = "running", time.monotonic() - seconds
        return Ended(self._done(job, launcher.how(code), pull=True), code)

    def stop(self, jobs: Sequence[Job]) -> None:
        running = {j.folder: own for j in jobs if (own := self.tries.get(j.folder)) and own.ref is not None}
        for own in running.values():
            self.ray.cancel(own.ref)
        refs = [own.ref for own in running.values()]
        if refs:
            self.ray.wait(refs, num_returns=len(refs), timeout=launcher.GRACE + BEAT)
        for folder, own in running.items():
            with suppress(Exception), self.copying:  # for a local sweep to go on from; the storage has it anyway
                self.storage.pull(f"{own.cell}/{own.name}", folder)
            own.lock.close()

    def _has_record(self, job: Job, held: dict[str, Any]) -> bool:
        """Whether the try that counts has left a record that has reached the job's rung."""
        found = self.storage.read(f"{job.cell.folder}/{held.get('try')}/{LAST[1]}")
        return found.get("status") == "failed" or found.get("rung", 1 if found else 0) >= job.rung

    def _lost(self, job: Job, why: str) -> str:
        """Raise Lost, or return how the cell ended where it was lost too often."""
        self.lost[job.folder] = self.lost.get(job.folder, 0) + 1
        text = self._done(job, f"its node was lost, {why}")
        if self.lost[job.folder] >= LOSSES:
            return f"{text}, for the {LOSSES}th time"
        raise launcher.Lost(text)

    def _done(self, job: Job, how: str, pull: bool = False) -> str:
        """A try is over: copy what it left, if that counts, and clear the storage of what nobody needs."""
        own = self.tries[job.folder]
        with self.copying:
            if pull:
                self.storage.pull(f"{own.cell}/{own.name}", job.folder)
            del self.tries[job.folder]
        own.lock.close()
        if job.done() is not None:
            useless = ["nodes", *tries_of(self.storage.names(own.cell))] if self.keep else [""]
            for name in useless:
                if name != own.name:
                    self.storage.remove(f"{own.cell}/{name}".rstrip("/"))
        return how

    def _pulse(self) -> None:
        """Every BEAT seconds: a sign of life, the running cells' logs, the cluster's size."""
        while not self.closing.wait(BEAT):
            with suppress(Exception):  # a store or a cluster that is away comes back, or the cells end by it
                self.life.beat()
            with suppress(Exception):
                self._count()
            for folder, own in list(self.tries.items()):
                with suppress(Exception), self.copying:
                    if own.ref is not None and self.tries.get(folder) is own:
                        own.node = own.node or self.storage.read(f"{own.cell}/nodes/{own.name}.json").get("node", "")
                        own.dead = own.node in self.gone
                        if own.node:
                            for name in ("log.txt", status.FILE):
                                with suppress(Exception):
                                    self.storage.get(f"{own.cell}/{own.name}/{name}", folder / name)

    def _count(self) -> int:
        """How many cells fit the nodes; `places` is that, at least 1."""
        found = 0
        machines = self.ray.nodes()
        self.gone = {m["NodeID"] for m in machines if not m["Alive"]}  # a node that returns gets another id
        for machine in machines:
            has = machine.get("Resources", {}) if machine["Alive"] else {}
            fits = [int(has.get("CPU", 0) // self.cpus)] if self.cpus else []
            fits += [int(has.get("GPU", 0) // self.gpus)] if self.gpus else []
            found += min(fits)
        self.places = max(1, found)
        return found


def check_bases(jobs: Sequence[Job]) -> None:
    """Raise UsageError where a job's track has a checked base that is not drawn: nodes would each draw one of their own."""
    for job in jobs:
        track, folder = job.cell.track, job.folder.parent
        if track.evaluation.base_images_per_prompt is not None and checked_base.find(track, folder) is None:
            raise UsageError(
                f"the checked base of {track.id} is not in {folder}: bench-dfusion base, with the sweep's track, --model, "
                "--prompts, --set and --out, draws it once for all nodes"
            )


def _work(order: node.Order) -> tuple[int | None, float]:
    import ray

    return node.work(order, ray.get_runtime_context().get_node_id())
