"""Progress of everything a user waits for: a bar with the time left on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench_dfusion.util import parallel

LINE_EVERY = 20.0  # s between lines where the output is no terminal

console = Console(stderr=True)


class Bar:
    """One task's progress. `advance(n, note)` counts `n` of `total` done; the note follows the bar."""

    def __init__(self, label: str, total: float, done: float = 0.0, progress: Progress | None = None):
        self.label, self.total, self.done, self.started_at = label, total, done, done
        self.start = self.printed = time.monotonic()
        self.progress = progress
        if progress is not None:
            self.task = progress.add_task(label, total=total, completed=int(done), note="")

    def advance(self, n: float = 1.0, note: str = "") -> None:
        self.done += n
        if self.progress is not None:
            self.progress.update(self.task, completed=self.done, note=note)
            return
        now = time.monotonic()
        if now - self.printed >= LINE_EVERY or (self.done >= self.total and now - self.start > LINE_EVERY):
            self.printed = now
            rate = (self.done - self.started_at) / (now - self.start)
            left = (self.total - self.done) / rate if rate > 0 else float("inf")
            text = f"{self.label} {self.done:.0f}/{self.total:.0f}, {duration(left)} left  {note}"
            print(text.rstrip(), file=sys.stderr, flush=True)


@contextmanager
def bar(label: str, total: float, done: float = 0.0) -> Iterator[Bar]:
    """Show the progress of one task while the block runs."""
    if not parallel.first():
        yield Bar(label, total, done, Progress(disable=True))
        return
    if not console.is_terminal:
        yield Bar(label, total, done)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield Bar(label, total, done, progress)


def duration(seconds: float) -> str:
    """Seconds as people write them: 45 s, 3 min 20 s, 2 h 05 min."""
    if seconds == float("inf"):
        return "unknown time"
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    return f"{s // 3600} h {s % 3600 // 60:02d} min"
