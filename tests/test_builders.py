"""same-noise and branch: what endings share and what is their own, pairs by hand, costs, and every algorithm on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_dfusion.algorithms.dpo import DPO, DPOConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import TINY, command
from pydantic import ValidationError
from torch import Tensor

from bench_dfusion import registry
from bench_dfusion.algorithm import all_log_probs
from bench_dfusion.builders.branch import Branch, BranchConfig, endings
from bench_dfusion.builders.contract import Builder, ConsistentSamples
from bench_dfusion.builders.same_noise import SameNoise, SameNoiseConfig
from bench_dfusion.diffusion import samplers
from bench_dfusion.diffusion.policy import Policy
from bench_dfusion.results import records
from bench_dfusion.testing.fakes import RED, ddim, draw, fake_policy, shake
from bench_dfusion.util.seeds import seed_of

PROMPTS = ["one"] * 4 + ["two"] * 4


def trained_policy(**options: Any) -> Policy:
    policy = fake_policy(**options)
    shake(policy)
    return policy


def round_of(policy: Policy, builder: Builder, prompts: Sequence[str] = PROMPTS, first: int = 0) -> ConsistentSamples:
    drawn = draw(policy, prompts, first=first)
    drawn.rewards = RED.score(drawn.images, prompts)
    return builder.build(policy, drawn, RED.score)


def scripted(policy: Policy, builder: Builder, rewards: Sequence[float], new: Sequence[float]) -> ConsistentSamples:
    """A round of one prompt whose drawn and new samples have these rewards."""
    return builder.build(
        policy, draw(policy, ["one"] * len(rewards), rewards), lambda images, prompts: torch.tensor(new)
    )


# ---------------------------------------------------------------- what endings share, and what is their own


@settings(max_examples=40, deadline=None)
@given(
    prompts=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 5)), min_size=1, max_size=3),
    steps=st.integers(2, 5),
    at=st.floats(0, 0.6),
    branches=st.integers(1, 3),
    every=st.integers(1, 6),
    batch=st.integers(1, 7),
)
def test_branches_share_the_prefix_bit_for_bit_and_nothing_after_it(
    prompts: list[tuple[str, int]], steps: int, at: float, branches: int, every: int, batch: int
) -> None:
    policy = trained_policy(steps=steps, batch=batch)
    builder = Branch(BranchConfig(at=at, branches=branches, every=every))
    builder.check(policy, [])
    words = [word for word, n in prompts for _ in range(n)]
    drawn = len(words)
    found = round_of(policy, builder, words)
    trajectory, point = found.samples.trajectory, round(at * steps)
    parents = list(range(0, drawn, every))
    assert found.drawn == drawn and len(found.samples) == builder.queries(drawn) == drawn + len(parents) * branches
    groups = [[p, *(drawn + g * branches + k for k in range(branches))] for g, p in enumerate(parents)]
    assert found.train.tolist() == [row for group in groups for row in group]
    assert trajectory.seeds.unique().numel() == len(found.samples)
    for parent, *new in groups:
        for row in new:
            assert trajectory.prompts[row] == words[parent]
            assert torch.equal(trajectory.latents[row, : point + 1], trajectory.latents[parent, : point + 1])
            assert torch.equal(trajectory.log_probs[row, :point], trajectory.log_probs[parent, :point])
        later = trajectory.latents[[parent, *new], point + 1 :].flatten(2)  # [K + 1, S, ...], all of them apart
        apart = (later[:, None] - later).abs().amax(-1) + torch.eye(len(new) + 1)[..., None]
        assert (apart > 1e-4).all()
    rewards = found.samples.rewards
    assert torch.equal(rewards, RED.score(found.samples.images, []))
    assert torch.equal(found.samples.images, policy.decode(trajectory.final))
    assert len(found.triples) == len(groups) == len(found.pairs) + found.dropped
    kept: dict[int, int] = dict(found.pairs.tolist())
    for group, (best, worst, winner) in zip(groups, found.triples.tolist(), strict=True):
        assert {best, worst} <= set(group) and winner == best
        assert rewards[best] == rewards[group].max() and rewards[worst] == rewards[group].min()
        assert kept.get(best) == (worst if rewards[best] > rewards[worst] else None)


def test_a_partner_has_its_samples_start_noise_and_step_noise_of_its_own_seed() -> None:
    policy = trained_policy()
    found = round_of(policy, SameNoise(SameNoiseConfig()))
    trajectory = found.samples.trajectory
    assert len(found.samples) == 16 and found.train.view(8, 2).tolist() == [[i, 8 + i] for i in range(8)]
    assert torch.equal(trajectory.latents[8:, 0], trajectory.latents[:8, 0])
    assert trajectory.seeds[8:].tolist() == [seed_of("same-noise", s) for s in range(8)]
    own = samplers.sample_noise(trajectory.seeds, 4, policy.adapter.latent_shape)
    assert torch.equal(own[:8, 0], trajectory.latents[:8, 0]) and not torch.isclose(own[8:, 0], own[:8, 0]).any()
    for i in range(4):  # the z that each step was drawn with, from what is stored
        with torch.no_grad():
            mean = policy.mean(trajectory.latents[:, i], torch.full((16,), i), trajectory.prompts)
        z = (trajectory.latents[:, i + 1] - mean) / policy.schedule.std[i]
        torch.testing.assert_close(z, own[:, 1 + i], atol=2e-3, rtol=0)


@pytest.mark.parametrize("step", range(4))
def test_endings_with_the_parents_own_seeds_are_the_parents(step: int) -> None:
    """The i-th step takes the i-th noise of a seed, wherever it branches."""
    policy = trained_policy()
    drawn = draw(policy, PROMPTS).trajectory
    again = endings(policy, drawn, torch.arange(8), step, drawn.seeds)
    assert torch.equal(again.latents, drawn.latents) and torch.equal(again.log_probs, drawn.log_probs)
    rows = torch.tensor([5, 2, 2])
    some = endings(policy, drawn, rows, step, drawn.seeds[rows])
    torch.testing.assert_close(some.latents, drawn.latents[rows])
    assert some.prompts == ["two", "one", "one"]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("builder", [SameNoise(SameNoiseConfig()), Branch(BranchConfig(at=0.5, branches=3, every=1))])
def test_stored_log_probs_are_the_plain_policys(builder: Builder, guidance: float) -> None:
    policy = trained_policy(guidance=guidance)
    found = round_of(policy, builder)
    rows, steps = torch.arange(len(found.samples)).repeat_interleave(4), torch.arange(4).repeat(len(found.samples))
    again = all_log_probs(policy, found, rows, steps).view(-1, 4)
    torch.testing.assert_close(again, found.samples.trajectory.log_probs, atol=1e-5, rtol=0)
    shake(policy)  # and of no other
    assert (all_log_probs(policy, found, rows, steps).view(-1, 4) - again).abs().max() > 1e-3


@pytest.mark.parametrize("builder", [SameNoise(SameNoiseConfig()), Branch(BranchConfig(branches=3, every=1))])
def test_endings_depend_on_their_parent_alone(builder: Builder) -> None:
    """Not on the batch, nor on the parents beside theirs, nor on torch's own generator, which stays untouched."""
    whole = round_of(trained_policy(), builder)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    for batch in (1, 5):
        policy = trained_policy(batch=batch)
        split = round_of(policy, builder)
        assert torch.equal(split.samples.trajectory.seeds, whole.samples.trajectory.seeds)
        torch.testing.assert_close(split.samples.trajectory.latents, whole.samples.trajectory.latents)
        torch.testing.assert_close(split.samples.trajectory.log_probs, whole.samples.trajectory.log_probs)
    assert torch.equal(torch.get_rng_state(), state)
    each = (len(whole.samples) - 8) // 8
    alone = round_of(trained_policy(), builder, PROMPTS[3:5], first=3)
    rows = torch.cat([torch.tensor([3, 4]), 8 + torch.arange(3 * each, 5 * each)])
    torch.testing.assert_close(alone.samples.trajectory.latents, whole.samples.trajectory.latents[rows])


