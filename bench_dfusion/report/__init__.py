"""One self-contained HTML page of the records of one or several tracks, and the leaderboard as a picture.

The page asks no network for anything: styles, script, data and pictures are in it, and its Content-Security-Policy
forbids the rest. What records say is shown as text, never obeyed. The same records give the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from bench_dfusion.errors import UsageError
from bench_dfusion.report import content
from bench_dfusion.report.content import pareto
from bench_dfusion.report.marks import MARKS
from bench_dfusion.report.picture import leaderboard_picture
from bench_dfusion.results import leaderboard
from bench_dfusion.results.leaderboard import Board
from bench_dfusion.util import files
from bench_dfusion.util.progress import bar

__all__ = ["html", "leaderboard_picture", "pareto", "write"]


def write(boards: Sequence[Board], path: Path) -> None:
    """Write the page of some boards. Raises UsageError where there is none, or `path` cannot be a file."""
    if path.is_dir():
        raise UsageError(f"{path} is a directory; name a file in it, for example {path / 'report.html'}")
    page = html(boards)
    try:
        files.write_atomic(path, page.encode("utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from None


def html(boards: Sequence[Board], home: str | None = None) -> str:
    """The page, one section a board; `home` is the address of the dataset that it is of. Raises UsageError where there is
    no board."""
    if not boards:
        raise UsageError("no record to report on; bench-dfusion run leaves its records in runs/")
    pictures = content.Pictures()
    with bar("report", sum(len(leaderboard.rows(board)) for board in boards)) as progress:
        tracks = [content.of_board(board, pictures, progress.advance) for board in boards]
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    theme, script = _source("theme.js"), _source("page.js")
    return environment.from_string(_source("page.html")).render(
        tracks=tracks,
        home=home,
        marks=MARKS,
        limits={"pictures": content.MOST_PICTURES, "megabytes": content.MOST_BYTES / 1e6},
        data=embedded({"tracks": [track["data"] for track in tracks]}),
        style=Markup(_source("page.css")),
        theme=Markup(theme),
        script=Markup(script),
        hashes=Markup(" ".join(f"'sha256-{_sha256(text)}'" for text in (theme, script))),
        percent=_percent,
    )


def embedded(value: Any) -> Markup:
    """JSON that cannot end the element it stands in, nor a line of a script."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _percent(value: float, axis: tuple[float, float]) -> str:
    """Where a value lies on an axis, in hundredths of it."""
    return f"{100 * (value - axis[0]) / (axis[1] - axis[0]):.2f}"


def _source(name: str) -> str:
    return (resources(__name__) / name).read_text(encoding="utf-8")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
