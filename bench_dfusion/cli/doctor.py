"""`bench-dfusion doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench_dfusion.cli.options import (
    Config,
    Device,
    Model,
    Plugins,
    Settings,
    TrackOption,
    check_names,
    load_files,
    out,
)


def doctor(
    model: Model = None,
    track: TrackOption = None,
    algo: Annotated[str, typer.Option(help="Training backend (bench-dfusion list algorithms).")] = "dpo",
    reward: Annotated[str | None, typer.Option(help="Training reward, as in run (default: clip).")] = None,
    builder: Annotated[str | None, typer.Option(help="Builder of the consistent samples (default: dfusion).")] = None,
    teacher: Annotated[list[str] | None, typer.Option(help="A run or LoRA to learn from, as in run.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Training prompts, as in run.")] = None,
    settings: Settings = None,
    config: Config = None,
    device: Device = None,
    memory_gb: Annotated[
        float | None,
        typer.Option(metavar="GB", help="The device's memory (10⁹ bytes) in the place of what is free on it now."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the estimate as JSON.")] = False,
    plugin: Plugins = None,
) -> None:
    """Estimate the memory and the time of a run before anything is loaded, and what to change where it does not fit.

    Configs are read, no weights: a model of the Hub is not downloaded.

    Exit status: 0 where it fits, 1 where not, 2 on a mistake.
    """
    load_files(plugin)
    check_names([algo], [builder] if builder else [], [reward] if reward else [], track)
    from bench_dfusion import doctor as doctors
    from bench_dfusion.cli import display
    from bench_dfusion.doctor import device as devices

    where = devices.find(device, memory_gb)
    cell, notes = doctors.resolve(
        track_source=track,
        model=model,
        prompts=prompts,
        settings=settings,
        config=config,
        algo=algo,
        builder=builder,
        reward=reward,
        teachers=teacher,
    )
    found = doctors.estimate(cell, where, memory_gb)
    found.notes[:0] = notes
    if as_json:
        print(found.as_json())
    else:
        display.estimate(found, out)
    if not found.fits:
        raise typer.Exit(1)
