"""The records of one track side by side: boards, read from a folder, and the rows that their runs are grouped into.

`standings` ranks the rows, `tables` writes them. The same records give the same bytes, in whatever order they are found.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bench_dfusion.errors import UsageError
from bench_dfusion.results import checks, records, statistics
from bench_dfusion.results.records import Record, Unfinished
from bench_dfusion.tracks.schema import check_rung, labels_of
from bench_dfusion.util import files

REVIEWED = "reviewed.json"  # in a leaderboard's folder: the rewards that a person has looked at, by fingerprint
# Rank correlation of the training reward and the judge that ranks, on the same pictures, from which a row is a ceiling
# until a person has looked. A judge under another name has 1; the embedded CLIP has .69 with the oracle on pictures of the
# base (benchmarks/results/clip_agreement.json), and .57 to .81 over the prompts' means of the 230 runs of micro-v1.
AGREEMENT = 0.9


@dataclass(frozen=True)
class Board:
    """The records of one track, and the cells that were registered and have none. Raises ValueError where two
    records are of one cell, where judges are not the same everywhere, or where tracks are mixed.

    Of a track with rungs, records are compared at one rung alone (`at`); a board of them as they are is so at `common`.
    """

    records: tuple[Record, ...]
    unfinished: tuple[Unfinished, ...] = ()
    paths: tuple[Path, ...] = ()  # of the records, where they were read from files
    reviewed: frozenset[str] = frozenset()  # fingerprints of rewards that a person found to be none of the judges
    rung: int | None = None  # None: the records as they are
    whole: Board | None = None  # what `at` was asked of

    def __post_init__(self) -> None:
        tracks = {c.track_hash: c.track for c in self.cells}
        if len(tracks) != 1:
            raise ValueError(
                f"records of {len(tracks)} different tracks never share a table: {sorted(set(tracks.values()))}"
            )
        seen: dict[str, int] = {}
        for number, record in enumerate(self.records):
            cell = identity(record)
            if cell in seen:
                first = seen[cell]
                where = f": {self.paths[first]} and {self.paths[number]}" if self.paths else ""
                raise ValueError(f"the cell {record.name} has two records{where}; keep one")
            seen[cell] = number
        judged: list[tuple[str, int]] | None = None
        judges: dict[str, str] = {}
        for record in self.records:
            if record.status == "finished":
                own = [(v.judge, len(v.per_prompt)) for v in record.verdicts]
                if not own or own != (judged := judged or own):
                    raise ValueError(
                        f"{record.name} was judged by {_judged(own)}, other records by {_judged(judged or [])}: "
                        "their verdicts cannot be compared"
                    )
            for v in record.verdicts:
                if judges.setdefault(v.judge, v.fingerprint) != v.fingerprint:
                    raise ValueError(
                        f"the judge {v.judge} of {record.name} has other weights or rules than that of other records "
                        f"({v.fingerprint[:12]}…, not {judges[v.judge][:12]}…): their verdicts cannot be compared"
                    )

    @cached_property
    def checker(self) -> checks.Checker:
        return self.whole.checker if self.whole else checks.Checker()

    @property
    def ladder(self) -> tuple[int, ...]:
        """The budgets at which runs of the track are ranked, rising (reward queries)."""
        budget = self.cells[0].resolved.get("track", {}).get("budget", {})
        return tuple(budget.get("rungs") or (budget.get("reward_queries"),))

    def at(self, rung: int) -> Board:
        """The board of what was found at a rung: without the runs that end before it, unless they failed. Raises
        UsageError where the track has no such rung or no run has reached it."""
        whole = self.whole or self
        check_rung(rung, self.ladder, self.track)
        found = [r.at(rung) for r in whole.records]
        paths = [p for r, p in zip(found, whole.paths, strict=False) if r is not None]
        there = tuple(r for r in found if r is not None)
        if not there and not whole.unfinished:
            raise UsageError(f"--rung {rung}: no run of {self.track} has reached it")
        return replace(whole, records=there, paths=tuple(paths), rung=rung, whole=whole)

    @property
    def common(self) -> int:
        """The rung that most rows end at, the later one of equals; a row ends where the first of its runs does."""
        ends: dict[str, int] = {}
        for record in (self.whole or self).records:
            if record.status == "finished":
                row = json.dumps([*_names(record), options_of(record)], sort_keys=True)
                ends[row] = min(ends.get(row, record.rung or 1), record.rung or 1)
        counts = Counter(ends.values())
        return max(counts, key=lambda rung: (counts[rung], rung), default=1)

    @cached_property
    def ranked(self) -> Board:
        """This board at a rung, `common` where none was asked for; itself of a track without rungs."""
        return self if self.rung is not None or len(self.ladder) == 1 else self.at(self.common)

    @cached_property
    def levels(self) -> list[Board]:
        """The board at every rung that a run has reached, from the first; of a track without rungs one."""
        furthest = max(
            (len(self.ladder) if r.status == "failed" else r.rung or 1 for r in (self.whole or self).records), default=1
        )
        return [self.at(rung) for rung in range(1, furthest + 1)]

    @property
    def place(self) -> str:
        """The rung that is compared, as headings say it; empty of a track without rungs."""
        rung = self.ranked.rung
        if rung is None or len(self.ladder) == 1:
            return ""
        left = sum(not r.reached(rung) for r in (self.whole or self).records)
        before = f"; {left} run{'s' * (left != 1)} that end{'s' * (left == 1)} before it not shown" if left else ""
        return f"rung {rung} of {len(self.ladder)}, {self.ladder[rung - 1]:,} reward queries{before}"

    @cached_property
    def grouped(self) -> tuple[Row, ...]:
        """`rows`, grouped once."""
        return tuple(_grouped(self))

    @property
    def cells(self) -> list[Record | Unfinished]:
        return [*self.records, *self.unfinished]

    @property
    def track(self) -> str:
        return self.cells[0].track

    @property
    def track_hash(self) -> str:
        return self.cells[0].track_hash

    @property
    def judges(self) -> list[str]:
        """The judges in the track's order; the first ranks. None where no run has finished."""
        return next(([v.judge for v in r.verdicts] for r in self.records if r.verdicts), [])


