"""What the runs below a folder are doing, read from the files that they leave alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_dfusion.errors import UsageError
from bench_dfusion.results import records
from bench_dfusion.results.figures import signed
from bench_dfusion.runs import status
from bench_dfusion.util import files
from bench_dfusion.util.progress import duration

SILENT = 600.0  # s without a word after which a run that holds no lock here has stopped, wherever it ran
BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Watched:
    """One registered cell as it is now.

    state    waiting, base, training, evaluating, stopped, finished, collapsed, error
    said     what there is to it: rounds, gain, evidence or error
    rises    of each round, the training reward minus the base's on the same prompts
    left     seconds of training left, None where that is not known
    """

    name: str
    state: str
    said: str
    rises: tuple[float, ...] = ()
    left: float | None = None

    @property
    def over(self) -> bool:
        return self.state in ("finished", "collapsed", "error")


def look(folder: Path) -> list[Watched]:
    """Every cell below a folder, by path. Raises UsageError where there is none."""
    cells = records.below(folder, "cell.json") if folder.is_dir() else []
    if not cells:
        raise UsageError(f"no run below {folder}; bench-dfusion run leaves its runs in runs/")
    return [_cell(path) for path in cells]


def _cell(path: Path) -> Watched:
    """A cell; what is damaged is shown as that and stops nothing."""
    folder = path.parent
    try:
        name = _name(files.read_json(path)["resolved"])
    except (OSError, ValueError, KeyError, TypeError):
        return Watched(folder.name, "error", "its cell.json cannot be read")
    running = files.held(folder / ".lock")  # a run to a later rung has a record of the earlier one
    try:
        if (folder / "record.json").exists() and not running:
            return _ended(name, folder)
        if (folder / "error.json").exists():
            return Watched(name, "error", str(files.read_json(folder / "error.json")["error"]))
    except (UsageError, OSError, ValueError, KeyError, TypeError) as error:
        return Watched(name, "error", str(error))
    now = status.read(folder)
    if now is None:
        return Watched(name, "waiting", "")
    if not running and (now.stage == "done" or time.time() - now.updated > SILENT):
        return Watched(name, "stopped", f"{now.done} of {now.total} rounds", tuple(now.rises))
    if now.stage == "train":
        left = now.seconds_left
        known = left != float("inf")
        said = f"{now.done} of {now.total} rounds"
        return Watched(name, "training", said, tuple(now.rises), left if known else None)
    return Watched(name, "evaluating" if now.stage == "evaluate" else "base", "", tuple(now.rises))


def _name(resolved: dict[str, Any]) -> str:
    parts = [str(resolved[part]["name"]) for part in ("algorithm", "builder", "reward")]
    return f"{'/'.join(parts)}, seed {resolved['seed']}"


def _ended(name: str, folder: Path) -> Watched:
    record = records.read(folder / "record.json")
    rises = tuple(r.rise for r in record.rounds if r.rise is not None)
    if record.status == "failed":
        return Watched(name, "collapsed", record.evidence or "", rises)
    first = record.verdicts[0]
    interval = f"[{signed(first.gain.low)}, {signed(first.gain.high)}]"
    return Watched(name, "finished", f"{first.judge} {signed(first.gain.mean)} {interval}", rises)


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """The values as a line of bars, the last `width` of them; 0 is always within the scale."""
    shown = list(values)[-width:]
    low, high = min([0.0, *shown]), max([0.0, *shown])
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in shown)


def headline(cells: Sequence[Watched]) -> str:
    """How many are over, what the others do, and the longest time left that is known."""
    counts = {state: sum(cell.state == state for cell in cells) for state in dict.fromkeys(c.state for c in cells)}
    left = max((cell.left for cell in cells if cell.left is not None), default=None)
    text = (
        f"{sum(cell.over for cell in cells)} of {len(cells)} over: {', '.join(f'{n} {s}' for s, n in counts.items())}"
    )
    return text + (f"; the running ones train for {duration(left)} more" if left is not None else "")
