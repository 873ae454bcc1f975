"""dpo, diffusion-dpo and ddpo: terms by hand, what a first update is, and a bandit."""

from __future__ import annotations

import math

import pytest
import torch
from bench_dfusion.algorithms.ddpo import DDPO, DDPOConfig
from bench_dfusion.algorithms.diffusion_dpo import DiffusionDPO, DiffusionDPOConfig, diffusion_dpo_terms
from bench_dfusion.algorithms.dpo import DPO, DPOConfig, dpo_terms
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from bench_dfusion.algorithm import all_log_probs, every_step, step_log_prob, step_weights, window_steps
from bench_dfusion.builders.contract import ConsistentSamples, PairConfig
from bench_dfusion.builders.vanilla import Vanilla
from bench_dfusion.objectives.policy_gradient import clipped_terms
from bench_dfusion.testing import rounds
from bench_dfusion.testing.fakes import ddim, draw, fake_policy, shake, with_targets
from bench_dfusion.testing.rounds import (
    PROMPTS,
    bandit,
    generator,
    gradient,
    loss_and_gradient,
    values,
)

ALGORITHMS = {
    "dpo": lambda **o: DPO(DPOConfig(**{"beta": 5.0, "ratio_clamp": 0.0, **o})),
    "diffusion-dpo": lambda **o: DiffusionDPO(DiffusionDPOConfig(**{"beta": 20.0, **o})),
    "ddpo": lambda **o: DDPO(DDPOConfig(**{"clip": 0.9, "min_count": 4, "buffer": 4, **o})),
}


def round_of(name, policy=None, **options):
    return rounds.round_of(ALGORITHMS[name](**options), policy)


# --- terms by hand


def test_dpo_terms_by_hand():
    # beta (r_w - r_l) = 2 (.05 + .03) = .16; log(1 + e^-.16) = log 1.8521438.
    assert dpo_terms(values(0.05), values(-0.03), 2, 0).item() == pytest.approx(0.6163439, abs=1e-6)
    # Both ratios, 1.0513 and .9704, lie within 1 ± .1: the clamp changes nothing.
    assert dpo_terms(values(0.05), values(-0.03), 2, 0.1).item() == pytest.approx(0.6163439, abs=1e-6)
    # e^.3 is clamped to 1.1, e^-.5 to .9: 2 (log 1.1 - log .9) = .4013414; log(1 + e^-.4013414) = log 1.6694215.
    assert dpo_terms(values(0.3), values(-0.5), 2, 0.1).item() == pytest.approx(0.5124772, abs=1e-6)


def test_diffusion_dpo_terms_by_hand():
    # d_theta - d_ref is -.001 for the winner and +.0002 for the loser, so gains are .001 and -.0002:
    # 5000 / 2 * .0012 = 3; log(1 + e^-3) = .0485874.
    assert diffusion_dpo_terms(values(0.001), values(-0.0002), 5000).item() == pytest.approx(0.0485874, abs=1e-6)


def test_ddpo_terms_by_hand():
    # -A rho unless the clipped one is larger: the loss never profits from leaving 1 ± .2 on A's side.
    log_ratio = values(1.5, 1.5, 0.5, 0.5, 1.1).log()
    advantage = torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0])
    # -2*1.2, 2*1.5, -2*.5, 2*.8, -2*1.1
    expected = torch.tensor([-2.4, 3.0, -1.0, 1.6, -2.2], dtype=torch.float64)
    torch.testing.assert_close(clipped_terms(log_ratio, advantage, 0.2), expected)


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=6), st.floats(0.01, 20))
@settings(max_examples=50, deadline=None)
def test_dpo_terms_are_trls_sigmoid_loss(ratios, beta):
    # TRL 1.16, loss type "sigmoid": -log sigmoid(beta (chosen log-ratio - rejected log-ratio)), written as a softplus.
    w, l = values(*ratios), values(*reversed(ratios))  # noqa: E741
    expected = torch.tensor([math.log1p(math.exp(-beta * (a - b))) for a, b in zip(ratios, reversed(ratios))])  # noqa: B905
    torch.testing.assert_close(dpo_terms(w, l, beta, 0).detach(), expected.double(), rtol=1e-5, atol=1e-7)
    # Diffusion-DPO is the same of gains with half the beta.
    torch.testing.assert_close(diffusion_dpo_terms(w, l, 2 * beta), dpo_terms(w, l, beta, 0))


