"""The command `bench-dfusion`: verbs only."""

from __future__ import annotations

import errno
import json
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench_dfusion import errors, plugin_files, registry
from bench_dfusion.errors import PluginError, UsageError

if TYPE_CHECKING:
    from bench_dfusion.results.leaderboard import Board
    from bench_dfusion.runs.loaded import Loaded
    from bench_dfusion.sweeps.launcher import Launcher

app = typer.Typer(
    help="Which method aligns a text-to-image diffusion model best, at what cost, and the proof.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
pairs_app = typer.Typer(help="The consistent samples of a run as a preference dataset.", no_args_is_help=True)
app.add_typer(pairs_app, name="pairs")
out = Console()

Plugins = Annotated[
    list[Path] | None, typer.Option("--plugin", help="A Python file that defines a plugin, for a first try.")
]

AtRung = Annotated[
    int | None,
    typer.Option("--rung", min=1, help="Of a track with rungs the one to compare at (default: where most rows end)."),
]
Rung = Annotated[
    int, typer.Option(min=1, help="Of a track with rungs the one to end at; a run goes on from an earlier one.")
]


@app.command()
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
    track: Annotated[
        str | None, typer.Option(help="Track name or TOML file (default: micro-v2; with --model: paper).")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Training seed (default 0).")] = None,
    seeds: Annotated[int | None, typer.Option(help="Run seeds 0 to this minus 1.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A diffusers pipeline directory or Hub id instead of the track's.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Training prompts instead of the track's, one a line; for a track of a published prompt set, your "
            "copy of it (file or directory), or hf:REPO."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="SECTION.OPTION=VALUE: algo., builder., reward., track.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file with sections algo, builder, reward, track.")] = None,
    folder: Annotated[Path, typer.Option("--out", help="Where run directories go.")] = Path("runs"),
    device: Annotated[str | None, typer.Option(help="torch device (default: cuda where there is one).")] = None,
    processes: Annotated[
        int,
        typer.Option(min=1, help="Processes that share each run, one a GPU; the record is the same for any number."),
    ] = 1,
    keep_pairs: Annotated[
        Literal["all", "last", "none"] | None,
        typer.Option(help="Rounds whose pairs stay, for pairs export (default: all; over 128 px the last)."),
    ] = None,
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
    expect: Annotated[
        str | None, typer.Option(metavar="HASH", help="Refuse to run a cell whose hash (in cell.json) is another.")
    ] = None,
    plugin: Plugins = None,
) -> None:
    """Train one algorithm with one reward on consistent samples, then evaluate base against trained."""
    _load_files(plugin)
    if seed is not None and seeds is not None:
        raise UsageError("--seed and --seeds exclude each other")
    if seeds is not None and seeds < 1:
        raise UsageError(f"--seeds must be 1 or more, not {seeds}")
    numbers = range(seeds) if seeds is not None else [seed or 0]
    if push is None and (private or benchmark):
        raise UsageError("--private and --benchmark say how to --push-to-hub OWNER/NAME: give that too")
    if push is not None and len(numbers) > 1:
        raise UsageError("--push-to-hub takes one run: give --seed N, and a repository for each")
    from bench_dfusion.runs import config as configs
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
    if expect is not None and any(cell.hash != expect for cell in cells):
        raise UsageError(
            f"this cell's hash is {cells[0].hash[:8]} here and {expect[:8]} where it was planned: use the same "
            "bench-dfusion, plugins and files on both machines"
        )
    hub = None
    if push is not None:  # a missing token is said before any compute
        from bench_dfusion.publish.repository import connect

        hub = connect(push)
    if processes > 1 and parallel.size() == 1:
        raise typer.Exit(parallel.launch(processes, sys.argv[1:]))
    # Only now: they import what runs need, which takes longer than to find a mistake.
    from bench_dfusion.cli import display
    from bench_dfusion.results.leaderboard import Board
    from bench_dfusion.runs.loaded import Loaded
    from bench_dfusion.runs.trainer import run_cell

    records = []
    loaded = context.obj or Loaded()
    for cell in cells:
        try:
            records.append(run_cell(cell, folder, device, keep_pairs, loaded, rung))
        except KeyboardInterrupt:
            out.print(f"\nstopped; the same command goes on from the last finished round ({folder / cell.folder})")
            raise typer.Exit(130) from None
    if not parallel.first():
        return
    for cell, record in zip(cells, records, strict=True):
        display.record(record, folder / cell.folder, out)
    if len(records) > 1:
        display.board(Board(tuple(records)), out)
    if any(r.status == "failed" for r in records):
        raise typer.Exit(1)
    if push is not None:
        from bench_dfusion.runs import model_card

        where = model_card.push(folder / cells[0].folder, push, private=private, benchmark=benchmark, hub=hub)
        out.print(f"pushed: {escape(where)}", soft_wrap=True, highlight=False)


@app.command()
def sweep(
    track: Annotated[str, typer.Argument(help="Track name or TOML file.")],
    algo: Annotated[str, typer.Option(help="Training backends, comma-separated.")],
    reward: Annotated[str, typer.Option(help="Training rewards, comma-separated; sums as NAME:WEIGHT+NAME:WEIGHT.")],
    builder: Annotated[str, typer.Option(help="Builders, comma-separated.")] = "dfusion,vanilla",
    seeds: Annotated[int | None, typer.Option(help="Run seeds 0 to this minus 1 (default: the track's).")] = None,
    model: Annotated[
        str | None, typer.Option(help="A diffusers pipeline directory or Hub id instead of the track's.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Training prompts instead of the track's, one a line.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="SECTION.OPTION=VALUE, for every cell: track. above all.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file with sections algo, builder, reward, track.")] = None,
    folder: Annotated[Path, typer.Option("--out", help="Where run directories go.")] = Path("runs"),
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
    keep_pairs: Annotated[
        Literal["all", "last", "none"] | None,
        typer.Option(help="Rounds whose pairs stay, for pairs export (default: all; over 128 px the last)."),
    ] = None,
    rung: Rung = 1,
    plugin: Plugins = None,
) -> None:
    """Run every algorithm × builder × reward × seed, and print the leaderboard.

    All cells are registered before the first runs. Finished ones are skipped, killed ones go on where they were, and a
    failing one is reported and stops nothing; the same command again runs what is still missing.
    """
    _load_files(plugin)
    from bench_dfusion.rewards import sums
    from bench_dfusion.sweeps import queue

    of_ray = {"--ray-address": ray_address, "--cpus-per-cell": cpus, "--gpus-per-cell": gpus, "--storage": storage}
    if launcher == "local" and (named := [o for o, value in of_ray.items() if value is not None]):
        raise UsageError(f"{named[0]} is of --launcher ray: give that too")
    if launcher == "ray" and (device or workers != 1):
        raise UsageError("--device and --workers are of this machine: with ray give --cpus-per-cell, --gpus-per-cell")
    if seeds is not None and seeds < 1:
        raise UsageError(f"--seeds must be 1 or more, not {seeds}")
    words = ["--track", track]
    given = [("--model", model), ("--prompts", prompts), ("--config", config), ("--keep-pairs", keep_pairs)]
    given += [("--set", s) for s in settings or []] + [("--plugin", p) for p in plugin or []]
    for option, value in given:
        words += [option, str(value)] if value is not None else []
    jobs, left_out = queue.plan(
        track,
        _names(algo, "--algo"),
        _names(builder, "--builder"),
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

    for board in _boards(str(folder / jobs[0].cell.track.id), folder):
        display.board(board if len(board.ladder) == 1 else board.at(rung), out)
    if not whole:
        raise typer.Exit(1)


def _names(text: str, option: str, names: list[str] | None = None) -> list[str]:
    """Comma-separated names, or those given. Raises UsageError where one is empty or there twice."""
    names = names or [n.strip() for n in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise UsageError(f"{option} {text!r}: write different names with commas between, for example a,b")
    return names


@app.command()
def doctor(
    model: Annotated[
        str | None, typer.Option(help="A diffusers pipeline directory or Hub id instead of the track's.")
    ] = None,
    track: Annotated[
        str | None, typer.Option(help="Track name or TOML file (default: micro-v2; with --model: paper).")
    ] = None,
    algo: Annotated[str, typer.Option(help="Training backend (bench-dfusion list algorithms).")] = "dpo",
    reward: Annotated[str | None, typer.Option(help="Training reward, as in run (default: clip).")] = None,
    builder: Annotated[str | None, typer.Option(help="Builder of the consistent samples (default: dfusion).")] = None,
    teacher: Annotated[list[str] | None, typer.Option(help="A run or LoRA to learn from, as in run.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Training prompts, as in run.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="SECTION.OPTION=VALUE: algo., builder., reward., track.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file with sections algo, builder, reward, track.")] = None,
    device: Annotated[str | None, typer.Option(help="torch device (default: cuda where there is one).")] = None,
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
    _load_files(plugin)
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


@app.command("eval")
def evaluate(
    run_folder: Annotated[Path | None, typer.Argument(metavar="RUN", help="The directory of a finished run.")] = None,
    lora: Annotated[
        Path | None,
        typer.Option(help="A LoRA to score: a .safetensors file, or the directory of one (diffusers, peft)."),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A pipeline directory to score, trained as a whole from the track's model.")
    ] = None,
    track: Annotated[
        str | None, typer.Option(help="Track name or TOML file (default: micro-v2; with --model: paper).")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The base: a pipeline directory or Hub id instead of the track's, or the run's.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts to hold out every fourth of, where the track holds none (as in run).")
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="track.OPTION=VALUE.")] = None,
    name: Annotated[str | None, typer.Option(help="What to call the weights (default: their file's name).")] = None,
    folder: Annotated[Path, typer.Option("--out", help="Where the evaluation's directory goes.")] = Path("runs"),
    device: Annotated[str | None, typer.Option(help="torch device (default: cuda where there is one).")] = None,
    plugin: Plugins = None,
) -> None:
    """Score a run's LoRA again and compare with its record; or score a LoRA or pipeline that the suite did not train."""
    _load_files(plugin)
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
    where, scored = rescore.weights(on, folder, lora=lora, checkpoint=checkpoint, name=name, device=device)
    display.evaluation(scored, where, out)


@app.command()
def base(
    track: Annotated[
        str | None, typer.Argument(help="Track name or TOML file (default: micro-v2; with --model: paper).")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The base: a pipeline directory or Hub id instead of the track's.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts to hold out every fourth of, where the track holds none (as in run).")
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="track.OPTION=VALUE.")] = None,
    folder: Annotated[Path, typer.Option("--out", help="Where run directories go: the base lies among them.")] = Path(
        "runs"
    ),
    device: Annotated[str | None, typer.Option(help="torch device (default: cuda where there is one).")] = None,
    check: Annotated[bool, typer.Option("--check", help="Draw it anew and compare.")] = False,
    plugin: Plugins = None,
) -> None:
    """Draw and judge a track's checked base, once, where it is not there yet; runs do so by themselves.

    Exit status: 0; 1 where --check finds another base.
    """
    _load_files(plugin)
    from bench_dfusion.cli import display
    from bench_dfusion.runs import config, rescore

    on = config.resolve_track(track, model, prompts, settings)
    path, found, again = rescore.base(on, folder, device, check)
    display.base(path, found, again, out)
    if again is not None and not rescore.same_base(found, again):
        raise typer.Exit(1)


@app.command("list")
def list_plugins(
    kind: Annotated[str | None, typer.Argument(help="algorithms, rewards, builders, models or tracks.")] = None,
    name: Annotated[str | None, typer.Argument(help="One plugin, with its options.")] = None,
    plugin: Plugins = None,
) -> None:
    """Show the plugins that are installed, or one plugin's options."""
    _load_files(plugin)
    if kind is not None and kind not in registry.KINDS:
        raise UsageError(errors.unknown("kind of plugin", kind, registry.KINDS))
    if kind == "tracks" and name and name.endswith(".toml"):
        _describe_track(name)
        return
    if kind and name:
        found = registry.plugins(kind)
        if name not in found:
            raise UsageError(errors.unknown(kind[:-1], name, found))
        _describe(kind, name, found[name])
        return
    for each in [kind] if kind else registry.KINDS:
        grid = Table(title=each, title_justify="left", box=None, pad_edge=False)
        for column in ("name", "what it is", "source", "from"):
            grid.add_column(column, overflow="fold", no_wrap=column == "name")
        for plugin_name, found_plugin in registry.plugins(each).items():
            try:
                value = found_plugin.load()
                summary, paper = _summary(value), getattr(value, "paper", "")
            except PluginError as error:
                summary, paper = f"broken: {error}", ""
            grid.add_row(plugin_name, escape(summary), escape(paper), found_plugin.source)
        out.print(grid)
        out.print()


@app.command()
def leaderboard(
    source: Annotated[
        str, typer.Argument(metavar="TRACK_OR_FOLDER", help="A track's name, or a folder with run directories.")
    ] = "runs",
    folder: Annotated[Path, typer.Option("--out", help="Where the run directories of a named track are.")] = Path(
        "runs"
    ),
    csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated values, every column.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print GitHub's Markdown.")] = False,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Draw the table of one track instead, as an SVG.")
    ] = None,
    wins: Annotated[bool, typer.Option("--wins", help="Print how often each row beats each other, in %.")] = False,
    variants: Annotated[
        bool, typer.Option("--variants", help="Show the rows too whose options are not those the track's tuning chose.")
    ] = False,
    rung: AtRung = None,
) -> None:
    """Print the table of the runs found, one table a track, and the effect of D-Fusion."""
    from bench_dfusion.cli import display
    from bench_dfusion.results.leaderboard import csv as as_csv
    from bench_dfusion.results.leaderboard import markdown as as_markdown

    if csv + markdown + wins + (picture is not None) > 1:
        raise UsageError("--csv, --markdown, --wins and --picture exclude each other")
    found = _boards(source, folder, rung)
    if picture is not None:
        from bench_dfusion.report import leaderboard_picture

        if len(found) > 1:
            tracks = ", ".join(board.track for board in found)
            raise UsageError(
                f"a picture shows one track, and {source} holds {len(found)} ({tracks}); give one's folder"
            )
        leaderboard_picture(found[0], picture)
        out.print(f"{escape(str(picture))}: {escape(found[0].track)}", soft_wrap=True, highlight=False)
        return
    for number, board in enumerate(found):
        if csv or markdown:
            print("\n" * (number > 0) + (as_csv if csv else as_markdown)(board, variants), end="")
        elif wins:
            display.wins(board, out)
        else:
            display.board(board, out, variants)


@app.command()
def report(
    source: Annotated[
        str, typer.Argument(metavar="TRACK_OR_FOLDER", help="A track's name, or a folder with run directories.")
    ] = "runs",
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="The page to write.")] = Path("report.html"),
    folder: Annotated[Path, typer.Option("--out", help="Where the run directories of a named track are.")] = Path(
        "runs"
    ),
    rung: AtRung = None,
) -> None:
    """Write the runs found as one self-contained HTML page: tables, charts, pictures and every record."""
    from bench_dfusion import report as reports

    found = _boards(source, folder, rung)
    reports.write(found, to)
    runs = sum(len((board.whole or board).records) for board in found)
    tracks = ", ".join(board.track for board in found)
    size = to.stat().st_size / 1e6
    out.print(f"{escape(f'{to}: {runs} runs of {tracks}, {size:.1f} MB')}", soft_wrap=True, highlight=False)


@app.command()
def merge(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="SOURCE...", help="Record files, or directories with record.json files below them."),
    ],
    into: Annotated[Path, typer.Option(metavar="DIR", help="The leaderboard directory, new or with records.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and say, write nothing.")] = False,
    skip_refused: Annotated[
        bool,
        typer.Option("--skip-refused", help="Add the others where records are refused (the first of two that differ)."),
    ] = False,
    submitter: Annotated[str, typer.Option(help="Who submits the records that name nobody.")] = "",
) -> None:
    """Add records from other machines or people to a leaderboard directory.

    Records are copied to DIR/TRACK/CELL/record.json with their LoRAs and scores: no pictures.

    Refused: a damaged record, one that contradicts itself or cannot be, one of code that no revision has, another version of DIR's track, model, judges or base, and another result for a cell that DIR has.

    Exit status: 0; 2 if any record is refused, and nothing is written; 1 if so with --skip-refused, and the others are written.
    """
    from bench_dfusion.cli import display
    from bench_dfusion.results import merge as merging

    done = merging.merge(sources, into, dry_run, skip_refused, submitter)
    display.merged(done, into, out)
    if done.refused:
        raise typer.Exit(1 if skip_refused else 2)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A leaderboard, or any folder with records.")],
    sample: Annotated[int, typer.Option(min=0, help="Records to evaluate again from their LoRAs.")] = 3,
    rerun: Annotated[int, typer.Option(min=0, help="Cells to run again as a whole.")] = 0,
    device: Annotated[str | None, typer.Option(help="torch device (default: cuda where there is one).")] = None,
    model: Annotated[
        str | None, typer.Option(help="Where the base model is now, if not where the records say.")
    ] = None,
    plugin: Plugins = None,
) -> None:
    """Check every record, evaluate some again and run some again; which, a hash of all of them decides.

    Exit status: 0; 1 where something differs; 2 where a record cannot be at all.
    """
    _load_files(plugin)
    from bench_dfusion.cli import display
    from bench_dfusion.publish import verify as verifying

    done = verifying.run(folder, sample, rerun, device=device, model=model, say=lambda text: out.print(escape(text)))
    display.verified(done, out)
    if any(verifying.failures(done)):
        raise typer.Exit(1)


