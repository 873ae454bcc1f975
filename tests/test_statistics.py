"""Intervals, comparisons, ranks and scores against numbers worked out by hand, and the intervals' coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bench_dfusion.statistics import (
    compare,
    holm,
    mean_interval,
    paired_gain,
    pairwise_accuracy,
    rank_ranges,
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


# --- coverage under the design of method.md, Statistics


def coverage(seeds, runs, rng, interaction=0.2, prompts=200, images=4):
    """The share of `runs` simulated studies whose interval holds the true gain."""
    truth, held = 0.3, 0
    for _ in range(runs):
        table = (
            truth
            + rng.normal(0, 0.15, (seeds, 1))
            + rng.normal(0, 0.5, (1, prompts))
            + rng.normal(0, interaction, (seeds, prompts))
            + rng.normal(0, 1, (seeds, prompts, images)).mean(-1)
        )
        interval = paired_gain(table)
        held += interval.low <= truth <= interval.high
    return held / runs


def test_coverage():
    assert 0.90 <= coverage(5, 400, np.random.default_rng(3)) <= 0.985


@pytest.mark.slow
@pytest.mark.parametrize("interaction", [0.2, 0.4])
@pytest.mark.parametrize("seeds", [5, 10])
def test_coverage_closely(seeds, interaction):
    # One generator's seed for all cases, kept from the first two: none was chosen by what came out.
    assert 0.93 <= coverage(seeds, 2_000, np.random.default_rng(4), interaction) <= 0.97


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


def test_rank_ranges_under_holm():
    # Seed means 1.5 2 2.5 over zero: t = 2 / √(.25/3), t² = 48, p = 1 - √(48/50) = .0202 with 2 degrees of freedom.
    zero, two = np.zeros((3, 2)), np.array([[1.5, 1.5], [2, 2], [2.5, 2.5]])
    assert rank_ranges({"zero": zero, "two": two}) == {"zero": (2, 2), "two": (1, 1)}
    # A third entry makes three tests: 3 · .0202 = .0606 separates nothing at .05, and everything but the twins at .1.
    three = {"zero": zero, "two": two, "twin": two.copy()}
    assert rank_ranges(three) == {"zero": (1, 3), "two": (1, 3), "twin": (1, 3)}
    assert rank_ranges(three, alpha=0.1) == {"zero": (3, 3), "two": (1, 2), "twin": (1, 2)}


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