def test_term_gradients_are_those_of_finite_differences():
    inside, outside = values(0.02, -0.06, 0.09), values(0.5, -0.7, 0.2)  # all away from the kinks at 1 ± .1
    other = values(-0.03, 0.08, 0.01)
    for clamp in (0.0, 0.1):
        assert torch.autograd.gradcheck(lambda w, l: dpo_terms(w, l, 3, clamp), (inside, other))  # noqa: B023, E741
        assert torch.autograd.gradcheck(lambda w, l: dpo_terms(w, l, 3, clamp), (outside, other))  # noqa: B023, E741
    assert torch.autograd.gradcheck(lambda w, l: diffusion_dpo_terms(w, l, 7), (inside, other))  # noqa: E741
    for advantage in (1.5, -1.5):
        a = torch.full((3,), advantage, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda r: clipped_terms(r, a, 0.1), (inside,))  # noqa: B023
        assert torch.autograd.gradcheck(lambda r: clipped_terms(r, a, 0.1), (outside,))  # noqa: B023


def test_dpo_clamp_stops_the_gradient_on_both_sides():
    w, l = values(0.3, -0.3, 0.05, 0.05), values(-0.02, -0.02, 0.3, -0.3)  # noqa: E741
    dpo_terms(w, l, 2, 0.1).sum().backward()
    assert w.grad[:2].tolist() == [0, 0] and l.grad[2:].tolist() == [0, 0]
    assert (w.grad[2:] < 0).all() and (l.grad[:2] > 0).all()


def test_ddpo_gradient_is_minus_the_advantage_at_ratio_1_and_stops_beyond_the_clip_on_its_side():
    advantage = torch.tensor([3.0, -2.0], dtype=torch.float64)
    at_one = values(0.0, 0.0)
    clipped_terms(at_one, advantage, 1e-4).sum().backward()
    torch.testing.assert_close(at_one.grad, -advantage)
    high, low = values(0.5, 0.5), values(-0.5, -0.5)
    (clipped_terms(high, advantage, 0.1) + clipped_terms(low, advantage, 0.1)).sum().backward()
    e = math.exp(0.5)
    torch.testing.assert_close(high.grad, values(0.0, 2 * e).detach())
    torch.testing.assert_close(low.grad, values(-3 / e, 0.0).detach())


@pytest.mark.parametrize("terms", [lambda r: dpo_terms(r, 0 * r, 1, 0.1), lambda r: clipped_terms(r, 0 * r + 1, 0.1)])
def test_a_clipped_ratio_has_no_gradient_however_far_out(terms):
    ratio = values(100.0, dtype=torch.float32)  # e^100 is inf in float32
    terms(ratio).sum().backward()
    assert ratio.grad.item() == 0


@given(st.floats(-2, 2), st.floats(-2, 2), st.floats(0.1, 5))
@settings(max_examples=30, deadline=None)
def test_swapping_winner_and_loser_flips_the_margin(w, l, beta):  # noqa: E741
    # -log sigmoid(-x) = -log sigmoid(x) + x
    forth, back = (dpo_terms(values(a), values(b), beta, 0).item() for a, b in ((w, l), (l, w)))
    assert back == pytest.approx(forth + beta * (w - l), abs=1e-9)


def test_beta_0_is_log_2_and_the_log_sigmoid_is_of_each_pair():
    w, l = values(0.7, -2.0), values(-0.4, 3.0)  # noqa: E741
    for terms in (dpo_terms(w, l, 1e-9, 0), diffusion_dpo_terms(w, l, 1e-9)):
        torch.testing.assert_close(terms.detach(), torch.full((2,), math.log(2), dtype=torch.float64))
    # Margins +4 and -4: mean of log(1 + e^∓4) = (.01815 + 4.01815) / 2, where the mean margin 0 would give log 2.
    w, l = values(4.0, -4.0), values(0.0, 0.0)  # noqa: E741
    assert dpo_terms(w, l, 1, 0).mean().item() == pytest.approx(2.0181499, abs=1e-6)
    assert diffusion_dpo_terms(w, l, 2).mean().item() == pytest.approx(2.0181499, abs=1e-6)


# --- whole losses


