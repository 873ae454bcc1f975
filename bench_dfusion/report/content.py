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
from bench_dfusion.results import leaderboard
from bench_dfusion.results.leaderboard import Board, Row, signed
from bench_dfusion.results.records import Record
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
class Cell:
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
    by_key = {r.key: r for r in found}
    lines = leaderboard.table(board).to_dict("records")
    rungs = leaderboard.by_rung(board).to_dict("records")
    climbs = {tuple(line[k] for k in leaderboard.KEY): _climb(line, board) for line in rungs}
    early = [line for line in rungs if tuple(line[k] for k in leaderboard.KEY) not in by_key]  # not run to this rung
    ordered = [by_key[tuple(line[k] for k in leaderboard.KEY)] for line in lines]
    root = _root(board)
    where = {r.cell_hash: p for r, p in zip(board.records, board.paths, strict=False)}
    builders = {*(r.builder for r in found), *(line["builder"] for line in early)}
    marks = marks_of(builders)
    fixed = board.cells[0].resolved.get("track", {})
    judges = _judges(board)
    return {
        "track": visible(board.track),
        "hash": board.track_hash[:12],
        "judges": judges,
        "place": board.place,
        "ladder": [f"{budget:,}" for budget in board.ladder],
        "rungs": _rungs(rungs, board),
        "counts": {
            "rows": len(found),
            "runs": len((board.whole or board).records),
            "missing": len(board.unfinished),
            "seeds": len({c.seed for c in board.cells}),
        },
        "columns": (columns := _columns(judges)),
        "groups": [{"name": name, "span": len(list(own))} for name, own in groupby(columns, lambda c: c.group)],
        "rows": [
            _row(line, row, number, board.judges, marks)
            for number, (line, row) in enumerate(zip(lines, ordered, strict=True))
        ],
        "axis": _axis(lines, board.judges),
        "choices": {
            key: sorted({visible(getattr(r, key)) for r in found}) for key in ("algorithm", "builder", "reward")
        }
        | {"state": sorted({_state(line, row) for line, row in zip(lines, ordered, strict=True)})},
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
                    {
                        **_details(line, row, board.judges, marks, where, root),
                        "climb": climbs.get(row.key, []),
                    }
                    for line, row in zip(lines, ordered, strict=True)
                ],
                "early": [
                    {
                        "name": [line[k] for k in ("algorithm", "builder", "reward")],
                        "variant": leaderboard.label_of(line),
                        "mark": marks[line["builder"]],
                        "climb": _climb(line, board),
                    }
                    for line in early
                ],
                "fronts": fronts(lines, board.judges),
            }
        ),
    }


def _rungs(lines: Sequence[dict[Any, Any]], board: Board) -> list[dict[str, Any]]:
    """The lines of the table by rung: names, and of each rung (gain, interval, rank) as text; none without rungs."""
    return [
        {
            **{k: visible(str(line[k])) for k in ("algorithm", "builder", "reward")},
            "label": visible(leaderboard.label_of(line)),
            "cells": [
                (
                    signed(line[f"{n} gain"]),
                    leaderboard.rung_text(line, n).partition(" ")[2],
                    line[f"{n} rank"],
                )
                for n in range(1, len(board.ladder) + 1)
            ],
        }
        for line in lines
    ]


def _climb(line: dict[Any, Any], board: Board) -> list[list[float | None]]:
    """(reward queries, gain, low, high) at each rung that a row was run to, None for the gain where a run had collapsed."""
    points: list[list[float | None]] = []
    for n, budget in enumerate(board.ladder, 1):
        gain = line[f"{n} gain"]
        if not math.isnan(gain):
            points.append(
                [budget, *(_short(line[f"{n} {c}"]) if math.isfinite(gain) else None for c in ("gain", "low", "high"))]
            )
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


def fronts(lines: Sequence[dict[Any, Any]], judges: Sequence[str]) -> dict[str, list[int]]:
    """For each cost the rows on the Pareto front, of those that no reason keeps from a rank."""
    result: dict[str, list[int]] = {}
    for cost in COSTS:
        result[cost] = []
        if judges:
            gain = f"{judges[0]} gain"
            able = [
                i for i, n in enumerate(lines) if _rankable(n) and math.isfinite(n[gain]) and math.isfinite(n[cost])
            ]
            result[cost] = [able[i] for i in pareto([(lines[i][cost], lines[i][gain]) for i in able])]
    return result


def _rankable(line: dict[Any, Any]) -> bool:
    return not str(line["note"]) or str(line["note"]).startswith("offline")


def _state(line: dict[Any, Any], row: Row) -> str:
    return row.state or ("ranked" if line["rank"] else "unranked")


def _judges(board: Board) -> list[dict[str, str]]:
    first = next((r.verdicts for r in board.records if r.verdicts), [])
    return [{"name": visible(v.judge), "metric": visible(v.metric)} for v in first]


def _columns(judges: Sequence[dict[str, str]]) -> list[Column]:
    gain = "trained − base on the same noise, mean over seeds and held-out prompts, 95 % interval"
    own = "Over-optimisation"
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
        Column(
            "reward rise",
            "Reward rise",
            "training reward of the last round − the base's on the same prompts (old records: − the first round's)",
            own,
        ),
        Column("diversity", "Diversity", "Vendi score within a prompt, trained / base", own),
        Column("kl", "KL", "mean per-step KL to the base (nats)", own),
        Column("queries", "Queries", "images the training reward scored, a run", "Cost of a run"),
        Column("evaluations", "Evaluations", "forwards of one sample through the network, a run", "Cost of a run"),
        Column("seconds", "Seconds", "wall time, a run", "Cost of a run"),
        Column("memory", "MB", "peak memory, a run", "Cost of a run"),
    ]


