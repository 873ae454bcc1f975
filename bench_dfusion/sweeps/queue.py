"""Many cells, one command: every cell is registered before the first runs, none is lost, a failing one stops nothing.

Each cell runs in a process that runs no other at the same time, which a launcher starts here or on other machines
(`bench_dfusion.sweeps.launcher`), so a crash takes one cell with it. Here a process goes on to the next cell where the last one
left a record and can have left nothing else (`launch.worker`). What a cell says goes to `log.txt` in its directory; if it
ends without a record, `error.json` says why until a later sweep tries again. Cells that another process is running (a
second sweep, or what a killed sweep left running) are waited for.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bench_dfusion.errors import UsageError
from bench_dfusion.results.figures import signed
from bench_dfusion.runs.config import Misfit, resolve
from bench_dfusion.sweeps.job import Job
from bench_dfusion.sweeps.launcher import BUSY, Ended, Launcher, Lost
from bench_dfusion.tracks.schema import check_rung
from bench_dfusion.util import files
from bench_dfusion.util.progress import duration

POLL = 0.2  # s between looks at the running cells


def plan(
    track: str,
    algorithms: Sequence[str],
    builders: Sequence[str],
    rewards: Sequence[str],
    seeds: int | None,
    out: Path,
    words: Sequence[str] = (),
    rung: int = 1,
    **options: Any,
) -> tuple[list[Job], list[str]]:
    """Every cell of algorithms × builders × rewards × seeds, seed by seed, and why combinations were left out.

    seeds     0 to this minus 1; None: as many as the track has
    rung      of the track's ladder of budgets the one that each cell runs to
    words     the command's arguments that `options` (those of `config.resolve`) were read from
    Raises UsageError on any mistake, and where no combination fits.
    """
    jobs: list[list[Job]] = []
    left_out: list[str] = []
    for algorithm in algorithms:
        for builder in builders:
            for reward in rewards:
                given = {"track_source": track, "algo": algorithm, "builder": builder, "reward": reward, **options}
                try:
                    first = resolve(seed=0, **given)
                except Misfit as misfit:
                    left_out.append(f"{algorithm}/{builder}/{reward}: {misfit}")
                    continue
                check_rung(rung, first.track.budget.ladder, first.track.id)
                count = first.track.seeds if seeds is None else seeds
                cells = [first, *(resolve(seed=n, **given) for n in range(1, count))]
                jobs.append([Job(cell, out, list(words), rung) for cell in cells])
    if not jobs:
        raise UsageError(left_out[0] if left_out else "nothing to run: name at least one algorithm")
    by_seed = [own[n] for n in range(max(map(len, jobs))) for own in jobs if n < len(own)]
    return by_seed, left_out


def register(jobs: Sequence[Job]) -> None:
    """Write every cell's `cell.json`: from here on a table shows it, with or without a record."""
    for job in jobs:
        if not job.take_record():
            files.write_json(job.folder / "cell.json", job.cell.description)


