"""What a page holds of one board, as plain data: the table's cells for the template, the rest as JSON for the script."""

from __future__ import annotations

import base64
import io
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from bench_dfusion.report.marks import marks_of, ticks, visible
from bench_dfusion.results import leaderboard, standings
from bench_dfusion.results.figures import FIGURES, Figure, signed
from bench_dfusion.results.leaderboard import Board, Row
from bench_dfusion.results.records import Record
from bench_dfusion.results.standings import Climb, Line
from bench_dfusion.results.tables import interval_text
from bench_dfusion.util import picture_reader

PICTURES = {
    "base_trained": "base (left) and trained (right) on the same noise, for held-out prompts",
    "triples": "triples of the last round, reference, its mask if any, base, and target or winner, with rewards",
}
MOST_PICTURES = 48  # pictures in a page
MOST_BYTES = 4_000_000  # of all its pictures together
MOST_PIXELS = 16_000_000  # of a picture that is opened
WIDEST = 1280  # px, wider pictures are scaled down


@dataclass(frozen=True)
class Column:
    key: str
    label: str
    help: str
    group: str = ""
    numeric: bool = True


@dataclass(frozen=True)
class TableCell:
    """What a cell shows, a smaller second line, and what it sorts by (None: always last)."""

    text: str
    sort: str | float | None
    sub: str = ""
    mark: str = ""  # trained: this judge was the training reward

    @property
    def key(self) -> str:
        """`sort` as the script reads it."""
        return "" if self.sort is None else str(self.sort) if self.sort != -math.inf else "-Infinity"


@dataclass
class Pictures:
    """The pictures a page has taken in so far, and those it had no room for or could not read."""

    used: int = 0
    size: int = 0
    shown: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    def take(self, path: Path, name: str) -> dict[str, Any] | None:
        """The picture as a data URI, or None: too many, too large, or no picture."""
        try:
            data, width, height = _encode(path)
        except (OSError, picture_reader.PictureError):
            self.unreadable.append(name)
            return None
        if self.used >= MOST_PICTURES or self.size + len(data) > MOST_BYTES:
            self.left_out.append(name)
            return None
        self.used, self.size = self.used + 1, self.size + len(data)
        return {"src": data, "width": width, "height": height}


def _encode(path: Path) -> tuple[str, int, int]:
    picture = picture_reader.read(path.read_bytes(), most=MOST_PIXELS)
    if picture.width > WIDEST:
        picture = picture.resize((WIDEST, max(1, round(picture.height * WIDEST / picture.width))))
    data = io.BytesIO()
    picture.save(data, "WEBP", quality=80, method=4)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode(), picture.width, picture.height