def _row(line: dict[Any, Any], row: Row, number: int, judges: Sequence[str], marks: dict[str, int]) -> dict[str, Any]:
    state = _state(line, row)
    rank = str(line["rank"])
    best, _, worst = rank.partition("–")
    count = line["seeds"] + line["missing"]
    cells = {
        "rank": Cell(
            rank or ("–" if state == "unranked" else state), float(best) + float(worst or best) / 1e4 if rank else None
        ),
        "algorithm": Cell(visible(row.algorithm), visible(row.algorithm).lower(), visible(leaderboard.label_of(line))),
        "builder": Cell(visible(row.builder), visible(row.builder).lower()),
        "reward": Cell(visible(row.reward), visible(row.reward).lower()),
        "seeds": Cell(f"{line['seeds']}/{count}" if line["missing"] else str(count), line["seeds"]),
        "reward rise": _number(line["reward rise"], signed),
        "diversity": _number(line["diversity"], "{:.2f}".format),
        "kl": _number(line["kl"], "{:.4f}".format),
        "queries": Cell("offline", 0.0) if row.offline else _number(line["queries"] or math.nan, "{:,.0f}".format),
        "evaluations": _number(line["evaluations"] or math.nan, "{:,.0f}".format),
        "seconds": _number(line["seconds"], "{:,.0f}".format),
        "memory": _number(line["memory"], "{:,.0f}".format),
    }
    for n, judge in enumerate(judges):
        gain = line[f"{judge} gain"]
        trained = any(r.verdicts[n].trained_on for r in row.finished)
        interval = f"{signed(line[f'{judge} low'])} to {signed(line[f'{judge} high'])}" if math.isfinite(gain) else ""
        cells[f"{n} gain"] = Cell(signed(gain), None if math.isnan(gain) else gain, interval, "trained" * trained)
    words = (row.algorithm, row.builder, row.reward, leaderboard.label_of(line), line["note"], line["flags"], state)
    ranking = f"{judges[0]} " if judges else ""
    return {
        "number": number,
        "state": state,
        "note": visible(_note(line)),
        "mark": marks[row.builder],
        "algorithm": visible(row.algorithm),
        "builder": visible(row.builder),
        "reward": visible(row.reward),
        "words": " ".join(visible(str(w)).lower() for w in words),
        "cells": cells,
        "gain": [line[f"{ranking}{end}"] for end in ("gain", "low", "high")]
        if judges and math.isfinite(line[f"{ranking}gain"])
        else None,
    }


def _note(line: dict[Any, Any]) -> str:
    return "; ".join(t for t in (line["note"], line["flags"] and f"not to be published: {line['flags']}") if t)


def _number(value: float, form: Any) -> Cell:
    return Cell("–", None) if math.isnan(value) else Cell(form(value), float(value))


def _axis(lines: Sequence[dict[Any, Any]], judges: Sequence[str]) -> tuple[float, float]:
    """What the small intervals of the table run over."""
    ends = [line[f"{j} {e}"] for line in lines for j in judges[:1] for e in ("low", "high")]
    return _span([e for e in ends if math.isfinite(e)])


def _span(ends: Sequence[float]) -> tuple[float, float]:
    low, high = min([0.0, *ends]), max([0.0, *ends])
    pad = (high - low) * 0.05 or 1.0
    return low - pad, high + pad


def _effect(board: Board) -> dict[str, Any]:
    """The rows of the forest plot and its axis."""
    lines = leaderboard.contrasts(board).to_dict("records") if board.judges else []
    low, high = _span([e[end] for e in lines for end in ("low", "high")])
    return {
        "axis": (low, high),
        "ticks": [(t, f"{t:+g}".replace("-", "−") if t else "0") for t in ticks(low, high, 4)],
        "lines": [
            {
                **{k: visible(e[k]) for k in ("algorithm", "reward", "variant")},
                "seeds": e["seeds"],
                "mean": e["algorithm"].startswith("mean of "),
                "ceiling": bool(e["ceiling"]),
                "values": (e["difference"], e["low"], e["high"]),
                "difference": signed(e["difference"]),
                "interval": f"{signed(e['low'])} to {signed(e['high'])}",
                "holm": f"{e['holm']:.3f}",
            }
            for e in lines
        ],
    }


def _details(
    line: dict[Any, Any],
    row: Row,
    judges: Sequence[str],
    marks: dict[str, int],
    where: dict[str, Path],
    root: Path | None,
) -> dict[str, Any]:
    resolved = (row.records or row.unfinished)[0].resolved
    shown = {
        short: {k: v for k, v in resolved.get(part, {}).items() if k != "name"} for part, short in SECTIONS.items()
    }
    # The numbers the charts need; the table's cells carry the rest.
    gain = [line[f"{judges[0]} {end}"] for end in ("gain", "low", "high")] if judges else [math.nan] * 3
    return {
        "name": [row.algorithm, row.builder, row.reward],
        "variant": leaderboard.label_of(line),
        "state": _state(line, row),
        "note": line["note"],
        "mark": marks[row.builder],
        "gain": [_short(g) for g in gain],
        "costs": {cost: _short(line[cost]) for cost in COSTS},
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