@dataclass
class Sweep:
    """Runs registered jobs by a launcher."""

    jobs: list[Job]
    launcher: Launcher
    console: Console = field(default_factory=lambda: Console(stderr=True))

    def run(self) -> bool:
        """Run what has no record yet; whether every cell ended with a record of a finished run.

        KeyboardInterrupt first stops the running cells, which go on from their last round later.
        """
        self.begun = time.monotonic()
        self.queue = deque(j for j in self.jobs if j.state == "waiting")
        with self._shown() as show:
            try:
                while self.queue or any(j.state in ("queued", "running", "elsewhere") for j in self.jobs):
                    self._start()
                    self._collect()
                    show()
                    time.sleep(POLL)
            except BaseException:
                self.launcher.stop([j for j in self.jobs if j.state in ("queued", "running")])
                raise
        return all(j.state == "finished" for j in self.jobs)

    def _start(self) -> None:
        """Start waiting cells while the launcher takes them."""
        for _ in range(len(self.queue)):
            if not self.launcher.ready():
                return
            job = self.queue.popleft()
            if job.take_record():  # a sweep beside this one was faster
                self._ended(job)
            elif self.launcher.taken(job):
                job.state = "elsewhere"
            else:
                self.launcher.start(job)

    def _collect(self) -> None:
        """Take note of what ended."""
        for job in self.jobs:
            if job.state == "elsewhere" and not self.launcher.taken(job):
                if job.take_record():
                    self._ended(job)
                else:
                    job.state = "waiting"
                    self.queue.append(job)
            if job.state in ("queued", "running"):
                try:
                    ended = self.launcher.ended(job)
                except Lost as lost:
                    self.console.print(f"{job.name}: {lost}; it is tried again", markup=False, highlight=False)
                    job.state = "waiting"
                    self.queue.appendleft(job)
                    continue
                if ended is not None:
                    self._ended(job, ended)

    def _ended(self, job: Job, ended: Ended | None = None) -> None:
        job.seconds = time.monotonic() - job.started if job.state == "running" else None
        if not job.take_record():
            if ended is not None and ended.code == BUSY:  # another took its lock between the look and the start
                job.state = "elsewhere"
                return
            text = job.last_line() or "it said nothing"
            how = ended.how if ended is not None else ""
            files.write_json(job.folder / "error.json", {"error": f"{text} ({how})", "log": "log.txt"})
            job.state = "error"
        self._say(job)

    def _say(self, job: Job) -> None:
        """One line for a cell that ended, where there is no live table."""
        if self.console.is_terminal:
            return
        done = sum(j.state in ("finished", "miss", "error") for j in self.jobs)
        took = f" in {duration(job.seconds)}" if job.seconds is not None else ""
        text = _gain(job) if job.state == "finished" else f"{job.state}: {job.error or 'the run collapsed'}"
        left = f"; {duration(self.time_left())} left" if done < len(self.jobs) else ""
        print(f"[{done}/{len(self.jobs)}] {job.name}: {text}{took}{left}", file=sys.stderr, flush=True)

    def time_left(self) -> float:
        """Seconds until the last cell ends, from cells of the same kind that ended, else from all, else from how far
        the running ones are."""
        now = time.monotonic()
        ended = [j for j in self.jobs if j.seconds is not None and j.state in ("finished", "miss")]
        ahead = [(now - j.started) / share for j in self.jobs if j.state == "running" and (share := j.share()) > 0]
        known = [j.seconds or 0.0 for j in ended] or ahead

        def expected(job: Job) -> float:
            same = [j.seconds or 0.0 for j in ended if j.row == job.row]
            return _mean(same or known)

        if not known:
            return float("inf")
        total = 0.0
        for job in self.jobs:
            if job.state in ("waiting", "queued", "elsewhere"):
                total += expected(job)
            elif job.state == "running":
                total += max(0.0, expected(job) - (now - job.started))
        return total / self.launcher.places

    @contextmanager
    def _shown(self) -> Iterator[Any]:
        if not self.console.is_terminal:
            yield lambda: None
            return
        with Live(self.picture(), console=self.console, refresh_per_second=4, transient=True) as live:
            yield lambda: live.update(self.picture())

    def picture(self) -> Group:
        """The live table: a line for each row of the leaderboard, a sign for each seed, what is running now."""
        signs = {
            "waiting": Text("·", "dim"),
            "queued": Text("·", "dim"),
            "running": Text("▶", "cyan"),
            "elsewhere": Text("◌", "cyan"),
            "finished": Text("✓", "green"),
            "miss": Text("✗", "red"),
            "error": Text("!", "bold red"),
        }
        done = sum(j.state in ("finished", "miss", "error") for j in self.jobs)
        head = (
            f"{done} of {len(self.jobs)} cells, {duration(time.monotonic() - self.begun)} gone, "
            f"{duration(self.time_left())} left"
        )
        legend = "✓ finished  ✗ collapsed  ! error  ▶ running  ◌ run by another process  · waiting"
        grid = Table(box=None, pad_edge=False)
        grid.add_column("algorithm/builder/reward", overflow="fold")
        grid.add_column("seeds", no_wrap=True)
        grid.add_column("now", overflow="ellipsis", no_wrap=True)
        for row in dict.fromkeys(j.row for j in self.jobs):
            own = sorted((j for j in self.jobs if j.row == row), key=lambda j: j.cell.seed)
            now = next((j.last_line() for j in own if j.state == "running"), "")
            now = now.removeprefix(f"train {'/'.join(row)} ")
            now = now or next((j.error for j in own if j.state == "error"), "")
            grid.add_row(escape("/".join(row)), Text(" ").join(signs[j.state] for j in own), escape(now))
        return Group(Text(head, "bold"), grid, Text(legend, "dim"))


def _gain(job: Job) -> str:
    verdicts = job.result.verdicts if job.result else []
    return f"finished, {verdicts[0].judge} {signed(verdicts[0].gain.mean)}" if verdicts else "finished"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