@app.command()
def publish(
    repo: Annotated[
        str | None, typer.Argument(metavar="OWNER/NAME", help="A dataset of the Hub, made where there is none.")
    ] = None,
    to: Annotated[Path | None, typer.Option(metavar="DIR", help="Write a directory instead.")] = None,
    source: Annotated[
        str, typer.Option("--from", metavar="TRACK_OR_FOLDER", help="A track's name, or a folder with run directories.")
    ] = "runs",
    folder: Annotated[Path, typer.Option("--out", help="Where the run directories of a named track are.")] = Path(
        "runs"
    ),
    pr: Annotated[bool, typer.Option("--pr", help="Propose as a pull request, for somebody else's dataset.")] = False,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Title of the commit.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new dataset private.")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Your record takes the place of another result of its cell.")
    ] = False,
) -> None:
    """Publish the runs found as a dataset, merged with what it holds: tables, records with their LoRAs, pictures, a card."""
    from bench_dfusion.publish import repository as publish

    if (repo is None) == (to is None):
        raise UsageError("give one of OWNER/NAME (a dataset of the Hub) and --to DIR")
    if to is not None and (pr or private or message is not None):
        raise UsageError("--pr, --private and --message are of the Hub: leave them out with --to")
    found = _boards(source, folder)
    if to is not None:
        done = publish.to_directory(found, to, replace)
    else:
        done = publish.to_hub(found, str(repo), pr=pr, message=message, private=private, replace=replace)
    out.print(escape(publish.summary(done)), soft_wrap=True, highlight=False)


