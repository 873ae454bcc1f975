"""TRL's loss types and Diffusion-SDPO in dpo and diffusion-dpo: by hand, against TRL's own trainer, and what they owe."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from bench_dfusion.algorithms.diffusion_dpo import DiffusionDPO, DiffusionDPOConfig
from bench_dfusion.algorithms.dpo import DPO, DPOConfig, dpo_terms
from pydantic import ValidationError

from bench_dfusion.algorithm import all_log_probs
from bench_dfusion.builders.contract import ConsistentSamples
from bench_dfusion.diffusion import samplers
from bench_dfusion.errors import UsageError
from bench_dfusion.objectives.preference import LOSSES, REFUSED, loser_scale, preference_terms, scale_gradient
from bench_dfusion.testing.fakes import ddim, draw, fake_policy, shake, with_targets
from bench_dfusion.testing.rounds import (
    PROMPTS,
    bandit,
    generator,
    loss_and_gradient,
    round_of,
    values,
)
from bench_dfusion.tracks.schema import validate

SMOOTHING = {"robust": 0.1, "exo_pair": 0.1}
ALGORITHMS = {
    "dpo": lambda **o: DPO(DPOConfig(**{"beta": 5.0, "ratio_clamp": 0.0, "step_weight": "sigma", **o})),
    "diffusion-dpo": lambda **o: DiffusionDPO(DiffusionDPOConfig(**{"beta": 20.0, **o})),
}
OF_THE_MARGIN = [n for n in LOSSES if n not in ("nca_pair", "sppo_hard", "apo_zero", "apo_down")]
every_loss = pytest.mark.parametrize("loss", LOSSES)
both = pytest.mark.parametrize("name", ALGORITHMS)


def terms(loss, w, l, beta):  # noqa: E741
    return preference_terms(w, l, beta, {loss: 1.0}, SMOOTHING.get(loss, 0.0))


def options(loss):
    return {"loss_type": loss, "label_smoothing": SMOOTHING.get(loss, 0.0)}


# --- by hand

# beta 2, so 1/(2 beta) = .25. Two pairs at three steps:
R_W = [[0.50, 0.25, 0.00], [0.75, -0.25, 0.50]]
R_L = [[0.25, -0.25, 0.25], [-0.25, 0.25, 0.50]]
# Delta = r_w - r_l = .25 .5 -.25 / 1 -.5 0
TOY = {
    "hinge": [[0.5, 0.0, 1.5], [0.0, 2.0, 1.0]],  # max(0, 1 - 2 Delta)
    "ipo": [[0.0, 0.0625, 0.25], [0.5625, 0.5625, 0.0625]],  # (Delta - .25)^2
    # (r_w - .25)^2 + (r_l + .25)^2: .0625 + .25, 0 + 0, .0625 + .25 / .25 + 0, .25 + .25, .0625 + .5625
    "sppo_hard": [[0.3125, 0.0, 0.3125], [0.25, 0.5, 0.625]],
}


@pytest.mark.parametrize("loss", TOY)
def test_terms_of_a_toy_by_hand(loss):
    w, l, expected = (torch.tensor(x, dtype=torch.float64) for x in (R_W, R_L, TOY[loss]))  # noqa: E741
    torch.testing.assert_close(terms(loss, w, l, 2.0), expected)


# beta r_w = log 2 and beta r_l = -log 1.5, so beta Delta = log 3:
# sigmoid(log 2) = 2/3, sigmoid(-log 1.5) = 2/5, sigmoid(log 3) = 3/4.
THIRDS = {
    "sigmoid": -math.log(3 / 4),
    "hinge": 0.0,  # 1 - log 3 < 0
    "robust": (-0.9 * math.log(3 / 4) + 0.1 * math.log(1 / 4)) / 0.8,
    "exo_pair": 3 / 4 * math.log((3 / 4) / 0.9) + 1 / 4 * math.log((1 / 4) / 0.1),
    "nca_pair": -math.log(2 / 3) - 0.5 * math.log(1 / 3) - 0.5 * math.log(3 / 5),
    "apo_zero": 1 / 3 + 2 / 5,
    "apo_down": 2 / 3 + 1 / 4,
    "discopop": 1 / 3,  # e^-log 3: the share of the logistic loss is 1 / (1 + 3^20)
}


@pytest.mark.parametrize("loss", THIRDS)
def test_logistic_terms_by_hand(loss):
    found = terms(loss, values(math.log(2) / 4), values(-math.log(1.5) / 4), 4.0)
    assert found.item() == pytest.approx(THIRDS[loss], abs=1e-8)


def test_a_list_of_losses_is_their_weighted_sum():
    w, l = torch.tensor([0.5], dtype=torch.float64), torch.tensor([0.25], dtype=torch.float64)  # noqa: E741
    # 3 * .5 (hinge) + .5 * .3125 (sppo_hard), first entries of the toy
    assert preference_terms(w, l, 2.0, {"hinge": 3.0, "sppo_hard": 0.5}, 0.0).item() == pytest.approx(1.65625)


# --- against TRL's trainer


def trl_loss(loss_types, weights, chosen, rejected, ref_chosen, ref_rejected, beta, smoothing):
    """DPOTrainer._compute_loss on texts of one token with the given log-probs; a trainer without a model or data."""
    from trl.trainer.dpo_trainer import DPOTrainer

    trainer = DPOTrainer.__new__(DPOTrainer)
    same = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer.__dict__ |= {
        "accelerator": same,
        "model": SimpleNamespace(training=True),
        "args": SimpleNamespace(discopop_tau=0.05),
        "aux_loss_enabled": False,
        "ld_alpha": None,
        "precompute_ref_logps": True,
        "f_divergence_type": "reverse_kl",
        "use_weighting": False,
        "beta": beta,
        "label_smoothing": smoothing,
        "loss_types": loss_types,
        "loss_weights": weights,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    log_probs = torch.cat([chosen, rejected])[:, None]
    outputs = SimpleNamespace(
        log_probs=log_probs, entropy=log_probs, mean_logits=log_probs, is_top1=torch.ones_like(log_probs).bool()
    )
    ids = torch.ones(len(log_probs), 2, dtype=torch.long)
    inputs = {
        "input_ids": ids,
        "attention_mask": ids,
        "completion_mask": torch.tensor([[0, 1]]).repeat(len(ids), 1),
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    return trainer._compute_loss(lambda **kwargs: outputs, inputs, False)


@pytest.mark.parametrize("beta", [0.1, 1.0, 7.0])
@pytest.mark.parametrize("names", [*([n] for n in LOSSES), ["sigmoid", "robust", "nca_pair"]], ids="+".join)
def test_values_and_gradients_are_those_of_trls_trainer(names, beta):
    logps = [torch.randn(6, generator=generator(i), dtype=torch.float64).requires_grad_() for i in range(4)]
    weights = [1.0, 0.3, 2.0][: len(names)]
    smoothing = max(SMOOTHING.get(n, 0.0) for n in names)
    expected = trl_loss(names, weights, *logps, beta, smoothing)
    ratio_w, ratio_l = logps[0] - logps[2], logps[1] - logps[3]
    losses = dict(zip(names, weights, strict=True))
    found = dpo_terms(ratio_w, ratio_l, beta, 0.0, losses, smoothing).mean()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    gradients = [torch.autograd.grad(x, logps[:2]) for x in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)


def test_every_name_of_trls_trainer_is_taken_or_refused_with_a_reason():
    import inspect

    from trl.trainer.dpo_trainer import DPOTrainer

    source = inspect.getsource(DPOTrainer._compute_loss)
    theirs = {line.split('"')[1] for line in source.splitlines() if 'loss_type == "' in line}
    assert len(theirs) > 12 and theirs <= LOSSES.keys() | REFUSED.keys()
    assert not LOSSES.keys() & REFUSED.keys()


# --- what a loss owes


@every_loss
def test_term_gradients_are_those_of_finite_differences(loss):
    w, l = values(0.42, -0.6, 0.09), values(-0.03, 0.8, 0.01)  # noqa: E741
    assert torch.autograd.gradcheck(lambda w, l: terms(loss, w, l, 1.5), (w, l))  # noqa: E741


@pytest.mark.parametrize("loss", OF_THE_MARGIN)
def test_a_loss_of_the_margin_is_of_nothing_else_and_swapping_flips_the_margin(loss):
    w, l = values(0.3, -0.2), values(0.1, 0.4)  # noqa: E741
    torch.testing.assert_close(terms(loss, w + 2, l + 2, 1.5), terms(loss, w, l, 1.5))
    torch.testing.assert_close(terms(loss, l, w, 1.5), terms(loss, 0 * w, w - l, 1.5))
    for_w, for_l = torch.autograd.grad(terms(loss, w, l, 1.5).sum(), (w, l))
    torch.testing.assert_close(for_w, -for_l)


@pytest.mark.parametrize("loss", [n for n in LOSSES if n != "discopop"])
def test_from_the_base_on_winners_are_pushed_up_and_losers_down(loss):
    w, l = values(0.0), values(0.0)  # noqa: E741
    for_w, for_l = torch.autograd.grad(terms(loss, w, l, 0.5).sum(), (w, l))
    # apo_down pushes the winner down by as much as the margin pushes it up; then the margin alone counts.
    assert for_l.item() > 0 and (for_w.item() == 0 if loss == "apo_down" else for_w.item() < 0)


def test_discopop_alone_cannot_leave_the_base():
    # TRL's formula at tau .05: a fresh LoRA's margin, 0, lies on the wrong side of a hump between -.12 and .08.
    margin = torch.tensor([-0.2, -0.1, 0.0, 0.05, 0.1, 1.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(terms("discopop", margin, torch.zeros(6), 1.0).sum(), margin)
    assert slope.sign().tolist() == [-1, 1, 1, 1, -1, -1]


LIMITS = {  # of the term as beta goes to 0; ipo's and sppo_hard's are of beta^2 times the term
    "sigmoid": math.log(2),
    "hinge": 1.0,
    "ipo": 1 / 4,
    "robust": math.log(2),
    "exo_pair": 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1),
    "nca_pair": 2 * math.log(2),
    "sppo_hard": 1 / 2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": 0.5 * math.log(2) + 0.5,
}


@every_loss
def test_beta_0(loss):
    beta = 1e-6
    found = terms(loss, values(0.7, -2.0), values(-0.4, 3.0), beta).detach()
    scale = beta**2 if loss in ("ipo", "sppo_hard") else 1.0
    torch.testing.assert_close(scale * found, torch.full((2,), LIMITS[loss], dtype=torch.float64), rtol=1e-4, atol=0)


@every_loss
def test_far_out_terms_and_gradients_are_finite(loss):
    w = values(60.0, 1e4, 0.0, 0.0, -1e4, dtype=torch.float32)
    l = values(0.0, -1e4, 60.0, 1e4, -1e4, dtype=torch.float32)  # noqa: E741
    w, l = (w[:3], l[:3]) if loss == "discopop" else (w, l)  # its exponential grows without end, by design  # noqa: E741
    found = terms(loss, w, l, 1.0)
    assert found.isfinite().all() and all(g.isfinite().all() for g in torch.autograd.grad(found.sum(), (w, l)))


# --- in dpo and diffusion-dpo


def log_ratios(name, policy, samples, rows):
    """r of winners and losers, recomputed from the policy and a fresh base."""
    base = fake_policy()
    if name == "dpo":
        return [
            all_log_probs(policy, samples, side, rows["step"]) - all_log_probs(base, samples, side, rows["step"])
            for side in (rows["winner"], rows["loser"])
        ]
    trajectory, found = samples.samples.trajectory, []
    noise = samplers.sample_noise(rows["noise"], 0, (2, 2, 2))[:, 0]
    for side in (rows["winner"], rows["loser"]):
        clean, prompts = trajectory.final[side], [trajectory.prompts[i] for i in side.tolist()]
        x_t = samplers.add_noise(policy.levels, rows["t"], clean, noise)
        v = samplers.training_target(policy.levels, rows["t"], clean, noise)
        own, ref = (((p.predict(x_t, rows["t"], prompts) - v) ** 2).mean((1, 2, 3)).detach() for p in (policy, base))
        found.append((ref - own) / 2)
    return found


@both
@every_loss
def test_an_algorithm_takes_the_loss_of_its_log_ratios(name, loss):
    policy, samples, algorithm, rows = round_of(ALGORITHMS[name](beta=3.0, **options(loss)))
    weight = rows.get("weight", torch.ones(1))
    ratio_w, ratio_l = log_ratios(name, policy, samples, rows)
    expected = (weight * terms(loss, ratio_w, ratio_l, 3.0)).mean()
    found = algorithm.loss(policy, samples, rows)
    torch.testing.assert_close(found.value, expected, rtol=1e-3, atol=1e-4)
    margin = (ratio_w - ratio_l).mean() * (1 if name == "dpo" else 2)  # in units of d, where r is half of it
    torch.testing.assert_close(found.metrics["margin"], margin, rtol=1e-3, atol=1e-5)
    assert float(found.metrics["accuracy"]) == pytest.approx(float((ratio_w > ratio_l).float().mean()), abs=0.04)


MIXED = {"loss_type": ["robust", "apo_zero"], "loss_weights": [0.5, 2.0], "label_smoothing": 0.1}


@both
@every_loss
def test_turning_the_pairs_round_negates_the_margin(name, loss):
    policy = fake_policy()
    samples = with_targets(policy, draw(policy, PROMPTS))
    turned = ConsistentSamples(samples.samples, 8, samples.pairs.flip(1), samples.train, samples.triples)
    algorithm = ALGORITHMS[name](**options(loss))
    rows, back = (algorithm.prepare(policy, s, generator()) for s in (samples, turned))
    shake(policy)
    forth, back = algorithm.loss(policy, samples, rows).metrics, algorithm.loss(policy, turned, back).metrics
    assert abs(float(forth["margin"])) > 1e-4
    torch.testing.assert_close(back["margin"], -forth["margin"], rtol=1e-3, atol=1e-6)


# --- options


@pytest.mark.parametrize("config", [DPOConfig, DiffusionDPOConfig])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "bco_pair"}, "'bco_pair' does not carry over: its reward shift"),
        ({"loss_type": ["sigmoid", "sft"]}, "'sft' does not carry over.*algorithm sft"),
        ({"loss_type": "sigmod"}, "unknown loss type 'sigmod'; did you mean sigmoid"),
        ({"loss_type": []}, "at least one"),
        ({"loss_type": ["ipo", "ipo"]}, "none twice"),
        ({"loss_type": ["ipo", "hinge"], "loss_weights": [1.0]}, "2 numbers > 0"),
        ({"loss_weights": [1.0, 1.0]}, "1 numbers > 0"),
        ({"loss_type": ["ipo", "hinge"], "loss_weights": [1.0, 0.0]}, "2 numbers > 0"),
        ({"loss_type": "exo_pair"}, "exo_pair needs label_smoothing > 0"),
        ({"label_smoothing": 0.1}, "robust and exo_pair alone, not on sigmoid"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "label_smoothing: Input should be less than 0.5"),
        ({"sdpo": 1.1}, "sdpo: Input should be less than or equal to 1"),
    ],
)
def test_what_is_wrong_is_refused_in_one_line(config, settings, message):
    with pytest.raises(UsageError, match=message) as refused:
        validate(config, settings, "algo")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_have_reasons(name):
    with pytest.raises(ValidationError, match="does not carry over: .{20}"):
        DPOConfig(loss_type=name)


def test_one_name_and_a_list_of_it_are_the_same():
    assert DPOConfig().losses == DPOConfig(loss_type=["sigmoid"]).losses == {"sigmoid": 1.0}
    assert DPOConfig(loss_type=["ipo", "hinge"]).losses == {"ipo": 1.0, "hinge": 1.0}
    assert DPOConfig(loss_type=["ipo", "hinge"], loss_weights=[2, 3]).losses == {"ipo": 2.0, "hinge": 3.0}


def test_the_clamp_is_sigmoids_alone_and_its_default_shows():
    assert DPOConfig().ratio_clamp == DPOConfig(loss_type=["sigmoid"]).ratio_clamp == 0.1
    assert DPOConfig(ratio_clamp=0.0).ratio_clamp == 0 and DPOConfig(ratio_clamp=0.2).ratio_clamp == 0.2
    for loss in ("ipo", ["sigmoid", "ipo"]):
        assert DPOConfig(loss_type=loss).ratio_clamp == DPOConfig(loss_type=loss, ratio_clamp=0.0).ratio_clamp == 0
        with pytest.raises(ValidationError, match="ratio_clamp\n.*sigmoid alone"):
            DPOConfig(loss_type=loss, ratio_clamp=0.1)


def test_the_clamp_holds_in_the_algorithm():
    policy, samples, algorithm, rows = round_of(ALGORITHMS["dpo"](beta=3.0, ratio_clamp=0.05))
    ratio_w, ratio_l = (r.clamp(math.log(0.95), math.log(1.05)) for r in log_ratios("dpo", policy, samples, rows))
    assert (ratio_w == math.log(1.05)).any() or (ratio_w == math.log(0.95)).any()
    expected = (rows["weight"] * torch.nn.functional.softplus(-3 * (ratio_w - ratio_l))).mean()
    torch.testing.assert_close(algorithm.loss(policy, samples, rows).value, expected, rtol=1e-4, atol=1e-5)


# --- Diffusion-SDPO


def lambda_of(w, l, mu, score=lambda output: (output**2).sum(1) / 2, batch=2):  # noqa: E741
    """Lambda of pairs whose winners' and losers' outputs are w and l [B, ...], `batch` of them at a time."""

    def scores(rows):
        output = torch.cat([w[rows["pair"]], l[rows["pair"]]]).detach().requires_grad_()
        return score(output), output

    return loser_scale(scores, {"pair": torch.arange(len(w))}, batch, mu).item()


@pytest.mark.parametrize("batch", [1, 2])
def test_lambda_by_hand(batch):
    # Errors of two pairs are half the squares of outputs of three numbers, so a gradient is the output itself:
    # g_w = (1 0 2 / 0 1 0), g_l = (3 1 2 / 0 5 1); |g_w|^2 = 6, g_l . g_w = 3 + 4 + 5 = 12. (By pair: 5/7 and 1/5.)
    w, l = torch.tensor([[1.0, 0, 2], [0, 1, 0]]), torch.tensor([[3.0, 1, 2], [0, 5, 1]])  # noqa: E741
    for mu, expected in ((0.0, 0.5), (0.9, 0.05), (1.0, 0.0)):
        assert lambda_of(w, l, mu, batch=batch) == pytest.approx(expected)
        assert lambda_of(w, l, mu, lambda output: -(output**2).sum(1) / 2, batch) == pytest.approx(expected)
    # Turned round: |g_w|^2 = 40, so 40/12 is clipped to 1, and .25 * 40/12 is not.
    assert lambda_of(l, w, 0.0, batch=batch) == 1
    assert lambda_of(l, w, 0.75, batch=batch) == pytest.approx(5 / 6)
    for against in (-1.0, 0.0):  # a dot product of -|g|^2, and of 0
        assert lambda_of(w, against * w, 0.9, batch=batch) == 1


@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(5))
def test_to_first_order_the_winners_error_cannot_rise(mu, seed):
    # Winner and loser share the network, so to first order an update moves both outputs alike: by -h (g_w - lambda g_l).
    target = torch.randn(2, 4, 5, generator=generator(seed), dtype=torch.float64)
    start = torch.randn(2, 4, 5, generator=generator(seed + 9), dtype=torch.float64)
    start[1] = target[1] + (2 + seed) * (start[0] - target[0]) + start[1]  # losers further out on the same side

    def errors(output):
        return ((output.view(2, 4, 5) - target) ** 2).mean(2).flatten()

    output = start.flatten(0, 1).requires_grad_()
    scale = loser_scale(lambda rows: (errors(output), output), {"pair": torch.arange(4)}, 4, mu)
    assert scale < 1
    g_w, g_l = torch.autograd.grad(errors(output).sum(), output)[0].chunk(2)

    def change(by, h=1e-5):
        moved = output.detach() - h * (g_w - by * g_l).repeat(2, 1)
        return float((errors(moved) - errors(output.detach()))[:4].sum() / h)

    assert change(scale) == pytest.approx(-mu * float((g_w**2).sum()), abs=1e-3)
    assert change(1.0) > 0.1  # without the safeguard it does rise
    assert change(1.1 * float(scale) + 0.01) > change(scale)  # and lambda is the largest that keeps the bound


def test_scaling_a_gradient_leaves_the_value():
    x = values(3.0)
    found = scale_gradient(x**2, torch.tensor(0.25))
    assert found.item() == 9 and torch.autograd.grad(found.sum(), x)[0].item() == pytest.approx(0.25 * 6)


def aligned_round(name, **settings):
    """A round whose losers lie on the winners' side and further out, so that lambda is below 1."""
    policy = fake_policy(scheduler=ddim(prediction_type="epsilon"))
    samples = with_targets(policy, draw(policy, PROMPTS))
    latents = samples.samples.trajectory.latents
    latents[:8] = latents[8:] * 1.5
    algorithm = ALGORITHMS[name](**settings)
    rows = algorithm.prepare(policy, samples, generator())
    shake(policy)
    return policy, samples, algorithm, rows