# ---------------------------------------------------------------- pairs by hand


def test_same_noise_pairs_by_hand() -> None:
    # Partners of 0..3 are 4..7: the partner wins, loses by a margin of 0.25, ties, loses by 0.5.
    rewards, new = [0.0, 0.75, 0.5, 1.0], [0.5, 0.5, 0.5, 0.5]
    found = scripted(fake_policy(), SameNoise(SameNoiseConfig()), rewards, new)
    assert found.pairs.tolist() == [[4, 0], [1, 5], [3, 7]] and found.dropped == 1
    assert found.triples.tolist() == [[4, 0, 4], [1, 5, 1], [2, 6, 2], [3, 7, 3]]
    assert not len(found.masks) and found.samples.rewards.tolist() == [*rewards, *new]
    narrow = scripted(fake_policy(), SameNoise(SameNoiseConfig(margin=0.25)), rewards, new)
    assert narrow.pairs.tolist() == [[4, 0], [3, 7]] and narrow.dropped == 2  # the margin is exclusive


def test_branch_pairs_by_hand() -> None:
    # Rows 0, 2, 4 branch twice: endings 5 6, 7 8, 9 10. A parent in the middle, a best parent, three of one reward.
    rewards, new = [0.5, 9.0, 0.9, 9.0, 0.3], [0.1, 0.7, 0.2, 0.9, 0.3, 0.3]
    found = scripted(fake_policy(), Branch(BranchConfig(branches=2, every=2)), rewards, new)
    assert found.pairs.tolist() == [[6, 5], [2, 7]] and found.dropped == 1
    assert found.triples.tolist() == [[6, 5, 6], [2, 7, 2], [4, 10, 4]]
    assert found.train.tolist() == [0, 5, 6, 2, 7, 8, 4, 9, 10]
    found = scripted(fake_policy(), Branch(BranchConfig(branches=2, every=2, margin=0.65)), rewards, new)
    assert found.pairs.tolist() == [[2, 7]] and found.dropped == 2  # by .7; .6 is too little


