"""A leaderboard as a dataset: what is published of boards, its tables with every column declared, and its card.

Pure: `publish.py` reads and writes. The `records` table holds everything the others are made from, so that a published
dataset can be merged and made anew from itself alone. The same cells lie as files below `runs/`, each record with its
companions, so that the tree is also a folder of runs: `leaderboard`, `verify` and `merge` take it as it is.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bench_dfusion.errors import UsageError, plain
from bench_dfusion.results import checks, leaderboard, records, standings
from bench_dfusion.results.figures import COST, FIGURES, OVER
from bench_dfusion.results.leaderboard import Board
from bench_dfusion.results.records import Record, Unfinished
from bench_dfusion.results.standings import Line
from bench_dfusion.runs.pictures import evenly, prompts_of
from bench_dfusion.tracks.schema import Track
from bench_dfusion.util.files import json_text

MARK = "bench-dfusion-leaderboard"  # the tag by which a dataset is known as one of ours
README = "README.md"
TABLES = ("leaderboard", "scores", "curves", "records")  # made anew at every publication; samples are only added to
SHARD = re.compile(rf"({'|'.join(TABLES)})/train-[^/]*\.parquet")
RUN = re.compile(r"runs/([0-9a-f]{64})/(.+)")  # a cell's files, by its hash
MADE = ("record.json", "cell.json", "error.json")  # those that `files` makes of the cell; the others are companions
SAMPLE = re.compile(r"samples/train-([0-9a-f]{16})-[0-9a-f]{12}\.parquet")  # start of the cell's hash, of the content's
PICTURES = {
    "base_trained": "base (left) and trained (right) on the same noise, up to 24 held-out prompts",
    "triples": "reference, its mask, base and target of the last training round, with rewards",
}
SHOWN = 5  # differences named in a refusal

_TRACK = {
    "track": ("string", "the track's name and version"),
    "track_hash": ("string", "SHA-256 of everything the track holds equal; rows of different hashes never compare"),
}
_NAMES = {
    "algorithm": ("string", "the training backend"),
    "builder": ("string", "the builder of the consistent samples; vanilla: no fusion, the control"),
    "reward": ("string", "the training reward"),
}
_VARIANT = {"variant": ("string", "the options that tell it from other rows of the same three names, else empty")}
_CELL = {
    **_TRACK,
    "cell_hash": ("string", "SHA-256 of the run's resolved configuration; the key into records"),
    **_NAMES,
}
_RUNG = {"rung": ("int64", "rung of the track's ladder of budgets, from 1; null where the track has none")}
_SEED = {"seed": ("int64", "the training seed")}


@dataclass(frozen=True)
class Column:
    """A column of the table `leaderboard`: its type in the names that pyarrow and datasets share, its meaning, and its value."""

    kind: str
    meaning: str
    of: Callable[[Board, Line], Any]


def _of_row(name: str) -> Callable[[Board, Line], Any]:
    return lambda board, line: getattr(line.row, name)


def _of_score(name: str) -> Callable[[Board, Line], Any]:
    """A figure of the judge that ranks; the interval of the runs that are left is not that of a row with a miss."""

    def value(board: Board, line: Line) -> Any:
        if line.row.failed and name in ("gain", "low", "high", "interval"):
            return -math.inf if name == "gain" else None
        found = getattr(line.scores[0], name) if line.scores else None
        return None if found == "" else found

    return value


def _of_figures(group: str) -> dict[str, Column]:
    def value(name: str) -> Callable[[Board, Line], Any]:
        return lambda board, line: line.figures[name]

    return {f.column: Column(f.kind, f.meaning, value(f.name)) for f in FIGURES if f.group == group}


def leaderboard_columns() -> dict[str, Column]:
    """The columns of the table `leaderboard`, by name, in their order."""
    return {
        "track": Column(*_TRACK["track"], lambda board, line: board.track),
        "track_hash": Column(*_TRACK["track_hash"], lambda board, line: board.track_hash),
        "rank_low": Column(
            "int64",
            "best rank the row may hold, 1 first; null where it has none",
            lambda board, line: line.rank and line.rank.low,
        ),
        "rank_high": Column(
            "int64",
            "worst rank it may hold: ties that the data do not separate share a range",
            lambda board, line: line.rank and line.rank.high,
        ),
        "rank": Column(
            "string",
            "both as text, 2–4; null where there is none",
            lambda board, line: str(line.rank) if line.rank else None,
        ),
        "state": Column(
            "string",
            "complete, or why there is no rank: miss (a run collapsed), incomplete (cells without a record), "
            "ceiling (trained on the judge), variant (other options than the tuning chose), checkpoint (below three seeds)",
            lambda board, line: line.row.state or "complete",
        ),
        **{name: Column(*about, _of_row(name)) for name, about in (_NAMES | _VARIANT).items()},
        "rung": Column(*_RUNG["rung"], lambda board, line: line.rung),
        "seeds": Column("int64", "records (count)", lambda board, line: line.seeds),
        "failed": Column(
            "int64",
            "runs that collapsed or turned non-finite (count); one makes the row a miss",
            lambda board, line: len(line.row.failed),
        ),
        "missing": Column("int64", "registered cells without a record (count)", lambda board, line: line.missing),
        "judge": Column(
            "string",
            "the judge that ranks: the first of the track; the others are in scores",
            lambda board, line: track_of(board.cells[0]).evaluation.judges[0],
        ),
        "metric": Column(
            "string",
            "what it measures; null where no run has finished",
            lambda board, line: next((r.verdicts[0].metric for r in board.records if r.verdicts), None),
        ),
        "base": Column(
            "float64", "mean over seeds and held-out prompts of the frozen base, of finished runs", _of_score("base")
        ),
        "trained": Column("float64", "the same of the trained policy, on the same noise", _of_score("trained")),
        "gain": Column("float64", "mean of trained − base; −inf for a miss", _of_score("gain")),
        "low": Column("float64", "lower end of its 95 % interval; null for a miss", _of_score("low")),
        "high": Column("float64", "upper end of its 95 % interval; null for a miss", _of_score("high")),
        "interval": Column(
            "string",
            "how it was made: two-way t over seeds and prompts; below three seeds over prompts",
            _of_score("interval"),
        ),
        **_of_figures(OVER),
        "offline": Column("bool", "trained on given pairs: no reward was queried", _of_row("offline")),
        **_of_figures(COST),
        "note": Column("string", "what there is to say about the state", lambda board, line: line.note),
        "submitter": Column("string", "who submitted it; empty: the leaderboard's own keeper", _of_row("submitter")),
    }


LEADERBOARD = leaderboard_columns()

# Columns of each config: the type, in the names that pyarrow and datasets share, and the meaning.
COLUMNS: dict[str, dict[str, tuple[str, str]]] = {
    "leaderboard": {name: (column.kind, column.meaning) for name, column in LEADERBOARD.items()},
    "scores": {
        **_CELL,
        **_VARIANT,
        **_SEED,
        **_RUNG,
        "judge": ("string", "the reward plugin that judged"),
        "ranks": ("bool", "whether it is the track's first judge, the one that ranks"),
        "trained_on": ("bool", "whether it was the training reward, and so a ceiling; null for a failed run"),
        "metric": ("string", "what it measures; null for a failed run"),
        "template": ("string", "template of the held-out prompts scored; null: all of them"),
        "prompt": ("string", "the held-out prompt scored; null: all of the template"),
        "n": ("int64", "prompts scored (count)"),
        "base": ("float64", "mean of the frozen base"),
        "trained": ("float64", "mean of the trained policy on the same noise"),
        "gain": ("float64", "trained − base; −inf for a run that failed"),
        "low": ("float64", "lower end of the 95 % interval over prompts, where all prompts are scored"),
        "high": ("float64", "upper end of it"),
        "interval": ("string", "how it was made"),
    },
    "curves": {
        **_CELL,
        **_VARIANT,
        **_SEED,
        "round": ("int64", "training round, from 0"),
        "queries": ("int64", "reward queries spent up to its end (count)"),
        "metric": (
            "string",
            "reward, reward_sd (drawn samples), base_reward, winner_reward (of pairs), pairs, dropped (counts); "
            "what the algorithm reports begins with train/",
        ),
        "value": ("float64", "its value, a mean over the round"),
    },
    "samples": {
        **_CELL,
        **_SEED,
        "kind": ("string", "; ".join(f"{kind}: {meaning}" for kind, meaning in PICTURES.items())),
        "image": ("image", "the sheet of pictures"),
        "prompts": ("string", "base_trained: the prompts shown, one a line; null for triples, whose sheet names them"),
    },
    "records": {
        **_CELL,
        **_SEED,
        "status": ("string", "finished, failed, or unfinished: registered, without a record"),
        "error": ("string", "what the last try of an unfinished cell ended in, where it is known"),
        "record": (
            "string",
            "the record as JSON (bench_dfusion/results/records.py); of an unfinished cell its cell.json",
        ),
    },
}
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SCHEMAS = {
    config: pa.schema([(name, _IMAGE if kind == "image" else pa.type_for_alias(kind)) for name, (kind, _) in c.items()])
    for config, c in COLUMNS.items()
}


# ---------------------------------------------------------------- what is published


@dataclass(frozen=True)
class Content:
    """Everything a published leaderboard is made from.

    records, unfinished   by the cell's hash; none is in both
    samples               path in the dataset of a cell's pictures, by the first 16 digits of the cell's hash
    companions            paths in the dataset of what lies beside the records
    """

    records: Mapping[str, Record] = field(default_factory=dict)
    unfinished: Mapping[str, Unfinished] = field(default_factory=dict)
    samples: Mapping[str, str] = field(default_factory=dict)
    companions: frozenset[str] = frozenset()


def content_of(boards: Sequence[Board]) -> Content:
    """The cells of boards. Raises UsageError for a record that cannot be published."""
    found = Content(
        {r.cell_hash: r for b in boards for r in b.records}, {u.cell_hash: u for b in boards for u in b.unfinished}
    )
    for group in (found.records, found.unfinished):
        for cell in group.values():
            _check(cell, "")
    checker = checks.Checker()
    for record in found.records.values():
        for flag in checker.flags(record):
            raise UsageError(plain(f"{record.name} cannot be published: {flag}"))
    return found


def boards_of(content: Content) -> list[Board]:
    """One board for each track, by its name. Raises UsageError where judges are not the same everywhere."""
    cells: list[Record | Unfinished] = [*content.records.values(), *content.unfinished.values()]
    cells.sort(key=lambda c: c.cell_hash)
    result = []
    names = {c.track_hash: c.track for c in reversed(cells)}
    for track in sorted(names, key=lambda h: (names[h], h)):
        own = [c for c in cells if c.track_hash == track]
        try:
            result.append(
                Board(
                    tuple(c for c in own if isinstance(c, Record)), tuple(c for c in own if isinstance(c, Unfinished))
                )
            )
        except ValueError as error:
            raise UsageError(plain(error)) from None
    return result


def merged(published: Content, own: Content, replace: bool = False) -> Content:
    """Both together, one record a cell; of the same record the published one stays, unless one's own goes on to a further
    rung; a record outlives an unfinished cell. Raises UsageError where records of one cell differ in more than timings,
    unless `replace` takes one's own."""
    together, differing = dict(published.records), []
    samples, beside = dict(published.samples), published.companions
    for key, record in own.records.items():
        old = together.get(key)
        differs = old is not None and bool(records.differences(old, record))
        if old is not None and differs:
            differing.append((old, record))
        if old is None:
            together[key] = record
        elif differs or records.further(old, record):
            together[key] = record
            samples.pop(key[:16], None)  # they show the record that is gone
            beside = frozenset(p for p in beside if not p.startswith(run_path(key, "")))
    if differing and not replace:
        old, record = differing[0]
        found = records.differences(old, record)
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        others = f" (and {len(differing) - 1} other cells)" if len(differing) > 1 else ""
        raise UsageError(
            f"{plain(record.name)}{others} is published with another result: {'; '.join(found[:SHOWN])}{more}. "
            "Publish elsewhere, or put your record in its place with --replace"
        )
    unfinished = {k: u for k, u in {**published.unfinished, **own.unfinished}.items() if k not in together}
    return Content(together, unfinished, samples, beside)


