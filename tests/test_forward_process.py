"""sft, rwr, kto, dgpo, nft, crd and awm: terms by hand, losses written a second time, first updates, a bandit."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from bench_dfusion.algorithms.awm import AWM, AWMConfig, pseudo_log_prob
from bench_dfusion.algorithms.crd import CRD, CRDConfig, crd_terms
from bench_dfusion.algorithms.dgpo import DGPO, DGPOConfig, dgpo_terms
from bench_dfusion.algorithms.kto import KTO, KTOConfig, kto_terms
from bench_dfusion.algorithms.nft import NFT, NFTConfig, nft_terms
from bench_dfusion.algorithms.rwr import RWR, RWRConfig, rwr_weights
from bench_dfusion.algorithms.sft import SFT, SFTConfig
from pydantic import ValidationError
from torch.distributions import Normal
from torch.nn.functional import softplus

from bench_dfusion.builders.contract import ConsistentSamples
from bench_dfusion.diffusion import samplers
from bench_dfusion.errors import UsageError
from bench_dfusion.models import schedules
from bench_dfusion.objectives.advantages import advantages, prompt_groups, win_rates
from bench_dfusion.objectives.averages import EMA
from bench_dfusion.objectives.denoising import at_levels, draw_levels, noised
from bench_dfusion.objectives.groups import each_member
from bench_dfusion.objectives.policy_gradient import clipped_terms
from bench_dfusion.testing.fakes import RED, ddim, draw, fake_policy, shake, with_targets
from bench_dfusion.testing.rounds import PROMPTS, bandit, generator, gradient, loss_and_gradient, values
from bench_dfusion.tracks.schema import validate

ALGORITHMS = {
    "sft": lambda **o: SFT(SFTConfig(**o)),
    "rwr": lambda **o: RWR(RWRConfig(**{"tau": 0.7, **o})),
    "kto": lambda **o: KTO(KTOConfig(**{"beta": 3.0, "desirable": 1.5, "undesirable": 0.5, **o})),
    "dgpo": lambda **o: DGPO(DGPOConfig(**{"beta": 3.0, "clip": 0.05, "kl": 0.7, **o})),
    "nft": lambda **o: NFT(NFTConfig(**{"beta": 0.6, "kl": 0.7, **o})),
    "crd": lambda **o: CRD(CRDConfig(**{"beta": 0.6, "kl": 0.7, "space": "output", **o})),
    "awm": lambda **o: AWM(AWMConfig(**{"clip": 0.05, "weight": "time", "kl": 0.7, "kl_ema": 0.4, **o})),
}
every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)
REWARDS = [0.0, 1.0, 1.0, 4.0, 2.0, 2.5, 7.0, 3.0]


def round_of(name, size=0.1, policy=None, samples=None, **options):
    """(policy, samples, algorithm, rows as one batch) of a round: a moved LoRA drew and prepared it, and has moved on."""
    policy = policy or fake_policy()
    shake(policy)
    samples = samples or with_targets(policy, draw(policy, PROMPTS, REWARDS))
    algorithm = ALGORITHMS[name](**options)
    rows = algorithm.prepare(policy, samples, generator())
    shake(policy, size, seed=2)
    return policy, samples, algorithm, algorithm.batch(policy, samples, rows)


def before(**options):
    """The policy of `round_of` as it was when it prepared the round."""
    policy = fake_policy(**options)
    shake(policy)
    return policy


def at(policy, samples, row, t, seed):
    """The forward process written a second time."""
    scheduler = policy.adapter.scheduler
    a = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    clean = samples.samples.trajectory.latents[row, -1]
    noise = torch.cat(
        [torch.randn(1, *clean.shape[1:], generator=torch.Generator().manual_seed(s)) for s in seed.tolist()]
    )
    x_t = scheduler.add_noise(clean, noise, t)
    epsilon = scheduler.config.prediction_type == "epsilon"
    target = noise if epsilon else scheduler.get_velocity(clean, noise, t)
    prompts = [samples.samples.prompts[i] for i in row.tolist()]

    def clean_hat(output):
        return (x_t - (1 - a).sqrt() * output) / a.sqrt() if epsilon else a.sqrt() * x_t - (1 - a).sqrt() * output

    def d(output):
        return ((output - target) ** 2).mean((1, 2, 3))

    def velocity(output):  # x_t less the signal's part of x_0 is the noise's
        return (x_t - a.sqrt() * clean_hat(output)) / (1 - a).sqrt() - clean_hat(output)

    def view(output, space):
        return {"output": lambda o: o, "clean": clean_hat, "velocity": velocity}[space](output)

    return SimpleNamespace(
        x_t=x_t,
        clean=clean,
        target=target,
        d=d,
        clean_hat=clean_hat,
        view=view,
        output=lambda p: p.predict(x_t, t, prompts),
    )


def standardised(samples, row, per_prompt):
    """Advantages written a second time, in Python; no clip is reached here."""
    rewards, prompts = samples.samples.rewards.tolist(), samples.samples.prompts
    train = samples.train.tolist()
    result = []
    for i in row.tolist():
        own = [rewards[k] for k in train if prompts[k] == prompts[i]]
        every = own if per_prompt else [rewards[k] for k in train]
        mean, centre = sum(own) / len(own), sum(every) / len(every)
        std = math.sqrt(sum((r - centre) ** 2 for r in every) / len(every))
        result.append((rewards[i] - mean) / (std + 1e-4))
    return torch.tensor(result)


def squared(difference):
    return (difference**2).mean((1, 2, 3))


def normalised(e):
    return squared(e) / e.abs().mean((1, 2, 3)).detach()


def crd_a_second_time(policy, samples, rows, base, old, space, form="square"):
    """Group by group, sample by sample."""
    total, sizes = 0.0, []
    for member, t, seeds in zip(rows["member"], rows["t"], rows["noise"], strict=True):
        own = member[member >= 0]
        here = at(policy, samples, own, t.expand(len(own)), seeds[: len(own)])
        alpha = (standardised(samples, own, per_prompt=False) / 10 + 0.5).clamp(0, 1)

        def d(output, here=here):
            return normalised(here.view(output, space) - here.view(here.target, space))

        output, first = here.output(policy), here.output(base).detach()
        gain = d(here.output(old)).detach() - d(output)
        drift = squared(here.view(output, space) - here.view(first, space))
        value = 0.0
        for i in range(len(own)):
            got, wanted = 0.6 * (gain[i] - gain.mean()), alpha[i] - alpha.mean()
            if form == "square":
                term = (got - wanted) ** 2
            else:
                p, y = torch.sigmoid(0.6 * (gain[i] - gain.detach().mean())), torch.sigmoid(wanted)
                term = -(y * p.log() + (1 - y) * (1 - p).log())
            c = 1e-4 / 0.7
            value = value + 5 / 0.6 * term + 0.7 * (c + alpha[i] * (1 - c)) * drift[i]
        total = total + value / len(own) / len(rows["t"])
        sizes.append(len(own))
    assert min(sizes) > 1
    return total


def a_second_time(name, policy, samples, rows, **options):
    """The loss from the docstring's formula, with the base and the old policy as separate networks."""
    base, old = fake_policy(**options), before(**options)
    if name == "crd":
        return crd_a_second_time(policy, samples, rows, base, old, "output")
    if name == "dgpo":
        total = 0.0
        for member, t, seed in zip(rows["member"], rows["t"], rows["noise"], strict=True):
            own = member[member >= 0]
            here = at(policy, samples, own, t.expand(len(own)), seed.expand(len(own)))
            output, ref = here.output(policy), here.output(base).detach()
            advantage = standardised(samples, own, per_prompt=True)
            d, d_old = here.d(output), here.d(here.output(old)).detach()
            ratio = torch.exp(d_old - d)
            stays = ~((advantage > 0) & (ratio > 1.05) | (advantage < 0) & (ratio < 0.95))
            s = sum(float(a) * 3.0 * float(x - r) for a, x, r in zip(advantage, d.detach(), here.d(ref), strict=True))
            weight = 1 / (1 + math.exp(-s / len(own)))
            value = weight * (advantage * torch.where(stays, d, d.detach())).mean() + 0.7 * squared(output - ref).mean()
            total = total + value / len(rows["t"])
        return total
    here = at(policy, samples, rows["row"], rows["t"], rows["noise"])
    output = here.output(policy)
    ref, before_ = here.output(base).detach(), here.output(old).detach()
    d = here.d(output)
    if name == "sft":
        return d.mean()
    if name == "rwr":
        prompts = samples.samples.prompts
        weight = (standardised(samples, rows["row"], per_prompt=True) / 0.7).exp()
        train = (standardised(samples, samples.train, per_prompt=True) / 0.7).exp()
        of = {p: train[[prompts[i] == p for i in samples.train.tolist()]].mean() for p in set(prompts)}
        return (d * weight / torch.stack([of[prompts[i]] for i in rows["row"].tolist()])).mean()
    if name == "kto":
        y = standardised(samples, rows["row"], per_prompt=True).sign()
        g = here.d(ref) - d
        z = max(0.0, float(g.detach().mean()))
        return (torch.where(y > 0, 1.5, 0.5) * (1 - 1 / (1 + torch.exp(-y * 3.0 * (g - z))))).mean()
    a = standardised(samples, rows["row"], per_prompt=False)
    if name == "nft":
        r = (a / 10 + 0.5).clamp(0, 1)
        plus, minus = 0.6 * output + 0.4 * before_, 1.6 * before_ - 0.6 * output  # outputs, not x_0, are combined
        losses = []
        for v in (plus, minus):
            miss = here.clean_hat(v) - here.clean
            losses.append((miss**2 / miss.abs().mean((1, 2, 3), keepdim=True).detach()).mean((1, 2, 3)))
        return (5 * (r * losses[0] + (1 - r) * losses[1]) / 0.6 + 0.7 * squared(output - ref)).mean()
    rho = torch.exp((rows["t"] + 1) / 1000 * (here.d(before_) - d))
    a = a / 5
    clipped = rho.clamp(0.95, 1.05)
    surrogate = torch.where(a * rho < a * clipped, a * rho, a * clipped)
    return (-surrogate + 0.7 * squared(output - ref) + 0.4 * squared(output - before_)).mean()


