"""How sure a number is: intervals, comparisons and ranks from tables of gains.

A *table* is float [S seeds, P prompts]: trained minus base on the same noise, averaged over a prompt's
images. Its seeds and its prompts are both samples of larger populations, and every seed meets every
prompt, so both carry uncertainty. Larger is better throughout.

Prompts that belong together, one composition in several phrasings, are no independent sample. `clusters` gives each
prompt a label; each seed's gains are then averaged within a label first, and the labels take the place of the prompts:
the mean is over compositions, each of which counts once.

Everything here is pure: random draws are seeded, and nothing depends on the order of seeds, prompts or tables.
docs/statistics.md has the model and the simulations.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import special, stats

MIN_SEEDS = 3  # below, the seeds' variance is unknown in practice: a result is about checkpoints, not an algorithm
RESAMPLES = 9_999
BOOTSTRAP_SEED = 0
DRAWS = 9_999  # of the largest difference by chance: a p-value near .05 is then known to about .002
DRAWS_SEED = 0
PRIOR_DF = np.array([1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 128, 1000])

Clusters = Sequence[Hashable] | None
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


@dataclass(frozen=True)
class AdjustedGains:
    """Gains [S, P] freed of the base pictures' known luck, and the slope by which they were."""

    table: np.ndarray
    slope: float


def paired_gain(table: ArrayLike, level: float = 0.95, clusters: Clusters = None) -> Interval:
    """The mean gain of a table [S, P].

    With three seeds or more the two-way t, valid for other seeds and other prompts; with fewer a BCa
    bootstrap over prompts. A table of one value throughout gets an interval of no width.
    Raises ValueError for fewer than two prompts (or clusters of them) and for values that are not finite.
    """
    values = _clustered(_table(table), clusters)
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


def adjusted_gains(base: ArrayLike, trained: ArrayLike, clusters: Clusters = None) -> AdjustedGains:
    """The gains of pictures [S, P, K] over a base known from more pictures [P, K₀], K₀ ≥ K ≥ 2.

    Picture k of `trained` is drawn on the same noise as picture k of `base`, whose further pictures have noise of their
    own. A prompt's luck is how much better the base did on the first K than on all of its pictures, and
        gain_sp = mean_k trained_spk − mean of all base_pk − b · luck_p.
    b is the slope of trained on base scores over the pictures within a prompt, Σ(x − x̄)(y − ȳ) / Σ(x − x̄)², summed over
    seeds, prompts and the first K pictures. For each prompt it is taken from the other prompts (of other clusters): then b
    and the luck are independent, and because the luck is zero on average the gain has no bias. `slope` is that of all.
    With b = 1 this is trained − base on the same noise, with b = 0 the difference of means that have only part of their
    noise in common. Where the base's scores do not vary, b is 0.
    Raises ValueError for shapes that do not fit and for values that are not finite.
    """
    x, y = _finite(base, "base scores"), _finite(trained, "trained scores")
    if x.ndim != 2 or y.ndim != 3 or x.shape[0] != y.shape[1] or not 2 <= y.shape[2] <= x.shape[1] or len(y) == 0:
        raise ValueError(
            "base scores [prompts, pictures] and trained scores [seeds, prompts, pictures] must have the same prompts, "
            f"and the base at least as many pictures, of two or more: not {x.shape} and {y.shape}"
        )
    # Counting from a prompt's first picture makes equal scores give exactly no slope and no luck.
    offsets = x - x[:, :1]
    own = offsets[:, : y.shape[2]]
    centred = own - own.mean(1, keepdims=True)
    # A whole cluster is left out at once: its prompts may be lucky together.
    labels = _labels(clusters, len(x))
    products = np.bincount(labels, (centred * (y - y.mean(2, keepdims=True)).mean(0)).sum(1))
    squares = np.bincount(labels, (centred**2).sum(1))
    of_others = squares.sum() - squares
    of_others[of_others < 1e-12 * squares.sum()] = 0  # rounding
    slopes = _ratio(products.sum() - products, of_others)[labels]
    luck = own.mean(1) - offsets.mean(1)
    table = y.mean(2) - x.mean(1) - slopes * luck
    return AdjustedGains(table, float(_ratio(products.sum(), squares.sum())))


def compare(a: ArrayLike, b: ArrayLike, level: float = 0.95, clusters: Clusters = None) -> Comparison:
    """Whether `a` gains more than `b`: tables [S, P] whose rows are the same seeds and columns the same prompts.

    Raises ValueError where the shapes differ or there are fewer than three seeds.
    """
    first, second = _table(a), _table(b)
    if first.shape != second.shape:
        raise ValueError(f"a paired comparison needs the same seeds and prompts, not {first.shape} and {second.shape}")
    if len(first) < MIN_SEEDS:
        raise ValueError(f"a comparison needs at least {MIN_SEEDS} seeds, not {len(first)}")
    _check_level(level)
    difference = _two_way_t(_clustered(first - second, clusters), level)
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