def _check(cell: Record | Unfinished, source: str) -> Track:
    """The track of a cell. Raises UsageError where it contradicts itself: a table must not be made from that."""

    def wrong(why: object) -> UsageError:
        name = f"{cell.algorithm}/{cell.builder}/{cell.reward}/seed {cell.seed}"
        return UsageError(plain(f"{source}the cell {name} cannot be published: {why}"))

    for problem in records.check(cell) if isinstance(cell, Record) else []:
        raise wrong(problem)
    if not re.fullmatch(r"[0-9a-f]{64}", cell.cell_hash):
        raise wrong(f"its hash is {cell.cell_hash[:80]!r}, no SHA-256")
    if not -(2**63) <= cell.seed < 2**63:
        raise wrong("its seed has more than 64 bits")
    return track_of(cell)


def track_of(cell: Record | Unfinished) -> Track:
    track: Track = Track.model_validate(cell.resolved["track"])
    return track


# ---------------------------------------------------------------- tables


def tables(content: Content) -> dict[str, pa.Table]:
    """The tables of `TABLES`, in the schemas of `SCHEMAS`; the same content gives the same tables."""
    lines: dict[str, list[dict[str, Any]]] = {config: [] for config in TABLES}
    for board in boards_of(content):
        whole = {r.cell_hash: r for r in board.records}
        for level in board.levels:
            found = leaderboard.rows(level)
            rung = {"rung": level.rung if len(board.ladder) > 1 else None}
            lines["leaderboard"] += _leaderboard(level)
            for row in found:
                for record in row.records:
                    lines["scores"] += _scores(record, {**_cell(record), "variant": row.variant, **rung})
        for row in leaderboard.rows(board.at(1)):  # every cell is there
            own = [whole[r.cell_hash] for r in row.records]
            for record in own:
                lines["curves"] += _curves(record, {**_cell(record), "variant": row.variant})
            lines["records"] += [*map(_stored, own), *map(_stored, row.unfinished)]
    return {config: pa.Table.from_pylist(lines[config], SCHEMAS[config]) for config in TABLES}