@pytest.mark.parametrize("name", ["dpo", "diffusion-dpo"])
def test_turning_the_pairs_round_negates_margin_and_accuracy(name):
    policy = fake_policy()
    samples = with_targets(policy, draw(policy, PROMPTS))
    turned = ConsistentSamples(samples.samples, 8, samples.pairs.flip(1), samples.train, samples.triples)
    algorithm = ALGORITHMS[name]()
    rows, back = (algorithm.prepare(policy, s, generator()) for s in (samples, turned))
    shake(policy)
    forth, back = algorithm.loss(policy, samples, rows), algorithm.loss(policy, turned, back)
    assert abs(float(forth.metrics["margin"])) > 1e-4
    torch.testing.assert_close(back.metrics["margin"], -forth.metrics["margin"], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(back.metrics["accuracy"], 1 - forth.metrics["accuracy"])


# --- first updates: the LoRA that drew the samples is the LoRA that is trained


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("moved", [False, True])
def test_the_first_ratio_is_1_for_drawn_and_for_made_samples(guidance, moved):
    policy = fake_policy(batch=5, guidance=guidance, steps=6)  # 5 divides neither the samples nor the rows
    if moved:
        shake(policy)
    samples = with_targets(policy, draw(policy, PROMPTS))
    rows = ALGORITHMS["ddpo"]().prepare(policy, samples, generator())
    assert sorted(rows["row"].unique().tolist()) == list(range(16))
    now = all_log_probs(policy, samples, rows["row"], rows["step"])
    assert ((now - rows["old"]).exp() - 1).abs().max() < 1e-5
    behaviour = ALGORITHMS["ddpo"](old_log_prob="behaviour").prepare(policy, samples, generator())
    made = behaviour["row"] >= samples.drawn
    ratio = (now - behaviour["old"]).exp()
    assert (ratio[~made] - 1).abs().max() < 1e-5
    assert ((ratio[made] - 1).abs() > 1e-4).float().mean() > 0.95 and (ratio[made] - 1).abs().max() > 0.05


@pytest.mark.parametrize("old", ["plain", "behaviour"])
def test_the_made_samples_log_probs_are_of_the_prediction_that_drew_them(old):
    policy = fake_policy()
    samples = with_targets(policy, draw(policy, PROMPTS))
    rows = ALGORITHMS["ddpo"](old_log_prob=old).prepare(policy, samples, generator())
    stored = samples.samples.trajectory.log_probs[rows["row"], rows["step"]]
    same = rows["old"] == stored
    made = rows["row"] >= samples.drawn
    assert same[~made].all() and same[made].all() == (old == "behaviour")


def test_ddpos_first_gradient_is_minus_advantage_times_that_of_the_log_prob():
    policy = fake_policy()
    samples = with_targets(policy, draw(policy, PROMPTS))
    algorithm = ALGORITHMS["ddpo"](clip=1e-4, step_weight="sigma")
    rows = algorithm.prepare(policy, samples, generator())
    _, found = loss_and_gradient(policy, samples, algorithm, rows)
    log_prob = step_log_prob(policy, samples, rows["row"], rows["step"])
    (-rows["advantage"] * log_prob * rows["weight"]).mean().backward()
    torch.testing.assert_close(found, gradient(policy), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "beta"), [("dpo", 0.1), ("dpo", 20.0), ("diffusion-dpo", 5000.0)])
def test_a_fresh_lora_is_the_reference_so_dpo_starts_at_log_2(name, beta):
    policy = fake_policy()
    samples = with_targets(policy, draw(policy, PROMPTS))
    algorithm = ALGORITHMS[name](beta=beta)
    loss = algorithm.loss(policy, samples, algorithm.prepare(policy, samples, generator()))
    assert float(loss.value.detach()) == pytest.approx(math.log(2), abs=1e-3)
    assert abs(float(loss.metrics["margin"])) < 1e-6


def test_dpos_log_ratios_are_to_the_base_not_to_the_round_before():
    policy = fake_policy()
    shake(policy)
    samples = with_targets(policy, draw(policy, PROMPTS))
    algorithm = ALGORITHMS["dpo"](beta=3.0, step_weight="sigma")
    rows = algorithm.prepare(policy, samples, generator())
    base = fake_policy()  # the same network without the shaken LoRA
    winner, loser = samples.pairs[rows["row"]].T
    ratio_w, ratio_l = (
        all_log_probs(policy, samples, side, rows["step"]) - all_log_probs(base, samples, side, rows["step"])
        for side in (winner, loser)
    )
    sigma = policy.schedule.std / policy.schedule.std.mean()
    expected = (sigma[rows["step"]] * torch.nn.functional.softplus(-3 * (ratio_w - ratio_l))).mean()
    assert abs(float(expected) - math.log(2)) > 1e-3
    torch.testing.assert_close(algorithm.loss(policy, samples, rows).value, expected, rtol=1e-4, atol=1e-5)


