"""The leaderboard as one SVG picture for a README: the gain of each row with its interval."""

from __future__ import annotations

import math
import unicodedata
from html import escape
from pathlib import Path
from typing import Any

from bench_dfusion.errors import UsageError
from bench_dfusion.report.marks import MARKS, marks_of, ticks, visible
from bench_dfusion.results import standings
from bench_dfusion.results.leaderboard import Board
from bench_dfusion.results.standings import Line
from bench_dfusion.results.tables import gain_text
from bench_dfusion.util import files

WIDTH, LINE, TOP, BOTTOM = 960, 26, 92, 74  # px
RANK, NAME, PLOT, RIGHT = 24, 112, 420, 736  # px, left ends of the columns, and the plot's right end
CHARACTER = 0.62  # em, width of an average character of the widest usual font, DejaVu Sans
INK, DIM, FAINT, GROUND = "#1f2328", "#59636e", "#d8dee4", "#ffffff"


def leaderboard_picture(board: Board, path: Path) -> None:
    """Write the table of a track as an SVG, best first; the same records give the same bytes.

    One line a row: its rank, its mean gain before the judge that ranks with its 95 % interval, the builder by colour
    and shape, hollow where the row was trained on that judge. The ground is the picture's own, so that it reads the same
    on a light and on a dark page. Raises UsageError where no run has finished or `path` is no .svg file.
    """
    if path.suffix.lower() != ".svg":
        raise UsageError(f"the picture is an SVG: name it {path.with_suffix('.svg').name}, not {path.name}")
    if not board.judges:
        raise UsageError(f"no run of {board.track} has finished: there is no gain to draw")
    files.write_atomic(path, _svg(board))


def _svg(board: Board) -> str:
    judge = board.judges[0]
    lines = standings.lines(board, variants=False)
    marks = marks_of(line.row.builder for line in lines)
    ends = [end for line in lines for end in (line.scores[0].low, line.scores[0].high) if math.isfinite(end)]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    pad = (high - low) * 0.04 or 1.0
    low, high = low - pad, high + pad

    def x(value: float) -> float:
        return PLOT + (value - low) / (high - low) * (RIGHT - PLOT)

    height = TOP + LINE * len(lines) + BOTTOM
    bottom = TOP + LINE * len(lines)
    seeds = max((line.seeds for line in lines), default=0)
    title = f"{board.track}: gain before {judge}" + (f", {board.place}" if board.place else "")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'role="img" aria-label="{escape(visible(title))}" '
        "font-family=\"Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif\">",
        f"<title>{escape(visible(title))}</title>",
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8" fill="{GROUND}" stroke="{FAINT}"/>',
        _text(RANK, 34, title, 17, INK, WIDTH - 2 * RANK, weight=600),
        _text(
            RANK,
            56,
            f"trained − base on the same noise, mean over up to {seeds} seeds and the held-out prompts, 95 % interval",
            12,
            DIM,
            WIDTH - 2 * RANK,
        ),
    ]
    for value in ticks(low, high):
        parts.append(
            f'<line x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{TOP - 8}" y2="{bottom}" '
            f'stroke="{DIM if value == 0 else FAINT}"/>'
        )
        parts.append(_text(x(value), TOP - 14, _tick(value), 11, DIM, 60, anchor="middle"))
    for number, line in enumerate(lines):
        parts += _line(line, TOP + LINE * number + LINE / 2, x, MARKS[marks[line.row.builder]])
    parts.append(f'<line x1="{RANK}" x2="{WIDTH - RANK}" y1="{bottom + 10}" y2="{bottom + 10}" stroke="{FAINT}"/>')
    left = float(RANK)
    for builder in sorted({line.row.builder for line in lines}, key=lambda b: (marks[b], b)):
        shape, colour, _ = MARKS[marks[builder]]
        name = _fit(visible(builder), 12, 160)
        parts.append(mark(shape, left + 6, bottom + 30, colour))
        parts.append(_text(left + 18, bottom + 34, name, 12, INK, 160))
        left += 18 + _width(name, 12) + 20
        if left > 480:  # beyond some builders the rows' names say it
            break
    hollow = "hollow: trained on this judge, or not ranked; ranks overlap where no difference is separated"
    parts.append(_text(RANK, bottom + 56, hollow, 12, DIM, WIDTH - 2 * RANK))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _line(line: Line, y: float, x: Any, style: tuple[str, str, str]) -> list[str]:
    shape, colour, _ = style
    row, score = line.row, line.scores[0]
    name = " · ".join(part for part in (row.algorithm, row.builder, row.reward, row.label) if part)
    parts = [
        _text(RANK, y + 4, line.place or "–", 12, INK if line.rank else DIM, NAME - RANK - 8),
        _text(NAME, y + 4, name, 13, INK, PLOT - NAME - 16, weight=600 if line.rank else 400),
        _text(WIDTH - RANK, y + 4, gain_text(score), 12, INK, WIDTH - RANK - RIGHT - 8, anchor="end"),
    ]
    if not math.isfinite(score.gain):
        return parts
    parts.append(
        f'<line x1="{x(score.low):.1f}" x2="{x(score.high):.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}" stroke-width="2"/>'
    )
    parts.append(mark(shape, x(score.gain), y, colour, hollow=not line.rank))
    return parts


def mark(shape: str, x: float, y: float, colour: str, hollow: bool = False) -> str:
    """A mark of about 10 px around a point."""
    paint = f'fill="{GROUND if hollow else colour}" stroke="{colour}" stroke-width="2"'
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" {paint}/>'
    outlines: dict[str, list[tuple[float, float]]] = {
        "square": [(-4.5, -4.5), (4.5, -4.5), (4.5, 4.5), (-4.5, 4.5)],
        "triangle": [(0, -5.5), (5.5, 4.5), (-5.5, 4.5)],
        "diamond": [(0, -6.5), (6.5, 0), (0, 6.5), (-6.5, 0)],
        "down": [(0, 5.5), (5.5, -4.5), (-5.5, -4.5)],
        "cross": [
            *((-2, -6), (2, -6), (2, -2), (6, -2), (6, 2), (2, 2)),
            *((2, 6), (-2, 6), (-2, 2), (-6, 2), (-6, -2), (-2, -2)),
        ],
        "star": [
            ((7 - 4 * (i % 2)) * math.sin(i * math.pi / 5), -(7 - 4 * (i % 2)) * math.cos(i * math.pi / 5))
            for i in range(10)
        ],
    }
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in outlines[shape])
    return f'<polygon points="{points}" {paint}/>'


def _text(
    x: float, y: float, text: str, size: int, fill: str, most: float, anchor: str = "start", weight: int = 400
) -> str:
    text = _fit(visible(" ".join(text.split())), size, most)
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}" text-anchor="{anchor}" '
        f'font-weight="{weight}">{escape(text)}</text>'
    )


def _width(text: str, size: int) -> float:
    """About as wide as the text is drawn (px): fonts differ, so this errs on the wide side."""
    return size * sum(1.1 if unicodedata.east_asian_width(c) in "WF" else CHARACTER for c in text)


def _fit(text: str, size: int, most: float) -> str:
    if _width(text, size) <= most:
        return text
    while text and _width(text + "…", size) > most:
        text = text[:-1]
    return text.rstrip() + "…"


def _tick(value: float) -> str:
    return f"{value:+g}".replace("-", "−") if value else "0"