@pairs_app.command("export")
def pairs_export(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a finished run.")],
    folder: Annotated[
        Path | None, typer.Option("--out", help="Where the dataset goes, a new directory (default: RUN/dataset).")
    ] = None,
    rounds: Annotated[Literal["all", "last"], typer.Option(help="Every round kept, or the latest one.")] = "all",
) -> None:
    """Write a run's pairs as a dataset of prompt, chosen and rejected, for datasets.load_dataset and the Hub."""
    from bench_dfusion.runs import pairs

    done = pairs.export(run_folder, folder, rounds)
    out.print(
        f"{sum(done.pairs.values())} pairs of {len(done.pairs)} of {done.rounds} rounds in {escape(str(done.folder))}; "
        f'datasets.load_dataset("{escape(str(done.folder))}") reads them',
        soft_wrap=True,
        highlight=False,
    )


def _load_files(paths: Sequence[Path] | None) -> None:
    for path in paths or []:
        plugin_files.load_file(path)


def _summary(value: Any) -> str:
    text = getattr(value, "summary", None) or (value.__doc__ or "").strip()
    return text.splitlines()[0] if text else ""


def _describe(kind: str, name: str, plugin: registry.Plugin) -> None:
    value = plugin.load()
    out.print(f"[bold]{name}[/bold]  ({plugin.source})\n{escape(_summary(value))}")
    if getattr(value, "paper", None):
        out.print(escape(f"source: {value.paper}"))
    if requirements := getattr(value, "requirements", ()):
        out.print(escape(f"needs: {', '.join(requirements)}"), soft_wrap=True, highlight=False)
    if kind == "tracks":
        _describe_track(name)
        return
    fields = getattr(getattr(value, "Config", None), "model_fields", {})
    if fields:
        section = {"algorithms": "algo", "builders": "builder", "rewards": "reward"}[kind]
        grid = Table(box=None, pad_edge=False)
        for column in ("option", "default", "meaning (unit; source)"):
            grid.add_column(column, overflow="fold")
        for option, info in fields.items():
            text = "; ".join(t for t in (info.description, _range(info.metadata), _searched(info.metadata)) if t)
            grid.add_row(f"{section}.{option}", str(info.default), escape(text))
        out.print(grid)
        _suggestions(kind, name)