def by_hand(name, policy, samples, rows, mu):
    """Lambda from the errors' gradients written out: residuals, weighted as the loss weights them."""
    sides = []
    for side in (rows["winner"], rows["loser"]):
        trajectory = samples.samples.trajectory
        prompts = [trajectory.prompts[i] for i in side.tolist()]
        if name == "dpo":
            x_t, x_s = trajectory.latents[side, rows["step"]], trajectory.latents[side, rows["step"] + 1]
            schedule, step = policy.schedule, rows["step"]
            ones = torch.ones_like(x_t)  # mu is linear in the output: its slope, step by step
            slope = samplers.step_mean(schedule, step, 0 * x_t, ones)
            factor = rows["weight"].view(-1, 1, 1, 1) * slope / schedule.std[step].view(-1, 1, 1, 1) ** 2
            sides.append(factor * (policy.mean(x_t, step, prompts) - x_s))
        else:
            noise = samplers.sample_noise(rows["noise"], 0, (2, 2, 2))[:, 0]
            x_t = samplers.add_noise(policy.levels, rows["t"], trajectory.final[side], noise)
            sides.append(policy.predict(x_t, rows["t"], prompts) - noise)
    g_w, g_l = (s.detach() for s in sides)
    along = float((g_w * g_l).sum())
    return min(1.0, (1 - mu) * float((g_w**2).sum()) / along) if along > 0 else 1.0


