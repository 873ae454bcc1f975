"""draft: the reward's gradient against finite differences, what its first update sees, what it refuses and costs."""

from __future__ import annotations

import pytest
import torch
from bench_dfusion.algorithms.draft import DRaFT, DRaFTConfig

from bench_dfusion.builders.contract import ConsistentSamples, PairConfig
from bench_dfusion.builders.vanilla import Vanilla
from bench_dfusion.runs.config import Misfit, resolve
from bench_dfusion.testing.fakes import RED, draw, fake_policy, shake

PROMPTS = ["one"] * 4 + ["two"] * 4


def round_of(**options) -> tuple:
    policy = fake_policy()
    shake(policy)
    algorithm = DRaFT(DRaFTConfig(**options))
    algorithm.setup(policy, RED)
    drawn = draw(policy, PROMPTS)
    samples: ConsistentSamples = Vanilla(PairConfig()).build(policy, drawn, lambda images, prompts: images)
    return policy, samples, algorithm, algorithm.prepare(policy, samples, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_at_the_first_update_it_denoises_the_same_pictures(k):
    policy, samples, algorithm, rows = round_of(last_steps=k)
    expected = policy.adapter.decode(samples.samples.trajectory.final)[:, 0].mean()
    loss = algorithm.loss(policy, samples, rows)
    assert loss.value.item() == pytest.approx(-expected.item(), abs=1e-6)
    assert loss.metrics["score"].item() == pytest.approx(expected.item(), abs=1e-6)
    assert not loss.metrics["score"].requires_grad


@pytest.mark.parametrize("k", [1, 3])
def test_the_gradient_is_that_of_the_last_k_steps_and_of_nothing_before(k):
    policy, samples, algorithm, rows = round_of(last_steps=k)
    algorithm.loss(policy, samples, rows).value.backward()
    parameter = next(p for n, p in policy.parameters.items() if "to_v.lora_B" in n)
    step = 1e-2
    found, expected = [], []
    for at in range(0, parameter.numel(), 7):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.view(-1)[at] += sign * step
                # x at step T - k is the stored one: finite differences see what the gradient may see.
                values.append(algorithm.loss(policy, samples, rows).value.item())
                parameter.view(-1)[at] -= sign * step
        expected.append((values[0] - values[1]) / (2 * step))
        found.append(parameter.grad.view(-1)[at].item())
    assert max(abs(x) for x in expected) > 1e-5
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0.02, atol=2e-6)


def test_alignprop_draws_every_length_and_the_loss_is_the_mean_over_rows():
    policy, samples, algorithm, rows = round_of(last_steps=4, draw_last_steps=True)
    assert set(rows["last"].tolist()) <= {1, 2, 3, 4} and len(rows["last"].unique()) > 1
    whole = algorithm.loss(policy, samples, rows).value
    single = [algorithm.loss(policy, samples, {k: v[i : i + 1] for k, v in rows.items()}).value for i in range(8)]
    torch.testing.assert_close(whole, torch.stack(single).mean())


def test_a_reward_without_gradient_and_too_many_steps_are_refused():
    with pytest.raises(Misfit, match="oracle has none; these have: aesthetic, clip"):
        resolve(algo="draft", reward="oracle")
    with pytest.raises(ValueError, match="5, the sampler has 4"):
        DRaFT(DRaFTConfig(last_steps=5)).setup(fake_policy(), RED)


def test_its_evaluations_are_counted_as_queries():
    assert DRaFT(DRaFTConfig(inner_epochs=3)).queries(16) == 48
