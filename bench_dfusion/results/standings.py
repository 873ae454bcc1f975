"""How the rows of a board stand: ranks, gains before every judge, costs, the effect of a builder, pairwise wins.

Everything here is typed and holds numbers; what shows them (`tables`, the terminal, the page, the picture, the dataset)
takes these objects and `figures.FIGURES`, and reads nothing back out of texts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from bench_dfusion.results import statistics
from bench_dfusion.results.figures import FIGURES, mean
from bench_dfusion.results.leaderboard import Board, Note, Row, hidden, rows


@dataclass(frozen=True)
class Rank:
    """The ranks that a row may hold, 1 first: rows that no difference separates share a range."""

    low: int
    high: int

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}–{self.high}"


@dataclass(frozen=True)
class Score:
    """What one judge says of a row: means over seeds and held-out prompts, and the gain's 95 % interval.

    nan where no run has finished; the gain is minus infinity where a run collapsed, and the rest of the finished ones.
    """

    judge: str
    base: float
    trained: float
    gain: float
    low: float
    high: float
    interval: str  # how the interval was made, empty where there is none


@dataclass(frozen=True)
class Line:
    """One row of a leaderboard.

    rank     None where it has none; `notes` say why
    rung     of a track with rungs the one compared at
    scores   of every judge, in the track's order: the first one ranks
    figures  what `figures.FIGURES` are of it, by name; nan where there is none
    notes    in the order of their weight
    flags    why some of its records must not be published, empty where all may be
    """

    row: Row
    rank: Rank | None
    rung: int | None
    scores: tuple[Score, ...]
    figures: Mapping[str, float]
    notes: tuple[Note, ...]
    flags: str

    @property
    def seeds(self) -> int:
        """Records (count)."""
        return len(self.row.records)

    @property
    def missing(self) -> int:
        """Registered cells without a record (count)."""
        return len(self.row.unfinished)

    @property
    def gain(self) -> float:
        """Before the judge that ranks; nan where there is none."""
        return self.scores[0].gain if self.scores else float("nan")

    @property
    def place(self) -> str:
        """The rank, or in a word why there is none."""
        return str(self.rank) if self.rank else self.notes[0].kind if self.notes else ""

    @property
    def rankable(self) -> bool:
        """Whether nothing but a lack of rows to compare keeps it from a rank."""
        return all(note.kind == "offline" for note in self.notes)

    @property
    def note(self) -> str:
        """Its notes as one text."""
        return "; ".join(map(str, self.notes))


def lines(board: Board, variants: bool = True) -> list[Line]:
    """The leaderboard, best first; the first judge of the track ranks.

    A row trained on the ranking judge is a ceiling: shown, unranked. Below three seeds there is no rank and no interval
    of the algorithm. A run that collapsed counts as a miss: its row's gain is minus infinity. A row with cells that
    have no record is incomplete: shown with what there is, unranked. So is a row of other seeds than the track's.
    `variants`: with the rows that `leaderboard.hidden` names.
    """
    found = rows(board)
    ranks = _ranks(found)
    left_out = {row.key for row in (() if variants else hidden(found))}
    made = [_line(board, row, ranks.get(row.name)) for row in found if row.key not in left_out]
    # Best first; rows without any figure come last, and equals stay in the order of their names.
    return sorted(made, key=_order) if board.judges else made


def _order(line: Line) -> tuple[bool, float]:
    return bool(np.isnan(line.gain)), 0.0 if np.isnan(line.gain) else -line.gain


def _line(board: Board, row: Row, rank: Rank | None) -> Line:
    notes = row.notes
    if not row.state and rank is None:
        seeds = f"not exactly the track's {row.track_seeds} seeds, counted from 0"
        notes = (Note("unranked", seeds), *notes)
    return Line(
        row,
        rank,
        board.ranked.rung if len(board.ladder) > 1 else None,
        tuple(_score(row, number, judge) for number, judge in enumerate(board.judges)),
        {figure.name: figure.of(row) for figure in FIGURES},
        notes,
        flags_of(board, row),
    )


def _score(row: Row, number: int, judge: str) -> Score:
    nothing = float("nan")
    if not row.finished:
        return Score(judge, nothing, nothing, -np.inf if row.failed else nothing, nothing, nothing, "")
    interval = statistics.paired_gain(np.stack(list(row.gains(number).values())), clusters=row.clusters)
    return Score(
        judge,
        mean(r.verdicts[number].base for r in row.finished),
        mean(r.verdicts[number].trained for r in row.finished),
        -np.inf if row.failed else interval.mean,
        interval.low,
        interval.high,
        interval.kind,
    )


def _ranks(found: Sequence[Row]) -> dict[str, Rank]:
    """The range of ranks of each row that has none of `Row.state`'s reasons and exactly the track's seeds. What other
    rows have takes nothing from these."""
    gains = {
        row.name: np.stack([gains for _, gains in sorted(row.gains().items())])
        for row in found
        if not row.state
        and len(row.records) == row.track_seeds
        and sorted(r.seed for r in row.records) == list(range(len(row.records)))
    }
    clusters = next((row.clusters for row in found if row.records), None)
    return {name: Rank(*ends) for name, ends in statistics.rank_ranges(gains, clusters=clusters).items()}


def flags_of(board: Board, row: Row) -> str:
    """Why records of a row must not be published, each reason with the number of runs that have it."""
    counts = Counter(flag for r in row.records for flag in board.checker.flags(r))
    return "; ".join(f"{flag} ({n} of {len(row.records)} runs)" for flag, n in sorted(counts.items()))


@dataclass(frozen=True)
class Climb:
    """A row at each rung of its track's ladder: its line there, None where it was not run to it."""

    algorithm: str
    builder: str
    reward: str
    variant: str
    submitter: str
    at: tuple[Line | None, ...]

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        return self.algorithm, self.builder, self.reward, self.variant, self.submitter

    @property
    def label(self) -> str:
        return next(line.row.label for line in self.at if line is not None)


