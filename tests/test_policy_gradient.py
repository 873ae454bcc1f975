"""dpok, grpo and ddpo's score form: terms by hand, KL and densities against torch.distributions, first updates, bandits."""

from __future__ import annotations

import math

import pytest
import torch
from bench_dfusion.algorithms.ddpo import DDPO, DDPOConfig
from bench_dfusion.algorithms.dpok import DPOK, DPOKConfig
from bench_dfusion.algorithms.grpo import GRPO, GRPOConfig, leads_away
from torch.distributions import Normal, kl_divergence

from bench_dfusion.builders.contract import ConsistentSamples
from bench_dfusion.builders.stored_steps import Steps, all_means, stored_steps
from bench_dfusion.diffusion import samplers
from bench_dfusion.errors import UsageError
from bench_dfusion.models import schedules
from bench_dfusion.objectives.advantages import PromptAdvantages, advantages
from bench_dfusion.objectives.policy_gradient import unclipped_terms
from bench_dfusion.testing.fakes import ddim, draw, fake_policy, shake, with_targets
from bench_dfusion.testing.rounds import (
    PROMPTS,
    bandit,
    generator,
    gradient,
    loss_and_gradient,
)
from bench_dfusion.tracks.schema import validate

EARLIER = {"buffer": 4, "min_count": 4}
SCORE = {"estimator": "score", "updates": 1}
ALGORITHMS = {
    "score": lambda **o: DDPO(DDPOConfig(**{**EARLIER, **SCORE, **o})),
    "dpok": lambda **o: DPOK(DPOKConfig(**{**EARLIER, "clip": 0.9, "kl": 0.5, **o})),
    "dpok score": lambda **o: DPOK(DPOKConfig(**{**EARLIER, **SCORE, "kl": 0.5, **o})),
    "grpo": lambda **o: GRPO(GRPOConfig(**{"clip": 0.9, "kl": 0.5, **o})),
    "grpo exact": lambda **o: GRPO(GRPOConfig(**{"clip": 0.9, "kl": 0.5, "kl_form": "exact", "spread": "round", **o})),
    "grpo guard": lambda **o: GRPO(GRPOConfig(**{"clip": 0.9, "kl": 0.5, "guard": True, **o})),
    "grpo divergence": lambda **o: GRPO(GRPOConfig(**{"divergence": 2e-3, "kl": 0.5, **o})),
    "grpo cps": lambda **o: GRPO(GRPOConfig(**{"clip": 0.9, "kl": 0.5, "ratio_scale": "cps", **o})),
}
every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)


def gaussians(policy, samples, rows):
    """N(mu, sigma_t) of every row and number of its latent, made from the schedule with torch.distributions."""
    at = stored_steps(policy, samples, rows["row"], rows["step"])
    return Normal(at.mean, policy.schedule.std[rows["step"]].view(-1, 1, 1, 1))


def kl(policy, other, samples, rows):
    return kl_divergence(gaussians(policy, samples, rows), gaussians(other, samples, rows)).mean((1, 2, 3))


def moved(name, seed=5, size=0.05, **options):
    """A round of a policy that had moved off the base before it drew, and has moved on since."""
    policy = fake_policy()
    shake(policy, 0.1, seed=3)
    samples = with_targets(policy, draw(policy, PROMPTS))
    algorithm = ALGORITHMS[name](**options)
    rows = algorithm.prepare(policy, samples, generator())
    old = fake_policy()
    shake(old, 0.1, seed=3)
    shake(policy, size, seed=seed)
    return policy, old, samples, algorithm, rows


# --- by hand


class Toy:
    """A policy of two samples, three numbers and two steps: at step 0 sigma is 1/2, at step 1 it is 1."""

    device = torch.device("cpu")
    schedule = schedules.Schedule(
        torch.tensor([600, 200]),
        *[torch.ones(2)] * 3,
        "epsilon",
        *[torch.ones(2)] * 2,
        torch.tensor([0.5, 1.0]),
        torch.ones(2),
    )