def _cell(cell: Record | Unfinished) -> dict[str, Any]:
    return {name: getattr(cell, name) for name in (*_CELL, *_SEED)}


def _leaderboard(board: Board) -> list[dict[str, Any]]:
    found = []
    for line in standings.lines(board):
        values = {name: column.of(board, line) for name, column in LEADERBOARD.items()}
        found.append({k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()})
    return found


def _scores(record: Record, cell: dict[str, Any]) -> list[dict[str, Any]]:
    """What every judge said of all held-out prompts, of each template and of each prompt."""
    track = track_of(record)
    prompts, templates = track.prompts.heldout, track.prompts.templates or {}
    first = track.evaluation.judges[0]
    if record.status == "failed":
        missed = {**cell, "n": len(prompts), "gain": -math.inf}
        return [{**missed, "judge": judge, "ranks": judge == first} for judge in track.evaluation.judges]
    lines = []
    for v in record.verdicts:
        same = {**cell, "judge": v.judge, "ranks": v.judge == first, "trained_on": v.trained_on, "metric": v.metric}
        g = v.gain
        whole = {"n": len(prompts), "gain": g.mean, "low": g.low, "high": g.high, "interval": g.kind}
        lines.append({**same, "base": v.base, "trained": v.trained, **whole})
        parts = [(t, None, b, a, sum(x == t for x in templates.values())) for t, (b, a) in v.templates.items()]
        each = [(templates.get(p), p, b, a, 1) for p, (b, a) in zip(prompts, v.per_prompt, strict=True)]
        for template, prompt, base, trained, n in (parts if templates else []) + each:
            figures = {"n": n, "base": base, "trained": trained, "gain": trained - base}
            lines.append({**same, "template": template, "prompt": prompt, **figures})
    return lines