def test_only_new_endings_are_scored_and_paid_for() -> None:
    policy = trained_policy()
    asked: list[tuple[Tensor, list[str]]] = []

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        asked.append((images, list(prompts)))
        return torch.zeros(len(images))

    drawn = draw(policy, PROMPTS)
    before = policy.network_evaluations
    builder = Branch(BranchConfig(at=0.5, branches=3, every=4))
    found = builder.build(policy, drawn, score)
    ((images, prompts),) = asked
    assert len(images) == builder.queries(8) - 8 == 6 and prompts == ["one"] * 3 + ["two"] * 3
    assert torch.equal(images, found.samples.images[8:])
    assert policy.network_evaluations - before == 6 * 2  # two of four steps are left
    assert torch.equal(found.samples.rewards[:8], drawn.rewards)


@pytest.mark.parametrize(
    ("builder", "expected"),
    [
        (SameNoise(SameNoiseConfig()), 32),
        (SameNoise(SameNoiseConfig(every=3)), 16 + 6),
        (Branch(BranchConfig()), 32),
        (Branch(BranchConfig(branches=4, every=5)), 16 + 4 * 4),
    ],
)
def test_queries_by_hand(builder: Builder, expected: int) -> None:
    assert builder.queries(16) == expected


# ---------------------------------------------------------------- what cannot work is refused


