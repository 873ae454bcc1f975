"""The command `bench-dfusion`: verbs only."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench_dfusion import registry
from bench_dfusion.registry import PluginError, UsageError

if TYPE_CHECKING:
    from bench_dfusion.leaderboard import Board

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


@app.command()
def run(
    algo: Annotated[str, typer.Option(help="Training backend (bench-dfusion list algorithms).")],
    reward: Annotated[str | None, typer.Option(help="Training reward (bench-dfusion list rewards).")] = None,
    builder: Annotated[str | None, typer.Option(help="Builder of the consistent samples (default: dfusion).")] = None,
    pairs: Annotated[
        str | None,
        typer.Option(
            metavar="PATH_OR_HUB_ID",
            help="Train offline on a dataset of prompt, chosen and rejected pictures; no reward is queried.",
        ),
    ] = None,
    track: Annotated[
        str | None, typer.Option(help="Track name or TOML file (default: micro; with --model: paper).")
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
    keep_pairs: Annotated[
        Literal["all", "last", "none"] | None,
        typer.Option(help="Rounds whose pairs stay, for pairs export (default: all; over 128 px the last)."),
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
    from bench_dfusion import config as configs
    from bench_dfusion import display
    from bench_dfusion.leaderboard import Board
    from bench_dfusion.trainer import run_cell

    cells = [
        configs.resolve(
            track_source=track,
            algo=algo,
            builder=builder,
            reward=reward,
            pairs=pairs,
            seed=n,
            model=model,
            prompts=prompts,
            settings=settings,
            config=config,
        )
        for n in numbers
    ]
    records = []
    for cell in cells:
        try:
            records.append(run_cell(cell, folder, device, keep_pairs))
        except KeyboardInterrupt:
            out.print(f"\nstopped; the same command goes on from the last finished round ({folder / cell.folder})")
            raise typer.Exit(130) from None
    for cell, record in zip(cells, records, strict=True):
        display.record(record, folder / cell.folder, out)
    if len(records) > 1:
        display.board(Board(tuple(records)), out)
    if any(r.status == "failed" for r in records):
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
        raise UsageError(registry.unknown("kind of plugin", kind, registry.KINDS))
    if kind == "tracks" and name and name.endswith(".toml"):
        _describe_track(name)
        return
    if kind and name:
        found = registry.plugins(kind)
        if name not in found:
            raise UsageError(registry.unknown(kind[:-1], name, found))
        _describe(kind, name, found[name])
        return
    for each in [kind] if kind else registry.KINDS:
        grid = Table(title=each, title_justify="left", box=None, pad_edge=False)
        for column in ("name", "what it is", "source", "from"):
            grid.add_column(column, overflow="fold")
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
) -> None:
    """Print the table of the runs found, one table a track, and the effect of D-Fusion."""
    from bench_dfusion import display
    from bench_dfusion.leaderboard import csv as as_csv
    from bench_dfusion.leaderboard import markdown as as_markdown

    if csv and markdown:
        raise UsageError("--csv and --markdown exclude each other")
    for number, board in enumerate(_boards(source, folder)):
        if csv or markdown:
            print("\n" * (number > 0) + (as_csv(board) if csv else as_markdown(board)), end="")
        else:
            display.board(board, out)


@pairs_app.command("export")
def pairs_export(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a finished run.")],
    folder: Annotated[
        Path | None, typer.Option("--out", help="Where the dataset goes, a new directory (default: RUN/dataset).")
    ] = None,
    rounds: Annotated[Literal["all", "last"], typer.Option(help="Every round kept, or the latest one.")] = "all",
) -> None:
    """Write a run's pairs as a dataset of prompt, chosen and rejected, for datasets.load_dataset and the Hub."""
    from bench_dfusion import pairs

    done = pairs.export(run_folder, folder, rounds)
    out.print(
        f"{sum(done.pairs.values())} pairs of {len(done.pairs)} of {done.rounds} rounds in {escape(str(done.folder))}; "
        f'datasets.load_dataset("{escape(str(done.folder))}") reads them',
        soft_wrap=True,
        highlight=False,
    )


def _load_files(paths: Sequence[Path] | None) -> None:
    for path in paths or []:
        registry.load_file(path)


def _summary(value: Any) -> str:
    text = getattr(value, "summary", None) or (value.__doc__ or "").strip()
    return text.splitlines()[0] if text else ""


def _describe(kind: str, name: str, plugin: registry.Plugin) -> None:
    value = plugin.load()
    out.print(f"[bold]{name}[/bold]  ({plugin.source})\n{escape(_summary(value))}")
    if getattr(value, "paper", None):
        out.print(escape(f"source: {value.paper}"))
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
            text = "; ".join(t for t in (info.description, _range(info.metadata)) if t)
            grid.add_row(f"{section}.{option}", str(info.default), escape(text))
        out.print(grid)
        _suggestions(kind, name)


def _describe_track(source: str) -> None:
    """A track's content, what it leaves to the user, and its hash where it leaves nothing."""
    from bench_dfusion import config, prompt_sources
    from bench_dfusion import track as tracks

    content = tracks.read(source)
    prompts = content.get("prompts", {})
    if "source" in prompts:
        origin = prompt_sources.SOURCES[prompt_sources.check(prompts, source).source]
        out.print(
            escape(f"prompts: from {origin.title}, not in this package; {origin.hint}"), soft_wrap=True, highlight=False
        )
    elif "model" in content and prompts:
        settings = tracks.validate(tracks.Track, content, "track")
        config.judges(settings)
        out.print(f"{settings.id}, hash {settings.hash}", soft_wrap=True, highlight=False)
    else:
        out.print("leaves the model and the prompts to you: --model DIR_OR_HUB_ID, --prompts FILE", soft_wrap=True)
    out.print_json(json.dumps(content, default=str))


def _range(metadata: Sequence[Any]) -> str:
    """The limits of an option as a reader would write them."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "multiple_of": "a multiple of"}
    limits = [f"{sign} {getattr(m, key):g}" for m in metadata for key, sign in signs.items() if hasattr(m, key)]
    return ", ".join(limits)


def _suggestions(kind: str, name: str) -> None:
    """What tracks set in the place of a plugin's defaults."""
    from bench_dfusion import track as tracks

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


def _boards(source: str, folder: Path) -> list[Board]:
    """The boards below a folder, or of a named track's runs below `folder`. Raises UsageError where there is none."""
    from bench_dfusion import leaderboard, track

    where = Path(source)
    if not where.is_dir():
        if where != Path("runs"):
            content = track.read(source)
            where = folder / f"{content['name']}-v{content['version']}"
        if not where.is_dir():
            raise UsageError(f"no directory {where}; bench-dfusion run leaves its runs in runs/")
    try:
        found = leaderboard.boards(where)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if not found:
        raise UsageError(f"no run below {where}")
    return found


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit status 2."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        sys.exit(app(standalone_mode=False) or 0)  # typer.Exit comes back as its status
    except UsageError as error:
        print(f"bench-dfusion: {error}", file=sys.stderr)
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
        # typer brings its own copy of click, whose exceptions it does not export: known by their method.
        if not hasattr(error, "format_message"):
            raise
        print(f"bench-dfusion: {error.format_message()}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