def _judged(judges: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{judge} on {prompts} prompts" for judge, prompts in judges) or "no judge"


def boards(folder: Path) -> list[Board]:
    """One board for each track below a folder, by the track's name. Raises UsageError for what is no record, and for one
    that cannot be (`checks`)."""
    found = records.find(folder)
    checks.check(found)
    reviewed = _reviewed(folder)
    finished = {identity(r) for _, r in found}
    registered = {identity(u): u for u in records.find_unfinished(folder)}
    waiting = [u for cell, u in registered.items() if cell not in finished]
    tracks = sorted({(r.track, r.track_hash) for _, r in found} | {(u.track, u.track_hash) for u in waiting})
    result = []
    for _, track in tracks:
        own = [(p, r) for p, r in found if r.track_hash == track]
        result.append(
            Board(
                tuple(r for _, r in own),
                tuple(u for u in waiting if u.track_hash == track),
                tuple(p for p, _ in own),
                reviewed,
            )
        )
    return result


def _reviewed(folder: Path) -> frozenset[str]:
    """The fingerprints in a folder's `reviewed.json`, which has a note for each. Raises UsageError."""
    path = folder / REVIEWED
    if not path.exists():
        return frozenset()
    try:
        return frozenset(dict(files.read_json(path)))
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(
            f'{path}: {error}; write {{"FINGERPRINT": "who looked at the reward, when, what it is"}}'
        ) from None


State = Literal["", "miss", "incomplete", "ceiling", "variant", "checkpoint"]


@dataclass(frozen=True)
class Note:
    """What a reader must know of a row: of which kind it is (why there is no rank, or how it was trained), and the rest."""

    kind: State | Literal["unranked", "untrained", "offline"]
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


KEY = ("algorithm", "builder", "reward", "variant", "submitter")


@dataclass(frozen=True)
class Row:
    """One algorithm × builder × reward in one configuration, its records by seed."""

    algorithm: str
    builder: str
    reward: str
    variant: str  # the options that tell it from other rows of the same three, else empty
    records: tuple[Record, ...]
    unfinished: tuple[Unfinished, ...]
    submitter: str = ""
    variant_only: bool = False  # whether another row of the same four, or none, stands for them: see `_representative`
    reviewed: frozenset[str] = frozenset()

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        """What tells it from every other row of its board."""
        return self.algorithm, self.builder, self.reward, self.variant, self.submitter

    @property
    def name(self) -> str:
        return "/".join(part for part in (self.algorithm, self.builder, self.reward, self.label) if part)

    @property
    def finished(self) -> list[Record]:
        return [r for r in self.records if r.status == "finished"]

    @property
    def failed(self) -> list[Record]:
        """The runs that collapsed: each makes its row a miss."""
        return [r for r in self.records if r.status == "failed"]

    @property
    def ceiling(self) -> bool:
        """Whether it was trained on the judge that ranks."""
        return any(r.verdicts[0].trained_on for r in self.finished)

    @property
    def agreement(self) -> float | None:
        """The largest rank correlation of its training reward and the judge that ranks, where a run has it."""
        return max((r.agreement.get(r.verdicts[0].judge, -1.0) for r in self.finished if r.agreement), default=None)

    @property
    def suspect(self) -> bool:
        """Whether its training reward agrees with the judge that ranks as only the judge itself would, and no person has
        looked at it."""
        looked = all(r.provenance.reward_fingerprint in self.reviewed for r in self.records)
        return not looked and self.agreement is not None and self.agreement >= AGREEMENT

    @property
    def offline(self) -> bool:
        # A run whose very first score was not finite has no round and no query, and says nothing about it.
        return any(r.rounds for r in self.records) and not any(r.cost.reward_queries for r in self.records)

    def gains(self, judge: int = 0) -> dict[int, np.ndarray]:
        """The gain of each held-out prompt [P], by seed, before the judge of that number."""
        return {r.seed: np.array(r.verdicts[judge].gains) for r in self.finished}

    @property
    def clusters(self) -> tuple[str, ...] | None:
        """The cluster of each held-out prompt, where the track has any."""
        prompts = self.records[0].resolved["track"].get("prompts", {}) if self.records else {}
        return labels_of(prompts.get("heldout", ()), prompts.get("clusters"))

    @property
    def state(self) -> State:
        """Why a row has no rank: miss, incomplete, ceiling, variant or checkpoint; empty where it has one."""
        if self.failed:
            return "miss"
        if self.unfinished:
            return "incomplete"
        if self.ceiling or self.suspect:
            return "ceiling"
        if self.variant_only:
            return "variant"
        return "" if len(self.finished) >= statistics.MIN_SEEDS else "checkpoint"

    @property
    def notes(self) -> tuple[Note, ...]:
        """`state` with what there is to it, and whatever else a reader must know of the row."""
        count = len(self.records) + len(self.unfinished)
        broken = sum(u.error is not None for u in self.unfinished)
        details = {
            "miss": f"{len(self.failed)} of {count} runs collapsed or turned non-finite",
            "incomplete": f"{len(self.unfinished)} of {count} cells have no record"
            + (f", {broken} ended in an error" if broken else ""),
            "ceiling": "trained on the judge"
            if self.ceiling
            else f"its reward agrees with the judge ({self.agreement or 0:.2f}) until a person has looked",
            "variant": "other options than those the track's tuning chose",
            "checkpoint": f"{count} of {statistics.MIN_SEEDS} seeds",
        }
        found = [Note(self.state, details[self.state])] if self.state else []
        idle = sum(r.trained is False for r in self.records)
        if idle:
            found.append(Note("untrained", f"no update, or no gradient, in {idle} of {count} runs"))
        if self.offline:
            found.append(Note("offline", "no reward query"))
        return tuple(found)

    @property
    def label(self) -> str:
        """What tells it from others of its algorithm, builder and reward."""
        return ", ".join(part for part in (self.variant, f"by {self.submitter}" if self.submitter else "") if part)

    @property
    def track_seeds(self) -> int:
        """How many seeds its track gives a published row: 0 to this minus 1; 0 where a record has no such number."""
        seeds = self.records[0].resolved["track"].get("seeds")
        return seeds if isinstance(seeds, int) else 0


def _names(cell: Record | Unfinished) -> tuple[str, str, str, str]:
    return cell.algorithm, cell.builder, cell.reward, cell.submitter if isinstance(cell, Record) else ""


def options_of(cell: Record | Unfinished) -> dict[str, Any]:
    """What the runs of a row share: every option but the seed and the batch, on which no number depends."""
    track = {k: v for k, v in cell.resolved.get("track", {}).items() if k != "batch"}
    return {k: v for k, v in cell.resolved.items() if k != "seed"} | {"track": track}


def identity(cell: Record | Unfinished) -> str:
    """What makes two cells one: names, options and seed, with whatever batch they ran."""
    names = [cell.track_hash, cell.algorithm, cell.builder, cell.reward, cell.seed]
    return json.dumps([*names, options_of(cell)], sort_keys=True)


def rows(board: Board) -> list[Row]:
    """A board's cells, grouped by algorithm, builder, reward and options, in the order of their names. A row has one name
    and one standing at all rungs."""
    return list(board.ranked.grouped)


def _grouped(board: Board) -> list[Row]:
    groups: dict[tuple[str, str, str, str], dict[str, list[Record | Unfinished]]] = {}
    for cell in sorted((board.whole or board).cells, key=lambda c: (c.seed, c.cell_hash)):
        same = groups.setdefault(_names(cell), {})
        same.setdefault(json.dumps(options_of(cell), sort_keys=True), []).append(cell)
    result = []
    for (algorithm, builder, reward, submitter), configurations in sorted(groups.items()):
        labels = _variants([json.loads(text) for text in configurations])
        standing = _representative(board.checker, list(configurations.values()))
        for label, cells in sorted(zip(labels, configurations.values(), strict=True), key=lambda pair: pair[0]):
            seeds = [c.seed for c in cells]
            if len(set(seeds)) < len(seeds):
                raise ValueError(
                    f"{algorithm}/{builder}/{reward} has seed {next(s for s in seeds if seeds.count(s) > 1)} twice"
                )
            at = [c.at(board.rung or 1) for c in cells if isinstance(c, Record)]
            own = tuple(r for r in at if r is not None)
            unfinished = tuple(c for c in cells if isinstance(c, Unfinished))
            if not own and not unfinished:
                continue
            variant_only = cells is not standing
            result.append(
                Row(algorithm, builder, reward, label, own, unfinished, submitter, variant_only, board.reviewed)
            )
    return result


def _representative(
    checker: checks.Checker, configurations: Sequence[list[Record | Unfinished]]
) -> list[Record | Unfinished] | None:
    """Of an algorithm, builder, reward and submitter the one configuration that may rank: the one with the options that
    the track's tuning chose. Where those are not known here, the one whose options were not given by hand; None where
    that leaves none or several of several."""
    first = [next((c for c in cells if isinstance(c, Record)), None) for cells in configurations]
    by_rule = [checker.by_rule(r) if r else None for r in first]
    if True in by_rule:
        return configurations[by_rule.index(True)]
    open_ones = [cells for cells, known in zip(configurations, by_rule, strict=True) if known is None]
    if len(configurations) > 1:
        open_ones = [c for c in open_ones if not any(isinstance(r, Record) and _by_hand(r) for r in c)]
    return open_ones[0] if len(open_ones) == 1 else None


def _by_hand(record: Record) -> bool:
    """Whether a run's user set options of the algorithm, the builder or the reward."""
    given = record.given.get("set", [])
    own = [str(s) for s in given if not str(s).startswith("track.")] if isinstance(given, list) else [given]
    config = record.given.get("config") or {}
    return bool(own) or not isinstance(config, dict) or bool(config.keys() - {"track"})


def _variants(configurations: Sequence[dict[str, Any]]) -> list[str]:
    """For each configuration the options in which it is not like the others."""
    flat = [
        {
            f"{short}.{option}": json.dumps(value, sort_keys=True)
            for section, short in (("algorithm", "algo"), ("builder", "builder"), ("reward", "reward"))
            for option, value in content[section].items()
        }
        for content in configurations
    ]
    options = sorted({o for f in flat for o in f if any(f.get(o) != g.get(o) for g in flat)})
    return [", ".join(f"{o}={_short(f[o])}" for o in options if o in f) for f in flat]


def _short(value: str) -> str:
    """A value that a label has room for: of a long one (D-Fusion's items by prompt) a hash."""
    return value if len(value) <= 60 else f"#{hashlib.sha256(value.encode()).hexdigest()[:8]}"


def hidden(found: Sequence[Row]) -> list[Row]:
    """The variants that a table leaves out unless it is asked for them: those for which another row stands."""
    standing = {(r.algorithm, r.builder, r.reward, r.submitter) for r in found if not r.variant_only}
    return [r for r in found if r.variant_only and (r.algorithm, r.builder, r.reward, r.submitter) in standing]
