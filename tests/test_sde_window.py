"""SDE windows: where the noise is, what the other steps are, and that sampling and training see the same steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bench_dfusion.algorithms.ddpo import DDPO, DDPOConfig
from bench_dfusion.algorithms.dpo import DPO, DPOConfig
from bench_dfusion.algorithms.grpo import GRPO, GRPOConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import SETTINGS
from pydantic import ValidationError
from tiny import policy_of
from torch import Tensor

import bench_dfusion
from bench_dfusion.algorithm import SDEWindow
from bench_dfusion.builders.branch import Branch, BranchConfig
from bench_dfusion.diffusion import samplers
from bench_dfusion.errors import UsageError
from bench_dfusion.testing.fakes import RED, ddim, draw, fake_policy, shake, with_targets
from bench_dfusion.testing.rounds import PROMPTS, generator, loss_and_gradient

ALGORITHMS = {"ddpo": (DDPO, DDPOConfig), "dpo": (DPO, DPOConfig), "grpo": (GRPO, GRPOConfig)}
every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)
SEEDS = torch.tensor([1, 2, 3])


def places(rounds: int, total: int = 5, seed: int = 0, **options) -> list[list[int]]:
    window = SDEWindow(**options)
    return [window.of(torch.arange(total), seed, n).tolist() for n in range(rounds)]


def algorithm_of(name: str, **options):
    cls, config = ALGORITHMS[name]
    return cls(config(**options))


# --- where it is


def test_places_by_hand():
    assert places(6, steps=3, every=2) == [[0, 1, 2]] * 2 + [[1, 2, 3]] * 2 + [[2, 3, 4]] * 2
    assert places(4, steps=2, every=1, stride=2) == [
        [0, 1],
        [2, 3],
        [3, 4],
        [3, 4],
    ]  # it stays at the end, and is whole
    assert places(3, steps=2, every=1, place="frozen") == [[0, 1]] * 3
    assert places(3, steps=5, every=1, stride=3) == [[0, 1, 2, 3, 4]] * 3


@given(st.integers(1, 6), st.integers(0, 4), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_a_drawn_place_depends_on_seed_and_round_alone(steps, more, seed):
    total = steps + more
    for place in ("random", "scattered"):
        found = places(8, total, seed, steps=steps, place=place)
        assert found == places(8, total, seed, steps=steps, place=place)
        assert all(own == sorted(set(own)) and len(own) == steps and max(own) < total for own in found)
        assert place == "scattered" or all(own[-1] - own[0] == steps - 1 for own in found)


def test_every_place_is_drawn_equally_often():
    for place, count in (("random", 4), ("scattered", 10)):
        found = [tuple(own) for own in places(2000, steps=2, place=place)]
        shares = [found.count(own) / 2000 for own in set(found)]
        assert len(shares) == count and all(abs(share - 1 / count) < 4 * (1 / count / 2000) ** 0.5 for share in shares)


def test_it_stays_within_the_steps_of_the_window_that_have_noise():
    policy = fake_policy(steps=6, scheduler=ddim(timestep_spacing="leading"))  # whose last step is deterministic
    ddpo = algorithm_of("ddpo", window=(0.5, 1.0), sde_window={"steps": 1, "every": 1})
    assert [ddpo.noisy_steps(policy, 0, n).tolist() for n in range(4)] == [[3], [4], [4], [4]]
    ddpo.setup(policy, RED)
    with pytest.raises(ValueError, match=r"sde_window.steps is 3, and window \[0.5, 1.0\] holds 2 steps with noise"):
        algorithm_of("ddpo", window=(0.5, 1.0), sde_window={"steps": 3}).setup(policy, RED)
    assert algorithm_of("ddpo").noisy_steps(policy, 0, 0) is None


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"stride": 0}, {"every": 0}, {"place": "here"}, {"width": 2}])
def test_what_is_wrong_is_refused(wrong):
    with pytest.raises(ValidationError):
        DDPOConfig(sde_window=wrong)


# --- what the steps are


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart", "sd3", "flux"])
@pytest.mark.parametrize("kind", ["native", "cps"])
def test_outside_a_window_every_familys_steps_are_the_odes(name, kind, request):
    options = {"resolution": 32} if name == "flux" else {}
    folder = request.getfixturevalue(f"{name}_dir")
    policy = policy_of(folder, lora=0, steps=4, batch=3, kind=kind, **options)
    prompts = ["a red circle"] * 3
    with policy.sampling(4, 0.0, kind, policy.guidance):
        ode = policy.sample(prompts, SEEDS)
    full = policy.sample(prompts, SEEDS)
    before = policy.schedule
    with policy.noisy_at(torch.tensor([1, 2])):
        drawn = policy.sample(prompts, SEEDS)
        assert policy.schedule.stochastic.tolist() == [False, True, True, False]
        noise = torch.randn(3, 4, *policy.adapter.latent_shape)
        other = policy.denoise(drawn.latents[:, 0], noise, prompts)[0].detach()
    assert policy.schedule is before
    assert torch.equal(drawn.latents[:, :2], ode.latents[:, :2])
    assert torch.equal(other[:, :2], drawn.latents[:, :2]) and not torch.equal(other[:, 2], drawn.latents[:, 2])
    assert not drawn.log_probs[:, [0, 3]].any() and drawn.log_probs[:, 1:3].all()
    with policy.noisy_at(torch.arange(4)[before.stochastic]):
        whole = policy.sample(prompts, SEEDS)
    assert torch.equal(whole.latents, full.latents) and torch.equal(whole.log_probs, full.log_probs)


@every_algorithm
def test_a_window_of_all_steps_is_none_to_the_bit(name):
    found = []
    for options in ({}, {"sde_window": {"steps": 4}}):
        policy, algorithm = fake_policy(), algorithm_of(name, **options)
        shake(policy)
        with policy.noisy_at(algorithm.noisy_steps(policy, 0, 0)):
            samples = with_targets(policy, draw(policy, PROMPTS))
            rows = algorithm.prepare(policy, samples, generator())
            shake(policy, seed=2)
            found.append(loss_and_gradient(policy, samples, algorithm, rows))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@every_algorithm
def test_the_windows_steps_alone_are_trained_on_and_their_first_ratio_is_1(name):
    policy, algorithm = fake_policy(steps=5), algorithm_of(name, sde_window={"steps": 2, "every": 1})
    shake(policy)
    for number, wanted in enumerate(({0, 1}, {1, 2}, {2, 3}, {3, 4}, {3, 4})):
        with policy.noisy_at(algorithm.noisy_steps(policy, 0, number)):
            samples = with_targets(policy, draw(policy, PROMPTS))
            rows = algorithm.prepare(policy, samples, generator())
            assert set(rows["step"].tolist()) == wanted
            metrics = algorithm.loss(policy, samples, algorithm.batch(policy, samples, rows)).metrics
        if "approx_kl" in metrics:
            assert float(metrics["approx_kl"]) < 1e-8


def test_a_step_in_a_window_has_the_density_of_its_gaussian():
    policy = fake_policy(steps=4)
    with policy.noisy_at(torch.tensor([2])):
        drawn = policy.sample(["one"], torch.tensor([5]))
        noise = samplers.sample_noise(torch.tensor([5]), 4, policy.adapter.latent_shape)
        z: Tensor = noise[0, 3]
        by_hand = torch.distributions.Normal(0.0, 1.0).log_prob(z).mean() - policy.schedule.std[2].log()
    torch.testing.assert_close(drawn.log_probs[0], torch.tensor([0, 0, float(by_hand), 0]), rtol=1e-4, atol=1e-4)


# --- in a run


def test_a_builder_that_a_rounds_window_leaves_nothing_is_refused_before_compute(tmp_path: Path):
    policy = fake_policy(steps=4)
    with policy.noisy_at(torch.tensor([0, 1])), pytest.raises(ValueError, match="no stochastic step is left to branch"):
        Branch(BranchConfig(at=0.5)).check(policy, PROMPTS)
    own = [*SETTINGS, "builder.at=0.5", "algo.sde_window.steps=2", "algo.sde_window.place=frozen"]
    with pytest.raises(UsageError, match="no stochastic step is left to branch at 0.5"):
        bench_dfusion.run(algo="ddpo", builder="branch", reward="oracle", settings=own, out=tmp_path)
    assert not list(tmp_path.rglob("checkpoint*"))
