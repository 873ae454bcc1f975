"""How far a run is, for whoever watches: a small file in its directory, written while it runs and never read by the run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, ValidationError

from bench_dfusion.util import files, parallel

FILE = "status.json"


class Status(BaseModel):
    """What a run does now. No number of a record depends on it."""

    stage: Literal["base", "train", "evaluate", "done"] = Field(
        description="drawing the track's checked base, training, judging, or over"
    )
    done: int = Field(description="rounds trained (count)")
    total: int = Field(description="rounds to the rung that it runs to (count)")
    begun: float = Field(description="when this process began the stage (Unix time, s)")
    begun_at: int = Field(description="rounds that were trained then (count)")
    updated: float = Field(description="when this was written (Unix time, s)")
    reward: float | None = Field(None, description="mean training reward of the last round's drawn samples")
    rises: list[float] = Field([], description="of each round, the reward minus the base's on the same prompts")

    @property
    def share(self) -> float:
        """The share of the training that is done, in [0, 1]."""
        return 1.0 if self.stage in ("evaluate", "done") else self.done / self.total if self.total else 0.0

    @property
    def seconds_left(self) -> float:
        """Of the training, at the rate since `begun` (s); infinity where that is not known."""
        trained = self.done - self.begun_at
        if self.stage != "train":
            return 0.0 if self.stage in ("evaluate", "done") else float("inf")
        return (self.total - self.done) * (self.updated - self.begun) / trained if trained else float("inf")


class Reporter:
    """Writes the status of one run; only its first process does."""

    def __init__(self, folder: Path):
        self.path = folder / FILE
        self._began = "", 0.0, 0

    def say(
        self,
        stage: Literal["base", "train", "evaluate", "done"],
        done: int,
        total: int,
        reward: float | None = None,
        rises: list[float] | None = None,
    ) -> None:
        """Write what the run does now. A disk that is full or read-only stops what is written next, and not this."""
        now = time.time()
        if self._began[0] != stage:
            self._began = stage, now, done
        _, begun, begun_at = self._began
        if parallel.first():
            status = Status(
                stage=stage,
                done=done,
                total=total,
                begun=begun,
                begun_at=begun_at,
                updated=now,
                reward=reward,
                rises=rises or [],
            )
            try:
                files.write_json(self.path, status.model_dump(mode="json"))
            except OSError:
                return


def read(folder: Path) -> Status | None:
    """What a run's directory says of it; None where it says nothing that can be read."""
    try:
        return Status.model_validate_json((folder / FILE).read_bytes())
    except (OSError, ValidationError, ValueError):
        return None
