"""fdfo: terms by hand, the loss written a second time, what the pair owes it."""

from __future__ import annotations

import pytest
import torch
from bench_dfusion.algorithms.fdfo import FDFO, FDFOConfig, fdfo_ratio, fdfo_terms
from pydantic import ValidationError

from bench_dfusion.diffusion import samplers
from bench_dfusion.models import schedules
from bench_dfusion.testing.fakes import ddim, draw, fake_policy, shake, with_targets
from bench_dfusion.testing.rounds import (
    PROMPTS,
    generator,
    gradient,
    loss_and_gradient,
)

REWARDS = [0.0, 1.0, 1.0, 4.0, 2.0, 2.5, 7.0, 3.0]


def round_of(policy=None, size=0.05, **options):
    """(policy, samples, algorithm, rows): a moved LoRA drew and prepared the round, and has moved on."""
    policy = policy or fake_policy()
    shake(policy)
    samples = with_targets(policy, draw(policy, PROMPTS, REWARDS))
    samples.samples.rewards[8:] += torch.tensor([3.0, -4.0, 0.5, -2.0, 1.0, -1.5, 0.0, 2.0])  # some targets lost
    algorithm = FDFO(FDFOConfig(**{"trust": 0.5, "kl": 0.7, **options}))
    rows = algorithm.prepare(policy, samples, generator())
    shake(policy, size, seed=2)
    return policy, samples, algorithm, rows


# --- by hand


def test_ratio_and_terms_by_hand():
    # D = 2, delta (.5, 0) makes u (4, 0); f moved from 0 to (-.01, 0).
    ratio = fdfo_ratio(torch.tensor([[-0.01, 0.0]]), torch.tensor([[0.5, 0.0]]), torch.ones(1))
    assert ratio.item() == pytest.approx(1.04076, abs=1e-4)
    terms = fdfo_terms(torch.tensor([1.04076]), torch.tensor([0.5]), 0.03)
    assert terms.item() == pytest.approx(-0.50654, abs=1e-4)


def test_the_optimum_is_one_plus_or_minus_the_trust():
    for difference in (0.7, -0.2):
        ratio = torch.linspace(0.8, 1.2, 4001)
        terms = fdfo_terms(ratio, torch.full_like(ratio, difference), 0.03)
        sign = 1 if difference > 0 else -1
        assert ratio[terms.argmin()].item() == pytest.approx(1 + sign * 0.03, abs=2e-4)
        assert terms.min().item() == pytest.approx(-difference * (1 + sign * 0.03 / 2), abs=1e-4)


def test_the_first_ratio_is_1_and_its_slope_the_reward_along_the_difference():
    delta, moved = torch.randn(3, 2, 2, 2, generator=generator()), torch.zeros(3, 2, 2, 2, requires_grad=True)
    difference = torch.tensor([0.5, -1.0, 0.0])
    ratio = fdfo_ratio(moved, delta, torch.ones(3))
    assert ratio.tolist() == [1, 1, 1]
    fdfo_terms(ratio, difference, 0.03).sum().backward()
    u = delta / ((delta**2).mean((1, 2, 3), keepdim=True) + 1e-6)
    torch.testing.assert_close(moved.grad, 2 * difference.view(-1, 1, 1, 1) * u / 8)


def test_two_that_are_one_picture_teach_nothing_but_to_stay():
    moved = torch.full((1, 4), 0.1, requires_grad=True)
    ratio = fdfo_ratio(moved, torch.zeros(1, 4), torch.ones(1))
    assert ratio.item() == pytest.approx(torch.exp(torch.tensor(-0.01)).item())
    assert fdfo_terms(ratio, torch.zeros(1), 0.03).item() == 0


# --- whole losses