# --- terms by hand


def test_rwr_weights_by_hand():
    # Prompt 0: softmax(0, log 3) = 1/4, 3/4, times 2. Prompt 1 has one sample: 1. Prompt 2: softmax(0, 0, 2 log 2 / 2).
    advantage = torch.tensor([0.0, 5.0, math.log(9), 0.0, 0.0, 2 * math.log(2)])
    group = torch.tensor([0, 1, 0, 2, 2, 2])
    expected = torch.tensor([0.5, 1.0, 1.5, 0.75, 0.75, 1.5])
    torch.testing.assert_close(rwr_weights(advantage, group, 2.0), expected)


def test_kto_terms_by_hand():
    # z = .1: y beta (g - z) = 10 * .2 = 2 for the good and -10 * -.2 = 2 for the bad; 1 - sigmoid(2) = .1192029.
    found = kto_terms(values(0.3, -0.1), torch.tensor([1.0, -1.0]), torch.tensor(0.1), 10, 1, 2)
    torch.testing.assert_close(found.detach(), values(0.1192029, 0.2384058).detach(), atol=1e-7, rtol=0)
    # z = 0: 10 * .1 = 1 and -10 * .1 = -1, -10 * -.5 = 5: 1 - sigmoid = .2689414, .7310586, .0066929.
    found = kto_terms(values(0.1, 0.1, -0.5), torch.tensor([1.0, -1.0, -1.0]), torch.zeros(3), 10, 1, 1)
    torch.testing.assert_close(found.detach(), values(0.2689414, 0.7310586, 0.0066929).detach(), atol=1e-7, rtol=0)


def test_dgpo_terms_by_hand():
    # First group, two members and a place of padding: S = 10 (1 * -.1 + -1 * .1) / 2 = -1, sigmoid(-1) = .2689414,
    # times (.5 - .8) / 2 = -.0403412. Second, three members: S = 10 (2 * .1 - 1 * .3 - 1 * -.2) / 3 = 1/3,
    # sigmoid(1/3) = .5825702, times (2 * .6 - .8 - .1) / 3 = .1: .0582570.
    error = torch.tensor([[0.5, 0.8, 0.0], [0.6, 0.8, 0.1]])
    ref = torch.tensor([[0.6, 0.7, 0.0], [0.5, 0.5, 0.3]])
    advantage = torch.tensor([[1.0, -1.0, 0.0], [2.0, -1.0, -1.0]])
    found = dgpo_terms(error, ref, error, advantage, torch.tensor([2, 3]), 10, 0.05)
    torch.testing.assert_close(found, torch.tensor([-0.0403412, 0.0582570]), atol=1e-6, rtol=0)


def test_nft_terms_by_hand():
    clean, old, truth = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 2.0]]), torch.zeros(1, 2)
    good = torch.tensor([0.75])
    # beta 1: x+ = (1, 3): 5 / 2 = 2.5; x- = (0, 4) - (1, 3) = (-1, 1): 1 / 1; .75 * 2.5 + .25 * 1 = 2.125.
    assert nft_terms(clean, old, truth, good, 1.0).item() == pytest.approx(2.125)
    # beta .5: x+ = (.5, 2.5): 3.25 / 1.5; x- = (0, 3) - (.5, 1.5) = (-.5, 1.5): 1.25 / 1;
    # (.75 * 2.1666667 + .25 * 1.25) / .5 = 3.875.
    assert nft_terms(clean, old, truth, good, 0.5).item() == pytest.approx(3.875)
    # Where the guess is the truth, the divisor is 1e-5 and not 0; 4e-6 away it is still 1e-5: 1.6e-11 / 1e-5.
    assert nft_terms(truth, truth, truth, good, 1.0).item() == 0
    near = torch.full((1, 2), 4e-6)
    assert nft_terms(near, near, truth, good, 1.0).item() == pytest.approx(1.6e-6, rel=1e-4)


