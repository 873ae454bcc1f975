"""How sure a number is: intervals, comparisons and ranks from tables of gains.

A *table* is float [S seeds, P prompts]: trained minus base on the same noise, averaged over a prompt's
images. Its seeds and its prompts are both samples of larger populations, and every seed meets every
prompt, so both carry uncertainty. Larger is better throughout.

Everything here is pure: the bootstrap is seeded, and nothing depends on the order of seeds or prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import special, stats

MIN_SEEDS = 3  # below, the seeds' variance is unknown in practice: a result is about checkpoints, not an algorithm
RESAMPLES = 9_999
BOOTSTRAP_SEED = 0

Kind = Literal["two-way t", "BCa bootstrap", "one-sample t"]


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval, all in the units of the values.

    `df` is None for the bootstrap. "BCa bootstrap" speaks of the very checkpoints it saw, over other
    prompts: a checkpoint result, which must not be ranked.
    """

    mean: float
    low: float
    high: float
    standard_error: float
    df: float | None
    kind: Kind


@dataclass(frozen=True)
class Comparison:
    """The paired difference of two cells and its two-sided p-value (before any correction)."""

    difference: Interval
    p: float


def paired_gain(table: ArrayLike, level: float = 0.95) -> Interval:
    """The mean gain of a table [S, P].

    With three seeds or more the two-way t, valid for other seeds and other prompts; with fewer a BCa
    bootstrap over prompts. A table of one value throughout gets an interval of no width.
    Raises ValueError for fewer than two prompts and for values that are not finite.
    """
    values = _table(table)
    _check_level(level)
    return _two_way_t(values, level) if len(values) >= MIN_SEEDS else _over_prompts(values, level)


def mean_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """The mean of independent units [n], n at least 2, by the one-sample t."""
    units = _finite(values, "values")
    _check_level(level)
    if units.ndim != 1 or len(units) < 2:
        raise ValueError(f"an interval of a mean needs a row of at least 2 values, not the shape {units.shape}")
    # Counting from the first value makes equal values give exactly no variance.
    offsets = units - units[0]
    error = float(offsets.std(ddof=1) / np.sqrt(len(units)))
    return _t_interval(float(units[0] + offsets.mean()), error, len(units) - 1.0, level, "one-sample t")


