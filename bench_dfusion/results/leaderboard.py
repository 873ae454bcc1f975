"""A table computed from the records of one track, and from nothing else.

`boards` reads a folder; of a board, `table` is the leaderboard, `contrasts` the effect of D-Fusion, and `markdown`
both as text. The same records give the same bytes, in whatever order they are found.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench_dfusion.errors import UsageError, plain
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
        return "/".join(part for part in (self.algorithm, self.builder, self.reward, label_of(vars(self))) if part)

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
    def state(self) -> str:
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
    def note(self) -> str:
        """`state`, and what there is to it."""
        count = len(self.records) + len(self.unfinished)
        broken = sum(u.error is not None for u in self.unfinished)
        notes = {
            "miss": f"miss: {len(self.failed)} of {count} runs collapsed or turned non-finite",
            "incomplete": f"incomplete: {len(self.unfinished)} of {count} cells have no record"
            + (f", {broken} ended in an error" if broken else ""),
            "ceiling": "ceiling: trained on the judge"
            if self.ceiling
            else f"ceiling: its reward agrees with the judge ({self.agreement or 0:.2f}) until a person has looked",
            "variant": "variant: other options than those the track's tuning chose",
            "checkpoint": f"checkpoint: {count} of {statistics.MIN_SEEDS} seeds",
            "": "",
        }
        idle = sum(r.trained is False for r in self.records)
        untrained = f"untrained: no update, or no gradient, in {idle} of {count} runs" if idle else ""
        offline = "offline: no reward query" if self.offline else ""
        return "; ".join(n for n in (notes[self.state], untrained, offline) if n)


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


def table(board: Board, variants: bool = True) -> pd.DataFrame:
    """The leaderboard, best first; the first judge of the track ranks.

    A row trained on the ranking judge is a ceiling: shown, unranked. Below three seeds there is no rank and no interval
    of the algorithm. A run that collapsed counts as a miss: its row's gain is minus infinity. A row with cells that
    have no record is incomplete: shown with what there is, unranked. So is a row of other seeds than the track's.
    `variants`: with the rows that `hidden` names.

    Columns: rank (as a range where ties are not separated), algorithm, builder, reward, variant; seeds, failed, missing
    (counts of records, collapsed runs, cells without a record); rung (of a track with rungs); of each judge base, trained,
    gain, low, high (means over seeds and prompts, 95 %); interval (its kind); reward rise (training reward of the last round's drawn samples
    − the base's on the same prompts, or where records lack that − the first round's); diversity (trained / base); kl
    (nats); queries, evaluations (counts a run); seconds, memory (MB) a run; note; submitter; flags (why some of its
    records must not be published, empty where all may be).
    """
    found = rows(board)
    ranks = _ranks(found)
    left_out = {row.key for row in (() if variants else hidden(found))}
    lines: list[dict[str, object]] = []
    for row in found:
        if row.key in left_out:
            continue
        done = row.finished
        line: dict[str, object] = {
            "rank": ranks.get(row.name, ""),
            "algorithm": row.algorithm,
            "builder": row.builder,
            "reward": row.reward,
            "variant": row.variant,
            "seeds": len(row.records),
            "failed": len(row.failed),
            "missing": len(row.unfinished),
        } | ({"rung": board.ranked.rung} if len(board.ladder) > 1 else {})
        for number, judge in enumerate(board.judges):
            line |= dict.fromkeys((f"{judge} {c}" for c in ("base", "trained", "gain", "low", "high")), np.nan)
            if done:
                interval = statistics.paired_gain(np.stack(list(row.gains(number).values())), clusters=row.clusters)
                line[f"{judge} base"] = _mean(r.verdicts[number].base for r in done)
                line[f"{judge} trained"] = _mean(r.verdicts[number].trained for r in done)
                line[f"{judge} gain"] = interval.mean
                line[f"{judge} low"], line[f"{judge} high"] = interval.low, interval.high
                line["interval"] = interval.kind
            if row.failed:
                line[f"{judge} gain"] = -np.inf
        line.setdefault("interval", "")
        drifts = [r.drift for r in done if r.drift]
        line["reward rise"] = _mean(r.rises[-1][1] for r in done if r.rises)
        line["diversity"] = _mean(d.diversity_trained / d.diversity_base for d in drifts)
        line["kl"] = _mean(d.kl for d in drifts)
        line["queries"] = max((r.cost.reward_queries for r in row.records), default=0)
        line["evaluations"] = max((r.cost.network_evaluations for r in row.records), default=0)
        line["seconds"] = _mean(sum(r.cost.seconds.values()) for r in row.records)
        line["memory"] = _mean(r.cost.peak_memory_mb for r in row.records)
        line["note"] = row.note
        if not row.state and not line["rank"]:
            unranked = f"unranked: not exactly the track's {_track_seeds(row)} seeds, counted from 0"
            line["note"] = "; ".join(n for n in (unranked, row.note) if n)
        line["submitter"] = row.submitter
        line["flags"] = flags_of(board, row)
        lines.append(line)
    frame = pd.DataFrame(lines)
    if not board.judges:
        return frame
    return frame.sort_values(f"{board.judges[0]} gain", ascending=False, kind="stable").reset_index(drop=True)


def by_rung(board: Board, variants: bool = True) -> pd.DataFrame:
    """The gain of each row before the judge that ranks, at each rung of the track's ladder; rows as in `table`, then those
    that end before the board's rung. No line where the track has no rungs.

    Columns: algorithm, builder, reward, variant, submitter; of each rung N of the ladder `N rank` (as in `table`), `N gain`,
    `N low`, `N high` (nan where the row was not run to it; the gain minus infinity where a run had collapsed).
    """
    found: dict[tuple[str, ...], dict[str, object]] = {}
    levels = board.levels if len(board.ladder) > 1 and board.judges else []
    tables = {level.rung: table(level, variants).to_dict("records") for level in levels}
    columns = [f"{n} {c}" for n in range(1, len(board.ladder) + 1) for c in ("rank", "gain", "low", "high")]
    nothing: dict[str, object] = {c: "" if c.endswith(" rank") else np.nan for c in columns}
    for rung in sorted(tables, key=lambda n: (n != board.ranked.rung, -(n or 1))):
        for line in tables[rung]:
            key = tuple(line[name] for name in KEY)
            row = found.setdefault(key, dict(zip(KEY, key, strict=True)) | nothing)
            row[f"{rung} rank"] = line["rank"]
            row |= {f"{rung} {c}": line.get(f"{board.judges[0]} {c}", np.nan) for c in ("gain", "low", "high")}
    return pd.DataFrame(list(found.values()), columns=[*KEY, *columns])


def flags_of(board: Board, row: Row) -> str:
    """Why records of a row must not be published, each reason with the number of runs that have it."""
    counts = Counter(flag for r in row.records for flag in board.checker.flags(r))
    return "; ".join(f"{flag} ({n} of {len(row.records)} runs)" for flag, n in sorted(counts.items()))


def _mean(values: Iterable[float]) -> float:
    """The mean, the same in whatever order the values come; nan of none."""
    ordered = sorted(values)
    return float(np.mean(ordered)) if ordered else float("nan")


def _ranks(found: Sequence[Row]) -> dict[str, str]:
    """The range of ranks of each row that has none of `Row.state`'s reasons and exactly the track's seeds. What other
    rows have takes nothing from these."""
    tables = {
        row.name: np.stack([gains for _, gains in sorted(row.gains().items())])
        for row in found
        if not row.state
        and len(row.records) == _track_seeds(row)
        and sorted(r.seed for r in row.records) == list(range(len(row.records)))
    }
    clusters = next((row.clusters for row in found if row.records), None)
    ranges = statistics.rank_ranges(tables, clusters=clusters)
    return {name: str(low) if low == high else f"{low}–{high}" for name, (low, high) in ranges.items()}


def _track_seeds(row: Row) -> int:
    """How many seeds the row's track gives a published row: 0 to this minus 1; 0 where a record has no such number."""
    seeds = row.records[0].resolved["track"].get("seeds")
    return seeds if isinstance(seeds, int) else 0