@pytest.mark.parametrize("space", ["velocity", "output"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_loss_and_its_gradient_are_those_of_the_formula(prediction, space):
    scheduler = {"scheduler": ddim(prediction_type=prediction)}
    policy, samples, algorithm, rows = round_of(fake_policy(**scheduler), space=space)
    base, old = fake_policy(**scheduler), fake_policy(**scheduler)
    shake(old)
    trajectory, rewards = samples.samples.trajectory, samples.samples.rewards
    alphas = policy.adapter.scheduler.alphas_cumprod[policy.schedule.timesteps]
    total, count = 0.0, 0
    for _, two, one in samples.triples.tolist():
        for me, it in ((one, two), (two, one)):
            r = (rewards[me] - rewards[it]) / 2
            delta = (trajectory.final[me] - trajectory.final[it]) / 2
            u = delta / ((delta**2).mean() + 1e-6)
            for i, t in enumerate(policy.schedule.timesteps.tolist()):
                x_t, a, b = trajectory.latents[me : me + 1, i], alphas[i].sqrt(), (1 - alphas[i]).sqrt()

                def f(network, x_t=x_t, t=t, a=a, b=b, me=me):
                    out = network.predict(x_t, torch.tensor([t]), [trajectory.prompts[me]])
                    clean = (x_t - b * out) / a if prediction == "epsilon" else a * x_t - b * out
                    return (out if prediction == "epsilon" else a * out + b * x_t) - clean

                slope = 1.0
                if space == "output":
                    slope = (a + b) / a if prediction == "epsilon" else a + b
                now, was, first = f(policy), f(old).detach(), f(base).detach()
                wanted = was - u
                rho = torch.exp((((wanted - was) ** 2).mean() - ((now - wanted) ** 2).mean()) / slope**2)
                term = -r * rho + abs(r) / (2 * 0.5) * (rho - 1) ** 2
                total = total + term + 0.7 * ((now - first) ** 2).mean() / slope**2
                count += 1
    expected = total / count
    expected.backward()
    expected = expected.detach(), gradient(policy)
    assert expected[1].norm() > 1e-3 and count == len(rows["row"])
    found = loss_and_gradient(policy, samples, algorithm, rows)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-3)


def test_the_order_of_the_members_changes_nothing():
    policy, samples, algorithm, rows = round_of()
    expected = loss_and_gradient(policy, samples, algorithm, rows)
    samples.triples = samples.triples[:, [0, 2, 1]]
    fresh = fake_policy()
    shake(fresh)
    again = algorithm.prepare(fresh, samples, generator())
    assert again["row"].tolist() != rows["row"].tolist()
    torch.testing.assert_close(loss_and_gradient(policy, samples, algorithm, again), expected, rtol=1e-3, atol=1e-5)


def test_all_targets_are_taken_and_what_lost_is_left_behind():
    policy, samples, _, rows = round_of()
    n = len(policy.schedule)
    assert len(rows["row"]) == 2 * 8 * n
    lost = samples.samples.rewards[8:] < samples.samples.rewards[:8]
    assert 0 < int(lost.sum()) < 8
    signs = rows["difference"].view(2, 8, n)
    assert (signs[0, lost] < 0).all() and torch.equal(signs[0], -signs[1])


def test_equal_rewards_have_no_gradient():
    policy, samples, algorithm, rows = round_of(kl=0.0)
    rows["difference"] = torch.zeros_like(rows["difference"])
    value, slope = loss_and_gradient(policy, samples, algorithm, rows)
    assert float(value) == 0 and not slope.any()


def test_a_velocity_that_moves_along_u_moves_the_ending_there():
    """With a network blind to x, f - k u at every step moves x0 by k u (b/(a+b) first - last)."""
    schedule = schedules.ddim_schedule(ddim(prediction_type="epsilon"), 6, 0.0)
    u, k = torch.randn(1, 2, 2, 2, generator=generator()), 0.3
    ends = []
    for shift in (0.0, k):
        x = torch.randn(1, 2, 2, 2, generator=generator(1))
        for i in range(6):
            step = torch.tensor([i])
            a, b = schedule.signal[i], schedule.noise[i]
            f = torch.ones_like(x) - shift * u  # = epsilon - x_0
            output = (a * f + x) / (a + b)  # the epsilon whose velocity is f
            clean, noise = samplers.predict_clean(schedule, step, x, output)
            torch.testing.assert_close(noise - clean, f, rtol=1e-4, atol=1e-4)
            x = samplers.step_mean(schedule, step, x, output)
        ends.append(x)
    a, b = schedule.signal_s[-1], schedule.direction[-1]
    first = schedule.noise[0] / (schedule.signal[0] + schedule.noise[0])
    expected = k * u * (first - b / (a + b)) * (a + b)
    torch.testing.assert_close(ends[1] - ends[0], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_slope_of_the_velocity_is_that_of_the_output(prediction):
    schedule = schedules.ddim_schedule(ddim(prediction_type=prediction), 5, 1.0)
    step, x = torch.arange(5), torch.randn(5, 3, generator=generator())

    def f(output):
        clean, noise = samplers.predict_clean(schedule, step, x, output)
        return noise - clean

    output = torch.randn(5, 3, generator=generator(1)).double()
    found = (f(output + 1e-3) - f(output))[:, 0] / 1e-3
    torch.testing.assert_close(samplers.velocity_slope(schedule, step).double(), found, rtol=1e-3, atol=1e-3)


def test_preparing_keeps_to_the_window():
    policy, _, _, rows = round_of(window=(0.5, 1.0))
    assert set(rows["step"].tolist()) == {2, 3}
    samples = with_targets(policy, draw(policy, PROMPTS, REWARDS))
    with pytest.raises(ValueError, match="holds none of the 4 steps"):
        FDFO(FDFOConfig(window=(0.0, 0.1))).prepare(policy, samples, generator())


def test_the_curves_are_detached_and_wrong_options_refused():
    policy, samples, algorithm, rows = round_of()
    metrics = algorithm.loss(policy, samples, rows).metrics
    assert set(metrics) == {"moved", "ratio", "drift"} and all(not m.requires_grad for m in metrics.values())
    for option in ({"trust": 0}, {"kl": -1}, {"space": "x0"}, {"window": (0.5, 0.5)}):
        with pytest.raises(ValidationError):
            FDFOConfig(**option)
