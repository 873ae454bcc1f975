"""`bench-dfusion leaderboard` and `bench-dfusion report`: what is made of finished runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from bench_dfusion.cli.options import AtRung, From, Runs, Source, boards, out
from bench_dfusion.errors import UsageError


def leaderboard(
    source: Source = None,
    given: From = None,
    runs: Runs = Path("runs"),
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
    from bench_dfusion.results.tables import csv as as_csv
    from bench_dfusion.results.tables import markdown as as_markdown

    if csv + markdown + wins + (picture is not None) > 1:
        raise UsageError("--csv, --markdown, --wins and --picture exclude each other")
    found = boards(source, given, runs, rung)
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


def report(
    source: Source = None,
    given: From = None,
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="The page to write.")] = Path("report.html"),
    runs: Runs = Path("runs"),
    rung: AtRung = None,
) -> None:
    """Write the runs found as one self-contained HTML page: tables, charts, pictures and every record."""
    from bench_dfusion import report as reports

    found = boards(source, given, runs, rung)
    reports.write(found, to)
    count = sum(len((board.whole or board).records) for board in found)
    tracks = ", ".join(board.track for board in found)
    size = to.stat().st_size / 1e6
    out.print(f"{escape(f'{to}: {count} runs of {tracks}, {size:.1f} MB')}", soft_wrap=True, highlight=False)