def test_crd_terms_by_hand():
    # A = ±1: alpha .6 and .4, so the centred differences are 1, .5 and 0 times ±.1, and 5 times their mean square.
    good, real = torch.tensor([[0.6, 0.4]]), torch.ones(1, 2, dtype=torch.bool)
    for gain, expected in ((0.0, 0.05), (0.05, 0.0125), (0.1, 0.0)):
        found = 5 * crd_terms(torch.tensor([[gain, -gain]]), good, real, 1.0, "square")
        assert found.item() == pytest.approx(expected, abs=1e-8)
    # Beside one that is padded, of beta .5: R - mean R is ±.3, beta of it .15; alpha - mean alpha ±.2; (-.05)^2.
    gain, good = torch.tensor([[1.0, 0.4, 0.0]]), torch.tensor([[0.9, 0.5, 0.0]])
    real = torch.tensor([[True, True, False]])
    assert crd_terms(gain, good, real, 0.5, "square").item() == pytest.approx(0.0025)
    # Cross-entropy of sigmoid(.15) = .5374298 and sigmoid(.2) = .5498340, the other member alike with both signs turned:
    # -.5498340 log .5374298 - .4501660 log .4625702.
    assert crd_terms(gain, good, real, 0.5, "bce").item() == pytest.approx(0.6884819, abs=1e-6)


def test_awm_terms_by_hand():
    # As PPO's: -2*1.2, 2*1.5, -2*.5, 2*.8, -2*1.1 at clip .2.
    log_ratio, advantage = values(1.5, 1.5, 0.5, 0.5, 1.1).log(), torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0])
    expected = torch.tensor([-2.4, 3.0, -1.0, 1.6, -2.2], dtype=torch.float64)
    torch.testing.assert_close(clipped_terms(log_ratio, advantage, 0.2).detach(), expected)
    assert pseudo_log_prob(torch.tensor([0.5]), 1.0).item() == pytest.approx(-0.5)
    # (1/16)^(1/4) = 1/2, divided by 1/4.
    assert pseudo_log_prob(torch.tensor([0.0625]), 0.25).item() == pytest.approx(-2.0)
    at_zero = values(0.0)
    pseudo_log_prob(at_zero, 0.25).backward(torch.ones(1, dtype=torch.float64))
    assert at_zero.grad.isfinite().all()