def test_dpo_scores_each_sample_once_however_many_pairs_it_is_in():
    policy = fake_policy(steps=4)
    drawn = draw(policy, ["one"] * 8)
    samples = Vanilla(PairConfig()).build(policy, drawn, lambda images, prompts: torch.zeros(len(images)))
    assert samples.pairs.tolist() == [[7, 3], [7, 2], [6, 1], [6, 0]]
    before = policy.network_evaluations
    rows = ALGORITHMS["dpo"]().prepare(policy, samples, generator())
    assert policy.network_evaluations - before == 6 * 4
    with policy.reference():
        torch.testing.assert_close(rows["ref_w"], all_log_probs(policy, samples, rows["winner"], rows["step"]))
        torch.testing.assert_close(rows["ref_l"], all_log_probs(policy, samples, rows["loser"], rows["step"]))


# --- steps


def test_windows_and_weights_of_steps():
    policy = fake_policy(steps=8)
    assert window_steps(policy, (0.0, 0.5)).tolist() == [0, 1, 2, 3]
    assert window_steps(policy, (0.5, 1.0)).tolist() == [4, 5, 6, 7]
    steps = window_steps(policy, (0.25, 0.75))
    assert step_weights(policy, steps, "one").tolist() == [1, 1, 1, 1]
    sigma = step_weights(policy, steps, "sigma")
    assert float(sigma.mean()) == pytest.approx(1)
    torch.testing.assert_close(sigma / sigma[0], policy.schedule.std[steps] / policy.schedule.std[steps[0]])
    rows = every_step(torch.tensor([5, 2]), steps, sigma)
    assert rows["row"].tolist() == [5] * 4 + [2] * 4 and rows["step"].tolist() == [2, 3, 4, 5] * 2
    torch.testing.assert_close(rows["weight"], sigma.repeat(2))


def test_a_deterministic_step_is_never_trained_on_and_a_window_of_it_alone_is_refused():
    policy = fake_policy(steps=4, scheduler=ddim(timestep_spacing="leading"))
    assert policy.schedule.stochastic.tolist() == [True, True, True, False]
    assert window_steps(policy, (0.0, 1.0)).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="none of the 4 stochastic steps"):
        window_steps(policy, (0.75, 1.0))
    with pytest.raises(ValueError, match="none of the 4 stochastic steps"):
        window_steps(policy, (0.3, 0.3))
    samples = with_targets(policy, draw(policy, PROMPTS))
    for name in ("dpo", "ddpo"):
        assert 3 not in ALGORITHMS[name]().prepare(policy, samples, generator())["step"]


@pytest.mark.parametrize("share", [(-0.5, 1.0), (0.0, 2.0), (0.5, 0.0)])
def test_shares_outside_0_to_1_or_turned_round_are_refused(share):
    for config, option in ((DPOConfig, "window"), (DDPOConfig, "window"), (DiffusionDPOConfig, "levels")):
        with pytest.raises(ValidationError):
            config(**{option: share})


# --- ddpo's advantages


def test_advantages_below_and_above_min_count_by_hand():
    algorithm = DDPO(DDPOConfig(min_count=4, buffer=4, advantage_clip=5))
    # Two rewards of each prompt are remembered, fewer than 4: mean 3 and sd sqrt(5) of the whole round.
    found = algorithm._advantages(["a", "a", "b", "b"], torch.tensor([0.0, 2.0, 4.0, 6.0]))
    torch.testing.assert_close(found, torch.tensor([-3.0, -1.0, 1.0, 3.0]) / math.sqrt(5))
    # Now a has 0 2 4 10: mean 4, sd sqrt((16 + 4 + 0 + 36) / 4) = sqrt(14). c is new: mean and sd of the round,
    # 4 10 1 3: mean 4.5, sd sqrt((.25 + 30.25 + 12.25 + 2.25) / 4) = sqrt(11.25).
    found = algorithm._advantages(["a", "a", "c", "c"], torch.tensor([4.0, 10.0, 1.0, 3.0]))
    expected = [0, 6 / math.sqrt(14), -3.5 / math.sqrt(11.25), -1.5 / math.sqrt(11.25)]
    torch.testing.assert_close(found, torch.tensor(expected))
    # a forgets 0 and 2: 4 10 4 4, mean 5.5, sd sqrt((2.25 * 3 + 20.25) / 4) = sqrt(6.75).
    found = algorithm._advantages(["a", "a"], torch.tensor([4.0, 4.0]))
    torch.testing.assert_close(found, torch.full((2,), -1.5 / math.sqrt(6.75)))


def test_advantages_are_clipped_and_finite_where_all_rewards_are_alike():
    algorithm = DDPO(DDPOConfig(min_count=2, buffer=64, advantage_clip=2))
    rewards = torch.tensor([0.0] * 19 + [100.0])
    assert algorithm._advantages(["a"] * 20, rewards).max() == 2  # (100 - 5) / 21.8 without the clip
    assert algorithm._advantages(["b"] * 3, torch.ones(3)).tolist() == [0, 0, 0]