def rank_ranges(
    tables: Mapping[str, np.ndarray], alpha: float = 0.05, clusters: Clusters = None
) -> dict[str, tuple[int, int]]:
    """The best and the worst rank each entry may hold, 1 being best.

    Every pair of tables [S, P] is compared by `separation`, which holds the chance of any false separation at alpha.
    Entries separated above push the best rank down, entries separated below hold the worst rank up; all others are ties.
    Raises ValueError, naming the entry, for fewer than three seeds or a shape unlike the others'.
    """
    _check_level(alpha, "alpha")
    entries: dict[str, np.ndarray] = {}
    for name, table in tables.items():
        try:
            entries[name] = _clustered(_table(table), clusters)
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
    if not entries:
        return {}
    stack = np.stack(list(entries.values()))
    gains = stack.mean((1, 2))
    separated = separation(stack) <= alpha
    above = (separated & (gains > gains[:, None])).sum(1)  # how many entries are separated and better
    below = (separated & (gains < gains[:, None])).sum(1)
    return {
        name: (1 + int(better), len(entries) - int(worse))
        for name, better, worse in zip(entries, above, below, strict=True)
    }


def separation(tables: ArrayLike, draws: int = DRAWS) -> np.ndarray:
    """Familywise p-values [R, R] that two of R tables [R, S, P] have different mean gains; 1 on the diagonal.

    Where the pairs of a p-value of at most alpha are called different, the chance that any of them is not is about alpha
    (docs/statistics.md has simulations). A pair's difference is divided by the two-way standard error, whose seed variances are moderated over the rows: an empirical
    Bayes estimate (Smyth, 2004), yet never below a row's own. The draws give the largest such ratio by chance among
    all pairs, and among those that remain when larger ones are taken away (step-down: Westfall and Young, 1993): of each
    row an error of its seeds, plus one of its prompts with the rows' covariance over prompts, both t distributed.
    Rows share prompts, not seeds: seed 0 of two rows has nothing in common, and seeds may come in another order in each.
    Raises ValueError for fewer than three seeds or two prompts.
    """
    stack = _finite(tables, "gains")
    if stack.ndim != 3 or stack.shape[1] < MIN_SEEDS or stack.shape[2] < 2:
        raise ValueError(
            f"rows to separate need gains [rows, at least {MIN_SEEDS} seeds, at least 2 prompts], not {stack.shape}"
        )
    rows, seeds, prompts = stack.shape
    result = np.ones((rows, rows))
    if rows < 2:
        return result
    # Counting from one cell of a row makes equal values give exactly no variance; in units of the largest offset, for
    # neither huge nor tiny values have squares.
    offsets = stack - stack[:, :1, :1]
    unit = np.abs(offsets).max() or 1.0
    offsets = offsets / unit
    own = offsets.mean((1, 2))
    gains = stack[:, 0, 0] / unit + own
    order = np.lexsort((offsets.var((1, 2)), gains))  # each row gets the same draws in whatever order the rows come
    offsets, own, gains = offsets[order], own[order], gains[order]

    by_seed, by_prompt = offsets.mean(2), offsets.mean(1)
    residual = offsets - by_seed[:, :, None] - by_prompt[:, None] + own[:, None, None]
    shared = (residual**2).sum((1, 2)) / ((seeds - 1) * (prompts - 1)) / (seeds * prompts)
    variance, df = moderated_variances(by_seed.var(1, ddof=1), seeds - 1)
    of_seeds = variance / seeds
    profile = by_prompt - own[:, None]
    of_prompts = profile @ profile.T / (prompts - 1) / prompts

    i, j = np.triu_indices(rows, 1)
    seed_term = of_seeds[i] + of_seeds[j]
    alone = of_prompts[i, i] + of_prompts[j, j]
    prompt_term = alone - 2 * of_prompts[i, j]
    prompt_term[prompt_term < 1e-12 * alone] = 0  # rounding
    error = np.sqrt(np.maximum(seed_term + prompt_term - shared[i] - shared[j], np.maximum(seed_term, prompt_term)))
    t = np.abs(_ratio(gains[i] - gains[j], error, np.inf))

    # Ascending, so that the running maximum at a pair is over all pairs that are no further apart.
    ascending = np.argsort(t, kind="stable")
    i, j, t = i[ascending], j[ascending], t[ascending]
    scale = _ratio(1, np.sqrt(seed_term + prompt_term)[ascending])[:, None]
    rng = np.random.default_rng(DRAWS_SEED)
    values, vectors = np.linalg.eigh(of_prompts)
    # The symmetric root is the one that does not depend on the signs of the vectors.
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    as_far = np.zeros(len(t))
    for count in _batches(draws, len(t)):
        of_prompt = rng.standard_normal((count, rows)) @ root
        of_prompt /= np.sqrt(rng.chisquare(prompts - 1, (count, 1)) / (prompts - 1))
        by_row = np.ascontiguousarray((rng.standard_t(df, (count, rows)) * np.sqrt(of_seeds) + of_prompt).T)
        ratios = np.abs(by_row[i] - by_row[j]) * scale
        as_far += (np.maximum.accumulate(ratios, axis=0) >= t[:, None]).sum(1)
    # The observed tables count as a draw: no p-value is 0. A pair is separated only if all that are further apart are.
    p = np.maximum.accumulate(((as_far + 1) / (draws + 1))[::-1])[::-1]
    result[order[i], order[j]] = result[order[j], order[i]] = p
    return result


