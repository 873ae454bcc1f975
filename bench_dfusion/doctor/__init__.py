"""What a run will need of a device, estimated before anything is loaded.

The networks are made on the meta device from the checkpoint's configs, with the run's own LoRA, and the run's own code
(policy, builder, algorithm) is run on them and traced (`trace.py`), at the run's batch size but for few samples and
steps. What the trace cannot see is added: weights by part, the optimiser's state, cached embeddings, on a CPU the
round's samples and the process itself, and a margin. Times are the traced operations over rates that this device
reaches (`device.py`).

Not counted: what rewards and judges take while they score, beside their weights; the time they take; what the host of
a GPU holds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from bench_dfusion.doctor import changes as changing
from bench_dfusion.doctor import device
from bench_dfusion.doctor.device import Rates
from bench_dfusion.doctor.estimates import Change, Estimate, Phase
from bench_dfusion.doctor.memory import Memory
from bench_dfusion.errors import UsageError
from bench_dfusion.models.loading import dtype
from bench_dfusion.runs.config import Cell, default_track
from bench_dfusion.runs.config import resolve as resolve_cell
from bench_dfusion.tracks import schema

STAND_INS = 40  # prompts where the track leaves them to the user and none are given


def estimate(cell: Cell, where: torch.device, memory_gb: float | None = None) -> Estimate:
    """What a cell needs of a device, and what to change where that is more than it has.

    memory_gb   the device's memory in the place of what is free on it (1e9 bytes)
    Raises UsageError where the checkpoint's configs cannot be had or the cell cannot run.
    """
    if memory_gb is not None and not memory_gb > 0:
        raise UsageError(f"--memory-gb must be more than 0, not {memory_gb:g}")
    available = int(memory_gb * 1e9) if memory_gb is not None else device.free(where)
    try:
        doctor = Memory(cell, where, fresh=memory_gb is not None)
        found = doctor.phases(cell.track)
        changes: list[Change] = []
        smallest = None
        if max(p.peak for p in found) > available:
            changes = list(changing.changes(doctor, available))
            smallest = changing.smallest(doctor, [c.settings for c in changes], available)
        rates = None
        if device.present(where):
            rates = device.measure(where, dtype(cell.track.model.dtype))
            fill_in_times(doctor, found, rates)
    except UsageError:
        raise
    except ValueError as error:  # a model, builder, algorithm or prompt that does not fit
        raise UsageError(str(error)) from error
    return Estimate(
        model=cell.track.model.id,
        device=str(where),
        cell=f"{cell.algorithm.name} on {cell.builder.name} samples, reward {cell.reward.name}, track {cell.track.id}",
        available=available,
        phases=found,
        parameters=doctor.parameters(cell.track),
        on_disk={name: s.size for name, s in doctor.stored.items()},
        changes=changes,
        smallest=smallest,
        smallest_peak=doctor.peak(changing.changed(cell.track, smallest)) if smallest else None,
        rates=rates,
        rounds=doctor.rounds,
        notes=doctor.notes,
    )


def resolve(
    *,
    track_source: str | None = None,
    model: str | None = None,
    prompts: Path | None = None,
    settings: list[str] | None = None,
    config: Path | None = None,
    algo: str = "dpo",
    builder: str | None = None,
    reward: str | None = None,
    teachers: Sequence[str] | None = None,
) -> tuple[Cell, list[str]]:
    """The cell as `run` would have it, and remarks; prompts stand in where the track leaves them to the user."""
    source = track_source or default_track(model)
    settings, notes = list(settings or []), []
    content = schema.read(source)
    given = schema.read_toml(config).get("track", {}) if config else {}
    if prompts is None and not any("prompts" in c for c in (content, given)) and ".prompts." not in "".join(settings):
        words = [f"a photo of a cat and a dog, number {i}" for i in range(STAND_INS + 10)]
        settings += [f"track.prompts.train={json.dumps(words[:STAND_INS])}"]
        settings += [f"track.prompts.heldout={json.dumps(words[STAND_INS:])}"]
        notes.append(
            f"{STAND_INS} prompts stand in for those of --prompts: their number moves the cached embeddings alone"
        )
    cell = resolve_cell(
        track_source=source,
        model=model,
        prompts=prompts,
        settings=settings,
        config=config,
        algo=algo,
        builder=builder,
        reward=reward or "clip",
        teachers=teachers,
    )
    if not cell.builder.draws:
        raise UsageError(f"builder {cell.builder.name} is of offline pairs: the doctor estimates builders that draw")
    return cell, notes


def fill_in_times(doctor: Memory, phases: list[Phase], rates: Rates) -> None:
    """Fill in the seconds of each phase in a round, and of the evaluation at the end."""
    settings = doctor.cell.track
    costs = {name: doctor._trace(name, settings).cost for name in ("sample", "decode", "build", "train")}
    by_name = {p.name: p for p in phases}
    for name, cost in costs.items():
        by_name[name].seconds = rates.seconds(cost)
    # Base (where it is not a checked one) and trained are drawn, and one image of each prompt goes through both again
    # at each step.
    each = (1 if settings.evaluation.base_images_per_prompt else 2) * settings.evaluation.images_per_prompt
    evaluated = len(settings.prompts.heldout) * (each + 2) / doctor.drawn
    pictures = len(settings.prompts.heldout) * each / (doctor.drawn + doctor.made)
    by_name["evaluate"].seconds = rates.seconds(
        doctor._trace("judge", settings).cost * evaluated + doctor._trace("show", settings).cost * pictures
    )