def contrasts(board: Board, builder: str = "dfusion", control: str = "vanilla") -> pd.DataFrame:
    """What a builder adds over another: the paired difference of gains before the judge that ranks, for each algorithm
    and reward that have both, over the seeds (three or more) and prompts both have.

    Columns: algorithm, reward, variant, seeds (count), difference, low, high (95 %), p, holm (p adjusted over this
    table by Holm), ceiling (whether trained on the judge). Where several algorithms share a reward a line `mean of N`
    is their average, over the seeds they all share: those algorithms, other seeds and other prompts.
    """
    complete = {
        (r.algorithm, r.builder, r.reward, label_of(vars(r))): r for r in rows(board) if r.state in ("", "ceiling")
    }
    clusters = next((r.clusters for r in complete.values()), None)
    differences: dict[str, dict[tuple[str, str], dict[int, np.ndarray]]] = {}
    for (algorithm, own, reward, variant), row in complete.items():
        other = complete.get((algorithm, control, reward, variant))
        if own == builder and other is not None:
            a, b = row.gains(), other.gains()
            shared = {s: a[s] - b[s] for s in sorted(set(a) & set(b))}
            if len(shared) >= statistics.MIN_SEEDS:
                differences.setdefault(reward, {})[algorithm, variant] = shared
    lines = []
    for reward, found in differences.items():
        entries = dict(found)
        common = sorted(set.intersection(*map(set, found.values())))
        if len(found) > 1 and len(common) >= statistics.MIN_SEEDS:
            entries[f"mean of {len(found)}", ""] = {s: np.mean([d[s] for d in found.values()], axis=0) for s in common}
        for (algorithm, variant), shared in entries.items():
            values = np.stack(list(shared.values()))
            result = statistics.compare(values, np.zeros_like(values), clusters=clusters)
            lines.append(
                {
                    "algorithm": algorithm,
                    "reward": reward,
                    "variant": variant,
                    "seeds": len(shared),
                    "difference": result.difference.mean,
                    "low": result.difference.low,
                    "high": result.difference.high,
                    "p": result.p,
                    "ceiling": any(r.ceiling for k, r in complete.items() if k[2] == reward),
                }
            )
    columns = ["algorithm", "reward", "variant", "seeds", "difference", "low", "high", "p", "holm", "ceiling"]
    frame = pd.DataFrame(lines, columns=[c for c in columns if c != "holm"])
    frame["holm"] = statistics.holm(frame["p"].to_numpy(dtype=float)) if len(frame) else []
    return frame[columns]


