"""A board as a table: a DataFrame, comma-separated values, Markdown, and the texts that every printed table has."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd

from bench_dfusion.errors import plain
from bench_dfusion.results import standings
from bench_dfusion.results.figures import FIGURES, number, signed
from bench_dfusion.results.leaderboard import KEY, Board, hidden, rows
from bench_dfusion.results.standings import Contrast, Line, Score


def table(board: Board, variants: bool = True) -> pd.DataFrame:
    """`standings.lines` as a DataFrame.

    Columns: rank (as a range where ties are not separated, empty where there is none), algorithm, builder, reward, variant;
    seeds, failed, missing (counts of records, collapsed runs, cells without a record); rung (of a track with rungs); of each
    judge base, trained, gain, low, high (means over seeds and prompts, 95 %); interval (its kind); the figures of
    `figures.FIGURES`; note; submitter; flags (why some of its records must not be published, empty where all may be).
    """
    return pd.DataFrame([_values(line) for line in standings.lines(board, variants)])


def _values(line: Line) -> dict[str, object]:
    row = line.row
    values: dict[str, object] = {
        "rank": str(line.rank or ""),
        "algorithm": row.algorithm,
        "builder": row.builder,
        "reward": row.reward,
        "variant": row.variant,
        "seeds": line.seeds,
        "failed": len(row.failed),
        "missing": line.missing,
    }
    if line.rung is not None:
        values["rung"] = line.rung
    for place, score in enumerate(line.scores):
        values |= {f"{score.judge} {part}": getattr(score, part) for part in ("base", "trained", "gain", "low", "high")}
        if not place:
            values["interval"] = score.interval
    values.setdefault("interval", "")
    for figure in FIGURES:
        value = line.figures[figure.name]
        values[figure.name] = int(value) if figure.kind == "int64" else value
    return values | {"note": line.note, "submitter": row.submitter, "flags": line.flags}


def by_rung(board: Board, variants: bool = True) -> pd.DataFrame:
    """`standings.climbs` as a DataFrame.

    Columns: algorithm, builder, reward, variant, submitter; of each rung N of the ladder `N rank` (as in `table`), `N gain`,
    `N low`, `N high` (nan where the row was not run to it; the gain minus infinity where a run had collapsed).
    """
    columns = [f"{n} {c}" for n in range(1, len(board.ladder) + 1) for c in ("rank", "gain", "low", "high")]
    found = []
    for climb in standings.climbs(board, variants):
        values: dict[str, object] = dict(zip(KEY, climb.key, strict=True))
        for n, line in enumerate(climb.at, 1):
            score = line.scores[0] if line and line.scores else None
            values[f"{n} rank"] = str((line and line.rank) or "")
            values |= {f"{n} {c}": getattr(score, c) if score else np.nan for c in ("gain", "low", "high")}
        found.append(values)
    return pd.DataFrame(found, columns=[*KEY, *columns])


def contrasts(board: Board, builder: str = "dfusion", control: str = "vanilla") -> pd.DataFrame:
    """`standings.contrasts` as a DataFrame, a column for each field but the number of algorithms."""
    columns = [name for name in Contrast.__dataclass_fields__ if name != "of"]
    found = standings.contrasts(board, builder, control)
    return pd.DataFrame([{name: getattr(c, name) for name in columns} for c in found], columns=columns)


def csv(board: Board, variants: bool = False) -> str:
    """The table as comma-separated values, six significant digits; text that a spreadsheet would run is quoted by '."""

    def safe(value: object) -> str:
        return "'" * str(value).startswith(("=", "+", "-", "@", "\t", "\r", "\n")) + plain(value)

    frame = table(board, variants)
    for column in frame.columns:
        if not pd.api.types.is_numeric_dtype(frame[column]):
            frame[column] = [safe(v) for v in frame[column]]
    frame.columns = pd.Index([safe(c) for c in frame.columns])  # judges' names are in them
    return frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")