def moderated_variances(variances: np.ndarray, df: int) -> tuple[np.ndarray, float]:
    """Seed variances [R] moderated over the rows, and their degrees of freedom.

    Model: a row's variance, on `df` degrees of freedom, is s² times an F of (df, d). Moderated it is (d s² + df · own) /
    (d + df) on d + df degrees of freedom, and where the row's own is larger, its own: a row of wild seeds gets no
    help from calm ones. s² and d by maximum likelihood; of the d whose likelihood is within one standard error of the
    best (half a unit of its logarithm) the smallest, for a few rows say little about how alike rows are.
    """
    if not variances.any():
        return variances, 1000.0
    # A variance of exactly 0 has no logarithm; however small it is taken, it weighs the same for every d.
    logs = np.log(np.maximum(variances, 1e-12 * variances.max()))
    scales = np.median(logs) + np.linspace(-3, 3, 97)
    d = PRIOR_DF[:, None, None]
    x = (logs - scales[:, None])[None]
    half = (df + d) / 2
    likelihood = (
        special.gammaln(half)
        - special.gammaln(d / 2)
        + df / 2 * (np.log(df / d) + x)
        - half * np.log1p(df / d * np.exp(x))
    ).sum(2)
    profile = likelihood.max(1)
    chosen = int(np.argmax(profile >= profile.max() - 0.5))
    prior, scale = float(PRIOR_DF[chosen]), float(np.exp(scales[likelihood[chosen].argmax()]))
    return np.maximum((prior * scale + df * variances) / (prior + df), variances), prior + df


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


def _batches(total: int, width: int) -> list[int]:
    """`total` in parts of about 200,000 numbers, `width` a piece: they fit a processor's cache."""
    size = max(1, 200_000 // width)
    return [min(size, total - start) for start in range(0, total, size)]


def _ratio(top: ArrayLike, bottom: ArrayLike, otherwise: float = 0.0) -> np.ndarray:
    """top / bottom; where bottom is 0: 0 for a top of 0 and else `otherwise`, with the sign of top."""
    top, bottom = np.broadcast_arrays(np.asarray(top, dtype=float), np.asarray(bottom, dtype=float))
    missing = np.where(top == 0, 0.0, np.copysign(otherwise, top))
    return np.divide(top, bottom, out=missing, where=bottom > 0)


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


def _labels(clusters: Clusters, prompts: int) -> np.ndarray:
    """The number of each prompt's cluster, from 0; without clusters each prompt is its own."""
    if clusters is None:
        return np.arange(prompts)
    if len(clusters) != prompts:
        raise ValueError(f"each of the {prompts} prompts needs one cluster label, not {len(clusters)} labels")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in clusters], dtype=int)


def _clustered(table: np.ndarray, clusters: Clusters) -> np.ndarray:
    """A checked table [S, P] averaged within clusters of prompts: [S, C]. Raises ValueError for fewer than two."""
    if clusters is None:
        return table
    labels = _labels(clusters, table.shape[1])
    sizes = np.bincount(labels)
    if len(sizes) < 2:
        raise ValueError("an interval needs gains on at least 2 clusters of prompts, not 1")
    # Counting from one cell keeps equal values equal.
    sums = np.stack([np.bincount(labels, row) for row in table - table[0, 0]])
    return table[0, 0] + sums / sizes


def _finite(values: ArrayLike, what: str) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if not np.isfinite(array).all():
        raise ValueError(f"{what} must be finite: {np.count_nonzero(~np.isfinite(array))} of {array.size} are not")
    return array


def _check_level(level: float, what: str = "level") -> None:
    if not 0 < level < 1:
        raise ValueError(f"{what} must lie between 0 and 1, not {level}")