def win_rates(board: Board) -> pd.DataFrame:
    """How often one row's trained policy beats another's before the judge that ranks: the share, in [0, 1], of the
    held-out prompts and the seeds both have in which its score is the higher one, ties half. A run that collapsed loses.

    Index and columns are the rows' names, in the order of `rows`; nan where two rows share no seed, and with itself.
    """
    scores: dict[str, dict[int, np.ndarray]] = {}
    for row in rows(board):
        own = {r.seed: np.array([trained for _, trained in r.verdicts[0].per_prompt]) for r in row.finished}
        # Infinitely bad on every prompt, however many there are.
        scores[row.name] = own | {r.seed: np.array([-np.inf]) for r in row.failed}
    frame = pd.DataFrame(np.nan, index=list(scores), columns=list(scores))
    for a, first in scores.items():
        for b, second in scores.items():
            shared = sorted(first.keys() & second.keys())
            if a != b and shared:
                won = [np.mean((first[s] > second[s]) + 0.5 * (first[s] == second[s])) for s in shared]
                frame.loc[a, b] = float(np.mean(won))
    return frame


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
    found = table(board, variants).to_dict("records")
    lines = _grid(
        ["rank", "algorithm", "builder", "reward", "seeds"]
        + [f"{judge} gain" for judge in board.judges]
        + ["reward rise", "diversity", "KL", "queries", "evaluations", "seconds"],
        [
            [
                line["rank"] or str(line["note"]).partition(":")[0],
                line["algorithm"],
                line["builder"],
                line["reward"] + (f" ({label})" if (label := label_of(line)) else ""),
                f"{line['seeds']} of {line['seeds'] + line['missing']}" if line["missing"] else line["seeds"],
                *(gain_text(line, judge) for judge in board.judges),
                signed(line["reward rise"]),
                _number(line["diversity"], ".2f"),
                _number(line["kl"], ".4f"),
                queries_text(line),
                line["evaluations"],
                _number(line["seconds"], ".0f"),
            ]
            for line in found
        ],
        left=4,
    )
    if board.place:
        lines = [f"At {escaped(board.place)}:", "", *lines]
    for text in remarks(board, found, variants):
        lines += ["", escaped(text)]
    rungs = by_rung(board, variants).to_dict("records")
    if rungs:
        lines += ["", f"The gain at each rung ({escaped(board.judges[0])}), by its reward queries:", ""]
        heads = [head for budget in board.ladder for head in ("rank", f"{budget:,}")]
        lines += _grid(
            ["algorithm", "builder", "reward", *heads],
            [
                [
                    line["algorithm"],
                    line["builder"],
                    line["reward"] + (f" ({label})" if (label := label_of(line)) else ""),
                    *(
                        t
                        for n in range(1, len(board.ladder) + 1)
                        for t in (line[f"{n} rank"] or "–", rung_text(line, n))
                    ),
                ]
                for line in rungs
            ],
            left=3,
        )
    effect = contrasts(board)
    if len(effect):
        lines += [
            "",
            f"D-Fusion's effect, dfusion − vanilla ({escaped(board.judges[0])} gain, paired; p after Holm):",
            "",
        ]
        lines += _grid(
            ["algorithm", "reward", "seeds", "difference", "p"],
            [
                [
                    e["algorithm"] + (f" ({e['variant']})" if e["variant"] else ""),
                    e["reward"] + (" (ceiling)" if e["ceiling"] else ""),
                    e["seeds"],
                    f"{signed(e['difference'])} [{signed(e['low'])}, {signed(e['high'])}]",
                    _number(e["holm"], ".3f"),
                ]
                for e in effect.to_dict("records")
            ],
            left=2,
        )
    return "\n".join(lines) + "\n"