@both
@pytest.mark.parametrize("mu", [0.3, 0.9])
def test_sdpo_scales_the_losers_gradient_by_lambda_and_nothing_else(name, mu):
    policy, samples, plain, rows = aligned_round(name)
    safe = ALGORITHMS[name](sdpo=mu)
    scale = by_hand(name, policy, samples, rows, mu)
    loss = safe.loss(policy, samples, safe.batch(policy, samples, rows))
    assert 0 < scale < 0.9
    assert float(loss.metrics["loser_scale"]) == pytest.approx(scale, rel=1e-3)
    value, whole = loss_and_gradient(policy, samples, plain, rows)
    found_value, found = loss_and_gradient(policy, samples, safe, rows)
    torch.testing.assert_close(found_value, value)
    # mu = 1 leaves the winners' part of the gradient alone; the rest is the losers'.
    _, winners = loss_and_gradient(policy, samples, ALGORITHMS[name](sdpo=1.0), rows)
    assert (whole - winners).norm() > 1e-3
    torch.testing.assert_close(found, winners + scale * (whole - winners), rtol=1e-3, atol=1e-5)


def test_sdpo_with_the_losers_against_the_winners_is_plain():
    policy, samples, plain, rows = round_of(ALGORITHMS["dpo"]())
    one = {k: v[:1] for k, v in rows.items()}
    latents, (w, l, k) = samples.samples.trajectory.latents, (int(one[key]) for key in ("winner", "loser", "step"))  # noqa: E741
    mean = policy.mean(latents[w : w + 1, k], one["step"], [samples.samples.prompts[w]])[0].detach()
    latents[l, k], latents[l, k + 1] = latents[w, k], 2 * mean - latents[w, k + 1]  # as far off, on the other side
    safe = ALGORITHMS["dpo"](sdpo=0.9)
    assert safe.batch(policy, samples, one)["loser_scale"].tolist() == [1]
    expected = loss_and_gradient(policy, samples, plain, one)
    torch.testing.assert_close(loss_and_gradient(policy, samples, safe, one), expected)