def test_advantages_by_hand():
    # a: rewards 0, 2, mean 1, sd 1. b: 5, 5, 5.3, 5.7 of which row 3 is not asked for: 5, 5, 5.3 and the sd of those.
    policy = fake_policy()
    samples = draw(policy, ["a", "b", "a", "b", "b", "b"], [0.0, 5.0, 2.0, 5.7, 5.0, 5.3])
    rows = torch.tensor([2, 1, 0, 4, 5])
    assert prompt_groups(samples, rows).tolist() == [0, 1, 0, 1, 1]
    # b: mean 5.1, sd sqrt((.01 + .01 + .04) / 3) = .1414214.
    b = [-0.1 / 0.1415214, 0.2 / 0.1415214]
    expected = torch.tensor([1 / 1.0001, b[0], -1 / 1.0001, b[0], b[1]])
    torch.testing.assert_close(advantages(samples, rows, 5.0), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(advantages(samples, rows, 1.2), expected.clamp(-1.2, 1.2), rtol=1e-5, atol=1e-6)
    # The round's: mean 3.46, squares 2.1316, 2.3716, 11.9716, 2.3716, 3.3856: sd sqrt(22.232 / 5) = 2.1086489.
    expected = torch.tensor([1.0, -0.1, -1.0, -0.1, 0.2]) / 2.1087489
    torch.testing.assert_close(advantages(samples, rows, 5.0, "round"), expected, rtol=1e-5, atol=1e-6)


def test_win_rates_by_hand():
    # 1 2 2 5: wins and half ties of three: 0, 1 + 1/2, 1 + 1/2, 3. About 1/2 with sd sqrt(.125) = .3535534.
    assert win_rates(torch.tensor([1.0, 2.0, 2.0, 5.0])).tolist() == [0, 0.5, 0.5, 1]
    samples = draw(fake_policy(), ["a"] * 4 + ["b"], [1.0, 2.0, 2.0, 5.0, 9.0])
    expected = torch.tensor([-1.413814, 0, 0, 1.413814, 0])  # b is alone
    torch.testing.assert_close(advantages(samples, torch.arange(5), 5.0, "rank"), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(advantages(samples, torch.arange(5), 1.0, "rank"), expected.clamp(-1, 1))


def test_win_rates_are_those_of_every_pair_compared():
    rewards = torch.randint(6, (9,), generator=generator()).float()
    won = [sum(1.0 if a > b else 0.5 if a == b else 0.0 for b in rewards) - 0.5 for a in rewards]
    expected = torch.tensor(won, dtype=torch.float64) / 8
    torch.testing.assert_close(win_rates(rewards), expected)
    assert expected.mean().item() == pytest.approx(0.5)
    for group in (2, 5, 24):  # without ties the population standard deviation is known
        own = win_rates(torch.randperm(group, generator=generator()))
        assert own.std(correction=0).item() == pytest.approx(math.sqrt((group + 1) / (12 * (group - 1))))


def test_the_rank_is_one_for_all_rewards_of_one_order():
    rewards = torch.randn(8, generator=generator())
    ranks = []
    for own in (rewards, 1e6 * rewards + 3, rewards.exp(), rewards.atan()):
        samples = draw(fake_policy(), ["a"] * 5 + ["b"] * 3, own.tolist())
        ranks.append(advantages(samples, torch.arange(8), 5.0, "rank"))
    assert all(torch.equal(rank, ranks[0]) for rank in ranks[1:])
    assert ranks[0].unique().numel() == 7  # both prompts have a middle


def test_rewards_that_are_alike_have_no_advantage_whatever_their_mean_rounds_to():
    samples = draw(fake_policy(), ["a"] * 3 + ["b"] * 3, [0.11, 0.11, 0.11, 0.0, 1.0, 2.0])
    for spread in ("prompt", "round", "rank"):
        assert advantages(samples, torch.arange(6), 5.0, spread)[:3].tolist() == [0, 0, 0]
    assert advantages(samples, torch.arange(6), 5.0).sign().tolist() == [0, 0, 0, -1, 0, 1]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_clean_latent_is_found_in_the_output_that_is_right(prediction):
    levels, g = schedules.ddpm_levels(ddim(prediction_type=prediction)), generator()
    clean, noise = torch.randn(2, 5, 2, 3, 3, generator=g)
    t = torch.tensor([0, 10, 400, 800, 999])
    x_t = samplers.add_noise(levels, t, clean, noise)
    output = samplers.training_target(levels, t, clean, noise)
    found, _ = samplers.predict_clean(levels, t, x_t, output)
    torch.testing.assert_close(found, clean, rtol=1e-3, atol=1e-4)


def test_an_average_by_hand():
    policy = fake_policy()
    average = EMA(rate=0.1, most=0.25)
    name = next(iter(policy.parameters))
    found = []
    for number in (1.0, 5.0, 9.0, 9.0):
        with torch.no_grad():
            policy.parameters[name].fill_(number)
        average.update(policy)
        found.append(float(average.weights(policy)[name].mean()))
        average.steps += 2
    # Decay 0: 1. Decay .2: .2 * 1 + .8 * 5 = 4.2. Decay .25 (not .4): .25 * 4.2 + .75 * 9 = 7.8; .25 * 7.8 + 6.75 = 8.7.
    assert found == pytest.approx([1.0, 4.2, 7.8, 8.7])
    assert float(policy.parameters[name].mean().detach()) == 9


# --- terms against other implementations


def test_kto_is_kahneman_and_tverskys_value_of_the_gain():
    gain = torch.randn(9, generator=generator(), dtype=torch.float64)
    label = torch.tensor([1.0, -1.0, -1.0] * 3)
    z = gain.mean().clamp(min=0)
    tanh = (1 - torch.tanh(label * 1.7 * (gain - z) / 2)) / 2
    weight = torch.where(label > 0, 0.3, 0.9)
    torch.testing.assert_close(kto_terms(gain, label, z, 1.7, 0.3, 0.9), weight * tanh)


def test_awms_ratio_is_that_of_two_gaussians_densities():
    # For N(v, I) in n dimensions log p = -n d / 2 + constant: with w = n / 2, l is the log-density.
    truth, new, old = torch.randn(3, 4, 7, generator=generator(), dtype=torch.float64)
    exact = (Normal(new, 1).log_prob(truth) - Normal(old, 1).log_prob(truth)).sum(1)
    d, d_old = (new - truth).square().mean(1), (old - truth).square().mean(1)
    torch.testing.assert_close(7 / 2 * (pseudo_log_prob(d, 1.0) - pseudo_log_prob(d_old, 1.0)), exact)


def test_dgpos_gradient_is_that_of_the_group_preference_and_its_value_is_not():
    # -log sigmoid(-S) / beta has the gradient sigmoid(S) dS / beta = sigmoid(S) A / |G| in each d.
    g = generator()
    error = (0.01 * torch.randn(3, 4, generator=g, dtype=torch.float64) + 1).requires_grad_()
    ref, advantage = torch.rand(3, 4, generator=g).double(), torch.randn(3, 4, generator=g).double()
    size = torch.tensor([4, 4, 4])
    (found,) = torch.autograd.grad(dgpo_terms(error, ref, error.detach(), advantage, size, 6, 0.05).sum(), error)
    preference = softplus((advantage * 6 * (error - ref)).sum(1) / 4) / 6
    (expected,) = torch.autograd.grad(preference.sum(), error)
    torch.testing.assert_close(found, expected)
    assert not torch.autograd.gradcheck(
        lambda e: dgpo_terms(e, ref, error.detach(), advantage, size, 6, 0.05), error, raise_exception=False
    )


def test_dgpo_stops_a_member_that_went_far_enough_on_its_advantages_side():
    # Columns: ratio e^{.2}, e^{-.2}, e^{.04}, e^{-.04}; A > 0 stops at the first, A < 0 at the second.
    old = torch.full((2, 4), 1.0, dtype=torch.float64)
    error = (old - torch.tensor([0.2, -0.2, 0.04, -0.04])).requires_grad_()
    advantage = torch.tensor([[1.0] * 4, [-1.0] * 4], dtype=torch.float64)
    dgpo_terms(error, old, old, advantage, torch.tensor([4, 4]), 2, 0.05).sum().backward()
    assert (error.grad == 0).tolist() == [[True, False, False, False], [False, True, False, False]]


def test_nfts_gradient_by_hand():
    # d x+ / d x̂ = beta and d x- / d x̂ = -beta cancel the 1 / beta: 2 r (x+ - x_0) / (n m+) - 2 (1 - r) (x- - x_0) / (n m-).
    clean, old, truth = torch.randn(3, 5, 6, generator=generator(), dtype=torch.float64)
    good, beta = torch.linspace(0, 1, 5).double(), 0.3
    clean.requires_grad_()
    nft_terms(clean, old, truth, good, beta).sum().backward()
    miss_plus, miss_minus = (old + s * beta * (clean.detach() - old) - truth for s in (1, -1))
    r = good[:, None]
    expected = 2 * r * miss_plus / (6 * miss_plus.abs().mean(1, keepdim=True))
    expected -= 2 * (1 - r) * miss_minus / (6 * miss_minus.abs().mean(1, keepdim=True))
    torch.testing.assert_close(clean.grad, expected)


def test_term_gradients_are_those_of_finite_differences_where_the_value_is_meant():
    g = generator()
    label = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    gain, z = torch.randn(4, generator=g, dtype=torch.float64).requires_grad_(), torch.tensor(0.2)
    assert torch.autograd.gradcheck(lambda x: kto_terms(x, label, z, 3, 1.5, 0.5), (gain,))
    for log_ratio in (values(0.02, -0.06, 0.09, -0.01), values(0.5, -0.7, 0.2, -0.3)):
        assert torch.autograd.gradcheck(lambda x: clipped_terms(x, label, 0.1), (log_ratio,))
    error = values(0.3, 0.1, 2.0)
    for power in (1.0, 0.25):
        assert torch.autograd.gradcheck(lambda e: pseudo_log_prob(e, power), (error,))  # noqa: B023


def test_ktos_z_is_the_mean_gain_of_the_whole_batch_or_0():
    policy, samples, algorithm, rows = round_of("kto")
    here = at(policy, samples, rows["row"], rows["t"], rows["noise"])
    gain = (rows["ref"] - here.d(here.output(policy))).detach()
    for part in (gain > gain.median(), gain < gain.median(), gain == gain):
        z = algorithm.batch(policy, samples, {k: v[part] for k, v in rows.items()})["z"]
        torch.testing.assert_close(z, gain[part].mean().clamp(min=0).expand(int(part.sum())), rtol=1e-3, atol=1e-6)
        assert not z.requires_grad
    assert gain[gain > gain.median()].mean() > 0 > gain[gain < gain.median()].mean()


def test_crds_centre_has_no_gradient_and_needs_none():
    g = generator()
    gain, good = torch.randn(3, 5, generator=g, dtype=torch.float64), torch.rand(3, 5, generator=g).double()
    real = torch.ones(3, 5, dtype=torch.bool)
    real[1, 3:] = False
    gain, good = (gain * real).requires_grad_(), good * real
    terms = crd_terms(gain, good, real, 0.7, "square")
    (found,) = torch.autograd.grad(terms.sum(), gain)
    size = real.sum(1, keepdim=True)
    through = 0.7 * (gain - gain.sum(1, keepdim=True) / size) - (good - good.sum(1, keepdim=True) / size)
    whole = (through**2 * real).sum(1) / size[:, 0]
    (expected,) = torch.autograd.grad(whole.sum(), gain)
    torch.testing.assert_close((terms, found * real), (whole, expected * real))
    # Only differences within a group count: a shift of the implicit rewards, or of all alpha, of one group is none.
    for shifted in (
        crd_terms(gain + 3 * real, good, real, 0.7, "square"),
        crd_terms(gain, good + real, real, 0.7, "square"),
    ):
        torch.testing.assert_close(shifted, terms)


# --- whole losses


@every_algorithm
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_loss_and_its_gradient_are_those_of_the_formula(name, prediction):
    scheduler = {"scheduler": ddim(prediction_type=prediction)}
    policy, samples, algorithm, rows = round_of(name, policy=fake_policy(**scheduler))
    expected = a_second_time(name, policy, samples, rows, **scheduler)
    expected.backward()
    expected = expected.detach(), gradient(policy)
    assert expected[1].norm() > 1e-3
    found = loss_and_gradient(policy, samples, algorithm, rows)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@every_algorithm
def test_levels_of_the_sampler_are_its_own_timesteps_and_the_formula_is_the_same(name):
    policy, samples, algorithm, rows = round_of(name, policy=fake_policy(steps=5), levels="sampler", timesteps=8)
    assert rows["t"].unique().tolist() == [1000, 1001, 1002, 1003, 1004]  # after the training timesteps
    told = policy.schedule.timesteps[rows["t"] - 1000]
    assert told.unique().tolist() == [199, 399, 599, 799, 999]
    expected = a_second_time(name, policy, samples, {**rows, "t": told})
    expected.backward()
    expected = expected.detach(), gradient(policy)
    policy.adapter.network.calls.clear()
    found = loss_and_gradient(policy, samples, algorithm, rows)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert {int(t) for _, told in policy.adapter.network.calls for t in told} == {199, 399, 599, 799, 999}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_samplers_levels_are_those_of_its_timesteps(prediction):
    policy = fake_policy(steps=5, scheduler=ddim(prediction_type=prediction))
    levels, steps = policy.levels, policy.schedule.timesteps
    assert policy.training_levels == 1000 and levels.timesteps.tolist() == [*range(1000), *steps.tolist()]
    assert levels.prediction_type == prediction
    for name in ("signal", "noise", "time"):
        assert torch.equal(getattr(levels, name)[1000:], getattr(levels, name)[steps])


def test_the_noisiest_level_is_the_last_timestep(monkeypatch):
    # The largest number below 1 that torch draws: .5 + (1 - 2^-24) / 2 rounds to 1 in float32, and 1000 is no timestep.
    monkeypatch.setattr(torch, "rand", lambda n, generator: torch.full((n,), 1 - 2**-24))
    assert draw_levels(fake_policy(), 2, (0.5, 1.0), generator())["t"].tolist() == [999, 999]


def test_every_step_of_the_sampler_is_drawn_as_often_as_another():
    drawn = draw_levels(fake_policy(steps=8), 8000, "sampler", generator())["t"]
    counts = drawn.bincount(minlength=1008)
    assert counts[:1000].sum() == 0 and counts[1000:].min() > 900 and counts[1000:].max() < 1100  # sd 30


def test_the_last_step_of_the_sampler_is_the_last_level(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda n, generator: torch.full((n,), 1 - 2**-24))
    assert draw_levels(fake_policy(steps=3), 1, "sampler", generator())["t"].tolist() == [1002]


@every_algorithm
def test_the_final_latents_are_enough_and_levels_are_kept_to(name):
    policy, samples, algorithm, rows = round_of(name, levels=(0.5, 0.75), timesteps=8)
    assert rows["t"].min() >= 500 and rows["t"].max() < 750 and len(rows["t"].unique()) >= 12
    expected = algorithm.loss(policy, samples, rows).value
    samples.samples.trajectory.latents[:, :-1] = float("nan")
    samples.samples.trajectory.log_probs[:] = float("nan")
    assert torch.equal(algorithm.loss(policy, samples, rows).value, expected)


@every_algorithm
def test_rows_are_what_the_docstring_says(name):
    policy = fake_policy()
    drawn = draw(policy, PROMPTS + ["alike"] * 2, [*REWARDS, 5.0, 5.0])
    n = len(drawn)
    # Rewards of prompt "one": 0 1 1 4 and mean 1.5; of "two": 2 2.5 7 3 and mean 3.625. Rows 3 and 6 win twice each.
    pairs = torch.tensor([[3, 0], [3, 1], [6, 4], [6, 5]])
    samples = ConsistentSamples(drawn, n, pairs, torch.arange(n), torch.zeros(0, 3).long())
    algorithm = ALGORITHMS[name](timesteps=3)
    rows = algorithm.prepare(policy, samples, generator())
    if name in ("dgpo", "crd"):  # those that are alike are pulled together by crd, and left out by dgpo
        alike = [[8, 9, -1, -1]] * 3 if name == "crd" else []
        assert rows["member"].tolist() == [[0, 1, 2, 3]] * 3 + [[4, 5, 6, 7]] * 3 + alike
        if name == "crd":
            assert (rows["good"][6:, :2] == 0.5).all() and rows["good"][3, 2] > 0.6 and rows["good"][0, 0] < 0.5
        return
    expected = {"sft": [3, 6], "kto": list(range(8))}.get(name, list(range(10)))
    assert rows["row"].tolist() == [i for i in expected for _ in range(3)]
    assert len(rows["noise"].unique()) == len(rows["row"])
    if name == "kto":
        assert rows["label"].tolist() == [y for y in (-1, -1, -1, 1, -1, -1, 1, -1) for _ in range(3)]
    if name == "rwr":
        torch.testing.assert_close(rows["weight"].view(10, 3)[8:], torch.ones(2, 3))
        torch.testing.assert_close(rows["weight"].view(10, 3)[:4].mean(0), torch.ones(3))
    if name == "nft":
        assert (rows["good"].view(10, 3)[8:] == 0.5).all() and rows["good"][3 * 6] > 0.6 and rows["good"][0] < 0.5


def test_a_sample_that_wins_twice_is_one_datum_of_sft():
    policy = fake_policy()
    samples = ConsistentSamples(
        draw(policy, PROMPTS), 8, torch.tensor([[3, 0], [3, 1], [2, 0]]), torch.arange(8), torch.zeros(0, 3).long()
    )
    assert ALGORITHMS["sft"](timesteps=1).prepare(policy, samples, generator())["row"].tolist() == [2, 3]


@every_algorithm
def test_the_curves_are_detached_and_say_what_they_are_called(name):
    policy, samples, algorithm, rows = round_of(name)
    metrics = algorithm.loss(policy, samples, rows).metrics
    assert all(not m.requires_grad and m.ndim == 0 for m in metrics.values())
    if "member" in rows:
        size = rows["member"].shape[1]
        noise = rows["noise"] if name == "crd" else rows["noise"][:, None].expand(rows["member"].shape)
        flat = rows["member"].flatten(), rows["t"].repeat_interleave(size), noise.flatten()
    else:
        flat = rows["row"], rows["t"], rows["noise"]
    here = at(policy, samples, *flat)
    output, ref, old = (here.output(p).detach() for p in (policy, fake_policy(), before()))
    gain, label = here.d(ref) - here.d(output), rows.get("label")
    expected = {
        "sft": lambda: {},
        "rwr": lambda: {"error": here.d(output).mean()},
        "kto": lambda: {"gain": gain.mean(), "accuracy": (label == gain.sign()).float().mean()},
        "dgpo": lambda: {"gain": (rows["advantage"].flatten() * gain).mean(), "drift": squared(output - ref).mean()},
        "nft": lambda: {"moved": squared(output - old).mean(), "drift": squared(output - ref).mean()},
        "crd": lambda: {
            "gain": (normalised(old - here.target) - normalised(output - here.target)).mean(),
            "drift": squared(output - ref).mean(),
        },
        "awm": lambda: {
            "drift": squared(output - ref).mean(),
            "clipped": (((rows["t"] + 1) / 1000 * (here.d(old) - here.d(output))).expm1().abs() > 0.05).float().mean(),
        },
    }[name]()
    torch.testing.assert_close(metrics, expected, rtol=1e-3, atol=1e-5)
    if name in ("kto", "awm"):
        assert 0.02 < float(metrics["accuracy" if name == "kto" else "clipped"]) < 0.98


@pytest.mark.parametrize(
    "option",
    [{"levels": v} for v in ((0.5, 0.0), (0.0, math.nan), (0.5,), "training", None)]
    + [{"timesteps": 0}, {"unknown": 1}],
)
def test_wrong_options_are_refused(option):
    for config in (SFTConfig, RWRConfig, KTOConfig, DGPOConfig, NFTConfig, CRDConfig, AWMConfig):
        with pytest.raises(ValidationError):
            config(**option)


@pytest.mark.parametrize(
    ("levels", "said"),
    [
        ("samplr", "algo.levels: a share [from, to) of the training timesteps, or sampler, not 'samplr'"),
        ([0.5, 0.5], "algo.levels: a share is [from, to) with 0 <= from < to <= 1, not [0.5, 0.5], not [0.5, 0.5]"),
        ([0.5, "x"], "algo.levels.1: Input should be a valid number, unable to parse string as a number, not 'x'"),
    ],
)
def test_levels_that_are_none_are_refused_by_the_options_name(levels, said):
    with pytest.raises(UsageError) as caught:
        validate(SFTConfig, {"levels": levels}, "algo")
    assert str(caught.value) == said


def test_levels_are_written_as_before_and_the_samplers_by_its_word():
    assert SFTConfig().model_dump(mode="json")["levels"] == [0.0, 1.0]
    assert SFTConfig(levels=[0, "0.5"]).model_dump(mode="json")["levels"] == [0.0, 0.5]
    assert SFTConfig(levels="sampler").model_dump(mode="json")["levels"] == "sampler"


# --- dgpo's groups


def test_groups_share_level_and_noise_and_may_differ_in_size():
    policy = fake_policy(batch=5)
    drawn = draw(policy, ["one"] * 2 + ["two"] * 3 + ["one"], [0.0, 3.0, 1.0, 1.5, 4.0, 1.0])
    samples = ConsistentSamples(drawn, 6, torch.zeros(0, 2).long(), torch.arange(6).flip(0), torch.zeros(0, 3).long())
    samples.train = samples.train[1:]  # without row 5: two of "one", three of "two"
    algorithm = ALGORITHMS["dgpo"](timesteps=2)
    assert algorithm.samples_per_row == 1
    rows = algorithm.prepare(policy, samples, generator())
    assert algorithm.samples_per_row == 3
    assert rows["member"].tolist() == [[4, 3, 2]] * 2 + [[1, 0, -1]] * 2
    assert rows["advantage"].sign().tolist() == [[1, -1, -1]] * 2 + [[1, -1, 0]] * 2
    network = policy.adapter.network
    network.calls.clear()
    algorithm.loss(policy, samples, rows)
    ((x_t, t),) = network.calls
    assert t.tolist() == [int(rows["t"][i]) for i in (0, 0, 0, 1, 1, 1, 2, 2, 3, 3)]
    a = policy.adapter.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    clean = drawn.trajectory.final[[4, 3, 2, 4, 3, 2, 1, 0, 1, 0]]
    noise = (x_t - a.sqrt() * clean) / (1 - a).sqrt()
    groups = [noise[0:3], noise[3:6], noise[6:8], noise[8:10]]
    for group in groups:
        torch.testing.assert_close(group, group[:1].expand_as(group), rtol=1e-2, atol=1e-2)
    assert torch.pdist(torch.stack([g[0].flatten() for g in groups])).min() > 0.1


def test_a_group_of_another_size_pads_nothing_into_the_loss():
    policy = fake_policy()
    drawn = draw(policy, ["one"] * 2 + ["two"] * 5, [0.0, 3.0, 1.0, 1.5, 4.0, 1.0, 0.5])
    samples = ConsistentSamples(drawn, 7, torch.zeros(0, 2).long(), torch.arange(7), torch.zeros(0, 3).long())
    policy, samples, algorithm, rows = round_of("dgpo", policy=policy, samples=samples)
    expected = a_second_time("dgpo", policy, samples, rows)
    expected.backward()
    expected = expected.detach(), gradient(policy)
    torch.testing.assert_close(loss_and_gradient(policy, samples, algorithm, rows), expected, rtol=1e-3, atol=1e-4)
    alone = {k: v[:4] for k, v in rows.items()}  # "one" alone, with its three places of padding or without
    trimmed = {k: v[:, :2] if k in ("member", "advantage", "old", "ref") else v for k, v in alone.items()}
    torch.testing.assert_close(
        loss_and_gradient(policy, samples, algorithm, trimmed), loss_and_gradient(policy, samples, algorithm, alone)
    )


# --- first updates


@pytest.mark.parametrize("moved", [False, True])
def test_awms_first_ratio_is_1_and_its_gradient_that_of_the_weighted_error(moved):
    policy = fake_policy(batch=5)
    if moved:
        shake(policy)
    samples = with_targets(policy, draw(policy, PROMPTS, REWARDS))
    algorithm = ALGORITHMS["awm"](clip=0.1, kl=0.0)
    rows = algorithm.prepare(policy, samples, generator())
    value, found = loss_and_gradient(policy, samples, algorithm, rows)
    # rho = 1: the loss is -mean A, the averaged weights are the policy's own, and d rho = w (-d d): A w d d.
    assert float(value) == pytest.approx(-float(rows["advantage"].mean()), abs=1e-5)
    assert rows["advantage"].abs().max() <= 1 and rows["advantage"].abs().max() > 0.3
    here = at(policy, samples, rows["row"], rows["t"], rows["noise"])
    (rows["advantage"] * (rows["t"] + 1) / 1000 * here.d(here.output(policy))).mean().backward()
    torch.testing.assert_close(found, gradient(policy), rtol=1e-3, atol=1e-5)


def test_ktos_first_z_is_0_and_its_loss_half_the_weights():
    policy = fake_policy()
    samples = with_targets(policy, draw(policy, PROMPTS, REWARDS))
    algorithm = ALGORITHMS["kto"]()
    rows = algorithm.prepare(policy, samples, generator())
    value, found = loss_and_gradient(policy, samples, algorithm, rows)
    weight = torch.where(rows["label"] > 0, 1.5, 0.5)
    assert float(value) == pytest.approx(float(0.5 * weight.mean()), abs=1e-5)
    # sigmoid' = 1/4 at 0: w y beta / 4 times the gradient of d.
    here = at(policy, samples, rows["row"], rows["t"], rows["noise"])
    (weight * rows["label"] * 3.0 / 4 * here.d(here.output(policy))).mean().backward()
    torch.testing.assert_close(found, gradient(policy), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("beta", [0.3, 1.0])
@pytest.mark.parametrize("moved", [False, True])
def test_nfts_first_gradient_is_that_of_the_advantage_weighted_error(moved, beta):
    policy = fake_policy()
    if moved:
        shake(policy)
    samples = with_targets(policy, draw(policy, PROMPTS, REWARDS))
    algorithm = ALGORITHMS["nft"](beta=beta, kl=0.0)
    rows = algorithm.prepare(policy, samples, generator())
    _, found = loss_and_gradient(policy, samples, algorithm, rows)
    # At old = theta both guesses are x̂, dL+ = -dL- = beta dL: 5 (r - (1 - r)) dL = 5 (2 r - 1) dL = A dL,
    # with L = mean (x̂ - x_0)^2 / sg mean |x̂ - x_0|.
    here = at(policy, samples, rows["row"], rows["t"], rows["noise"])
    miss = here.clean_hat(here.output(policy)) - here.clean
    error = squared(miss) / miss.abs().mean((1, 2, 3)).detach()
    (standardised(samples, rows["row"], per_prompt=False) * error).mean().backward()
    torch.testing.assert_close(found, gradient(policy), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("beta", [0.3, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_crds_first_gradient_is_nfts_in_every_space(prediction, beta):
    """Both are mean A d; the space multiplies d by how much of it a change of the network's output makes (degree 1)."""
    policy = fake_policy(scheduler=ddim(prediction_type=prediction))
    shake(policy)
    samples = with_targets(policy, draw(policy, PROMPTS, REWARDS))
    for space in ("clean", "velocity", "output"):
        crd = ALGORITHMS["crd"](beta=beta, kl=0.0, space=space, timesteps=1)
        groups = crd.prepare(policy, samples, generator())
        assert groups["good"].min() > 0 and groups["good"].max() < 1  # no advantage is clipped
        flat = groups["member"].flatten(), groups["t"].repeat_interleave(8), groups["noise"].flatten()
        assert groups["member"].min() >= 0 and len(flat[0]) == 16
        _, found = loss_and_gradient(policy, samples, crd, groups)
        nft = ALGORITHMS["nft"](beta=1.0, kl=0.0, timesteps=1)
        rows = nft.prepare(policy, samples, generator())
        place = [rows["row"].tolist().index(i) for i in flat[0].tolist()]
        rows = {k: v[place] for k, v in rows.items()} | {"t": flat[1], "noise": flat[2]}
        with policy.holding(policy.weights()):
            rows["old"] = at(policy, samples, *flat).output(policy)
        if space == "clean":
            torch.testing.assert_close(rows["good"], groups["good"].flatten())
            _, expected = loss_and_gradient(policy, samples, nft, rows)
        else:
            a, b = policy.levels.signal[flat[1]], policy.levels.noise[flat[1]]
            own = b / a if prediction == "epsilon" else b  # d x_0 / d output
            factor = 1 / own if space == "output" else (a + b) / b
            here = at(policy, samples, *flat)
            error = factor * normalised(here.clean_hat(here.output(policy)) - here.clean)
            (standardised(samples, flat[0], per_prompt=False) * error).mean().backward()
            expected = gradient(policy)
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-4)


def test_crds_first_value_is_the_spread_of_alpha_and_a_shift_of_rewards_changes_nothing():
    policy = before()
    samples = with_targets(policy, draw(policy, PROMPTS, REWARDS))
    algorithm = ALGORITHMS["crd"](kl=0.0)
    rows = algorithm.prepare(policy, samples, generator())
    value, found = loss_and_gradient(policy, samples, algorithm, rows)
    spread = rows["good"].var(1, correction=0).mean()
    assert float(value) == pytest.approx(float(5 / 0.6 * spread), rel=1e-4)
    two = torch.tensor([p == "two" for p in samples.samples.prompts])
    kept = ALGORITHMS["crd"](kl=0.0, spread="prompt").prepare(policy, samples, generator())
    samples.samples.rewards += torch.where(two, 2.0, 0.0)  # which the round's spread would see
    again = ALGORITHMS["crd"](kl=0.0, spread="prompt").prepare(policy, samples, generator())
    torch.testing.assert_close(again, kept)
    assert found.norm() > 1e-3


def test_crd_in_other_spaces_and_with_the_cross_entropy_is_that_of_the_formula():
    for options in ({"space": "velocity"}, {"space": "clean"}, {"space": "velocity", "form": "bce"}):
        policy, samples, algorithm, rows = round_of("crd", levels=(0.2, 0.9), **options)
        expected = crd_a_second_time(policy, samples, rows, fake_policy(), before(), **options)
        expected.backward()
        expected = expected.detach(), gradient(policy)
        found = loss_and_gradient(policy, samples, algorithm, rows)
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-3)


def test_crds_group_shares_a_level_but_no_noise_and_pads_nothing_into_the_loss():
    policy = fake_policy()
    drawn = draw(policy, ["one"] * 2 + ["two"] * 5, [0.0, 3.0, 1.0, 1.5, 4.0, 1.0, 0.5])
    samples = ConsistentSamples(drawn, 7, torch.zeros(0, 2).long(), torch.arange(7), torch.zeros(0, 3).long())
    policy, samples, algorithm, rows = round_of("crd", policy=policy, samples=samples)
    assert algorithm.samples_per_row == 5 and rows["noise"].shape == (8, 5) and rows["t"].shape == (8,)
    assert len(rows["noise"].unique()) == 40
    expected = a_second_time("crd", policy, samples, rows)
    expected.backward()
    expected = expected.detach(), gradient(policy)
    torch.testing.assert_close(loss_and_gradient(policy, samples, algorithm, rows), expected, rtol=1e-3, atol=1e-4)
    alone = {k: v[:4] for k, v in rows.items()}  # "one" alone, with its three places of padding or without
    trimmed = {k: v[:, :2] if v.ndim > 1 else v for k, v in alone.items()}
    torch.testing.assert_close(
        loss_and_gradient(policy, samples, algorithm, trimmed), loss_and_gradient(policy, samples, algorithm, alone)
    )


def test_crds_centre_has_no_gradient_under_the_cross_entropy_where_it_would_count():
    gain, good = torch.tensor([[9.0, 0.0, 0.0]], requires_grad=True), torch.tensor([[0.5, 0.5, 0.5]])
    crd_terms(gain, good, torch.ones(1, 3, dtype=torch.bool), 1.0, "bce").sum().backward()
    # sigmoid(6) - 1/2 and twice sigmoid(-3) - 1/2, over 3: .4975274, -.4525741, which do not add up to 0.
    torch.testing.assert_close(gain.grad, torch.tensor([[0.4975274, -0.4525741, -0.4525741]]) / 3)


def test_crd_is_held_to_the_base_by_alpha_between_1e_4_and_kl():
    for kl, low, high in ((0.7, 1e-4, 0.7), (2e-4, 1e-4, 2e-4), (5e-5, 5e-5, 5e-5)):
        policy, samples, algorithm, rows = round_of("crd", kl=kl)
        rows["base"] += 30  # far off, so that little weights are seen
        real, flat = each_member(rows)
        with torch.no_grad():
            drift = squared(at(policy, samples, *flat).output(policy) - rows["base"][real])
            held = algorithm.loss(policy, samples, rows).value
            algorithm.config = algorithm.config.model_copy(update={"kl": 0.0})
            free = algorithm.loss(policy, samples, rows).value
        expected = ((low + rows["good"][real] * (high - low)) * drift).mean()
        assert float(held - free) == pytest.approx(float(expected), rel=1e-3)


def test_crds_base_may_be_guided_otherwise():
    policy = before()
    samples = with_targets(policy, draw(policy, PROMPTS, REWARDS))
    found = []
    for guidance in (None, 1.0, 4.5):
        algorithm = ALGORITHMS["crd"](kl_guidance=guidance)
        algorithm.setup(policy, RED)
        found.append(algorithm.prepare(policy, samples, generator())["base"])
        assert (policy.guidance, policy.branches) == (1, 1)
    assert torch.equal(found[0], found[1])
    real, flat = each_member(algorithm.prepare(policy, samples, generator()))
    base, guided = fake_policy(), fake_policy(guidance=4.5)
    here = at(base, samples, *flat)
    with torch.no_grad():
        torch.testing.assert_close(found[0][real], here.output(base), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found[2][real], here.output(guided), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found[0], found[2], atol=1e-2)


def test_dgpos_first_gradient_is_half_that_of_the_advantage_weighted_error():
    policy = fake_policy()
    samples = with_targets(policy, draw(policy, PROMPTS, REWARDS))
    algorithm = ALGORITHMS["dgpo"]()
    rows = algorithm.prepare(policy, samples, generator())
    _, found = loss_and_gradient(policy, samples, algorithm, rows)  # S = 0, and v = v_ref
    flat = rows["member"].flatten()
    here = at(policy, samples, flat, rows["t"].repeat_interleave(8), rows["noise"].repeat_interleave(8))
    (0.5 * rows["advantage"].flatten() * here.d(here.output(policy))).mean().backward()
    torch.testing.assert_close(found, gradient(policy), rtol=1e-3, atol=1e-5)


def test_rwr_of_a_high_temperature_is_sft_on_every_sample():
    policy = fake_policy()
    drawn = draw(policy, PROMPTS, REWARDS)
    every = torch.arange(8)
    samples = ConsistentSamples(drawn, 8, torch.stack([every, every.flip(0)], 1), every, torch.zeros(0, 3).long())
    found, expected = (
        loss_and_gradient(policy, samples, a, a.prepare(policy, samples, generator()))
        for a in (ALGORITHMS["rwr"](tau=1e6), ALGORITHMS["sft"]())
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


# --- averages of the weights


def test_nft_collects_with_the_average_and_trains_the_policy():
    policy = fake_policy()
    algorithm = ALGORITHMS["nft"](decay_rate=0.2, decay_most=0.5)
    start = policy.weights()
    with algorithm.collecting(policy):
        assert all(torch.equal(p, start[k]) for k, p in policy.parameters.items())
    shake(policy)
    algorithm.stepped(policy)
    algorithm.stepped(policy)
    trained = policy.weights()
    with algorithm.collecting(policy):  # decay min(.2 * 2, .5) = .4
        old = policy.weights()
        drawn = draw(policy, PROMPTS, REWARDS)
    for k in trained:
        torch.testing.assert_close(old[k], 0.4 * start[k] + 0.6 * trained[k])
        assert torch.equal(policy.parameters[k], trained[k])
    # What counts as old in the loss is the policy that collected.
    samples = with_targets(policy, drawn)
    rows = algorithm.prepare(policy, samples, generator())
    collector = fake_policy()
    here = at(policy, samples, rows["row"], rows["t"], rows["noise"])
    with collector.holding(old):
        torch.testing.assert_close(rows["old"], here.output(collector), rtol=1e-4, atol=1e-5)
    for _ in range(3):  # 5 * .2 = 1, held at .5
        algorithm.stepped(policy)
    with algorithm.collecting(policy):
        for k, p in policy.parameters.items():
            torch.testing.assert_close(p.data, 0.5 * old[k] + 0.5 * trained[k])


def test_crd_draws_with_one_average_and_compares_with_another():
    policy = fake_policy()
    algorithm = ALGORITHMS["crd"](
        old_start=0.1, old_rate=0.2, old_most=0.6, rollout_delay=1, rollout_rate=0.3, rollout_most=0.5
    )
    old = rollout = policy.weights()
    # Decays after 0, 1, 2 and 4 steps: old .1, .3, .5, .6; rollout 0 (not -.3), 0, .3, .5.
    for steps, (own, drawing) in zip((0, 1, 1, 2), ((0.1, 0.0), (0.3, 0.0), (0.5, 0.3), (0.6, 0.5)), strict=True):
        for _ in range(steps):
            shake(policy, seed=steps)
            algorithm.stepped(policy)
        now = policy.weights()
        old = {k: own * old[k] + (1 - own) * now[k] for k in now}
        rollout = {k: drawing * rollout[k] + (1 - drawing) * now[k] for k in now}
        with algorithm.collecting(policy):
            torch.testing.assert_close(policy.weights(), rollout)
            samples = with_targets(policy, draw(policy, PROMPTS, REWARDS))
        assert all(torch.equal(v, now[k]) for k, v in policy.weights().items())
    rows = algorithm.prepare(policy, samples, generator())
    real, flat = each_member(rows)
    before_ = fake_policy()
    with before_.holding(old):
        here = at(before_, samples, *flat)
        expected = normalised(here.output(before_) - here.target)
    torch.testing.assert_close(rows["old"][real], expected, rtol=1e-3, atol=1e-4)


def test_awm_holds_to_the_average_as_it_is_at_the_start_of_the_round():
    policy = fake_policy()
    samples = with_targets(policy, draw(policy, PROMPTS, REWARDS))
    algorithm = ALGORITHMS["awm"](decay_rate=0.2, decay_most=0.3)
    first = algorithm.prepare(policy, samples, generator())
    average = policy.weights()
    for seed, decay in ((3, 0.2), (4, 0.3)):  # .2 * 2 = .4, held at .3
        shake(policy, seed=seed)
        algorithm.stepped(policy)
        average = {k: decay * average[k] + (1 - decay) * new for k, new in policy.weights().items()}
    rows = algorithm.prepare(policy, samples, generator())
    assert torch.equal(first["ref"], rows["ref"]) and not torch.allclose(first["ema"], rows["ema"])
    averaged = fake_policy()
    here = at(policy, samples, rows["row"], rows["t"], rows["noise"])
    with averaged.holding(average):
        torch.testing.assert_close(rows["ema"], here.output(averaged), rtol=1e-4, atol=1e-5)


# --- the forward process


def test_every_row_has_a_level_and_a_noise_of_its_own():
    policy = fake_policy()
    samples = with_targets(policy, draw(policy, PROMPTS))
    rows = at_levels(policy, samples.train, SFTConfig(timesteps=3), generator())
    found = noised(policy, samples, rows["row"], rows["t"], rows["noise"])
    here = at(policy, samples, rows["row"], rows["t"], rows["noise"])
    torch.testing.assert_close(found.x_t, here.x_t)
    assert torch.pdist(found.noise.flatten(1)).min() > 0.1 and len(rows["t"].unique()) > 40
    output = here.output(policy)
    torch.testing.assert_close(found.clean_of(policy, output), here.clean_hat(output))


# --- the bandit

BANDITS = {
    "kto": {"beta": 2.0, "desirable": 1.0, "undesirable": 1.0},
    "dgpo": {"beta": 2.0, "kl": 0.0},
    "nft": {"beta": 1.0, "kl": 1e-4},
    "crd": {"beta": 1.0, "kl": 1e-2},
    "awm": {"clip": 1.0, "weight": "one", "kl": 1e-3, "kl_ema": 1.0},
}


@pytest.mark.parametrize(
    ("name", "held"),
    [
        ("kto", {"beta": 200.0}),
        ("dgpo", {"beta": 200.0}),
        ("dgpo", {"kl": 50.0}),
        ("nft", {"kl": 100.0}),
        ("crd", {"kl": 100.0}),
        ("awm", {"kl": 30.0}),
    ],
)
def test_what_holds_the_policy_to_the_base_does(name, held):
    free, near = (
        bandit(ALGORITHMS[name](learning_rate=1e-2, **{**BANDITS[name], **o}), 15)[0][-3:].mean(0) for o in ({}, held)
    )
    assert (near[0] - near[1]) < 0.5 * (free[0] - free[1])