def _describe_track(source: str) -> None:
    """A track's content, what it leaves to the user, and its hash where it leaves nothing."""
    from bench_dfusion.runs import config
    from bench_dfusion.tracks import schema as tracks
    from bench_dfusion.tracks import sources as prompt_sources

    content = tracks.read(source)
    prompts = content.get("prompts", {})
    if "source" in prompts:
        origin = prompt_sources.SOURCES[prompt_sources.check(prompts, source).source]
        out.print(
            escape(f"prompts: from {origin.title}, not in this package; {origin.hint}"), soft_wrap=True, highlight=False
        )
    elif "model" in content and prompts:
        settings = tracks.validate(tracks.Track, tracks.with_model_here(content), "track")
        config.judges_of(settings)
        out.print(f"{settings.id}, hash {settings.hash}", soft_wrap=True, highlight=False)
    else:
        out.print("leaves the model and the prompts to you: --model DIR_OR_HUB_ID, --prompts FILE", soft_wrap=True)
    out.print_json(json.dumps(content, default=str))


def _searched(metadata: Sequence[Any]) -> str:
    """Where tuning looks for an option."""
    from bench_dfusion.algorithm import Among, Between

    for where in metadata:
        if isinstance(where, Between):
            return f"tuned from {where.low:g} to {where.high:g}"
        if isinstance(where, Among):
            return f"tuned among {', '.join(map(str, where.values))}"
    return ""