def test_every_step_of_a_sample_has_its_samples_advantage():
    policy = fake_policy()
    samples = with_targets(policy, draw(policy, PROMPTS))
    algorithm = ALGORITHMS["ddpo"](buffer=8, min_count=8)
    rows = algorithm.prepare(policy, samples, generator())
    # Rewards of "one": 0 1 2 3 drawn, 1 2 3 4 made; mean 2, sd sqrt(1.5).
    first = rows["advantage"][rows["row"] == 0]
    torch.testing.assert_close(first, torch.full((4,), -2 / math.sqrt(1.5)))
    torch.testing.assert_close(rows["advantage"][rows["row"] == 11], torch.full((4,), 2 / math.sqrt(1.5)))


def test_an_algorithm_without_state_refuses_a_foreign_one():
    assert ALGORITHMS["dpo"]().state() == {}
    with pytest.raises(ValueError, match="keeps no state"):
        ALGORITHMS["dpo"]().load_state({"seen.a": torch.zeros(1)})


# --- diffusion-dpo's noise


def test_winner_and_loser_share_level_and_noise_and_rows_do_not():
    policy, samples, algorithm, rows = round_of("diffusion-dpo", timesteps=3)
    network = policy.adapter.network
    network.calls.clear()
    algorithm.loss(policy, samples, rows)
    ((noised, t),) = network.calls
    t_w, t_l = t.chunk(2)
    assert torch.equal(t_w, t_l) and torch.equal(t_w, rows["t"]) and len(rows["t"]) == 8 * 3
    a = policy.adapter.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    clean = samples.samples.trajectory.final[torch.cat([rows["winner"], rows["loser"]])]
    noise_w, noise_l = ((noised - a.sqrt() * clean) / (1 - a).sqrt()).chunk(2)
    seen = t_w > 100  # at the cleanest levels the subtraction leaves rounding alone
    torch.testing.assert_close(noise_w[seen], noise_l[seen], rtol=1e-3, atol=1e-3)
    assert torch.cdist(noise_w[seen].flatten(1), noise_w[seen].flatten(1)).fill_diagonal_(9).min() > 0.1
    assert len(rows["t"].unique()) > 12


@pytest.mark.parametrize("levels", [(0.0, 1.0), "sampler"])
def test_diffusion_dpos_value_is_that_of_the_paper(levels):
    policy, samples, algorithm, rows = round_of("diffusion-dpo", beta=50.0, levels=levels)
    base, network = fake_policy(), policy.adapter.network
    network.calls.clear()
    found = algorithm.loss(policy, samples, rows).value
    ((noised, t),) = network.calls
    assert set(t.tolist()) <= set(policy.schedule.timesteps.tolist() if levels == "sampler" else range(1000))
    both = torch.cat([rows["winner"], rows["loser"]])
    prompts = [samples.samples.prompts[i] for i in both.tolist()]
    clean, a = samples.samples.trajectory.final[both], policy.adapter.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    # In x_0 the v-prediction's error is the clean one's: v - v' = (x_0' - x_0) / sqrt(1 - a).
    errors = []
    for p in (policy, base):
        clean_hat = a.sqrt() * noised - (1 - a).sqrt() * p.predict(noised, t, prompts)
        errors.append(((clean_hat - clean) ** 2 / (1 - a)).mean((1, 2, 3)).chunk(2))
    (own_w, own_l), (base_w, base_l) = errors
    inner = -(50.0 / 2) * ((own_w - base_w) - (own_l - base_l))
    torch.testing.assert_close(found, -torch.log(torch.sigmoid(inner)).mean(), rtol=1e-3, atol=1e-3)


def test_diffusion_dpo_keeps_to_its_levels():
    rows = round_of("diffusion-dpo", levels=(0.5, 0.75), timesteps=8)[-1]
    assert rows["t"].min() >= 500 and rows["t"].max() < 750


# --- a bandit: one number, two prompts that want it high and low


@pytest.mark.parametrize(("name", "options"), [("dpo", {"window": (0.0, 0.6)}), ("diffusion-dpo", {})])
def test_a_high_beta_holds_the_policy_to_the_base(name, options):
    low, high = (
        bandit(ALGORITHMS[name](learning_rate=1e-2, beta=beta, **options), 15)[0][-3:].mean(0) for beta in (0.5, 100)
    )
    assert (high[0] - high[1]) < 0.4 * (low[0] - low[1])