# --- bandits

BANDIT = {"beta": 0.5, "learning_rate": 2e-2, "window": (0.0, 0.6), "step_weight": "one"}
CASES = {loss: options(loss) for loss in LOSSES} | {
    "ipo": {"loss_type": "ipo", "beta": 0.2},  # it aims at a margin of 1/(2 beta): at .5 it is still under way
    "sppo_hard": {"loss_type": "sppo_hard", "beta": 0.2},
    "discopop": {"loss_type": ["sigmoid", "discopop"], "loss_weights": [1.0, 0.2]},  # alone it cannot leave the base
}


@pytest.mark.parametrize("case", CASES)
def test_a_bandit_is_learned(case):
    means, rewards = bandit(ALGORITHMS["dpo"](**{**BANDIT, **CASES[case]}), 15)
    start, end = means[:3].mean(0), means[-3:].mean(0)
    assert start.abs().max() < 0.35
    assert end[0] > start[0] + 0.35 and end[1] < start[1] - 0.35
    assert rewards[-3:].mean() > rewards[:3].mean() + 0.4


@pytest.mark.parametrize("case", ["ipo", "apo_zero"])
def test_a_bandit_is_learned_by_diffusion_dpo(case):
    means, rewards = bandit(ALGORITHMS["diffusion-dpo"](**{"beta": 2.0, "learning_rate": 2e-2, **CASES[case]}), 15)
    start, end = means[:3].mean(0), means[-3:].mean(0)
    assert end[0] > start[0] + 0.35 and end[1] < start[1] - 0.35
    assert rewards[-3:].mean() > rewards[:3].mean() + 0.4