def of_board(board: Board, pictures: Pictures, advance: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Everything the page shows of one track, with text made visible (`marks.visible`) and no nan; `advance` is called
    after each row's pictures."""
    board = board.ranked
    found = leaderboard.rows(board)
    lines, rungs = standings.lines(board), standings.climbs(board)
    climbs = {climb.key: _climb(climb, board) for climb in rungs}
    early = [climb for climb in rungs if climb.key not in {row.key for row in found}]  # not run to this rung
    ordered = [line.row for line in lines]
    root = _root(board)
    where = {r.cell_hash: p for r, p in zip(board.records, board.paths, strict=False)}
    builders = {*(r.builder for r in found), *(climb.builder for climb in early)}
    marks = marks_of(builders)
    fixed = board.cells[0].resolved.get("track", {})
    judges = _judges(board)
    return {
        "track": visible(board.track),
        "hash": board.track_hash[:12],
        "judges": judges,
        "place": board.place,
        "ladder": [f"{budget:,}" for budget in board.ladder],
        "rungs": _rungs(rungs),
        "counts": {
            "rows": len(found),
            "runs": len((board.whole or board).records),
            "missing": len(board.unfinished),
            "seeds": len({c.seed for c in board.cells}),
        },
        "columns": (columns := _columns(judges)),
        "groups": [{"name": name, "span": len(list(own))} for name, own in groupby(columns, lambda c: c.group)],
        "rows": [_row(line, number, marks) for number, line in enumerate(lines)],
        "axis": _axis(lines),
        "choices": {
            key: sorted({visible(getattr(r, key)) for r in found}) for key in ("algorithm", "builder", "reward")
        }
        | {"state": sorted({_state(line) for line in lines})},
        "marks": {visible(b): marks[b] for b in sorted(builders, key=lambda b: (marks[b], b))},
        "effect": _effect(board),
        "pictures": _pictures(ordered, where, root, pictures, advance),
        "facts": [[visible(k), visible(v)] for k, v in _facts(fixed)],
        "provenance": _provenance(board),
        "data": clean(
            {
                "judges": judges,
                "prompts": list(fixed.get("prompts", {}).get("heldout", [])),
                "templates": fixed.get("prompts", {}).get("templates") or {},
                "rows": [
                    {**_details(line, marks, where, root), "climb": climbs.get(line.row.key, [])} for line in lines
                ],
                "early": [
                    {
                        "name": [climb.algorithm, climb.builder, climb.reward],
                        "variant": climb.label,
                        "mark": marks[climb.builder],
                        "climb": _climb(climb, board),
                    }
                    for climb in early
                ],
                "fronts": fronts(lines),
            }
        ),
    }


def _rungs(climbs: Sequence[Climb]) -> list[dict[str, Any]]:
    """The lines of the table by rung: names, and of each rung (gain, interval, rank) as text; none without rungs."""
    return [
        {
            **{k: visible(getattr(climb, k)) for k in ("algorithm", "builder", "reward")},
            "label": visible(climb.label),
            "cells": [_at_rung(line) for line in climb.at],
        }
        for climb in climbs
    ]


def _at_rung(line: Line | None) -> tuple[str, str, str]:
    if line is None or not line.scores:
        return "–", "", ""
    score, rank = line.scores[0], str(line.rank or "")
    return signed(score.gain), interval_text(score.low, score.high) if math.isfinite(score.gain) else "", rank


def _climb(climb: Climb, board: Board) -> list[list[float | None]]:
    """(reward queries, gain, low, high) at each rung that a row was run to, None for the gain where a run had collapsed."""
    points: list[list[float | None]] = []
    for budget, line in zip(board.ladder, climb.at, strict=True):
        if line is not None and not math.isnan(line.gain):
            score = line.scores[0]
            known = math.isfinite(score.gain)
            points.append([budget, *(_short(v) if known else None for v in (score.gain, score.low, score.high))])
    return points


def clean(value: Any) -> Any:
    """JSON-able data with visible text; what is not finite is None, for JSON has no name for it."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {visible(str(k)): clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [clean(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """The numbers of the points (cost, gain) that no other beats: none costs at most as much and gains at least as
    much, one of the two strictly. By cost."""
    front = [
        i
        for i, (cost, gain) in enumerate(points)
        if not any(c <= cost and g >= gain and (c < cost or g > gain) for c, g in points)
    ]
    return sorted(front, key=lambda i: (points[i], i))


COSTS = ("evaluations", "queries", "seconds", "kl")


def fronts(lines: Sequence[Line]) -> dict[str, list[int]]:
    """For each cost the rows on the Pareto front, of those that no reason keeps from a rank."""
    result: dict[str, list[int]] = {}
    for cost in COSTS:
        able = [
            i
            for i, line in enumerate(lines)
            if line.rankable and math.isfinite(line.gain) and math.isfinite(line.figures[cost])
        ]
        result[cost] = [able[i] for i in pareto([(lines[i].figures[cost], lines[i].gain) for i in able])]
    return result


def _state(line: Line) -> str:
    return line.row.state or ("ranked" if line.rank else "unranked")


def _judges(board: Board) -> list[dict[str, str]]:
    first = next((r.verdicts for r in board.records if r.verdicts), [])
    return [{"name": visible(v.judge), "metric": visible(v.metric)} for v in first]


def _columns(judges: Sequence[dict[str, str]]) -> list[Column]:
    gain = "trained − base on the same noise, mean over seeds and held-out prompts, 95 % interval"
    return [
        Column(
            "rank",
            "Rank",
            "range of ranks that the comparison of all pairs leaves open, at 5 % for the whole table",
            numeric=False,
        ),
        Column("algorithm", "Algorithm", "training backend; opens the records", numeric=False),
        Column("builder", "Builder", "builder of the consistent samples", numeric=False),
        Column("reward", "Reward", "training reward", numeric=False),
        Column("seeds", "Seeds", "runs with a record, of those registered"),
        *(Column(f"{n} gain", j["name"], f"{gain}; {j['metric']}", "Gain") for n, j in enumerate(judges)),
        *(Column(figure.name, figure.head, figure.meaning, figure.group) for figure in FIGURES),
    ]


def _row(line: Line, number: int, marks: dict[str, int]) -> dict[str, Any]:
    row, state = line.row, _state(line)
    place = "–" if state == "unranked" else str(line.rank) if line.rank else state
    cells = {
        "rank": TableCell(place, line.rank.low + line.rank.high / 1e4 if line.rank else None),
        "algorithm": TableCell(visible(row.algorithm), visible(row.algorithm).lower(), visible(row.label)),
        "builder": TableCell(visible(row.builder), visible(row.builder).lower()),
        "reward": TableCell(visible(row.reward), visible(row.reward).lower()),
        "seeds": TableCell(
            f"{line.seeds}/{line.seeds + line.missing}" if line.missing else str(line.seeds), line.seeds
        ),
        **{figure.name: _figure(figure, line) for figure in FIGURES},
    }
    for n, score in enumerate(line.scores):
        known = math.isfinite(score.gain)
        trained = any(r.verdicts[n].trained_on for r in row.finished)
        interval = f"{signed(score.low)} to {signed(score.high)}" if known else ""
        sort = None if math.isnan(score.gain) else score.gain
        cells[f"{n} gain"] = TableCell(signed(score.gain), sort, interval, "trained" * trained)
    words = (row.algorithm, row.builder, row.reward, row.label, line.note, line.flags, state)
    first = line.scores[0] if line.scores else None
    flags = f"not to be published: {line.flags}" if line.flags else ""
    return {
        "number": number,
        "state": state,
        "note": visible("; ".join(text for text in (line.note, flags) if text)),
        "mark": marks[row.builder],
        "algorithm": visible(row.algorithm),
        "builder": visible(row.builder),
        "reward": visible(row.reward),
        "words": " ".join(visible(word).lower() for word in words),
        "cells": cells,
        "gain": [first.gain, first.low, first.high] if first and math.isfinite(first.gain) else None,
    }


def _figure(figure: Figure, line: Line) -> TableCell:
    value = line.figures[figure.name]
    if figure.kind == "int64" and not value and not line.row.offline:
        value = math.nan
    return TableCell(figure.text(line.row, value, figure.form), None if math.isnan(value) else float(value))


def _axis(lines: Sequence[Line]) -> tuple[float, float]:
    """What the small intervals of the table run over."""
    ends = [end for line in lines for score in line.scores[:1] for end in (score.low, score.high)]
    return _span([e for e in ends if math.isfinite(e)])


def _span(ends: Sequence[float]) -> tuple[float, float]:
    low, high = min([0.0, *ends]), max([0.0, *ends])
    pad = (high - low) * 0.05 or 1.0
    return low - pad, high + pad


def _effect(board: Board) -> dict[str, Any]:
    """The rows of the forest plot and its axis."""
    found = standings.contrasts(board) if board.judges else []
    low, high = _span([end for c in found for end in (c.low, c.high)])
    return {
        "axis": (low, high),
        "ticks": [(t, f"{t:+g}".replace("-", "−") if t else "0") for t in ticks(low, high, 4)],
        "lines": [
            {
                **{k: visible(getattr(c, k)) for k in ("algorithm", "reward", "variant")},
                "seeds": c.seeds,
                "mean": c.of > 1,
                "ceiling": c.ceiling,
                "values": (c.difference, c.low, c.high),
                "difference": signed(c.difference),
                "interval": f"{signed(c.low)} to {signed(c.high)}",
                "holm": f"{c.holm:.3f}",
            }
            for c in found
        ],
    }


def _details(
    line: Line,
    marks: dict[str, int],
    where: dict[str, Path],
    root: Path | None,
) -> dict[str, Any]:
    row = line.row
    resolved = (row.records or row.unfinished)[0].resolved
    shown = {
        short: {k: v for k, v in resolved.get(part, {}).items() if k != "name"} for part, short in SECTIONS.items()
    }
    # The numbers the charts need; the table's cells carry the rest.
    first = line.scores[0] if line.scores else None
    gain = (first.gain, first.low, first.high) if first else [math.nan] * 3
    return {
        "name": [row.algorithm, row.builder, row.reward],
        "variant": row.label,
        "state": _state(line),
        "note": line.note,
        "mark": marks[row.builder],
        "gain": [_short(g) for g in gain],
        "costs": {cost: _short(line.figures[cost]) for cost in COSTS},
        "options": shown,
        "tuning": next((r.tuning for r in row.records if r.tuning), ""),
        "curve": _curve(row),
        "runs": [_run(r, where.get(r.cell_hash), root) for r in row.records],
        "unfinished": [
            {"seed": u.seed, "error": u.error, "path": _relative(u.folder / "cell.json", root)} for u in row.unfinished
        ],
    }


SECTIONS = {"algorithm": "algo", "builder": "builder", "reward": "reward"}  # as `--set` names them


def _run(record: Record, path: Path | None, root: Path | None) -> dict[str, Any]:
    rises = record.rises
    return {
        "seed": record.seed,
        "status": record.status,
        "evidence": record.evidence,
        "path": _relative(path, root) if path else None,
        "cell": record.cell_hash,
        "rise": _short(rises[-1][1]) if rises else None,
        "verdicts": [
            {
                "base": _short(v.base),
                "trained": _short(v.trained),
                "gain": [_short(g) for g in (v.gain.mean, v.gain.low, v.gain.high)],
                "kind": v.gain.kind,
                "trained_on": v.trained_on,
                "templates": {t: [_short(s) for s in both] for t, both in v.templates.items()},
                "scores": [[_short(s) for s in both] for both in v.per_prompt],
            }
            for v in record.verdicts
        ],
        "drift": record.drift.model_dump(mode="json") if record.drift else None,
        "rounds": [
            [r.round, r.queries, r.reward, r.reward_sd, r.base_reward, r.winner_reward, r.pairs, r.dropped]
            for r in record.rounds
        ],
        "cost": record.cost.model_dump(mode="json"),
        "provenance": record.provenance.model_dump(mode="json"),
        "given": record.given,
        "batch": record.resolved.get("track", {}).get("batch"),
    }


def _curve(row: Row) -> dict[str, Any]:
    """The rise of the training reward against queries: mean, lowest and highest of the finished runs, and each collapsed
    run by itself."""
    at: dict[int, list[float]] = {}
    for record in row.finished:
        for queries, rise in record.rises:
            at.setdefault(queries, []).append(rise)
    collapsed = [r.rises for r in row.failed if r.rises]
    return {
        "runs": sum(bool(r.rises) for r in row.finished),
        "band": [
            [q, _short(math.fsum(rises) / len(rises)), _short(min(rises)), _short(max(rises))]
            for q, rises in sorted(at.items())
        ],
        "collapsed": [[[q, _short(r)] for q, r in points] for points in collapsed],
    }


def _short(value: float) -> float | None:
    """Six significant digits: what a reader can use, at half the length."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _root(board: Board) -> Path | None:
    """The folder all of a board's cells are below."""
    folders = [p.parent.absolute() for p in board.paths] + [u.folder.absolute() for u in board.unfinished]
    return Path(os.path.commonpath([f.parent for f in folders])) if folders else None


def _relative(path: Path, root: Path | None) -> str:
    return path.absolute().relative_to(root).as_posix() if root else path.name


def _pictures(
    ordered: Sequence[Row],
    where: dict[str, Path],
    root: Path | None,
    pictures: Pictures,
    advance: Callable[[], None],
) -> dict[str, Any]:
    """Of each row the pictures of its first seed that has any, in the table's order."""
    before = len(pictures.left_out), len(pictures.unreadable)
    shown = []
    for number, row in enumerate(ordered):
        for record in row.records:
            folder = where[record.cell_hash].parent if record.cell_hash in where else None
            files = [(k, folder / f"{k}.png") for k in PICTURES if folder and (folder / f"{k}.png").is_file()]
            taken = [(kind, pictures.take(path, _relative(path, root))) for kind, path in files]
            name = visible(f"{row.algorithm} on {row.builder} samples, reward {row.reward}, seed {record.seed}")
            shown += [
                {"row": number, "kind": kind, "name": name, "alt": f"{name}: {PICTURES[kind]}", **picture}
                for kind, picture in taken
                if picture is not None
            ]
            if files:
                break
        advance()
    return {
        "shown": shown,
        "left_out": [visible(n) for n in pictures.left_out[before[0] :]],
        "unreadable": [visible(n) for n in pictures.unreadable[before[1] :]],
    }


def _facts(fixed: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """What the track holds equal, as (option, value); of prompts the number."""
    for section, content in fixed.items():
        if section == "prompts" and isinstance(content, dict):
            for name in ("train", "validation", "heldout"):
                yield f"prompts.{name}", f"{len(content.get(name) or [])} prompts"
        elif isinstance(content, dict):
            for option, value in content.items():
                if value is not None:
                    yield f"{section}.{option}", _value(value)
        elif section != "batch":
            yield section, _value(content)


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value))
    if isinstance(value, dict):
        return ", ".join(f"{k} {_value(v)}" for k, v in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _provenance(board: Board) -> list[dict[str, Any]]:
    """What the numbers come from: each value found, with the number of records that have it."""
    found: dict[str, list[str]] = {}
    for record in board.records:
        p = record.provenance
        state = " with changes" if p.dirty else ""
        found.setdefault("code", []).append(f"commit {p.code[:12]}{state}" if p.code else "not from a checkout")
        found.setdefault("hardware", []).append(p.hardware)
        found.setdefault("device", []).append(record.cost.device)
        found.setdefault("base model", []).append(f"sha256 {p.model_sha256[:12]}")
        for package, version in p.versions.items():
            found.setdefault(package, []).append(version)
    return [
        {"what": visible(what), "values": [(visible(v), n) for v, n in sorted(Counter(values).items())]}
        for what, values in found.items()
    ]