def compare(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> Comparison:
    """Whether `a` gains more than `b`: tables [S, P] whose rows are the same seeds and columns the same prompts.

    Raises ValueError where the shapes differ or there are fewer than three seeds.
    """
    first, second = _table(a), _table(b)
    if first.shape != second.shape:
        raise ValueError(f"a paired comparison needs the same seeds and prompts, not {first.shape} and {second.shape}")
    if len(first) < MIN_SEEDS:
        raise ValueError(f"a comparison needs at least {MIN_SEEDS} seeds, not {len(first)}")
    _check_level(level)
    difference = _two_way_t(first - second, level)
    if difference.standard_error == 0:
        p = 1.0 if difference.mean == 0 else 0.0
    else:
        p = float(2 * stats.t.sf(abs(difference.mean) / difference.standard_error, difference.df))
    return Comparison(difference, p)


def holm(p_values: ArrayLike) -> np.ndarray:
    """Holm's (1979) adjusted p-values, in the order given: at most alpha where the hypothesis is rejected at alpha."""
    p = _finite(p_values, "p-values")
    if p.ndim != 1 or ((p < 0) | (p > 1)).any():
        raise ValueError("p-values must be a row of numbers between 0 and 1")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def rank_ranges(tables: Mapping[str, np.ndarray], alpha: float = 0.05) -> dict[str, tuple[int, int]]:
    """The best and the worst rank each entry may hold, 1 being best.

    Every pair of tables [S, P] is compared, the p-values corrected together by Holm. Entries significantly
    better push the best rank down, entries significantly worse hold the worst rank up; all others are ties.
    Raises ValueError, naming the entry, for fewer than three seeds or a shape unlike the others'.
    """
    _check_level(alpha, "alpha")
    entries: dict[str, np.ndarray] = {}
    for name, table in tables.items():
        try:
            entries[name] = _table(table)
        except ValueError as error:
            raise ValueError(f"{name!r} cannot be ranked: {error}") from error
        if len(entries[name]) < MIN_SEEDS:
            raise ValueError(f"{name!r} cannot be ranked: it has {len(entries[name])} seeds of at least {MIN_SEEDS}")
        (other, expected), *_ = entries.items()
        if entries[name].shape != expected.shape:
            raise ValueError(
                f"{name!r} cannot be ranked: its seeds and prompts {entries[name].shape} "
                f"are not those of {other!r} {expected.shape}"
            )
    pairs = list(combinations(entries, 2))
    comparisons = [compare(entries[a], entries[b]) for a, b in pairs]
    better = dict.fromkeys(entries, 0)  # how many entries are significantly better than this one
    worse = dict.fromkeys(entries, 0)
    adjusted = holm([c.p for c in comparisons])
    for (a, b), comparison, p in zip(pairs, comparisons, adjusted, strict=True):
        if p <= alpha:
            winner, loser = (a, b) if comparison.difference.mean > 0 else (b, a)
            better[loser] += 1
            worse[winner] += 1
    return {name: (1 + better[name], len(entries) - worse[name]) for name in entries}


def vendi(embeddings: ArrayLike) -> float:
    """The Vendi score (Friedman and Dieng, 2023) of embeddings [n, d] under the cosine kernel: 1 (all alike) to n.

    Raises ValueError for an embedding of length zero, which has no direction.
    """
    rows = _finite(embeddings, "embeddings")
    if rows.ndim != 2 or len(rows) == 0:
        raise ValueError(f"the Vendi score needs embeddings [n, d] with n at least 1, not the shape {rows.shape}")
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if (lengths == 0).any():
        raise ValueError("the Vendi score needs embeddings of non-zero length")
    # Squared singular values are the kernel's eigenvalues, never negative, without forming the kernel.
    eigenvalues = np.linalg.svd(rows / lengths, compute_uv=False) ** 2 / len(rows)
    return float(np.exp(special.entr(eigenvalues).sum()))


def pairwise_accuracy(scores: ArrayLike, truth: ArrayLike) -> float:
    """The share of pairs with different truth that the scores [n] order as the truth [n] does.

    A tie of scores counts half. nan where no two truths differ.
    """
    score, true = _finite(scores, "scores"), _finite(truth, "truth")
    if score.ndim != 1 or score.shape != true.shape:
        raise ValueError(f"scores and truth must be rows of one length, not {score.shape} and {true.shape}")
    points, pairs = 0.0, 0
    for i in range(1, len(true)):  # a row at a time: all pairs at once would need n² memory
        above, below = true[:i] > true[i], true[:i] < true[i]
        right = (above & (score[:i] > score[i])) | (below & (score[:i] < score[i]))
        tied = (above | below) & (score[:i] == score[i])
        points += np.count_nonzero(right) + 0.5 * np.count_nonzero(tied)
        pairs += int(np.count_nonzero(above | below))
    return points / pairs if pairs else float("nan")


def _two_way_t(table: np.ndarray, level: float) -> Interval:
    """The two-way t on a checked table: variance of the seed means / S + of the prompt means / P - of the residuals / SP,
    not below either of the first two, with Satterthwaite's (1946) degrees of freedom."""
    seeds, prompts = table.shape
    # Counting from one cell makes equal values give exactly no variance.
    offsets = table - table[0, 0]
    by_seed, by_prompt, grand = offsets.mean(1), offsets.mean(0), offsets.mean()
    residual = offsets - by_seed[:, None] - by_prompt + grand
    seed_term = float(by_seed.var(ddof=1)) / seeds
    prompt_term = float(by_prompt.var(ddof=1)) / prompts
    # Both terms contain the residual's share; it is counted once.
    shared = float((residual**2).sum()) / ((seeds - 1) * (prompts - 1)) / (seeds * prompts)
    variance = max(seed_term + prompt_term - shared, seed_term, prompt_term)
    if variance > 0:
        # Satterthwaite's V² / Σ(term²/df), divided through by V² so that small values do not underflow.
        df = 1.0 / ((seed_term / variance) ** 2 / (seeds - 1) + (prompt_term / variance) ** 2 / (prompts - 1))
    else:
        df = min(seeds, prompts) - 1.0
    return _t_interval(float(table[0, 0] + grand), float(np.sqrt(variance)), df, level, "two-way t")


def _over_prompts(table: np.ndarray, level: float) -> Interval:
    """The BCa bootstrap over prompts, seeds averaged, on a checked table."""
    # Sorted, so that the seeded draws do not depend on the order of the prompts.
    gains = np.sort(table.mean(0))
    mean, spread = float(gains.mean()), float((gains - gains[0]).std())
    if spread == 0:  # BCa divides by the spread
        return Interval(float(gains[0]), float(gains[0]), float(gains[0]), 0.0, None, "BCa bootstrap")

    def statistic(sample: np.ndarray, axis: int = -1) -> np.ndarray:
        # BCa's bias correction counts resamples that tie with the mean, now 0: rounding must not break the ties.
        return sample.mean(axis).round(12)

    result = stats.bootstrap(
        ((gains - mean) / spread,),
        statistic,
        n_resamples=RESAMPLES,
        batch=1_000,
        confidence_level=level,
        method="BCa",
        rng=np.random.default_rng(BOOTSTRAP_SEED),
    )
    low, high = (float(mean + spread * end) for end in result.confidence_interval)
    return Interval(mean, low, high, float(spread * result.standard_error), None, "BCa bootstrap")


def _t_interval(mean: float, error: float, df: float, level: float, kind: Kind) -> Interval:
    half = float(stats.t.ppf((1 + level) / 2, df)) * error
    return Interval(mean, mean - half, mean + half, error, df, kind)


def _table(table: ArrayLike) -> np.ndarray:
    values = _finite(table, "gains")
    if values.ndim != 2 or len(values) == 0:
        raise ValueError(f"gains must be a table [seeds, prompts], not of the shape {values.shape}")
    if values.shape[1] < 2:
        raise ValueError(f"an interval needs gains on at least 2 prompts, not {values.shape[1]}")
    return values


def _finite(values: ArrayLike, what: str) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if not np.isfinite(array).all():
        raise ValueError(f"{what} must be finite: {np.count_nonzero(~np.isfinite(array))} of {array.size} are not")
    return array


def _check_level(level: float, what: str = "level") -> None:
    if not 0 < level < 1:
        raise ValueError(f"{what} must lie between 0 and 1, not {level}")
