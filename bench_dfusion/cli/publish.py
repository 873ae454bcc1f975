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
    space: Annotated[
        bool,
        typer.Option("--space", help="Put the report page into a static Space of the same name (or DIR/space) too."),
    ] = False,
) -> None:
    """Publish the runs found as a dataset, merged with what it holds: tables, records with their LoRAs, pictures, a card."""
    from bench_dfusion.publish import repository as publish
    from bench_dfusion.publish.space import FOLDER, PAGE, to_directory, to_hub

    if (repo is None) == (to is None):
        raise UsageError("give one of OWNER/NAME (a dataset of the Hub) and --to DIR")
    if to is not None and (pr or private or message is not None):
        raise UsageError("--pr, --private and --message are of the Hub: leave them out with --to")
    if space and pr:
        raise UsageError("--space goes with a dataset of your own: leave --pr out")
    found = boards(None, given, runs)
    if to is not None:
        done = publish.to_directory(found, to, replace, f"{FOLDER}/{PAGE}" if space else None)
    else:
        done = publish.to_hub(found, str(repo), pr=pr, message=message, private=private, replace=replace, space=space)
    out.print(escape(publish.summary(done)), soft_wrap=True, highlight=False)
    if not space:
        return
    try:
        if to is not None:
            where = str(to_directory(done.content, found, to) / PAGE)
        else:
            where = to_hub(done.content, found, str(repo), message=message, private=private)
    except UsageError as error:
        raise UsageError(
            f"the dataset is published, and its Space is not: {error}; the same command tries again"
        ) from None
    out.print(escape(f"page: {where}"), soft_wrap=True, highlight=False)
