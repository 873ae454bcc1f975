"""`bench-dfusion eval` and `bench-dfusion base`: what is judged again, and what it is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench_dfusion.cli.options import Device, HeldOut, Plugins, TrackOption, TrackSettings, check_names, load_files, out
from bench_dfusion.errors import UsageError


def evaluate(
    run_folder: Annotated[Path | None, typer.Argument(metavar="RUN", help="The directory of a finished run.")] = None,
    lora: Annotated[
        Path | None,
        typer.Option(help="A LoRA to score: a .safetensors file, or the directory of one (diffusers, peft)."),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A pipeline directory to score, trained as a whole from the track's model.")
    ] = None,
    track: TrackOption = None,
    model: Annotated[
        str | None, typer.Option(help="The base: a pipeline directory or Hub id instead of the track's, or the run's.")
    ] = None,
    prompts: HeldOut = None,
    settings: TrackSettings = None,
    name: Annotated[str | None, typer.Option(help="What to call the weights (default: their file's name).")] = None,
    folder: Annotated[Path, typer.Option("--out", help="Where the evaluation's directory goes.")] = Path("runs"),
    device: Device = None,
    plugin: Plugins = None,
) -> None:
    """Score a run's LoRA again and compare with its record; or score a LoRA or pipeline that the suite did not train."""
    load_files(plugin)
    check_names([], [], [], track)
    if sum(given is not None for given in (run_folder, lora, checkpoint)) != 1:
        raise UsageError("give one of RUN, --lora PATH and --checkpoint DIR")
    from bench_dfusion.cli import display
    from bench_dfusion.runs import config, rescore

    if run_folder is not None:
        given = {"--track": track, "--prompts": prompts, "--set": settings, "--name": name}
        for option in (option for option, value in given.items() if value):
            raise UsageError(f"{option} does not go with RUN: a run is scored as its record says")
        found = rescore.run(run_folder, device, model)
        display.rescored(found, run_folder, out)
        raise typer.Exit(0 if found.status == "matches" else 1)
    on = config.resolve_track(track, model, prompts, settings)
    where, scored = rescore.score_weights(on, folder, lora=lora, checkpoint=checkpoint, name=name, device=device)
    display.evaluation(scored, where, out)


def base(
    track: Annotated[
        str | None, typer.Argument(help="Track name or TOML file (default: micro-v2; with --model: paper).")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The base: a pipeline directory or Hub id instead of the track's.")
    ] = None,
    prompts: HeldOut = None,
    settings: TrackSettings = None,
    folder: Annotated[Path, typer.Option("--out", help="Where run directories go: the base lies among them.")] = Path(
        "runs"
    ),
    device: Device = None,
    check: Annotated[bool, typer.Option("--check", help="Draw it anew and compare.")] = False,
    plugin: Plugins = None,
) -> None:
    """Draw and judge a track's checked base, once, where it is not there yet; runs do so by themselves.

    Exit status: 0; 1 where --check finds another base.
    """
    load_files(plugin)
    check_names([], [], [], track)
    from bench_dfusion.cli import display
    from bench_dfusion.runs import config, rescore

    on = config.resolve_track(track, model, prompts, settings)
    path, found, again = rescore.base(on, folder, device, check)
    display.base(path, found, again, out)
    if again is not None and not rescore.same_base(found, again):
        raise typer.Exit(1)
