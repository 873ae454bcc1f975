"""`bench-dfusion watch`: a sweep or single runs, while they run."""

from __future__ import annotations

import html
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bench_dfusion.cli.options import out
from bench_dfusion.errors import UsageError, plain

if TYPE_CHECKING:
    from bench_dfusion.runs.watching import Watched

EVERY = 2.0  # s between looks
STYLE = {"finished": "green", "collapsed": "red", "error": "bold red", "stopped": "yellow", "waiting": "dim"}


def watch(
    folder: Annotated[Path, typer.Argument(metavar="RUNS", help="A folder with run directories.")] = Path("runs"),
    page: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Keep a page there too, which reloads itself.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Show how it is now, and end.")] = False,
) -> None:
    """Show what runs, how far it is and how the reward rises, until all has ended.

    It reads the files that runs leave, wherever they run, and changes none.
    """
    from bench_dfusion.runs.watching import headline, look

    if page is not None and (page.is_dir() or page.suffix != ".html"):
        raise UsageError(f"{page} is no page: name a file, for example watch.html")
    cells = look(folder)
    if once or not out.is_terminal:
        _lines(folder, page, once)
        return
    with Live(_table(cells, headline(cells)), console=out, refresh_per_second=4) as live:
        while True:
            cells = look(folder)
            live.update(_table(cells, headline(cells)))
            _write(page, cells, headline(cells))
            if all(cell.over for cell in cells):
                return
            time.sleep(EVERY)


def _lines(folder: Path, page: Path | None, once: bool) -> None:
    """A line for each change, where the output is no terminal."""
    from bench_dfusion.runs.watching import headline, look

    before: dict[str, Watched] = {}
    while True:
        cells = look(folder)
        for cell in cells:
            if before.get(cell.name) != cell:
                out.print(Text(f"{plain(cell.name)}: {cell.state} {plain(cell.said)}".rstrip()), soft_wrap=True)
        before = {cell.name: cell for cell in cells}
        _write(page, cells, headline(cells))
        if once or all(cell.over for cell in cells):
            out.print(Text(headline(cells)), soft_wrap=True)
            return
        time.sleep(EVERY)


def _table(cells: Sequence[Watched], head: str) -> Group:
    from bench_dfusion.runs.watching import sparkline
    from bench_dfusion.util.progress import duration

    grid = Table(box=None, pad_edge=False)
    grid.add_column("algorithm/builder/reward", overflow="fold")
    for column in ("state", "rise", "left", ""):
        grid.add_column(column, no_wrap=column != "", overflow="ellipsis")
    for cell in cells:
        left = duration(cell.left) if cell.left is not None else ""
        state = Text(cell.state, STYLE.get(cell.state, "cyan"))
        grid.add_row(Text(plain(cell.name)), state, sparkline(cell.rises), left, Text(plain(cell.said)))
    return Group(Text(head, "bold"), grid)


def _write(page: Path | None, cells: Sequence[Watched], head: str) -> None:
    """The page, whole at every moment."""
    if page is None:
        return
    from bench_dfusion.runs.watching import sparkline
    from bench_dfusion.util import files
    from bench_dfusion.util.progress import duration

    def cell_of(text: str) -> str:
        return f"<td>{html.escape(plain(text))}</td>"

    rows = "".join(
        f'<tr class="{cell.state}">'
        + "".join(
            map(
                cell_of,
                (
                    cell.name,
                    cell.state,
                    sparkline(cell.rises),
                    duration(cell.left) if cell.left is not None else "",
                    cell.said,
                ),
            )
        )
        + "</tr>\n"
        for cell in cells
    )
    over = all(cell.over for cell in cells)
    reload = "" if over else f'<meta http-equiv="refresh" content="{EVERY:.0f}">\n'
    files.write_atomic(
        page,
        f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
{reload}<title>{html.escape(head)}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em; color-scheme: light dark; }}
td, th {{ padding: .2em 1em .2em 0; text-align: left; vertical-align: top; }}
.finished td:nth-child(2) {{ color: #1a7f37; }} .collapsed td:nth-child(2), .error td:nth-child(2) {{ color: #cf222e; }}
.waiting {{ opacity: .6; }}
</style>
<h1>bench-dfusion</h1>
<p>{html.escape(head)}</p>
<table>
<tr><th>algorithm/builder/reward</th><th>state</th><th>rise</th><th>left</th><th></th></tr>
{rows}</table>
</html>
""",
    )