# Sample 0 at step 0, sample 1 at step 1; means, the base's means, the means at the start of the round, and x_s.
MEAN = [[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]]
BASE = [[0.0, 0.0, 1.0], [0.0, 3.0, 0.0]]
OLD = [[1.0, 1.0, 2.0], [0.0, 0.0, 1.0]]
NEXT = [[1.5, 0.5, 2.0], [1.0, 1.0, 3.0]]


def toy_loss(monkeypatch, algorithm, rows):
    """The loss over the toy's two rows; log-probs without the Gaussian's constant, which a ratio does not see."""

    def steps(policy, samples, row, step):
        mean, std = torch.tensor(MEAN), Toy.schedule.std[step]
        log_prob = -((torch.tensor(NEXT) - mean) ** 2).mean(1) / (2 * std**2)
        return Steps(mean, mean, std, log_prob)

    for module in ("ddpo", "dpok", "grpo"):
        monkeypatch.setattr(f"bench_dfusion.algorithms.{module}.stored_steps", steps)
    shared = {"row": [0, 1], "step": [0, 1], "weight": [1.0, 3.0], "advantage": [2.0, -1.0], "old": [0.0, -2.0]}
    rows = {k: torch.tensor(v) for k, v in (shared | rows).items()}
    return algorithm.loss(Toy(), None, rows)


# log pi: sample 0: squares .25 .25 0, mean 1/6, over 2/4: -1/3. Sample 1: squares 1 0 4, mean 5/3, over 2: -5/6.
LOG = [-1 / 3, -5 / 6]
# KL to the base: sample 0: squares 1 0 1, mean 2/3, over 2/4: 4/3. Sample 1: 0 4 1, mean 5/3, over 2: 5/6.
KL = [4 / 3, 5 / 6]


def mean_of(first, second):
    """Weights are 1 and 3: the loss is (first + 3 second) / 2."""
    return pytest.approx((first + 3 * second) / 2, rel=1e-5)


def test_the_score_form_by_hand(monkeypatch):
    loss = toy_loss(monkeypatch, ALGORITHMS["score"](), {})
    assert loss.value.item() == mean_of(-2 * LOG[0], LOG[1])  # -A log pi with A = 2 and -1


def test_dpok_by_hand(monkeypatch):
    # Old log-probs are 0 and -2: ratios e^{-1/3} = .7165 and e^{7/6} = 3.211, clipped to .8 and 1.2.
    # A = 2: max(-1.433, -1.6) = -2 e^{-1/3}. A = -1: max(3.211, 1.2) = e^{7/6}.
    terms = -2 * math.exp(-1 / 3), math.exp(7 / 6)
    loss = toy_loss(monkeypatch, ALGORITHMS["dpok"](clip=0.2, kl=0.3), {"ref_mean": BASE})
    assert loss.value.item() == mean_of(terms[0] + 0.3 * KL[0], terms[1] + 0.3 * KL[1])
    assert float(loss.metrics["kl"]) == pytest.approx((KL[0] + KL[1]) / 2)


@pytest.mark.parametrize(("form", "sizes"), [("exact", (1, 1)), ("flow", (0.4, 0.2))])
def test_grpo_by_hand(monkeypatch, form, sizes):
    # As dpok; in Flow-GRPO's form the KL is times the steps' sizes, 600 to 200 to 0 of 1000.
    terms = -2 * math.exp(-1 / 3), math.exp(7 / 6)
    algorithm = ALGORITHMS["grpo"](clip=0.2, kl=0.3, kl_form=form)
    loss = toy_loss(monkeypatch, algorithm, {"ref_mean": BASE, "size": [0.4, 0.2]})
    assert loss.value.item() == mean_of(*(t + 0.3 * s * k for t, s, k in zip(terms, sizes, KL, strict=True)))