def test_a_branch_point_with_nothing_random_after_it_is_refused_before_any_compute() -> None:
    # Leading spacing without offset: the last of the four steps goes from t = 0 to 0 and has no noise.
    policy = fake_policy(scheduler=ddim(timestep_spacing="leading"))
    assert policy.schedule.stochastic.tolist() == [True, True, True, False]
    Branch(BranchConfig(at=0.5)).check(policy, ["one"])
    SameNoise(SameNoiseConfig()).check(policy, ["one"])
    for at in (0.75, 0.9):  # the deterministic step, and none
        with pytest.raises(ValueError, match=rf"no stochastic step is left to branch at {at}, step . of 4"):
            Branch(BranchConfig(at=at)).check(policy, ["one"])
    flow = fake_policy(steps=1)
    flow.schedule = replace(flow.schedule, std=torch.zeros(1))  # as a flow's only step, which goes to the picture
    with pytest.raises(ValueError, match="at the start noise"):
        SameNoise(SameNoiseConfig()).check(flow, [])
    assert policy.network_evaluations == flow.network_evaluations == 0


@pytest.mark.parametrize(
    "options", [{"at": 1.0}, {"at": -0.1}, {"branches": 0}, {"every": 0}, {"margin": -1}, {"att": 0.1}]
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        BranchConfig(**options)


# ---------------------------------------------------------------- with the algorithms


@pytest.mark.parametrize(
    "algorithm", sorted(registry.plugins("algorithms").keys() - {"opd"})
)  # whose teachers test_opd.py has
@pytest.mark.parametrize("builder", [SameNoise(SameNoiseConfig()), Branch(BranchConfig())])
def test_every_algorithm_trains_on_them(builder: Builder, algorithm: str) -> None:
    cls = registry.load("algorithms", algorithm)
    backend = cls(cls.Config())
    policy = trained_policy()
    backend.setup(policy, RED)
    with backend.collecting(policy):
        found = round_of(policy, builder)
    rows = backend.prepare(policy, found, torch.Generator().manual_seed(0))
    loss = backend.loss(policy, found, backend.batch(policy, found, rows))
    loss.value.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in policy.parameters.values() if p.grad is not None))
    assert loss.value.isfinite() and math.isfinite(norm) and norm > 0


def test_steps_that_a_pair_shares_have_no_gradient_in_dpo() -> None:
    policy = trained_policy()
    found = round_of(policy, Branch(BranchConfig(at=0.5, branches=2, every=1)))
    shake(policy, seed=2)
    norms = []
    for window in ((0.0, 0.5), (0.5, 1.0)):
        dpo = DPO(DPOConfig(beta=5.0, ratio_clamp=0.0, window=window))
        dpo.loss(policy, found, dpo.prepare(policy, found, torch.Generator())).value.backward()
        norms.append(sum(float(p.grad.square().sum()) for p in policy.parameters.values()) ** 0.5)
        for p in policy.parameters.values():
            p.grad = None
    assert norms[0] < 1e-5 * norms[1]


@pytest.mark.parametrize(
    ("builder", "algorithm", "each"), [("branch", "dpo", 8 + 4 * 2), ("same-noise", "ddpo", 8 + 8)]
)
def test_a_run_counts_every_ending_in_its_budget(builder: str, algorithm: str, each: int, tmp_path: Path) -> None:
    words = ("run", "--algo", algorithm, "--reward", "oracle", "--builder", builder, *TINY)
    words += ("--set=track.budget.reward_queries=40",)
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ((_, record),) = records.find(tmp_path)
    assert len(record.rounds) == 40 // each == 2 and record.cost.reward_queries == len(record.rounds) * each
    assert all(r.pairs + r.dropped == (4 if builder == "branch" else 8) for r in record.rounds)
    assert all(r.winner_reward >= r.base_reward for r in record.rounds)


def test_a_branch_point_too_late_is_one_line(tmp_path: Path, refused) -> None:
    words = ("run", "--algo", "dpo", "--reward", "oracle", "--builder", "branch", "--set=builder.at=0.95", *TINY)
    assert "no stochastic step is left to branch at 0.95" in refused(*words, cwd=tmp_path)
    assert not list(tmp_path.iterdir())
