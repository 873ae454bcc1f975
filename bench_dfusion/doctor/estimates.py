"""What `bench-dfusion doctor` says: phases with their memory and time, and what could be changed."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, Field

from bench_dfusion.doctor.device import Rates

ORDER = ("load", "encode", "sample", "decode", "score", "build", "train", "evaluate")


class Phase(BaseModel):
    """A part of a run: the bytes that lie on the device while it runs, by what they are, and how long it takes."""

    name: str
    parts: dict[str, int] = Field(description="bytes at the phase's peak by what they are")
    seconds: float | None = Field(None, description="in a round (evaluation: once)")

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


class Change(BaseModel):
    """What could be set otherwise, and the peak if it were, alone."""

    settings: dict[str, Any] = Field(description="options of the track")
    peak: int = Field(description="bytes")
    saves: int = Field(description="bytes less than without it")
    note: str = Field("", description="what it costs")


class Estimate(BaseModel):
    """What `bench-dfusion doctor` says."""

    model: str
    device: str
    cell: str
    available: int = Field(description="bytes that the device has for a run")
    phases: list[Phase]
    parameters: dict[str, int] = Field(description="of each network, and of the LoRA (count)")
    on_disk: dict[str, int] = Field(description="bytes of each part's weights files")
    changes: list[Change] = Field([], description="where it does not fit, cheapest first")
    smallest: dict[str, Any] | None = Field(None, description="the smallest set of changes that fits")
    smallest_peak: int | None = None
    rates: Rates | None = None
    rounds: int
    notes: list[str]

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda p: p.peak)

    @property
    def fits(self) -> bool:
        return self.peak.peak <= self.available

    @property
    def round_seconds(self) -> float | None:
        """Seconds of a round without the reward's."""
        own = [p.seconds for p in self.phases if p.seconds is not None and p.name != "evaluate"]
        return sum(own) if own else None

    def as_json(self) -> str:
        derived = {"fits": self.fits, "peak": self.peak.peak, "peak_phase": self.peak.name}
        return json.dumps({**derived, "round_seconds": self.round_seconds, **self.model_dump(mode="json")}, indent=1)