@pytest.mark.parametrize("name", ["dpok", "grpo"])
@pytest.mark.parametrize(
    ("scale", "log_ratios"),
    [
        # Log-ratios -1/3 and 7/6 at sigma 1/2 and 1. By sigma: -1/6 and 7/6. By 2 sigma^2: -1/6 and 7/3, which is that of
        # squared errors: -(1/6 - 0) and -(5/3 - 4), x 2 sigma^2 having made old log-probs 0 and -4 of 0 and -2.
        ("sigma", (-1 / 6, 7 / 6)),
        ("cps", (-1 / 6, 7 / 3)),
    ],
)
def test_log_ratios_in_another_unit_by_hand(monkeypatch, name, scale, log_ratios):
    algorithm = ALGORITHMS[name](clip=0.15, kl=0.0, ratio_scale=scale)
    rows = {"ref_mean": BASE, "size": [0.4, 0.2], "advantage": [-2.0, -1.0]}
    loss = toy_loss(monkeypatch, algorithm, rows)
    # A = -2: max(2 e^{-1/6}, 2 * .85) is e^{-1/6} = .846 clipped. A = -1: e^{...} as it is.
    assert loss.value.item() == mean_of(2 * 0.85, math.exp(log_ratios[1]))
    assert float(loss.metrics["clipped"]) == 1
    wide = toy_loss(monkeypatch, ALGORITHMS[name](clip=0.99, kl=0.0, ratio_scale=scale), rows)
    assert wide.value.item() == mean_of(2 * math.exp(log_ratios[0]), math.exp(log_ratios[1]))
    assert float(wide.metrics["approx_kl"]) == pytest.approx((1 / 9 + 49 / 36) / 4)  # whatever the unit


@pytest.mark.parametrize("name", ["dpok", "grpo"])
def test_a_ratio_in_cpss_unit_is_that_of_squared_errors(name):
    policy, old, samples, algorithm, rows = moved(name, kl=0.0, ratio_scale="cps")
    x_s = samples.samples.trajectory.latents[rows["row"], rows["step"] + 1]
    now, before = (gaussians(p, samples, rows).mean for p in (policy, old))
    log_prob, old_log_prob = (-((x_s - mean) ** 2).mean((1, 2, 3)) for mean in (now, before))
    ratio = (log_prob - old_log_prob).exp()
    expected = torch.maximum(-rows["advantage"] * ratio, -rows["advantage"] * ratio.clamp(0.1, 1.9)).mean()
    torch.testing.assert_close(algorithm.loss(policy, samples, rows).value, expected, rtol=1e-3, atol=1e-4)


def test_grpo_guard_by_hand(monkeypatch):
    # |mu - mu_old|^2 / (2 sigma^2): squares 0 1 0, mean 1/3, over 2/4: 2/3; and 0 1 0, over 2: 1/6.
    # log rho: (-1/3 + 2/3) / 2 = 1/6 and (7/6 + 1/6) * 1 = 4/3. A = 2: e^{1/6} = 1.18 is clipped to 1.1: -2.2.
    # A = -1: e^{4/3}. Both over the steps' sizes.
    algorithm = ALGORITHMS["grpo guard"](clip=0.1, kl=0.0)
    loss = toy_loss(monkeypatch, algorithm, {"old_mean": OLD, "size": [0.4, 0.2]})
    assert loss.value.item() == mean_of(-2.2 / 0.4, math.exp(4 / 3) / 0.2)


@pytest.mark.parametrize(
    ("advantage", "ratio", "term"), [(1, 1.01, 0), (-1, 1.01, 1.01), (1, 0.99, -0.99), (-1, 0.99, 0), (0, 1.01, 0)]
)
def test_flow_dppos_terms_by_hand(advantage, ratio, term):
    log_ratio, advantage = torch.tensor([ratio]).log(), torch.tensor([float(advantage)])
    for divergence, expected in ((2e-5, term), (1e-5, term), (0.9e-5, -advantage * ratio)):  # the threshold is 1e-5
        away = leads_away(log_ratio, torch.tensor([divergence]), advantage, 1e-5, exact=False)
        assert (unclipped_terms(log_ratio, advantage) * ~away).item() == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize(
    ("divergence", "terms", "dropped"),
    [
        (0.7, (2 * math.exp(-1 / 3), -math.exp(7 / 6)), 0),
        (0.5, (0, -math.exp(7 / 6)), 0.5),
        (0.1, (0, 0), 1),
    ],
)
def test_grpo_with_a_divergence_by_hand(monkeypatch, divergence, terms, dropped):
    # D is 2/3 and 1/6 as in GRPO-Guard, log rho -1/3 and 7/6: with A = -2 and 1 both rows lead away.
    algorithm = ALGORITHMS["grpo divergence"](divergence=divergence, kl=0.0)
    loss = toy_loss(monkeypatch, algorithm, {"old_mean": OLD, "size": [0.4, 0.2], "advantage": [-2.0, 1.0]})
    assert loss.value.item() == mean_of(*terms)
    assert float(loss.metrics["dropped"]) == dropped
    assert float(loss.metrics["divergence"]) == pytest.approx(5 / 12)
    # With A = 2 and -1 both come back, and none is dropped.
    back = toy_loss(monkeypatch, algorithm, {"old_mean": OLD, "size": [0.4, 0.2]})
    assert back.value.item() == mean_of(-2 * math.exp(-1 / 3), math.exp(7 / 6))


