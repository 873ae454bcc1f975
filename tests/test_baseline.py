"""Rounds against the base on their own prompts: a policy that has not changed never collapses, one that has does."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bench_dfusion.results import records
from bench_dfusion.results.records import Round
from bench_dfusion.runs import config
from bench_dfusion.runs.baseline import Baseline, pictures_per_prompt


def test_the_mean_is_of_the_rounds_own_prompts() -> None:
    base = Baseline()
    assert base.missing(["a", "b", "a"]) == ["a", "b"]
    base.take(["a", "a", "b", "b"], torch.tensor([0.0, 1.0, 2.0, 4.0]))
    assert base.missing(["b", "c"]) == ["c"] and base.queries == 4
    assert (
        base.mean(["a", "a"]) == 0.5
        and base.mean(["a", "b"]) == 1.75
        and base.mean(["a", "a", "b"]) == pytest.approx(4 / 3)
    )
    assert Baseline(**vars(base)) == base


@pytest.mark.parametrize(
    ("queries", "rounds", "expected"), [(4608, 12, 3), (48, 6, 1), (100_000, 12, 16), (4608, 1, 10)]
)
def test_the_base_takes_a_twentieth_of_the_budget(queries: int, rounds: int, expected: int) -> None:
    track = config.resolve_track("micro", settings=[f"track.budget.reward_queries={queries}"])
    assert len(track.prompts.train) == 66 and track.budget.prompts_per_round == 24
    assert pictures_per_prompt(track, rounds) == expected


def rounds_of(
    rng: np.random.Generator, count: int, prompts: int, samples: int, pictures: int, spread: float, fall: float
) -> int:
    """The number of rounds until the evidence of a collapse, 0 for none: prompts of different means and standard deviations,
    the policy `fall` lower from round 8 on."""
    mean, deviation = rng.normal(size=40), np.exp(spread * rng.normal(size=40))
    base = Baseline()
    for number in range(count):
        chosen = rng.choice(40, prompts, replace=False)
        for p in base.missing(list(map(str, chosen))):
            base.take([p] * pictures, torch.tensor(rng.normal(mean[int(p)], deviation[int(p)], pictures)))
        rows = np.repeat(chosen, samples)
        rewards = rng.normal(mean[rows], deviation[rows]) - (fall if number >= 8 else 0.0)
        if base.collapsed([str(p) for p in rows], torch.tensor(rewards)):
            return number + 1
    return 0


@pytest.mark.parametrize(("prompts", "samples", "pictures", "spread"), [(1, 4, 2, 1.0), (1, 4, 1, 2.0), (4, 8, 4, 1.0)])
def test_an_unchanged_policy_never_collapses(prompts: int, samples: int, pictures: int, spread: float) -> None:
    rng = np.random.default_rng(0)
    assert not any(rounds_of(rng, 30, prompts, samples, pictures, spread, 0.0) for _ in range(40))


def test_a_policy_that_falls_far_collapses_in_its_second_low_round() -> None:
    rng = np.random.default_rng(0)
    assert [rounds_of(rng, 12, 8, 8, 4, 0.1, 6.0) for _ in range(20)] == [10] * 20
    assert not any(rounds_of(rng, 12, 8, 8, 4, 0.1, 3.0) for _ in range(20))


def test_rewards_that_are_all_alike_are_no_collapse() -> None:
    base = Baseline()
    base.take(["a"] * 4, torch.zeros(4))
    for value in (0.0, -1.0, -1.0, -1.0):
        assert base.collapsed(["a"] * 4, torch.full((4,), value)) is None


def a_round(**values: object) -> Round:
    scores = {"reward": 0.5, "reward_sd": 0.1, "base_reward": None, "winner_reward": None}
    fixed = {"round": 0, "queries": 8, "pairs": 0, "dropped": 0, **scores}
    return Round.model_validate({**fixed, "metrics": {"grad_norm": 1.0}, **values})


def test_what_was_not_trained_says_why() -> None:
    alike = "; the training reward gave every sample of a round the same score"
    assert records.training([a_round()], 2) == (True, None)
    assert records.training([a_round(metrics={"grad_norm": 0.0}), a_round()], 2) == (True, None)
    for rounds, updates, why in (
        ([a_round(metrics={})], 0, "no update was made: no round left anything to train on"),
        ([a_round(metrics={}, reward_sd=0.0)], 0, f"no update was made: no round left anything to train on{alike}"),
        (
            [a_round(metrics={"grad_norm": 0.0}, reward_sd=1e-9)],
            2,
            f"no gradient arrived: its norm was 0 in every round{alike}",
        ),
        (
            [a_round(metrics={}, reward=None, reward_sd=None)],
            0,
            "no update was made: no round left anything to train on",
        ),
        ([], 0, "no update was made: no round left anything to train on"),
    ):
        assert records.training(rounds, updates) == (False, why)
    assert math.isfinite(a_round().reward or math.nan)
