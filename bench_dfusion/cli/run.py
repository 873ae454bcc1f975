"""`bench-dfusion run`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from bench_dfusion.cli.options import (
    Config,
    Device,
    KeepPairs,
    Model,
    Out,
    Plugins,
    Rung,
    Settings,
    Tracker,
    TrackOption,
    check_names,
    load_files,
    out,
)
from bench_dfusion.errors import UsageError

if TYPE_CHECKING:
    from bench_dfusion.results.records import Record
    from bench_dfusion.runs.config import Cell
    from bench_dfusion.runs.loaded import Loaded
    from bench_dfusion.runs.pairs import Keep


def run(
    context: typer.Context,
    algo: Annotated[str, typer.Option(help="Training backend (bench-dfusion list algorithms).")],
    reward: Annotated[
        str | None,
        typer.Option(
            help="Training reward (bench-dfusion list rewards), a weighted sum NAME:WEIGHT,NAME:WEIGHT, or your own "
            "FILE.py:FUNCTION."
        ),
    ] = None,
    builder: Annotated[str | None, typer.Option(help="Builder of the consistent samples (default: dfusion).")] = None,
    pairs: Annotated[
        str | None,
        typer.Option(
            metavar="PATH_OR_HUB_ID",
            help="Train offline on a dataset of prompt, chosen and rejected pictures; no reward is queried.",
        ),
    ] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RUN_OR_LORA",
            help="For --algo opd: a finished run's directory, or a LoRA file, to learn from; once for each.",
        ),
    ] = None,
    track: TrackOption = None,
    seed: Annotated[int | None, typer.Option(help="Training seed (default 0).")] = None,
    seeds: Annotated[int | None, typer.Option(help="Run seeds 0 to this minus 1.")] = None,
    model: Model = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Training prompts instead of the track's, one a line; for a track of a published prompt set, your "
            "copy of it (file or directory), or hf:REPO."
        ),
    ] = None,
    settings: Settings = None,
    config: Config = None,
    folder: Out = Path("runs"),
    device: Device = None,
    processes: Annotated[
        int,
        typer.Option(min=1, help="Processes that share each run, one a GPU; the record is the same for any number."),
    ] = 1,
    keep_pairs: KeepPairs = None,
    push: Annotated[
        str | None,
        typer.Option("--push-to-hub", metavar="OWNER/NAME", help="Then put LoRA, card and record on the Hub."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="With --push-to-hub: make a new repository private.")
    ] = False,
    benchmark: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="With --push-to-hub: the dataset whose table the scores belong to."),
    ] = None,
    rung: Rung = 1,
    tracker: Tracker = None,
    expect: Annotated[
        str | None, typer.Option(metavar="HASH", help="Refuse to run a cell whose hash (in cell.json) is another.")
    ] = None,
    plugin: Plugins = None,
) -> None:
    """Train one algorithm with one reward on consistent samples, then evaluate base against trained."""
    load_files(plugin)
    numbers = _seeds(seed, seeds)
    if push is None and (private or benchmark):
        raise UsageError("--private and --benchmark say how to --push-to-hub OWNER/NAME: give that too")
    if push is not None and len(numbers) > 1:
        raise UsageError("--push-to-hub takes one run: give --seed N, and a repository for each")
    check_names([algo], [builder] if builder else [], [reward] if reward else [], track)
    from bench_dfusion.runs import config as configs
    from bench_dfusion.runs import trackers
    from bench_dfusion.util import parallel

    cells = [
        configs.resolve(
            track_source=track,
            algo=algo,
            builder=builder,
            reward=reward,
            pairs=pairs,
            teachers=teacher,
            seed=n,
            model=model,
            prompts=prompts,
            settings=settings,
            config=config,
        )
        for n in numbers
    ]
    _check_planned(cells, expect)
    trackers.check(tracker or [])
    hub = None
    if push is not None:  # a missing token is said before any compute
        from bench_dfusion.publish.repository import connect

        hub = connect(push)
    if processes > 1 and parallel.size() == 1:
        raise typer.Exit(parallel.launch(processes, sys.argv[1:]))
    records = _run(cells, folder, device, keep_pairs, context.obj, rung, tracker or [])
    if parallel.first():
        _show(cells, records, folder)
        if push is not None:
            from bench_dfusion.publish import model as on_hub

            where = on_hub.push(folder / cells[0].folder, push, private=private, benchmark=benchmark, hub=hub)
            out.print(f"pushed: {escape(where)}", soft_wrap=True, highlight=False)


def _seeds(seed: int | None, seeds: int | None) -> Sequence[int]:
    """Those of --seed or --seeds. Raises UsageError."""
    if seed is not None and seeds is not None:
        raise UsageError("--seed and --seeds exclude each other")
    if seeds is not None and seeds < 1:
        raise UsageError(f"--seeds must be 1 or more, not {seeds}")
    return range(seeds) if seeds is not None else [seed or 0]


def _check_planned(cells: Sequence[Cell], expect: str | None) -> None:
    """Raise UsageError where a cell is not the one that another machine planned."""
    if expect is not None and any(cell.hash != expect for cell in cells):
        raise UsageError(
            f"this cell's hash is {cells[0].hash[:8]} here and {expect[:8]} where it was planned: use the same "
            "bench-dfusion, plugins and files on both machines"
        )


def _run(
    cells: Sequence[Cell],
    folder: Path,
    device: str | None,
    keep_pairs: Keep | None,
    loaded: Loaded | None,
    rung: int,
    trackers: Sequence[str],
) -> list[Record]:
    """The record of each cell, one after another; a stop says how to go on."""
    # Only now: they import what runs need, which takes longer than to find a mistake.
    from bench_dfusion.runs.loaded import Loaded
    from bench_dfusion.runs.trainer import run_cell

    loaded, records = loaded or Loaded(), []
    for cell in cells:
        try:
            records.append(run_cell(cell, folder, device, keep_pairs, loaded, rung, trackers))
        except KeyboardInterrupt:
            out.print(f"\nstopped; the same command goes on from the last finished round ({folder / cell.folder})")
            raise typer.Exit(130) from None
    return records


def _show(cells: Sequence[Cell], records: Sequence[Record], folder: Path) -> None:
    """What the runs say, and of several their table. Raises typer.Exit(1) where one collapsed."""
    from bench_dfusion.cli import display
    from bench_dfusion.results.leaderboard import Board

    for cell, record in zip(cells, records, strict=True):
        display.record(record, folder / cell.folder, out)
    if len(records) > 1:
        display.board(Board(tuple(records)), out)
    if any(r.status == "failed" for r in records):
        raise typer.Exit(1)