def markdown(board: Board, variants: bool = False) -> str:
    """The table and the effect of D-Fusion as GitHub's Markdown."""
    found = standings.lines(board, variants)
    shown = [figure for figure in FIGURES if figure.short is not None]
    heads = [figure.head if figure.head.isupper() else figure.head.lower() for figure in shown]
    lines = _grid(
        ["rank", "algorithm", "builder", "reward", "seeds", *(f"{judge} gain" for judge in board.judges), *heads],
        [
            [
                line.place,
                *_named(line.row.algorithm, line.row.builder, line.row.reward, line.row.label),
                f"{line.seeds} of {line.seeds + line.missing}" if line.missing else line.seeds,
                *map(gain_text, line.scores),
                *(figure.text(line.row, line.figures[figure.name], str(figure.short)) for figure in shown),
            ]
            for line in found
        ],
        left=4,
    )
    if board.place:
        lines = [f"At {escaped(board.place)}:", "", *lines]
    for text in remarks(board, found, variants):
        lines += ["", escaped(text)]
    return "\n".join([*lines, *_rungs(board, variants), *_effect(board)]) + "\n"


def _named(algorithm: str, builder: str, reward: str, label: str) -> list[str]:
    return [algorithm, builder, reward + (f" ({label})" if label else "")]


def _rungs(board: Board, variants: bool) -> list[str]:
    """The gain of each row at each rung, where the track has any."""
    climbs = standings.climbs(board, variants)
    if not climbs:
        return []
    heads = [head for budget in board.ladder for head in ("rank", f"{budget:,}")]
    cells = [
        [
            *_named(climb.algorithm, climb.builder, climb.reward, climb.label),
            *(text for line in climb.at for text in (str((line and line.rank) or "–"), rung_text(line))),
        ]
        for climb in climbs
    ]
    title = f"The gain at each rung ({escaped(board.judges[0])}), by its reward queries:"
    return ["", title, "", *_grid(["algorithm", "builder", "reward", *heads], cells, left=3)]


def _effect(board: Board) -> list[str]:
    """What fusion adds, where an algorithm was run with and without."""
    found = standings.contrasts(board)
    if not found:
        return []
    cells = [
        [
            c.algorithm + (f" ({c.variant})" if c.variant else ""),
            c.reward + (" (ceiling)" if c.ceiling else ""),
            c.seeds,
            difference_text(c),
            number(c.holm, ".3f"),
        ]
        for c in found
    ]
    title = f"D-Fusion's effect, dfusion − vanilla ({escaped(board.judges[0])} gain, paired; p after Holm):"
    return ["", title, "", *_grid(["algorithm", "reward", "seeds", "difference", "p"], cells, left=2)]


def remarks(board: Board, lines: Sequence[Line], variants: bool) -> list[str]:
    """What to say below a table: which rows must not be published, and which are not shown."""
    said = [
        f"not to be published: {'/'.join((line.row.algorithm, line.row.builder, line.row.reward))}"
        f"{f' ({line.row.label})' if line.row.label else ''}: {line.flags}"
        for line in lines
        if line.flags
    ]
    left_out = [] if variants else hidden(rows(board))
    if left_out:
        groups = Counter("/".join((r.algorithm, r.builder, r.reward)) for r in left_out)
        said.append(f"variants not shown (--variants): {', '.join(f'{n} of {g}' for g, n in groups.items())}")
    return said


def interval_text(low: float, high: float) -> str:
    return f"[{signed(low)}, {signed(high)}]"


def gain_text(score: Score) -> str:
    """A gain with its interval, as in every printed table."""
    gain = signed(score.gain)
    return f"{gain} {interval_text(score.low, score.high)}" if np.isfinite(score.gain) else gain


def rung_text(line: Line | None) -> str:
    """The gain with its interval at a rung; a dash where the row was not run to it."""
    return gain_text(line.scores[0]) if line and line.scores else "–"


def difference_text(contrast: Contrast) -> str:
    return f"{signed(contrast.difference)} {interval_text(contrast.low, contrast.high)}"


def _grid(header: Sequence[str], lines: Sequence[Sequence[object]], left: int) -> list[str]:
    """A Markdown table whose first `left` columns are set left, the others right; what cells hold is only text."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    texts = [f"| {' | '.join(map(escaped, line))} |" for line in (header, *lines)]
    return [texts[0], f"| {' | '.join(rule)} |", *texts[1:]]


def escaped(value: object) -> str:
    """What Markdown shows as this text, in one line, whatever it holds; figures as they are."""
    text = plain(" ".join(str(value).split()))
    if re.fullmatch(r"[-+−–∞\d.,\[\] ]*", text):
        return text
    return "".join(f"\\{c}" if c in "\\`*_[]|~$" else c for c in html.escape(text, quote=False))
