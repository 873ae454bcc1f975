"""`bench-dfusion merge` and `bench-dfusion verify`: records of others, and whether they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from bench_dfusion.cli.options import Device, Plugins, load_files, out
from bench_dfusion.errors import UsageError


def merge(
    into: Annotated[
        Path, typer.Option("--to", "--into", metavar="DIR", help="The leaderboard directory, new or with records.")
    ],
    sources: Annotated[
        list[Path] | None, typer.Argument(metavar="SOURCE...", help="The same as --from.", show_default=False)
    ] = None,
    given: Annotated[
        list[Path] | None,
        typer.Option(
            "--from", metavar="SOURCE", help="A record file, or a folder with run directories; once for each."
        ),
    ] = None,
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

    found = [*(sources or []), *(given or [])]
    if not found:
        raise UsageError("nothing to merge: name record files or folders with run directories, --from SOURCE")
    done = merging.merge(found, into, dry_run, skip_refused, submitter)
    display.merged(done, into, out)
    if done.refused:
        raise typer.Exit(1 if skip_refused else 2)


def verify(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A leaderboard, or any folder with records.")],
    sample: Annotated[int, typer.Option(min=0, help="Records to evaluate again from their LoRAs.")] = 3,
    rerun: Annotated[int, typer.Option(min=0, help="Cells to run again as a whole.")] = 0,
    device: Device = None,
    model: Annotated[
        str | None, typer.Option(help="Where the base model is now, if not where the records say.")
    ] = None,
    plugin: Plugins = None,
) -> None:
    """Check every record, evaluate some again and run some again; which, a hash of all of them decides.

    Exit status: 0; 1 where something differs; 2 where a record cannot be at all.
    """
    load_files(plugin)
    from bench_dfusion.cli import display
    from bench_dfusion.publish import verify as verifying

    done = verifying.run(folder, sample, rerun, device=device, model=model, say=lambda text: out.print(escape(text)))
    display.verified(done, out)
    if any(verifying.failures(done)):
        raise typer.Exit(1)