def _range(metadata: Sequence[Any]) -> str:
    """The limits of an option as a reader would write them."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "multiple_of": "a multiple of"}
    limits = [f"{sign} {getattr(m, key):g}" for m in metadata for key, sign in signs.items() if hasattr(m, key)]
    return ", ".join(limits)


def _suggestions(kind: str, name: str) -> None:
    """What tracks set in the place of a plugin's defaults."""
    from bench_dfusion.tracks import schema as tracks

    where: dict[str, list[str]] = {}
    for track_name in registry.plugins("tracks"):
        content = tracks.read(track_name)
        found = {"": content.get(kind, {}).get(name, {})}
        if kind == "algorithms":
            tuned = content.get("tuned", {}).get(name, {})
            found |= {f" with builder {builder}": options for builder, options in tuned.items()}
        for builder, options in found.items():
            if options:
                values = ", ".join(f"{option} {value}" for option, value in options.items())
                where.setdefault(f"{builder}: {values}", []).append(track_name)
    for what, names in where.items():
        out.print(escape(f"track{'s' * (len(names) > 1)} {', '.join(names)}{what}"), highlight=False)


def _boards(source: str, folder: Path, rung: int | None = None) -> list[Board]:
    """The boards below a folder, or of a named track's runs below `folder`, at a rung where one is given. Raises
    UsageError where there is none."""
    from bench_dfusion.results import leaderboard
    from bench_dfusion.tracks import schema as track

    where = Path(source)
    if not where.is_dir():
        if where != Path("runs"):
            try:
                content = track.read(source)
            except UsageError as error:
                raise UsageError(f"no directory {source}; {error}") from None
            where = folder / f"{content['name']}-v{content['version']}"
        if not where.is_dir():
            raise UsageError(f"no directory {where}; bench-dfusion run leaves its runs in runs/")
    try:
        found = leaderboard.boards(where)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if not found:
        raise UsageError(f"no run below {where}")
    return found if rung is None else [board.at(rung) for board in found]


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


# What is wrong with a disk or a path, not with the program.
MENDED = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}


def _errno(error: Exception) -> int | None:
    """The system's number of an error; safetensors only has it in its text."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else getattr(error, "errno", None)


def main(loaded: Loaded | None = None) -> None:
    """Entry point: a user's mistake is one line on stderr and exit status 2; SIGTERM ends it as Ctrl-C does.

    `loaded`: what earlier runs in this process have loaded.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        sys.exit(app(standalone_mode=False, obj=loaded) or 0)  # typer.Exit comes back as its status
    except UsageError as error:
        print(f"bench-dfusion: {errors.plain(error)}", file=sys.stderr)
        sys.exit(2)
    except PluginError as error:
        import traceback

        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        print(f"bench-dfusion: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        if _errno(error) in MENDED:
            print(
                f"bench-dfusion: {errors.plain(error)}; the same command goes on when that is mended", file=sys.stderr
            )
            sys.exit(2)
        # typer brings its own copy of click, whose exceptions it does not export: known by their method.
        if not hasattr(error, "format_message"):
            raise
        print(f"bench-dfusion: {error.format_message()}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