def test_the_exact_sign_by_hand(monkeypatch):
    # log rho of sample 0 is -1/3 + .9 = .567, below its D of 2/3: rho is above 1 and yet the row comes back with A = 2.
    rows = {"old_mean": OLD, "size": [0.4, 0.2], "old": [-0.9, -2.0]}
    for sign, first in (("ratio", 0), ("exact", -2 * math.exp(0.9 - 1 / 3))):
        algorithm = ALGORITHMS["grpo divergence"](divergence=0.5, divergence_sign=sign, kl=0.0)
        assert toy_loss(monkeypatch, algorithm, rows).value.item() == mean_of(first, math.exp(7 / 6))


def test_the_exact_sign_is_whether_the_rows_gradient_makes_the_divergence_grow():
    x, old = torch.randn(2, 400, 3, generator=generator(), dtype=torch.float64)
    mean = (old + 0.7 * torch.randn(400, 3, generator=generator(1))).requires_grad_()
    std, advantage = torch.full((400,), 0.6), torch.randn(400, generator=generator(2))
    log_ratio = (Normal(mean, 0.6).log_prob(x) - Normal(old, 0.6).log_prob(x)).mean(1)
    (uphill,) = torch.autograd.grad((advantage * log_ratio.exp()).sum(), mean, retain_graph=True)
    divergence = kl_divergence(Normal(mean, 0.6), Normal(old, 0.6)).mean(1)
    (grows,) = torch.autograd.grad(divergence.sum(), mean)
    wanted = (uphill * grows).sum(1) > 0
    found = samplers.gaussian_kl(mean.detach(), old, std.double())
    assert torch.equal(leads_away(log_ratio.detach(), found, advantage, 1e-9, exact=True), wanted)
    assert not torch.equal(leads_away(log_ratio.detach(), found, advantage, 1e-9, exact=False), wanted)


def test_1e_4_holds_differences_of_rounding_down():
    # 1e-4 holds differences of rounding down: std 5e-6 makes .0476, not 1.
    samples = draw(fake_policy(), ["a", "a", "b"], [0.0, 1e-5, 7.0])
    almost = advantages(samples, torch.arange(3), 5)
    torch.testing.assert_close(almost, torch.tensor([-0.047619, 0.047619, 0.0]), rtol=1e-4, atol=0)


def test_ddpos_advantages_hold_differences_of_rounding_down():
    # std 1e-6, so 1e-6 / (1e-6 + 1e-6)
    found = PromptAdvantages(buffer=2, min_count=2, clip=5)(["a", "a"], torch.tensor([0.0, 2e-6]))
    torch.testing.assert_close(found, torch.tensor([-0.5, 0.5]), rtol=1e-4, atol=0)


def test_a_group_is_the_prompts_targets_and_bases_whatever_was_drawn_before():
    policy, _, samples, algorithm, rows = moved("grpo")
    # Rewards of "one": 0 1 2 3 drawn, 1 2 3 4 made; mean 2, sd sqrt(1.5); "two" the same, 4 higher.
    first, last = (rows["advantage"][rows["row"] == i] for i in (0, 15))
    torch.testing.assert_close(first, torch.full((4,), -2 / (math.sqrt(1.5) + 1e-4)))
    torch.testing.assert_close(last, torch.full((4,), 2 / (math.sqrt(1.5) + 1e-4)))
    again = algorithm.prepare(policy, samples, generator())["advantage"]
    assert torch.equal(again, rows["advantage"]) and algorithm.state() == {}