def climbs(board: Board, variants: bool = True) -> list[Climb]:
    """The rows at every rung, in the order of `lines`, then those that end before the board's rung. None where the track
    has no rungs."""
    levels = board.levels if len(board.ladder) > 1 and board.judges else []
    found: dict[tuple[str, str, str, str, str], dict[int, Line]] = {}
    for level in sorted(levels, key=lambda b: (b.rung != board.ranked.rung, -(b.rung or 1))):
        for line in lines(level, variants):
            found.setdefault(line.row.key, {})[level.rung or 1] = line
    numbers = range(1, len(board.ladder) + 1)
    return [Climb(*key, tuple(own.get(n) for n in numbers)) for key, own in found.items()]


@dataclass(frozen=True)
class Contrast:
    """What a builder adds over another before the judge that ranks, with one algorithm and reward.

    difference, low, high   paired difference of gains and its 95 % interval
    p, holm                 of no difference; adjusted over the track's contrasts by Holm
    ceiling                 whether trained on the judge
    of                      the number of algorithms whose average it is, 1 of a single one
    """

    algorithm: str
    reward: str
    variant: str
    seeds: int
    difference: float
    low: float
    high: float
    p: float
    holm: float
    ceiling: bool
    of: int = 1


def contrasts(board: Board, builder: str = "dfusion", control: str = "vanilla") -> list[Contrast]:
    """What a builder adds over another: the paired difference of gains before the judge that ranks, for each algorithm
    and reward that have both, over the seeds (three or more) and prompts both have.

    Where several algorithms share a reward, one called `mean of N` is their average, over the seeds they all share: those
    algorithms, other seeds and other prompts.
    """
    complete = {(r.algorithm, r.builder, r.reward, r.label): r for r in rows(board) if r.state in ("", "ceiling")}
    clusters = next((r.clusters for r in complete.values()), None)
    differences: dict[str, dict[tuple[str, str, int], dict[int, np.ndarray]]] = {}
    for (algorithm, own, reward, variant), row in complete.items():
        other = complete.get((algorithm, control, reward, variant))
        if own == builder and other is not None:
            a, b = row.gains(), other.gains()
            shared = {s: a[s] - b[s] for s in sorted(set(a) & set(b))}
            if len(shared) >= statistics.MIN_SEEDS:
                differences.setdefault(reward, {})[algorithm, variant, 1] = shared
    found: list[Contrast] = []
    for reward, each in differences.items():
        entries, n = dict(each), len(each)
        common = sorted(set.intersection(*map(set, each.values())))
        if n > 1 and len(common) >= statistics.MIN_SEEDS:
            entries[f"mean of {n}", "", n] = {s: np.mean([d[s] for d in each.values()], axis=0) for s in common}
        ceiling = any(r.ceiling for key, r in complete.items() if key[2] == reward)
        for (algorithm, variant, of), shared in entries.items():
            values = np.stack(list(shared.values()))
            result = statistics.compare(values, np.zeros_like(values), clusters=clusters)
            d = result.difference
            found.append(
                Contrast(algorithm, reward, variant, len(shared), d.mean, d.low, d.high, result.p, np.nan, ceiling, of)
            )
    adjusted: Sequence[float] = list(statistics.holm(np.array([c.p for c in found], float))) if found else []
    return [replace(c, holm=float(p)) for c, p in zip(found, adjusted, strict=True)]


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
