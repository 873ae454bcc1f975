"""GDPO: each reward of a sum normalised by itself: by hand, written a second time, what it owes each reward, and every algorithm that has it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bench_dfusion import registry
from bench_dfusion.builders.contract import Components, Samples
from bench_dfusion.objectives.advantages import advantages
from bench_dfusion.testing.fakes import draw, fake_policy, with_targets
from bench_dfusion.testing.rounds import PROMPTS, generator

WITH_COMPONENTS = [n for n, p in registry.plugins("algorithms").items() if "components" in p.load().Config.model_fields]


def scored(prompts: list[str], *columns: list[float], weights: tuple[float, ...] = ()) -> Samples:
    """Samples with these scores of each reward, and their weighted sum as the reward."""
    samples = draw(fake_policy(), prompts)
    scores, own = torch.tensor(columns).T, dict(enumerate(weights or [1.0] * len(columns)))
    samples.components = Components({f"reward {i}": w for i, w in own.items()}, scores)
    samples.rewards = (scores.nan_to_num() * torch.tensor(list(own.values()))).sum(1)
    return samples


def gdpo(samples: Samples, spread: Any = "prompt", clip: float = 5.0) -> Tensor:
    return advantages(samples, torch.arange(len(samples)), clip, spread, "each")


# --- by hand


def test_gdpo_by_hand() -> None:
    # Two groups of 2. First reward: 0 1, 0 1: both ∓.5 / sd .7071. Second: 0 0 adds nothing, 10 20: ∓5 / sd 7.071.
    # Sums ∓.7071 and ∓1.4142, their sd sqrt((2 · .5 + 2 · 2) / 3) = 1.29099.
    samples = scored(["a", "a", "b", "b"], [0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 10.0, 20.0])
    found = gdpo(samples)
    torch.testing.assert_close(found, torch.tensor([-0.5477, 0.5477, -1.0954, 1.0954]), rtol=3e-4, atol=0)
    torch.testing.assert_close(gdpo(samples, clip=1.0), found.clamp(-1, 1))
    # The sum's own: 0 1 and 10 21, in each group ∓1 over N (∓.7071 over N - 1): the second group learns no more.
    plain = advantages(samples, torch.arange(4), 5.0)
    torch.testing.assert_close(plain, torch.tensor([-1.0, 1, -1, 1]), rtol=3e-4, atol=0)
    # Weights 1 and -3: sums ∓.7071 and ±(3 - 1) · .7071 = ±1.4142.
    turned = scored(["a", "a", "b", "b"], [0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 10.0, 20.0], weights=(1.0, -3.0))
    torch.testing.assert_close(gdpo(turned), torch.tensor([-0.5477, 0.5477, 1.0954, -1.0954]), rtol=3e-4, atol=0)


def test_1e_4_holds_differences_of_rounding_down() -> None:
    # ∓5e-6 over sd 7.07e-6 + 1e-4: ∓.046695; over their own sd .066036 + 1e-4: ∓.70604.
    found = gdpo(scored(["a", "a"], [0.0, 1e-5], [1.0, 1.0]))
    torch.testing.assert_close(found, torch.tensor([-0.70604, 0.70604]), rtol=1e-4, atol=0)


def test_a_reward_that_does_not_apply_counts_0() -> None:
    nan = math.nan
    samples = scored(
        ["a", "a", "b", "b", "c"], [0.0, 1.0, nan, nan, 5.0], [3.0, 1.0, 0.0, 1.0, nan], weights=(2.0, 1.0)
    )
    # a: 2 · ∓.7071 ± .7071, b: ∓.7071, c is alone: sums ∓.7071, ∓.7071 and 0, sd sqrt(4 · .5 / 4) = .7071.
    torch.testing.assert_close(gdpo(samples), torch.tensor([-1.0, 1, -1, 1, 0]), rtol=4e-4, atol=0)
    # Within one prompt too: the mean and the sd are those of the others.
    samples = scored(["a"] * 3, [0.0, 1.0, nan], [4.0, 4.0, 4.0])
    torch.testing.assert_close(gdpo(samples), torch.tensor([-1.0, 1, 0]), rtol=4e-4, atol=0)


def test_one_sample_alone_and_none_have_no_advantage() -> None:
    samples = scored(["a", "b"], [1.0, 2.0], [3.0, 4.0])
    for rows in (torch.arange(2), torch.tensor([1]), torch.arange(0)):
        assert advantages(samples, rows, 5.0, "prompt", "each").tolist() == [0] * len(rows)


# --- written a second time, after TRL's multi-objective normalisation


@pytest.mark.parametrize("spread", ["prompt", "round", "rank"])
def test_gdpo_written_a_second_time(spread: str) -> None:
    prompts = [p for p in "abc" for _ in range(4)]
    columns = [(10**k * torch.randn(12, generator=generator(k))).tolist() for k in range(3)]
    weights = (0.5, 2.0, -1.0)
    total = [0.0] * 12
    for column, weight in zip(columns, weights, strict=True):
        everyone = [x - sum(column) / 12 for x in column]
        of_round = math.sqrt(sum(x * x for x in everyone) / 11)
        for i in range(12):
            group = column[i // 4 * 4 : i // 4 * 4 + 4]
            if spread == "rank":
                group = [sum(x > y for y in group) / 3 for x in group]
            mean = sum(group) / 4
            sd = of_round if spread == "round" else math.sqrt(sum((x - mean) ** 2 for x in group) / 3)
            total[i] += weight * (group[i % 4] - mean) / (sd + 1e-4)
    mean = sum(total) / 12
    sd = math.sqrt(sum((x - mean) ** 2 for x in total) / 11)
    expected = torch.tensor([(x - mean) / (sd + 1e-4) for x in total])
    torch.testing.assert_close(gdpo(scored(prompts, *columns, weights=weights), spread), expected, rtol=1e-4, atol=1e-5)


# --- what it owes each reward


def test_each_reward_may_be_scaled_and_shifted_without_the_others() -> None:
    one, two = torch.randn(2, 8, generator=generator())
    expected = gdpo(scored(PROMPTS, one.tolist(), two.tolist(), weights=(0.3, 0.7)))
    for changed in (1000 * two + 5, 20 * two - 300):
        found = gdpo(scored(PROMPTS, one.tolist(), changed.tolist(), weights=(0.3, 0.7)))
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)
    plain = advantages(scored(PROMPTS, one.tolist(), (1000 * two).tolist()), torch.arange(8), 5.0)
    alone = advantages(scored(PROMPTS, two.tolist()), torch.arange(8), 5.0)
    torch.testing.assert_close(plain, alone, rtol=1e-1, atol=2e-2)  # the sum has forgotten the first


def test_a_reward_that_is_constant_in_a_group_adds_nothing_there() -> None:
    one = torch.randn(8, generator=generator()).tolist()
    alone = gdpo(scored(PROMPTS, one))
    for constant in (0.11, 7.0, -300.3):
        assert torch.equal(gdpo(scored(PROMPTS, one, [constant] * 4 + [0.3] * 4)), alone)
    dead = gdpo(scored(PROMPTS, [0.11] * 4 + one[:4], [0.7] * 4 + one[4:]))
    assert dead[:4].tolist() == [0] * 4 and abs(dead[4:].sum().item()) < 1e-5
    # A half of the groups is alive: the rest weighs sqrt(2) times as much, but for the N - 1.
    alive = gdpo(scored(PROMPTS[4:], one[:4], one[4:]))
    torch.testing.assert_close(dead[4:], alive * math.sqrt(7 / 3), rtol=1e-3, atol=0)


# --- algorithms


@pytest.mark.parametrize("name", WITH_COMPONENTS)
def test_an_algorithm_that_has_the_option_takes_the_rewards_apart(name: str) -> None:
    assert {"grpo", "nft", "awm", "dgpo", "rwr"} <= set(WITH_COMPONENTS)
    cls = registry.load("algorithms", name)
    assert "components" not in cls.Config().model_dump() and not cls.Config().needs_components
    policy = fake_policy()
    samples = with_targets(policy, draw(policy, PROMPTS))
    apart, whole = (cls(cls.Config(components=kind)) for kind in ("each", "sum"))
    assert apart.config.needs_components
    with pytest.raises(ValueError, match="no score of each reward"):
        apart.prepare(policy, samples, generator())
    columns = torch.randn(16, 2, generator=generator())
    samples.samples.components = Components({"one": 1.0, "two": 0.5}, columns)
    rows, others = (algorithm.prepare(policy, samples, generator()) for algorithm in (apart, whole))
    assert any(not torch.equal(rows[key], others[key]) for key in rows if key != "member")
    samples.samples.components = Components({"one": 1.0, "two": 0.5}, columns * torch.tensor([1.0, 1e3]))
    again = apart.prepare(policy, samples, generator())
    assert all(torch.allclose(rows[key].float(), again[key].float(), rtol=1e-2, atol=1e-2) for key in rows)
