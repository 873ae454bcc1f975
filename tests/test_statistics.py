"""Intervals, comparisons, ranks and scores against numbers worked out by hand, and the intervals' coverage."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import integrate, optimize, stats

from bench_dfusion.results.statistics import (
    adjusted_gains,
    compare,
    holm,
    mean_interval,
    moderated_variances,
    paired_gain,
    pairwise_accuracy,
    rank_ranges,
    separation,
    vendi,
)

T2 = 4.302653  # the .975 quantile of Student's t with 2 degrees of freedom, from any table
TABLES = hnp.arrays(
    float,
    st.tuples(st.integers(1, 6), st.integers(2, 8)),
    elements=st.floats(-10, 10) | st.sampled_from([0.0, 0.5, 1.0]),  # the second: discrete values, hence ties
)


def ends(interval):
    return interval.low, interval.mean, interval.high


# --- the two-way t


def test_two_way_t_by_hand():
    # Seed means 2 4 6: variance 4. Prompt means 2 6: variance 8. Mean 4.
    # Residuals 1 -1 / 0 0 / -1 1: sum of squares 4 over (3-1)(2-1) = 2.
    # V = 4/3 + 8/2 - 2/6 = 5; df = 25 / ((4/3)²/2 + 4²/1) = 25 / (152/9) = 225/152.
    interval = paired_gain([[1, 3], [2, 6], [3, 9]])
    assert interval.kind == "two-way t"
    assert interval.mean == pytest.approx(4)
    assert interval.standard_error == pytest.approx(math.sqrt(5))
    assert interval.df == pytest.approx(225 / 152)


def test_two_way_t_of_seeds_alone():
    # Seed means 1 2 3: variance 1, no other variance. V = 1/3, df = 2: 2 ± 4.302653 · .577350 = 2 ± 2.484138.
    interval = paired_gain([[1, 1], [2, 2], [3, 3]])
    assert interval.df == pytest.approx(2)
    assert ends(interval) == pytest.approx((2 - 2.484138, 2, 2 + 2.484138), abs=1e-5)


def test_two_way_t_is_floored():
    # Seed means 0 3 6: variance 9, term 3. Prompt means 3 3: term 0. Residuals ±1 ±2 ±1: 12 / 2 = 6, term 6/6 = 1.
    # 3 + 0 - 1 = 2 is below the seeds' own 3, so V = 3 and df = 9 / (9/2) = 2: 3 ± 4.302653 · √3.
    interval = paired_gain([[1, -1], [1, 5], [7, 5]])
    assert interval.df == pytest.approx(2)
    assert ends(interval) == pytest.approx((3 - T2 * math.sqrt(3), 3, 3 + T2 * math.sqrt(3)), abs=1e-5)


def test_level_widens_the_interval():
    table = [[1, 3], [2, 6], [3, 9]]
    assert paired_gain(table, 0.99).high > paired_gain(table).high > paired_gain(table, 0.5).high
    for level in (0, 1, 95):
        with pytest.raises(ValueError, match="level"):
            paired_gain(table, level)


# --- below three seeds


@pytest.mark.parametrize("seeds", [1, 2])
def test_few_seeds_give_a_bootstrap_over_prompts(seeds):
    table = np.random.default_rng(1).normal(0.3, 1, (seeds, 200))
    interval = paired_gain(table)
    assert interval.kind == "BCa bootstrap"
    assert interval.df is None
    # 200 normal prompts: close to the t interval, up to the bootstrap's n instead of n - 1 and its own noise.
    expected = mean_interval(table.mean(0))
    assert ends(interval) == pytest.approx(ends(expected), abs=0.15 * expected.standard_error)
    assert interval.standard_error == pytest.approx(expected.standard_error, rel=0.03)
    np.random.default_rng().random()
    assert paired_gain(table) == interval


def test_bootstrap_follows_skew():
    interval = paired_gain(np.random.default_rng(2).exponential(1, (1, 40)))
    assert interval.high - interval.mean > 1.1 * (interval.mean - interval.low)


def test_bootstrap_survives_tiny_spreads():
    tiny = paired_gain(np.array([[0, 1, 2, 5]]) * 1e-120)
    usual = paired_gain(np.array([[0, 1, 2, 5]]))
    assert np.array(ends(tiny)) * 1e120 == pytest.approx(ends(usual))


# --- degenerate and wrong tables


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
@pytest.mark.parametrize("value", [0.0, 0.1, -7.3])
def test_equal_gains_have_no_width(seeds, value):
    interval = paired_gain(np.full((seeds, 7), value))
    assert ends(interval) == (value, value, value)
    assert interval.standard_error == 0


@pytest.mark.parametrize("seeds", [1, 3])
def test_wrong_tables_are_refused(seeds):
    with pytest.raises(ValueError, match="at least 2 prompts, not 1"):
        paired_gain(np.zeros((seeds, 1)))
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="1 of 4 are not"):
            paired_gain([[0, 1, bad, 2]])
    for shape in ((0, 4), (4,), (2, 2, 2)):
        with pytest.raises(ValueError, match="table"):
            paired_gain(np.zeros(shape))


# --- properties


@settings(max_examples=60, deadline=None)
@given(TABLES, st.randoms(use_true_random=False))
def test_order_of_seeds_and_prompts_is_irrelevant(table, random):
    seeds, prompts = (random.sample(range(n), n) for n in table.shape)
    before, after = paired_gain(table), paired_gain(table[seeds][:, prompts])
    assert ends(after) == pytest.approx(ends(before), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(TABLES, st.floats(-10, 10))
def test_a_constant_shifts_the_interval(table, constant):
    before, after = paired_gain(table), paired_gain(table + constant)
    assert ends(after) == pytest.approx([end + constant for end in ends(before)], abs=1e-9)
    assert after.low <= after.mean + 1e-9 and after.mean <= after.high + 1e-9


# --- clusters of prompts


def test_prompts_of_a_cluster_are_averaged_first():
    table = np.array([[1.0, 3, 10, 4], [2, 6, 20, 5], [3, 9, 60, 9]])
    # Labels b a b a: the clusters' gains are (1 + 10) / 2 and (3 + 4) / 2, and so on.
    by_cluster = [[5.5, 3.5], [11, 5.5], [31.5, 9]]
    assert paired_gain(table, clusters=["b", "a", "b", "a"]) == paired_gain(by_cluster)
    assert compare(table, table / 2, clusters=[0, 1, 0, 1]).p == pytest.approx(
        compare(by_cluster, np.array(by_cluster) / 2).p
    )
    assert paired_gain(table, clusters=[(0,), None, "x", 3]) == paired_gain(table), "each its own"
    assert paired_gain(table[:1], clusters=list("baba")).kind == "BCa bootstrap"
    # A composition counts once: seed means (1 + 3 + 10) / 3 and 4, and so on.
    assert paired_gain(table, clusters=list("aaab")).mean == pytest.approx(np.mean([14 / 3, 4, 28 / 3, 5, 24, 9]))
    assert paired_gain(np.full((3, 4), 0.1), clusters=list("aaab")).standard_error == 0


def test_ranks_of_clusters_are_those_of_their_means():
    rng = np.random.default_rng(5)
    tables = {name: rng.normal(gain, 1, (4, 30)) for name, gain in (("a", 0.0), ("b", 1.5), ("c", 1.6))}
    labels = rng.permutation(np.repeat(np.arange(10), 3))
    means = {n: np.stack([t[:, labels == c].mean(1) for c in range(10)], 1) for n, t in tables.items()}
    assert (
        rank_ranges(tables, clusters=labels.tolist()) == rank_ranges(means) == {"a": (3, 3), "b": (1, 2), "c": (1, 2)}
    )


def test_wrong_clusters_are_refused():
    for use in (
        lambda labels: paired_gain(np.zeros((3, 4)), clusters=labels),
        lambda labels: compare(np.zeros((3, 4)), np.ones((3, 4)), clusters=labels),
        lambda labels: rank_ranges({"a": np.zeros((3, 4))}, clusters=labels),
    ):
        with pytest.raises(ValueError, match="each of the 4 prompts needs one cluster label, not 3 labels"):
            use("aab")
        with pytest.raises(ValueError, match="at least 2 clusters of prompts, not 1"):
            use("aaaa")


# --- the base pictures' luck


def test_adjusted_gains_by_hand():
    # Prompt A: own base 0 2 of mean 1, all three 0 2 3 + 1 of mean 2: luck -1; Σ(x - x̄)(y - ȳ) = 1 of Σ(x - x̄)² = 2.
    # Prompt B: own base 1 5 of mean 3, all three of mean 4: luck -1; 8 of 8. Slopes: A's 1/2, B's 1, of both 9/10.
    # Each takes the other's: 1.5 - 2 - 1 · -1 and 2 - 4 - 1/2 · -1.
    base, trained = [[0, 2, 4], [1, 5, 6]], [[[1, 2], [0, 4]]]
    result = adjusted_gains(base, trained)
    assert result.slope == pytest.approx(0.9)
    assert result.table == pytest.approx(np.array([[0.5, -1.5]]))
    # With both left out there is no slope: 1.5 - 2 and 2 - 4.
    assert adjusted_gains(base, trained, clusters="xx").table == pytest.approx(np.array([[-0.5, -2]]))
    # A second seed whose scores do not follow the base halves the slopes.
    assert adjusted_gains(base, [trained[0], [[3, 3], [3, 3]]]).slope == pytest.approx(0.45)


def test_adjusted_gains_of_plain_cases():
    rng = np.random.default_rng(6)
    base = rng.random((9, 12))
    # Trained is base and a constant: all luck is known, and the gain is the constant.
    assert adjusted_gains(base, base[None, :, :4] + 0.25).table == pytest.approx(np.full((1, 9), 0.25))
    # As many base pictures as trained: there is no luck to know.
    trained = rng.random((3, 9, 12))
    assert adjusted_gains(base, trained).table == pytest.approx(trained.mean(2) - base.mean(1))
    # A base whose scores do not vary says nothing about noise.
    level = np.full((9, 12), 0.1)
    assert adjusted_gains(level, trained).slope == 0
    assert adjusted_gains(level, trained).table == pytest.approx(trained.mean(2) - 0.1)
    # One prompt alone varies: the others take their slope from it, itself from none.
    one = np.where(np.arange(9)[:, None] == 4, base, 0.1)
    table, luck = adjusted_gains(one, trained[:, :, :5]).table, one[:, :5].mean(1) - one.mean(1)
    assert table == pytest.approx(trained[:, :, :5].mean(2) - one.mean(1)) and luck[4] != 0
    seeds, prompts = rng.permutation(3), rng.permutation(9)
    few = trained[:, :, :5]
    moved = adjusted_gains(base[prompts] * 3 - 1, few[seeds][:, prompts] * 3 - 1).table
    assert moved == pytest.approx(3 * adjusted_gains(base, few).table[seeds][:, prompts])


def test_adjusted_gains_refuse():
    for base, trained in (
        ((4, 8), (3, 5, 4)),  # other prompts
        ((4, 3), (3, 4, 4)),  # fewer base pictures
        ((4, 8), (3, 4, 1)),  # no slope within one picture
        ((4, 8), (0, 4, 4)),
        ((8,), (3, 4, 4)),
        ((4, 8), (4, 4)),
    ):
        with pytest.raises(ValueError, match="must have the same prompts"):
            adjusted_gains(np.zeros(base), np.zeros(trained))
    with pytest.raises(ValueError, match="trained scores must be finite: 1 of 32"):
        adjusted_gains(np.zeros((4, 8)), np.where(np.arange(32) == 5, np.nan, 0).reshape(2, 4, 4))
    with pytest.raises(ValueError, match="one cluster label"):
        adjusted_gains(np.zeros((4, 8)), np.zeros((2, 4, 4)), clusters="abc")


# --- comparisons and ranks


def test_holm_by_hand():
    # Sorted .005 .01 .03 .04, times 4 3 2 1: .02 .03 .06 .04; running maximum: .02 .03 .06 .06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    # .4 .6 times 2 1: .8 .6, running maximum .8 .8. And 2 · .7 is capped.
    assert holm([0.6, 0.4]) == pytest.approx([0.8, 0.8])
    assert holm([0.7, 0.9]) == pytest.approx([1, 1])
    assert len(holm([])) == 0
    for bad in ([-0.1], [1.1], [np.nan], [[0.5]]):
        with pytest.raises(ValueError, match="p-values"):
            holm(bad)


def test_compare_by_hand():
    # The difference is the seeds-alone table: t = 2 / √(1/3), t² = 12, df 2.
    # With 2 degrees of freedom p = 1 - t / √(2 + t²) = 1 - √(12/14) = .074180.
    b = np.array([[5, -2], [0.5, 3], [1, 1]])
    result = compare(b + [[1], [2], [3]], b)
    assert ends(result.difference) == pytest.approx((2 - 2.484138, 2, 2 + 2.484138), abs=1e-5)
    assert result.p == pytest.approx(0.074180, abs=1e-6)
    assert compare(b, b + [[1], [2], [3]]).p == pytest.approx(result.p)


def test_compare_without_variance():
    table = np.arange(12.0).reshape(3, 4)
    assert compare(table, table).p == 1
    assert compare(table + 1, table).p == 0


def test_compare_refuses_unpaired_and_few():
    with pytest.raises(ValueError, match="same seeds"):
        compare(np.zeros((3, 4)), np.zeros((3, 5)))
    with pytest.raises(ValueError, match="at least 3 seeds, not 2"):
        compare(np.zeros((2, 4)), np.zeros((2, 4)))


def log_likelihood(variances, df, d, scale):
    return stats.f.logpdf(np.array(variances) / scale, df, d).sum() - len(variances) * np.log(scale)


@pytest.mark.parametrize("variances", [[1, 2, 3, 4, 5, 6], [0.01, 0.02, 3, 5], [7.0, 7.0, 7.0], [0.4, 0.9]])
def test_moderated_variances_are_of_the_least_pooling_that_is_likely(variances):
    df = 4
    moderated, freedom = moderated_variances(np.array(variances, dtype=float), df)

    def best(d):  # over the scale, by scipy's density and optimiser
        return max(
            -optimize.minimize_scalar(
                lambda log: -log_likelihood(variances, df, d, np.exp(log)), (np.log(v) - 1, np.log(v) + 1)
            ).fun
            for v in variances
        )

    prior = freedom - df
    ds = [1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 128, 1000]
    top = max(map(best, ds))
    likely = [d for d in ds if best(d) >= top - 0.5]
    assert prior == likely[0]
    scale = np.exp(
        optimize.minimize_scalar(
            lambda log: -log_likelihood(variances, df, prior, np.exp(log)), (np.log(np.median(variances)), 1)
        ).x
    )
    pooled = [(prior * scale + df * v) / freedom for v in variances]
    assert moderated == pytest.approx(np.maximum(pooled, variances), rel=0.04)  # the scale is found on a grid


def test_moderated_variances_of_odd_rows():
    calm = np.random.default_rng(7).chisquare(4, 12)
    of_calm, freedom = moderated_variances(calm, 4)
    assert freedom > 12 and (of_calm >= calm).all() and of_calm.min() > calm.mean() / 2
    scaled, same = moderated_variances(calm * 1e-9, 4)
    assert same == freedom and scaled == pytest.approx(of_calm * 1e-9)
    # A wild row keeps its own variance; a row without any is given the others', and takes little from them.
    wild, less = moderated_variances(np.append(calm, 1e4), 4)
    assert wild[-1] == 1e4 and less < freedom
    none, nearly = moderated_variances(np.append(calm, 0), 4)
    assert none[-1] > calm.mean() / 4 and nearly == moderated_variances(np.append(calm, 1e-9), 4)[1]
    assert none[:-1] == pytest.approx(of_calm, rel=0.4)
    nothing, _ = moderated_variances(np.zeros(3), 4)
    assert not nothing.any()


def separation_by_loops(tables, draws, rng):
    """The definition, a pair and a draw at a time."""
    rows, seeds, prompts = tables.shape
    variances, df = moderated_variances(np.array([t.mean(1).var(ddof=1) for t in tables]), seeds - 1)
    profiles = tables.mean(1)
    covariance = np.cov(profiles) / prompts
    ratios, spreads = {}, {}
    for i in range(rows):
        for j in range(i):
            seed = (variances[i] + variances[j]) / seeds
            prompt = (profiles[i] - profiles[j]).var(ddof=1) / prompts
            shared = 0
            for t in (tables[i], tables[j]):
                residual = t - t.mean(0) - t.mean(1, keepdims=True) + t.mean()
                shared += (residual**2).sum() / ((seeds - 1) * (prompts - 1)) / (seeds * prompts)
            error = np.sqrt(max(seed + prompt - shared, seed, prompt))
            ratios[i, j] = abs(tables[i].mean() - tables[j].mean()) / error
            spreads[i, j] = np.sqrt(seed + prompt)
    counts = dict.fromkeys(ratios, 0)
    for _ in range(draws):
        of_seeds = rng.standard_t(df, rows) * np.sqrt(variances / seeds)
        scale = np.sqrt((prompts - 1) / rng.chisquare(prompts - 1))
        errors = of_seeds + scale * rng.multivariate_normal(np.zeros(rows), covariance, method="svd")
        chance = {(i, j): abs(errors[i] - errors[j]) / spreads[i, j] for i, j in ratios}
        for pair, ratio in ratios.items():
            counts[pair] += max(chance[other] for other in ratios if ratios[other] <= ratio) >= ratio
    result = np.ones((rows, rows))
    for pair, ratio in ratios.items():
        i, j = pair
        # No pair is surer than one that is further apart.
        result[i, j] = result[j, i] = max(counts[p] for p in ratios if ratios[p] >= ratio) / draws
    return result


def test_separation_is_what_its_definition_says():
    rng = np.random.default_rng(8)
    effects = np.array([0, -0.2, 0.1, 0.2])[:, None, None]
    tables = effects + 0.15 * rng.normal(size=(4, 4, 1)) + rng.normal(size=(1, 1, 9)) + 0.6 * rng.normal(size=(4, 4, 9))
    expected = separation_by_loops(tables, 4_000, rng)
    assert ((expected > 0.02) & (expected < 0.6)).sum() / 2 >= 4, "a case that tells something"
    assert separation(tables) == pytest.approx(expected, abs=0.03)


def test_separation_of_two_rows_by_integration():
    # No variance but between seeds: the chance that two t variables of these scales differ by more than the gains.
    a, b = (np.repeat(np.array([means]).T, 2, axis=1) for means in ([1.0, 2, 3], [4.5, 5.0, 5.1]))
    (va, vb), df = moderated_variances(np.array([1, np.var([4.5, 5.0, 5.1], ddof=1)]), 2)
    sa, sb, gap = np.sqrt(va / 3), np.sqrt(vb / 3), (4.5 + 5.0 + 5.1) / 3 - 2
    inside, _ = integrate.quad(
        lambda x: stats.t.pdf(x, df) * (stats.t.cdf((gap - sa * x) / sb, df) - stats.t.cdf((-gap - sa * x) / sb, df)),
        -200,
        200,
        limit=500,
    )
    assert separation([a, b], draws=200_000)[0, 1] == pytest.approx(1 - inside, abs=0.002)


def test_separation_knows_no_order_and_no_unit():
    rng = np.random.default_rng(9)
    tables = rng.normal(size=(6, 1, 1)) + 0.3 * rng.normal(size=(6, 5, 1)) + rng.normal(size=(6, 5, 20))
    p = separation(tables)
    assert (p == p.T).all() and (np.diag(p) == 1).all() and ((p > 0.001) & (p < 0.5)).any()
    rows, prompts = rng.permutation(6), rng.permutation(20)
    moved = np.stack([t[rng.permutation(5)][:, prompts] for t in tables[rows]])  # seeds in another order in each row
    assert separation(moved) == pytest.approx(p[rows][:, rows], abs=1e-3)
    assert separation(tables * 1e-7) == pytest.approx(p, abs=1e-3)
    assert separation(tables + 3) == pytest.approx(p, abs=1e-3)
    # What all rows share on a prompt cancels, but the draws fall otherwise.
    assert separation(tables + 2 * rng.normal(size=20)) == pytest.approx(p, abs=0.03)


def test_separation_without_variance():
    level = np.zeros((3, 4))
    p = separation([level, level, level + 0.1])
    assert p[0, 1] == 1 and p[0, 2] == p[1, 2] == 1e-4
    # The same profile over prompts in both: rounding is no variance.
    profile = np.random.default_rng(10).normal(size=64) * np.ones((3, 1))
    assert separation([profile, profile])[0, 1] == 1
    assert separation([profile, profile + 0.1])[0, 1] == 1e-4
    assert separation([level]) == 1


@settings(max_examples=40, deadline=None)
@given(
    hnp.arrays(
        float,
        st.tuples(st.integers(1, 5), st.integers(3, 5), st.integers(2, 5)),
        elements=st.floats(-10, 10) | st.sampled_from([0.0, 0.1, 0.5, 1e150, -1e-150]),
    )
)
def test_separation_of_any_tables_is_of_p_values(tables):
    p = separation([*tables, tables[0]], draws=49)
    assert ((p > 0) & (p <= 1)).all() and (p == p.T).all()
    assert p[0, -1] == 1, "a row and its copy"


def test_separation_refuses():
    for shape in ((2, 2, 4), (2, 3, 1), (3, 4)):
        with pytest.raises(ValueError, match="at least 3 seeds, at least 2 prompts"):
            separation(np.zeros(shape))


def test_equal_rows_are_rarely_separated_where_seeds_dominate():
    rng = np.random.default_rng(11)
    tables = [0.04 * rng.normal(size=(12, 5, 1)) + 0.05 * rng.normal(size=(12, 5, 32)) for _ in range(100)]
    assert sum(separation(t, draws=499).min() <= 0.05 for t in tables) / 100 <= 0.08


def test_rank_ranges_count_what_is_separated():
    rng = np.random.default_rng(12)
    gains = {"a": 0.0, "b": 0.5, "c": 0.6, "d": 1.5}
    tables = {n: g + 0.1 * rng.normal(size=(5, 1)) + rng.normal(size=(5, 40)) for n, g in gains.items()}
    p = separation(np.stack(list(tables.values())))
    names = list(gains)
    for alpha in (0.05, 0.3):
        expected = {}
        for i, name in enumerate(names):
            others = [tables[names[j]].mean() > tables[name].mean() for j in range(4) if j != i and p[i, j] <= alpha]
            expected[name] = (1 + sum(others), 4 - sum(not above for above in others))
        assert rank_ranges(tables, alpha) == expected
    assert rank_ranges(tables)["d"] == (1, 1) and rank_ranges(tables)["b"][1] >= 3


def test_rank_ranges_overlap():
    # Differences of constant sign and tiny spread separate best from worst; the middle's huge spread ties with both.
    wobble = np.array([[-3.0], [0], [3]]) + np.zeros((3, 2))
    ranks = rank_ranges({"middle": wobble, "best": np.ones((3, 2)), "worst": -np.ones((3, 2))})
    assert ranks == {"best": (1, 2), "middle": (1, 3), "worst": (2, 3)}


def test_rank_ranges_small_and_wrong():
    assert rank_ranges({}) == {}
    assert rank_ranges({"only": np.zeros((3, 2))}) == {"only": (1, 1)}
    good = np.zeros((3, 4))
    with pytest.raises(ValueError, match="'few'.*2 seeds"):
        rank_ranges({"good": good, "few": np.zeros((2, 4))})
    with pytest.raises(ValueError, match="'other'.*'good'"):
        rank_ranges({"good": good, "other": np.zeros((4, 4))})
    with pytest.raises(ValueError, match="'broken'.*finite"):
        rank_ranges({"good": good, "broken": np.full((3, 4), np.nan)})


# --- scores


def test_vendi_by_hand():
    assert vendi(np.tile([0.3, -2, 5], (7, 1))) == pytest.approx(1)
    assert vendi(np.eye(6)) == pytest.approx(6)
    assert vendi(3 * np.eye(6, 9)) == pytest.approx(6)
    # Two alike and one orthogonal: eigenvalues 2/3 and 1/3; exp(2/3 ln(3/2) + 1/3 ln 3) = 3 / 2^(2/3) = 1.889882.
    assert vendi([[1, 0], [5, 0], [0, 2]]) == pytest.approx(1.889882, abs=1e-6)
    # At 60 degrees: eigenvalues (1 ± 1/2)/2 = 3/4, 1/4; exp(.75 ln(4/3) + .25 ln 4) = exp(.215762 + .346574) = 1.754765.
    assert vendi([[1, 0], [0.5, math.sqrt(0.75)]]) == pytest.approx(1.754765, abs=1e-5)


def test_vendi_refuses():
    for bad, match in (
        ([[0, 0], [1, 0]], "length"),
        (np.zeros((0, 3)), "shape"),
        ([1, 2], "shape"),
        ([[np.nan]], "fin"),
    ):
        with pytest.raises(ValueError, match=match):
            vendi(bad)


def test_pairwise_accuracy_by_hand():
    # Truths 0 0 1 2: five pairs differ. Scores 1 5 5 4: (0,2) right, (0,3) right, (1,2) tied, (1,3) wrong, (2,3) wrong.
    assert pairwise_accuracy([1, 5, 5, 4], [0, 0, 1, 2]) == pytest.approx(2.5 / 5)
    assert pairwise_accuracy([1, 2, 3], [10, 20, 30]) == 1
    assert pairwise_accuracy([3, 2, 1], [10, 20, 30]) == 0
    assert pairwise_accuracy([4, 4, 4], [10, 20, 30]) == 0.5
    for nothing in ([], [1], [2, 2]):
        assert math.isnan(pairwise_accuracy(nothing, nothing))
    with pytest.raises(ValueError, match="one length"):
        pairwise_accuracy([1, 2], [1, 2, 3])


def test_mean_interval_by_hand():
    # 1 2 3: variance 1, standard error 1/√3, df 2: 2 ± 2.484138 as above.
    interval = mean_interval([1, 2, 3])
    assert ends(interval) == pytest.approx((2 - 2.484138, 2, 2 + 2.484138), abs=1e-5)
    assert (interval.df, interval.kind) == (2, "one-sample t")
    assert ends(mean_interval([0.1] * 9)) == (0.1, 0.1, 0.1)
    for bad in ([1], [], [[1, 2]]):
        with pytest.raises(ValueError, match="at least 2"):
            mean_interval(bad)
    with pytest.raises(ValueError, match="finite"):
        mean_interval([1, np.inf])


# --- simulations: benchmarks/ranking.py at a part of its runs, the figures of docs/statistics.md


@pytest.fixture
def ranking(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import ranking

    return ranking


def nothing():
    """The progress of a simulation that nobody watches."""


def test_components_of_drawn_tables_are_found(ranking):
    model = ranking.Model(seed=0.3, prompt=0.5, row_prompt=0.4, seed_prompt=0.2, picture=1, pictures=4)
    tables = ranking.draw(model, np.random.default_rng(13), 40, 20, 300)
    assert ranking.components(tables) == pytest.approx(
        {"seed": 0.3, "prompt": math.hypot(0.5, 0.5), "row_prompt": 0.4, "seed_prompt": 0.2}, rel=0.1
    )


def test_coverage(ranking):
    model = ranking.Model(seed=0.15, prompt=0.5, row_prompt=0.1, seed_prompt=0.2, row_picture=0.6, run_picture=0.8)
    assert 0.90 <= ranking.coverage(model, 5, 200, 1, 400, nothing)["interval"] <= 0.985


def test_the_published_figures_are_those_of_the_simulation(ranking):
    tables = ranking.markdown(json.loads(ranking.RESULTS.read_text(encoding="utf-8")))
    page = (Path(__file__).parents[1] / "docs" / "statistics.md").read_text(encoding="utf-8")
    assert f"--tables -->\n{tables}<!-- end of tables -->" in page


@pytest.mark.slow
@pytest.mark.parametrize(
    "design", ["record-like", "seeds dominate", "picture noise removed", "heavy tails, collapsing seeds"]
)
def test_the_published_simulation_in_short(ranking, design):
    model = ranking.designs(ranking.record_like(ranking.ranked()))[design]
    before, *_, chosen = ranking.PROCEDURES
    # 300 tables: a share of .05 is known to .013.
    assert ranking.false_separations(model, 24, 5, 64, [chosen], 300, nothing)[chosen] <= 0.06
    if design in ("seeds dominate", "picture noise removed"):
        assert ranking.false_separations(model, 24, 5, 64, [before], 100, nothing)[before] > 0.12
    if design in ("record-like", "picture noise removed"):
        gains = ranking.ranked().mean((1, 2))
        found = ranking.power(model, gains, 5, 64, [before, chosen], 30, nothing)
        assert found[chosen] > 1.05 * found[before]
    # 800 intervals: the share that holds the truth is known to .008.
    assert 0.92 <= ranking.coverage(model, 5, 64, 1, 800, nothing)["interval"] <= 0.975
    assert 0.925 <= ranking.coverage(model, 5, 64, 4, 800, nothing)["labels"] <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize("bounded", [False, True])
def test_adjusted_gains_cover_and_narrow(ranking, bounded):
    found = ranking.control_variate(ranking.Pictures(0.245, bounded=bounded), 5, 64, 800, nothing)
    assert 0.93 <= found["coverage"]["16 on 64, adjusted"] <= 0.97
    width = found["half width"]
    assert width["16 on 64, adjusted"] < width["16 on the base's first 16"] < 0.65 * width["4 on 4 pictures"]
    assert found["slope"]["mean"] == pytest.approx(0.655, abs=0.02)