def label_of(line: Mapping[Any, Any]) -> str:
    """What tells a row from others of its algorithm, builder and reward."""
    return ", ".join(part for part in (line["variant"], f"by {line['submitter']}" if line["submitter"] else "") if part)


def remarks(board: Board, lines: Sequence[dict[Any, Any]], variants: bool) -> list[str]:
    """What to say below a table: which rows must not be published, and which are not shown."""
    said = [
        f"not to be published: {'/'.join((line['algorithm'], line['builder'], line['reward']))}"
        f"{f' ({label})' if (label := label_of(line)) else ''}: {line['flags']}"
        for line in lines
        if line["flags"]
    ]
    left_out = [] if variants else hidden(rows(board))
    if left_out:
        groups = Counter("/".join((r.algorithm, r.builder, r.reward)) for r in left_out)
        said.append(f"variants not shown (--variants): {', '.join(f'{n} of {g}' for g, n in groups.items())}")
    return said


def gain_text(line: dict[Any, Any], judge: str) -> str:
    """A gain with its interval, as in every printed table."""
    gain = line[f"{judge} gain"]
    if not np.isfinite(gain):
        return signed(gain)
    return f"{signed(gain)} [{signed(line[f'{judge} low'])}, {signed(line[f'{judge} high'])}]"


def rung_text(line: dict[Any, Any], rung: int) -> str:
    """The gain with its interval at a rung of a line of `by_rung`; a dash where the row was not run to it."""
    return gain_text({f" {c}": line[f"{rung} {c}"] for c in ("gain", "low", "high")}, "")


def queries_text(line: dict[Any, Any]) -> str:
    """The reward queries of a row's runs, `offline` where they need none, a dash where there is no record."""
    if not line["seeds"]:
        return "–"
    return "offline" if "offline: " in line["note"] else str(line["queries"])


def signed(value: float) -> str:
    """A difference with its sign (a true minus) and three digits; a dash where there is none, −∞ for a miss."""
    if np.isnan(value):
        return "–"
    if np.isinf(value):
        return "−∞" if value < 0 else "∞"
    return f"{value:+.3f}".replace("-", "−")


def _number(value: float, form: str) -> str:
    return "–" if np.isnan(value) else format(value, form)


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