def test_step_sizes_add_up_to_the_first_timestep():
    policy = fake_policy(steps=5)
    assert policy.schedule.timesteps.tolist() == [999, 799, 599, 399, 199]
    torch.testing.assert_close(policy.schedule.size, torch.tensor([0.2, 0.2, 0.2, 0.2, 0.199]))
    leading = fake_policy(steps=4, scheduler=ddim(timestep_spacing="leading"))
    assert leading.schedule.size.tolist() == [0.25] * 3 + [0.0]


# --- against torch.distributions


def test_stored_steps_have_the_log_probs_of_the_policy_and_of_a_normal():
    policy, _, samples, _, rows = moved("score")
    at = stored_steps(policy, samples, rows["row"], rows["step"])
    x_s = samples.samples.trajectory.latents[rows["row"], rows["step"] + 1]
    expected = gaussians(policy, samples, rows).log_prob(x_s).mean((1, 2, 3))
    torch.testing.assert_close(at.log_prob, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(all_means(policy, samples, rows["row"], rows["step"]), at.mean)


@pytest.mark.parametrize("name", [n for n in ALGORITHMS if n != "score"])
def test_the_kl_is_that_of_the_steps_gaussians_to_the_base(name):
    policy, _, samples, algorithm, rows = moved(name)
    expected = kl(policy, fake_policy(), samples, rows)
    assert expected.mean() > 1e-2
    torch.testing.assert_close(algorithm.loss(policy, samples, rows).metrics["kl"], expected.mean(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", [n for n in ALGORITHMS if n != "score"])
def test_the_kls_part_of_a_loss_and_of_its_gradient(name):
    policy, _, samples, algorithm, rows = moved(name, step_weight="sigma")
    without = ALGORITHMS[name](step_weight="sigma", kl=0.0)
    size = 1.0 if name in ("dpok", "dpok score", "grpo exact") else policy.schedule.size[rows["step"]]
    expected = (0.5 * rows["weight"] * size * kl(policy, fake_policy(), samples, rows)).mean()
    expected.backward()
    part = gradient(policy)
    value, whole = loss_and_gradient(policy, samples, algorithm, rows)
    rest_value, rest = loss_and_gradient(policy, samples, without, rows)
    torch.testing.assert_close(value - rest_value, expected.detach(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(whole - rest, part, rtol=1e-2, atol=1e-3)


def test_without_kl_dpok_is_ddpo_and_grpo_asks_nothing_of_the_base():
    policy, _, samples, dpok, rows = moved("dpok", kl=0.0)
    ddpo = DDPO(DDPOConfig(**EARLIER, clip=0.9))
    torch.testing.assert_close(
        loss_and_gradient(policy, samples, dpok, rows), loss_and_gradient(policy, samples, ddpo, rows)
    )
    before = policy.network_evaluations
    rows = ALGORITHMS["grpo"](kl=0.0).prepare(policy, samples, generator())
    assert policy.network_evaluations - before == 8 * 4 and "ref_mean" not in rows  # the targets' old log-probs


def test_grpo_guards_ratio_is_linear_in_the_move_and_of_mean_1_for_drawn_samples():
    # log rho = z (mu - mu_old), averaged over the latent, with z = (x_s - mu_old) / sigma: the same scale at every step.
    policy, old, samples, algorithm, rows = moved("grpo guard", kl=0.0)
    x_s = samples.samples.trajectory.latents[rows["row"], rows["step"] + 1]
    before, now = gaussians(old, samples, rows), gaussians(policy, samples, rows)
    z = (x_s - before.mean) / before.stddev
    log_ratio = (z * (now.mean - before.mean)).mean((1, 2, 3))
    expected = -rows["advantage"] * log_ratio.exp() / policy.schedule.size[rows["step"]]  # nothing is clipped at .9
    assert log_ratio.abs().max() < 0.5 and log_ratio.std() > 1e-3
    torch.testing.assert_close(algorithm.loss(policy, samples, rows).value, expected.mean(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sign", ["ratio", "exact"])
@pytest.mark.parametrize("threshold", [2e-3, 1e9])
def test_flow_dppo_written_a_second_time(sign, threshold):
    policy, old, samples, algorithm, rows = moved("grpo divergence", kl=0.0, divergence=threshold, divergence_sign=sign)
    x_s = samples.samples.trajectory.latents[rows["row"], rows["step"] + 1]
    before, now = gaussians(old, samples, rows), gaussians(policy, samples, rows)
    distance, dropped = kl_divergence(now, before).mean((1, 2, 3)), 0
    log_ratio = (now.log_prob(x_s) - before.log_prob(x_s)).mean((1, 2, 3))
    expected = []
    for a, d, ratio in zip(rows["advantage"].tolist(), distance.tolist(), log_ratio.exp(), strict=True):
        inner = math.log(ratio.item()) - d if sign == "exact" else ratio.item() - 1
        gone = d >= threshold and ((a > 0 and inner > 0) or (a < 0 and inner < 0))
        expected.append(0 * ratio if gone else -a * ratio)
        dropped += gone
    assert 0 < dropped < 0.7 * len(expected) if threshold < 1 else dropped == 0
    torch.stack(expected).mean().backward()
    part = gradient(policy)
    loss = algorithm.loss(policy, samples, rows)
    assert float(loss.metrics["dropped"]) == pytest.approx(dropped / len(expected))
    torch.testing.assert_close(loss.value, torch.stack(expected).mean(), rtol=1e-3, atol=1e-4)
    loss.value.backward()
    torch.testing.assert_close(gradient(policy), part, rtol=1e-2, atol=1e-3)


# --- first updates: the LoRA that drew the samples is the LoRA that is trained

AT_FIRST = [n for n in ALGORITHMS if "score" not in n]


@pytest.mark.parametrize("name", AT_FIRST)
@pytest.mark.parametrize("shaken", [False, True])
def test_the_first_ratio_is_1_for_drawn_and_for_made_samples(name, shaken):
    policy = fake_policy(batch=5, steps=6)  # 5 divides neither the samples nor the rows
    if shaken:
        shake(policy)
    samples = with_targets(policy, draw(policy, PROMPTS))
    algorithm = ALGORITHMS[name](kl=0.0, clip=1e-5)
    rows = algorithm.prepare(policy, samples, generator())
    assert sorted(rows["row"].unique().tolist()) == list(range(16))
    now = stored_steps(policy, samples, rows["row"], rows["step"]).log_prob.detach()
    assert ((now - rows["old"]).exp() - 1).abs().max() < 1e-5
    metrics = algorithm.loss(policy, samples, rows).metrics
    assert float(metrics["dropped" if "divergence" in name else "clipped"]) == 0 and float(metrics["approx_kl"]) < 1e-10


@every_algorithm
@pytest.mark.parametrize("side", ["drawn", "made", "both"])
def test_the_first_gradient_is_the_on_policy_one(name, side):
    policy = fake_policy()
    shake(policy)
    samples = with_targets(policy, draw(policy, PROMPTS))
    if side != "both":
        own = torch.arange(8) + 8 * (side == "made")
        samples = ConsistentSamples(samples.samples, 8, samples.pairs, own, samples.triples)
    kl_off = {} if name == "score" else {"kl": 0.0}
    clip = {} if "score" in name else {"clip": 1e-4}
    algorithm = ALGORITHMS[name](step_weight="sigma", **kl_off, **clip)
    rows = algorithm.prepare(policy, samples, generator())
    assert rows["advantage"].abs().max() > 0.5
    _, found = loss_and_gradient(policy, samples, algorithm, rows)
    weight = rows["weight"]
    if name == "grpo cps":
        weight = weight * 2 * policy.schedule.std[rows["step"]] ** 2
    if name == "grpo guard":  # whose steps weigh sigma_t / -dt
        weight = weight * policy.schedule.std[rows["step"]] / policy.schedule.size[rows["step"]]
    log_prob = gaussians(policy, samples, rows).log_prob(
        samples.samples.trajectory.latents[rows["row"], rows["step"] + 1]
    )
    (-rows["advantage"] * weight * log_prob.mean((1, 2, 3))).mean().backward()
    torch.testing.assert_close(found, gradient(policy), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["dpok", "grpo"])
def test_behaviour_log_probs_are_those_that_drew_the_targets(name):
    policy = fake_policy()
    samples = with_targets(policy, draw(policy, PROMPTS))
    rows = ALGORITHMS[name](old_log_prob="behaviour").prepare(policy, samples, generator())
    assert torch.equal(rows["old"], samples.samples.trajectory.log_probs[rows["row"], rows["step"]])


@pytest.mark.parametrize("name", ["dpok", "grpo", "grpo guard", "grpo divergence"])
def test_a_fresh_loras_kl_is_0_and_so_is_its_gradient(name):
    policy = fake_policy()
    samples = with_targets(policy, draw(policy, PROMPTS))
    samples.samples.rewards[:] = 1.0  # no advantages: the KL is all there is
    algorithm = ALGORITHMS[name]()
    loss = algorithm.loss(policy, samples, algorithm.prepare(policy, samples, generator()))
    loss.value.backward()
    assert abs(loss.value.item()) < 1e-6 and gradient(policy).abs().max() < 1e-5


# --- whole losses


@every_algorithm
def test_preparing_keeps_to_the_window(name):
    policy = fake_policy(steps=4, scheduler=ddim(timestep_spacing="leading"))  # whose last step is deterministic
    samples = with_targets(policy, draw(policy, PROMPTS))
    rows = ALGORITHMS[name](window=(0.25, 1.0)).prepare(policy, samples, generator())
    assert {len(v) for v in rows.values()} == {16 * 2} and set(rows["step"].tolist()) == {1, 2}


# --- options


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (DDPOConfig, {"estimator": "score"}, "on-policy only: set updates = 1 and inner_epochs = 1, not 2 and 1"),
        (DDPOConfig, {**SCORE, "inner_epochs": 2}, "set updates = 1 and inner_epochs = 1, not 1 and 2"),
        (DPOKConfig, {"estimator": "score"}, "on-policy only"),
        (DDPOConfig, {**SCORE, "old_log_prob": "behaviour"}, "score has no pi_old"),
        (DDPOConfig, {"buffer": 8}, "never be reached"),
        (DPOKConfig, {"kl": -1}, "kl: "),
        (GRPOConfig, {"kl": -1}, "kl: "),
        (GRPOConfig, {"guard": True, "old_log_prob": "behaviour"}, "guard needs the means of pi_old"),
        (GRPOConfig, {"divergence": 1e-6, "old_log_prob": "behaviour"}, "divergence needs the means of pi_old"),
        (GRPOConfig, {"divergence": 1e-6, "guard": True}, "divergence takes its place: set one of them"),
        (GRPOConfig, {"divergence_sign": "exact"}, "set divergence too"),
        (GRPOConfig, {"ratio_scale": "cps", "guard": True}, "leave ratio_scale out, or guard"),
        (DPOKConfig, {**SCORE, "ratio_scale": "sigma"}, "score has no ratio"),
        (DDPOConfig, {"ratio_scale": 2}, "ratio_scale: "),
        (GRPOConfig, {"divergence": 0}, "divergence: "),
        (GRPOConfig, {"spread": "batch"}, "spread: "),
    ],
)
def test_what_is_wrong_is_refused_in_one_line(config, settings, message):
    with pytest.raises(UsageError, match=message) as refused:
        validate(config, settings, "algo")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("config", [DDPOConfig, DPOKConfig, GRPOConfig])
def test_options_of_later_versions_leave_the_hash_of_a_cell_without_them(config):
    later = {"ema", "ratio_scale", "divergence", "divergence_sign"}
    assert not later & config().model_dump().keys()
    assert config(ratio_scale="cps").model_dump()["ratio_scale"] == "cps"


# --- a bandit

BANDIT = {"clip": 0.2, "learning_rate": 1e-2, "step_weight": "sigma"}


@pytest.mark.parametrize(
    ("name", "options"), [("dpok", {"buffer": 32, "min_count": 32}), ("grpo", {}), ("grpo exact", {})]
)
def test_a_high_kl_weight_holds_the_policy_to_the_base(name, options):
    low, high = (bandit(ALGORITHMS[name](**{**BANDIT, **options, "kl": k}), 15)[0][-3:].mean(0) for k in (0.0, 50.0))
    assert (high[0] - high[1]) < 0.5 * (low[0] - low[1])