def _curves(record: Record, cell: dict[str, Any]) -> list[dict[str, Any]]:
    lines = []
    for r in record.rounds:
        own = ("reward", "reward_sd", "base_reward", "winner_reward", "pairs", "dropped")
        values = {name: getattr(r, name) for name in own} | {f"train/{k}": v for k, v in r.metrics.items()}
        at = {**cell, "round": r.round, "queries": r.queries}
        lines += [{**at, "metric": k, "value": float(v)} for k, v in values.items() if v is not None]
    return lines


def _stored(cell: Record | Unfinished) -> dict[str, Any]:
    if isinstance(cell, Record):
        return {**_cell(cell), "status": cell.status, "record": json_line(cell.model_dump(mode="json"))}
    return {**_cell(cell), "status": "unfinished", "error": cell.error, "record": json_line(_registered(cell))}


def _registered(cell: Unfinished) -> dict[str, Any]:
    """The cell.json of a cell without a record."""
    return {"given": {}, "resolved": cell.resolved, "hash": cell.cell_hash}


def run_files(content: Content) -> dict[str, bytes]:
    """The files of all cells but the companions, by path: what their run directories hold."""
    found: dict[str, Any] = {}
    for key, record in content.records.items():
        found[run_path(key, "record.json")] = record.model_dump(mode="json")
    for key, cell in content.unfinished.items():
        found[run_path(key, "cell.json")] = _registered(cell)
        if cell.error is not None:
            found[run_path(key, "error.json")] = {"error": cell.error}
    return {path: json_text(found[path]).encode() for path in sorted(found)}


