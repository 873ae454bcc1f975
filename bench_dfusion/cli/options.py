"""Options that several verbs have, described once, and what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from bench_dfusion import registry
from bench_dfusion.errors import UsageError

if TYPE_CHECKING:
    from bench_dfusion.results.leaderboard import Board

out = Console()

Plugins = Annotated[
    list[Path] | None, typer.Option("--plugin", help="A Python file that defines a plugin, for a first try.")
]
Model = Annotated[str | None, typer.Option(help="A diffusers pipeline directory or Hub id instead of the track's.")]
TrackOption = Annotated[
    str | None, typer.Option("--track", help="Track name or TOML file (default: micro-v2; with --model: paper).")
]
HeldOut = Annotated[
    Path | None,
    typer.Option("--prompts", help="Prompts to hold out every fourth of, where the track holds none (as in run)."),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="SECTION.OPTION=VALUE: algo., builder., reward., track.")
]
TrackSettings = Annotated[list[str] | None, typer.Option("--set", help="track.OPTION=VALUE.")]
Config = Annotated[Path | None, typer.Option(help="A TOML file with sections algo, builder, reward, track.")]
Device = Annotated[str | None, typer.Option(help="torch device (default: cuda where there is one).")]
Out = Annotated[Path, typer.Option("--out", help="Where run directories go.")]
KeepPairs = Annotated[
    Literal["all", "last", "none"] | None,
    typer.Option(help="Rounds whose pairs stay, for pairs export (default: all; over 128 px the last)."),
]
Tracker = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Show runs in tensorboard, wandb, trackio or mlflow; once for each."),
]
Rung = Annotated[
    int, typer.Option(min=1, help="Of a track with rungs the one to end at; a run goes on from an earlier one.")
]

# Every verb that reads finished runs is told in the same words which ones.
Source = Annotated[str | None, typer.Argument(metavar="SOURCE", help="The same as --from.")]
From = Annotated[
    str | None,
    typer.Option(
        "--from", metavar="SOURCE", help="A track's name, or a folder with run directories.", show_default="runs"
    ),
]
Runs = Annotated[
    Path, typer.Option("--runs", "--out", metavar="DIR", help="Where the run directories of a named track are.")
]
AtRung = Annotated[
    int | None,
    typer.Option("--rung", min=1, help="Of a track with rungs the one to compare at (default: where most rows end)."),
]


def load_files(paths: Sequence[Path] | None) -> None:
    """Register the plugins of --plugin."""
    if paths:
        from bench_dfusion import plugin_files  # with torch

        for path in paths:
            plugin_files.load_file(path)


def check_names(algorithms: Sequence[str], builders: Sequence[str], rewards: Sequence[str], track: str | None) -> None:
    """Raise UsageError, with the close matches, for a name that no plugin has, before what runs need is imported.

    Sums of rewards and functions are left to `runs.config`, which reads them.
    """
    for kind, names in (("algorithms", algorithms), ("builders", builders), ("rewards", rewards)):
        for name in names:
            if kind != "rewards" or not set(name) & set(":,+./"):
                registry.check(kind, name)
    if track is not None and not track.endswith(".toml"):
        registry.check("tracks", track)


def boards(source: str | None, given: str | None, folder: Path, rung: int | None = None) -> list[Board]:
    """The boards of SOURCE or --from: below a folder, or of a named track's runs below `folder`, at a rung where one is
    given. Raises UsageError where there is none."""
    if source is not None and given is not None:
        raise UsageError(f"--from {given} and SOURCE {source} are the same option: give one")
    where = _folder_of(source or given or "runs", folder)
    from bench_dfusion.results import leaderboard

    try:
        found = leaderboard.boards(where)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if not found:
        raise UsageError(f"no run below {where}")
    return found if rung is None else [board.at(rung) for board in found]


def _folder_of(source: str, folder: Path) -> Path:
    """A folder of runs, or that of a named track's below `folder`. Raises UsageError where there is none."""
    where = Path(source)
    if where.is_dir():
        return where
    if where != Path("runs"):
        try:
            if not source.endswith(".toml"):
                registry.check("tracks", source)
            from bench_dfusion.tracks import schema

            content = schema.read(source)
        except UsageError as error:
            raise UsageError(f"no directory {source}; {error}") from None
        where = folder / f"{content['name']}-v{content['version']}"
    if not where.is_dir():
        raise UsageError(f"no directory {where}; bench-dfusion run leaves its runs in runs/")
    return where
