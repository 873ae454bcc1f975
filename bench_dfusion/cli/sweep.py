"""`bench-dfusion sweep`."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bench_dfusion.cli.options import (
    Config,
    KeepPairs,
    Model,
    Out,
    Plugins,
    Rung,
    Tracker,
    boards,
    check_names,
    load_files,
    out,
)
from bench_dfusion.errors import UsageError

if TYPE_CHECKING:
    from bench_dfusion.sweeps.launcher import Launcher


def sweep(
    track: Annotated[str, typer.Argument(help="Track name or TOML file.")],
    algo: Annotated[str, typer.Option(help="Training backends, comma-separated.")],
    reward: Annotated[str, typer.Option(help="Training rewards, comma-separated; sums as NAME:WEIGHT+NAME:WEIGHT.")],
    builder: Annotated[str, typer.Option(help="Builders, comma-separated.")] = "dfusion,vanilla",
    seeds: Annotated[int | None, typer.Option(help="Run seeds 0 to this minus 1 (default: the track's).")] = None,
    model: Model = None,
    prompts: Annotated[Path | None, typer.Option(help="Training prompts instead of the track's, one a line.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="SECTION.OPTION=VALUE, for every cell: track. above all.")
    ] = None,
    config: Config = None,
    folder: Out = Path("runs"),
    device: Annotated[
        str | None, typer.Option(help="torch devices, comma-separated (default: every GPU, else the CPU).")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Cells at a time on each device.")] = 1,
    launcher: Annotated[
        Literal["local", "ray"], typer.Option(help="This machine, or the nodes of a Ray cluster.")
    ] = "local",
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="The cluster, HOST:PORT or auto (default: one of this machine alone)."),
    ] = None,
    cpus: Annotated[int | None, typer.Option("--cpus-per-cell", min=1, help="With ray (default 1).")] = None,
    gpus: Annotated[
        float | None,
        typer.Option(
            "--gpus-per-cell", min=0, help="With ray; 0.5: two cells share one (default: 1 if there are any)."
        ),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(metavar="URL", help="With ray: what all nodes share, as s3://bucket/dir (default: --out)."),
    ] = None,
    keep_pairs: KeepPairs = None,
    rung: Rung = 1,
    tracker: Tracker = None,
    plugin: Plugins = None,
) -> None:
    """Run every algorithm × builder × reward × seed, and print the leaderboard.

    All cells are registered before the first runs. Finished ones are skipped, killed ones go on where they were, and a
    failing one is reported and stops nothing; the same command again runs what is still missing.
    """
    load_files(plugin)
    algorithms, builders = _names(algo, "--algo"), _names(builder, "--builder")
    check_names(algorithms, builders, reward.split(","), track)
    from bench_dfusion.rewards import sums
    from bench_dfusion.sweeps import queue

    _check_launcher(launcher, device, workers, ray_address, cpus, gpus, storage)
    if seeds is not None and seeds < 1:
        raise UsageError(f"--seeds must be 1 or more, not {seeds}")
    from bench_dfusion.runs import trackers

    words = ["--track", track]
    given = [("--model", model), ("--prompts", prompts), ("--config", config), ("--keep-pairs", keep_pairs)]
    given += [("--set", s) for s in settings or []] + [("--plugin", p) for p in plugin or []]
    given += [("--tracker", name) for name in trackers.check(tracker or [])]
    for option, value in given:
        words += [option, str(value)] if value is not None else []
    jobs, left_out = queue.plan(
        track,
        algorithms,
        builders,
        _names(reward, "--reward", sums.listed(reward)),
        seeds,
        folder,
        words,
        rung,
        model=model,
        prompts=prompts,
        settings=settings,
        config=config,
    )
    for reason in left_out:
        print(f"left out: {reason}", file=sys.stderr)
    from bench_dfusion.sweeps import cluster, local

    place: AbstractContextManager[Launcher]
    if launcher == "ray":
        cluster.check_bases(jobs)
        place = cluster.Cluster(folder, ray_address, cpus or 1, gpus, storage)
    else:
        place = local.Local(local.devices_of(device), workers)
    try:
        with place as where:
            queue.register(jobs)
            whole = queue.Sweep(jobs, where).run()
    except KeyboardInterrupt:
        out.print("\nstopped; the same command goes on where it was")
        raise typer.Exit(130) from None
    from bench_dfusion.cli import display

    for board in boards(str(folder / jobs[0].cell.track.id), None, folder):
        display.board(board if len(board.ladder) == 1 else board.at(rung), out)
    if not whole:
        raise typer.Exit(1)


def _names(text: str, option: str, names: list[str] | None = None) -> list[str]:
    """Comma-separated names, or those given. Raises UsageError where one is empty or there twice."""
    names = names or [n.strip() for n in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise UsageError(f"{option} {text!r}: write different names with commas between, for example a,b")
    return names


def _check_launcher(
    launcher: str,
    device: str | None,
    workers: int,
    address: str | None,
    cpus: int | None,
    gpus: float | None,
    storage: str | None,
) -> None:
    """Raise UsageError for an option of the launcher that was not asked for."""
    of_ray = {"--ray-address": address, "--cpus-per-cell": cpus, "--gpus-per-cell": gpus, "--storage": storage}
    if launcher == "local" and (named := [o for o, value in of_ray.items() if value is not None]):
        raise UsageError(f"{named[0]} is of --launcher ray: give that too")
    if launcher == "ray" and (device or workers != 1):
        raise UsageError("--device and --workers are of this machine: with ray give --cpus-per-cell, --gpus-per-cell")