def path_of(config: str) -> str:
    return f"{config}/train-00000-of-00001.parquet"


def run_path(cell_hash: str, name: str) -> str:
    """Where a file of a cell lies in the dataset; `RUN` matches it."""
    return f"runs/{cell_hash}/{name}"


def base_path(name: str) -> str:
    """Where a checked base lies in the dataset: among the cells' directories."""
    return f"runs/{name}"


def json_line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def sample_rows(record: Record, pictures: Mapping[str, bytes]) -> bytes:
    """The pictures of a run, by kind, as a Parquet file of the config `samples`."""
    heldout = track_of(record).prompts.heldout
    rows: list[dict[str, Any]] = []
    for kind, data in pictures.items():
        row = {**_cell(record), "kind": kind, "image": {"bytes": data, "path": None}}
        if kind == "base_trained":  # sheets that do not say what is on them are of before they did
            said = prompts_of(data) or []
            shown = said if said and {*said} <= {*heldout} else [heldout[i] for i in evenly(len(heldout))]
            row["prompts"] = "\n".join(" ".join(prompt.split()) for prompt in shown)
        rows.append(row)
    return parquet(pa.Table.from_pylist(rows, SCHEMAS["samples"]))


def sample_path(cell_hash: str, data: bytes) -> str:
    """Where `sample_rows` go in the dataset; `SAMPLE` matches it. Other content is another path."""
    return f"samples/train-{cell_hash[:16]}-{hashlib.sha256(data).hexdigest()[:12]}.parquet"


def parquet(table: pa.Table) -> bytes:
    """A table as a Parquet file, row groups of at most some 50 MB."""
    data = io.BytesIO()
    rows = max(1, int(50e6 * len(table) // max(1, table.nbytes)))
    pq.write_table(table, data, row_group_size=rows, compression="zstd")
    return data.getvalue()


# ---------------------------------------------------------------- read again


def read_records(data: bytes, source: str) -> Content:
    """What a published `records` file holds. Raises UsageError naming `source` where it cannot be read whole:
    nothing may be published over rows that would be lost."""
    update = "it was written by another version of bench-dfusion, or damaged: update bench-dfusion"
    try:
        table = pq.read_table(io.BytesIO(data))
        rows = table.select(list(COLUMNS["records"])).to_pylist()
    except (pa.ArrowException, KeyError, OSError) as error:
        raise UsageError(f"{source} cannot be read ({plain(error)[:200]}); {update}") from None
    finished: dict[str, Record] = {}
    unfinished: dict[str, Unfinished] = {}
    cell: Record | Unfinished
    for number, row in enumerate(rows):
        where = f"{source}, row {number}"
        try:
            if row["status"] == "unfinished":
                resolved = json.loads(row["record"])["resolved"]
                names = {name: row[name] for name in (*_CELL, *_SEED)}
                cell = unfinished[row["cell_hash"]] = Unfinished(Path(), **names, resolved=resolved, error=row["error"])
                track_of(cell)
            else:
                cell = finished[row["cell_hash"]] = records.parse(row["record"], where)
            if cell.cell_hash != row["cell_hash"]:
                raise ValueError("its hash is not that of its row")
        except UsageError as error:
            raise UsageError(f"{error}; {update}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{where}, is no record ({plain(error)[:200]}); {update}") from None
        _check(cell, f"{source}: ")
    return Content(finished, unfinished)
