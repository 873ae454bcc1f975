"""What could be set otherwise where a run does not fit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from bench_dfusion.doctor.estimates import Change
from bench_dfusion.doctor.memory import Memory
from bench_dfusion.tracks.schema import Track


def changed(settings: Track, changes: dict[str, Any]) -> Track:
    """A track with options changed: `batch`, `model.dtype`, `memory.OPTION`."""
    content = settings.model_dump()
    for name, value in changes.items():
        section, _, option = name.rpartition(".")
        (content[section] if section else content)[option] = value
    return Track.model_validate(content)


def changes(doctor: Memory, available: int) -> Iterator[Change]:
    """Each change alone, those that cost least first."""
    settings = doctor.cell.track
    now = doctor.peak(settings)
    costs = {
        "memory.drop_text": "",
        "memory.offload_text": "moves between new prompts",
        "memory.offload_vae": "moves twice a round",
        "memory.offload_rewards": "moves twice a round",
        "memory.vae_slicing": "slower decoding",
        "memory.gradient_checkpointing": "a second forward in each training step",
        "memory.offload_network": "moves in every call of the network",
    }
    for option, note in costs.items():
        if getattr(settings.memory, option.partition(".")[2]):
            continue
        try:
            peak = doctor.peak(changed(settings, {option: True}))
        except ValueError:  # the model has no such thing
            continue
        yield Change(settings={option: True}, peak=peak, saves=now - peak, note=note)
    if settings.batch > 1:
        batch = _batch(doctor, settings, {}, available) or 1
        peak = doctor.peak(changed(settings, {"batch": batch}))
        yield Change(settings={"batch": batch}, peak=peak, saves=now - peak, note="more calls of the network")
    if settings.model.dtype == "float32":
        half = {"model.dtype": "bfloat16"}
        peak = doctor.peak(changed(settings, half))
        yield Change(settings=half, peak=peak, saves=now - peak, note="other numbers: another track")


def _batch(doctor: Memory, settings: Track, others: dict[str, Any], available: int) -> int | None:
    """The largest of the batch's halves that fits beside other changes; None where 1 does not."""
    halves = [settings.batch // 2**n for n in range(1, settings.batch.bit_length())]
    if not doctor.fits(changed(settings, {**others, "batch": 1}), available):
        return None
    return next(b for b in halves if doctor.fits(changed(settings, {**others, "batch": b}), available))


def smallest(doctor: Memory, useful: list[dict[str, Any]], available: int) -> dict[str, Any] | None:
    """The fewest changes with which it fits, the cheapest of those; None where all together do not suffice."""
    settings = doctor.cell.track
    everything = {name: value for change in useful for name, value in change.items()}
    if "batch" in everything:
        everything["batch"] = 1
    if not doctor.fits(changed(settings, everything), available):
        return None
    for size in range(1, len(useful) + 1):
        for some in itertools.combinations(useful, size):
            chosen = {name: value for change in some for name, value in change.items()}
            if "batch" in chosen:
                others = {name: value for name, value in chosen.items() if name != "batch"}
                batch = _batch(doctor, settings, others, available)
                if batch is None:
                    continue
                chosen["batch"] = batch
            if doctor.fits(changed(settings, chosen), available):
                return chosen
    return None
