"""`bench-dfusion publish`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from bench_dfusion.cli.options import From, Runs, boards, out
from bench_dfusion.errors import UsageError


def publish(
    repo: Annotated[
        str | None, typer.Argument(metavar="OWNER/NAME", help="A dataset of the Hub, made where there is none.")
    ] = None,
    to: Annotated[Path | None, typer.Option(metavar="DIR", help="Write a directory instead.")] = None,
    given: From = None,
    runs: Runs = Path("runs"),
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
    found = boards(None, given, runs)
    if to is not None:
        done = publish.to_directory(found, to, replace)
    else:
        done = publish.to_hub(found, str(repo), pr=pr, message=message, private=private, replace=replace)
    out.print(escape(publish.summary(done)), soft_wrap=True, highlight=False)
