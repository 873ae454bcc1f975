"""One cell of a sweep: what it is to run, what has become of it, and what it left."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from bench_dfusion.results import records
from bench_dfusion.runs import status
from bench_dfusion.runs.config import Cell
from bench_dfusion.util import files

State = Literal["waiting", "queued", "running", "elsewhere", "finished", "miss", "error"]


@dataclass
class Job:
    """One cell of a sweep."""

    cell: Cell
    out: Path
    options: list[str]  # arguments of `bench-dfusion run` beside algorithm, builder, reward, seed, device, out and rung
    rung: int = 1  # to which it is to run
    state: State = "waiting"
    started: float = 0.0  # s, time.monotonic
    seconds: float | None = None  # wall time of the try that ended with a record
    result: records.Record | None = None
    folder: Path = field(init=False)

    def __post_init__(self) -> None:
        self.folder = self.out / self.cell.folder

    @property
    def words(self) -> list[str]:
        """The arguments of `bench-dfusion run` for this cell, all but --device and --out."""
        algorithm, builder, _ = self.row
        reward = self.cell.given["reward"]  # a sum or a function as the user wrote it
        names = ["--algo", algorithm, "--builder", builder, "--reward", reward, "--seed", str(self.cell.seed)]
        return names + self.options + (["--rung", str(self.rung)] if self.rung > 1 else [])

    @property
    def row(self) -> tuple[str, str, str]:
        return self.cell.algorithm.name, self.cell.builder.name, self.cell.reward.name

    @property
    def name(self) -> str:
        return f"{'/'.join(self.row)}, seed {self.cell.seed}"

    @property
    def record(self) -> Path:
        return self.folder / "record.json"

    def done(self) -> records.Record | None:
        """The cell's record at its rung, if there is one that has reached it."""
        return records.read(self.record).at(self.rung) if self.record.exists() else None

    def take_record(self) -> bool:
        """Note what `done` gives."""
        self.result = self.done()
        if self.result is None:
            return False
        self.state = "miss" if self.result.status == "failed" else "finished"
        return True

    @property
    def error(self) -> str:
        with suppress(OSError, ValueError, KeyError):
            return str(files.read_json(self.folder / "error.json")["error"])
        return ""

    def locked(self) -> bool:
        """Whether another process is running the cell."""
        return files.held(self.folder / ".lock")

    def last_line(self) -> str:
        """The last thing the cell said, its control characters removed."""
        try:
            with open(self.folder / "log.txt", "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            return ""
        text = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return "".join(c for c in text if c.isprintable())

    def share(self) -> float:
        """The share of the training that a running cell says is done."""
        found = status.read(self.folder)
        return found.share if found is not None else 0.0
