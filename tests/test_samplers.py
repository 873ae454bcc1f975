"""The step mathematics against diffusers' own DDIM step, torch.distributions and numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from diffusers import HeunDiscreteScheduler, PNDMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from bench_dfusion.diffusion import samplers
from bench_dfusion.models import schedules
from bench_dfusion.models.schedules import ddim_schedule
from bench_dfusion.testing.fakes import ddim, fake_policy

PREDICTIONS = ("epsilon", "v_prediction")
SPACINGS = {
    "trailing": {"timestep_spacing": "trailing"},
    "leading, offset 1": {"timestep_spacing": "leading", "steps_offset": 1},
}


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the schedule and the step


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 5, 20])
def test_mean_and_std_are_those_of_diffusers(prediction, spacing, eta, steps):
    # At the last step diffusers takes `final_alpha_cumprod`, which without set_alpha_to_one is the alpha of timestep 0.
    scheduler = ddim(prediction_type=prediction, **SPACINGS[spacing])
    schedule = ddim_schedule(scheduler, steps, eta)
    assert schedule.timesteps.tolist() == scheduler.timesteps.tolist() and len(schedule) == steps
    x_t, output = noise(3, 2, 4, 4), noise(3, 2, 4, 4, seed=1)
    for i, t in enumerate(scheduler.timesteps):
        zeros = torch.zeros_like(x_t)
        expected = scheduler.step(output, t, x_t, eta=eta, variance_noise=zeros).prev_sample
        mean = samplers.step_mean(schedule, torch.full((3,), i), x_t, output)
        torch.testing.assert_close(mean, expected, rtol=1e-5, atol=2e-5)
        variance = scheduler._get_variance(t, t - 1000 // steps)
        torch.testing.assert_close(schedule.std[i], eta * variance**0.5, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_where_the_spacing_does_not_divide_the_next_timestep_is_the_schedules(prediction):
    # 1000 / 6: the schedule goes 999, 832, 666, ...; diffusers denoises to t - 166 and then calls the network at the
    # schedule's next t, so its latents are noisier or cleaner than the network is told.
    scheduler = ddim(prediction_type=prediction)
    schedule = ddim_schedule(scheduler, 6, 1.0)
    after = [*schedule.timesteps[1:].tolist(), 0]
    assert [t - 1000 // 6 for t in schedule.timesteps.tolist()] != after
    torch.testing.assert_close(schedule.signal_s**2, scheduler.alphas_cumprod[after])
    x_t, output = noise(2, 1, 3, 3), noise(2, 1, 3, 3, seed=1)
    differs = []
    for i, t in enumerate(scheduler.timesteps):
        step = torch.full((2,), i)
        mean = samplers.step_mean(schedule, step, x_t, output)
        # Independently: the posterior of the forward process given x_0 and x_t, which is DDIM's at eta 1 (Ho et al. eq. 7).
        a_t, a_s = (scheduler.alphas_cumprod[j].double() for j in (t, after[i]))
        clean, _ = samplers.predict_clean(schedule, step, x_t, output)
        one = a_t / a_s
        posterior = (a_s.sqrt() * (1 - one) * clean + one.sqrt() * (1 - a_s) * x_t) / (1 - a_t)
        torch.testing.assert_close(mean, posterior.float(), rtol=1e-4, atol=5e-5)
        torch.testing.assert_close(
            schedule.std[i], ((1 - a_s) / (1 - a_t) * (1 - one)).sqrt().float(), rtol=1e-4, atol=1e-6
        )
        theirs = scheduler.step(output, t, x_t, eta=1.0, variance_noise=torch.zeros_like(x_t)).prev_sample
        differs.append(not torch.allclose(mean, theirs, rtol=1e-5, atol=2e-5))
    assert any(differs) and not differs[-1]  # the last step goes to timestep 0 by either rule


def test_a_schedule_and_a_step_by_hand():
    # Two timesteps with cumulative alphas .64 and .25; T = 2 goes 1 -> 0 -> 0.
    schedule = ddim_schedule(
        ddim(num_train_timesteps=2, trained_betas=[0.36, 0.609375], prediction_type="epsilon"), 2, 1
    )
    assert schedule.timesteps.tolist() == [1, 0]
    torch.testing.assert_close(schedule.signal, torch.tensor([0.5, 0.8]))
    torch.testing.assert_close(schedule.signal_s, torch.tensor([0.8, 0.8]))
    # sigma^2 = (.36 / .75) (1 - .25 / .64) = .48 * .609375 = .2925; then 0.
    torch.testing.assert_close(schedule.std, torch.tensor([0.5408327, 0.0]))
    # x_t = 1, epsilon = .5: x_0 = (1 - .8660254 * .5) / .5 = 1.1339746;
    # mu = .8 * 1.1339746 + sqrt(.36 - .2925) * .5 = .9071797 + .1299038.
    first = torch.tensor([0])
    mean = samplers.step_mean(schedule, first, torch.ones(1, 1), torch.full((1, 1), 0.5))
    torch.testing.assert_close(mean, torch.tensor([[1.0370835]]))
    # One sigma away: -1/2 - log .5408327 - log sqrt(2 pi) = -.5 + .6146453 - .9189385.
    log_prob = samplers.gaussian_log_prob(mean + schedule.std[0], mean, schedule.std[first])
    torch.testing.assert_close(log_prob, torch.tensor([-0.8042932]))


@pytest.mark.parametrize("spacing", [{"timestep_spacing": "leading"}, {"timestep_spacing": "linspace"}])
def test_a_step_from_timestep_0_is_deterministic_masked_and_without_density(spacing):
    schedule = ddim_schedule(ddim(**spacing), 4, 1.0)
    assert schedule.timesteps[-1] == 0 and schedule.std[-1] == 0
    assert schedule.stochastic.tolist() == [True, True, True, False]
    mean, last = noise(2, 1, 2, 2).requires_grad_(), torch.tensor([3, 3])
    log_prob = samplers.gaussian_log_prob(noise(2, 1, 2, 2, seed=1), mean, schedule.std[last])
    kl = samplers.gaussian_kl(mean, noise(2, 1, 2, 2, seed=1), schedule.std[last])
    assert log_prob.tolist() == [0, 0] and kl.tolist() == [0, 0]
    (gradient,) = torch.autograd.grad(log_prob.sum() + kl.sum(), mean)
    assert torch.equal(gradient, torch.zeros_like(mean))


def test_zero_terminal_snr_works_with_v_prediction():
    schedule = ddim_schedule(ddim(rescale_betas_zero_snr=True), 5, 1.0)
    assert schedule.signal[0] == 0 and schedule.std.isfinite().all()
    # Nothing of x_0 is left in x_T: x_0 = -v, the step goes to N(sqrt(a_s) x_0, 1 - a_s) whatever x_T is.
    v = noise(2, 1, 2, 2)
    mean = samplers.step_mean(schedule, torch.tensor([0, 0]), 7 * noise(2, 1, 2, 2, seed=1), v)
    torch.testing.assert_close(mean, -schedule.signal_s[0] * v, rtol=1e-5, atol=5e-3)
    torch.testing.assert_close(schedule.std[0], (1 - schedule.signal_s[0] ** 2).sqrt())


@pytest.mark.parametrize(
    ("scheduler", "eta", "reason"),
    [
        (ddim(clip_sample=True), 1.0, "clip_sample"),
        (ddim(thresholding=True), 1.0, "thresholding"),
        (ddim(), -0.5, "eta must be in"),
        (ddim(), 1.5, "eta must be in"),
        (ddim(), float("nan"), "eta must be in"),
        (ddim(rescale_betas_zero_snr=True, prediction_type="epsilon"), 1.0, "zero-terminal-SNR"),
        (ddim(prediction_type="sample"), 1.0, "'sample' is not supported"),
        (HeunDiscreteScheduler(), 1.0, "first-order"),
        (PNDMScheduler(skip_prk_steps=True), 1.0, "first-order"),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "config") else str(value),
)
def test_samplers_that_are_no_policy_are_refused_with_the_reason(scheduler, eta, reason):
    with pytest.raises(ValueError, match=reason):
        ddim_schedule(scheduler, 5, eta)


@pytest.mark.parametrize(
    ("settings", "steps", "said"),
    [
        (SPACINGS["leading, offset 1"], 1000, "steps_offset 1 the first step is from timestep 1000.* take fewer steps"),
        (SPACINGS["leading, offset 1"], 1001, "track.sampler.steps is 1001, and the schedule has 1000"),
        (SPACINGS["trailing"], 1001, "track.sampler.steps is 1001, and the schedule has 1000"),
        ({"timestep_spacing": "leading", "steps_offset": 700}, 2, "from timestep 1200"),
        ({"timestep_spacing": "leading", "steps_offset": -1}, 2, "steps_offset -1"),
        ({"timestep_spacing": "leading", "steps_offset": None}, 2, "settings make no 2 steps"),
        ({"timestep_spacing": None}, 2, "not supported"),
        ({"timestep_spacing": "leading"}, 1, "the only step is from timestep 0"),
        ({"timestep_spacing": "linspace"}, 1, "the only step is from timestep 0"),
        (SPACINGS["trailing"], 242, "made 243 steps of 242: rounding"),
    ],
)
def test_steps_that_a_schedule_has_not_are_one_line(settings, steps, said):
    with pytest.raises(ValueError, match=said) as refused:
        ddim_schedule(ddim(**settings), steps, 1.0)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("steps", [1, 2, 999, 1000])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_a_schedule_as_long_as_the_levels(spacing, steps):
    if steps == 1 and spacing != "trailing":
        return
    schedule = ddim_schedule(ddim(timestep_spacing=spacing), steps, 1.0)
    assert len(schedule.timesteps.unique()) == steps and schedule.std.isfinite().all() and schedule.stochastic.any()


# --- coefficients-preserving sampling, and none of the noise


def both_schedules(steps: int, eta: float, kind: str) -> list[schedules.Schedule]:
    """Of a VP scheduler and of a flow."""
    sigmas = torch.linspace(1, 0, steps + 1).double()
    flow = schedules.flow_schedule(sigmas, sigmas[:-1] * 1000, eta, kind)
    return [ddim_schedule(ddim(), steps, eta, kind), flow]


@given(st.floats(0, 1), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_cps_keeps_the_noise_of_a_level(eta, steps):
    for schedule in both_schedules(steps, eta, "cps"):
        noise_s = (
            (1 - schedule.signal_s) if schedule.prediction_type == "velocity" else (1 - schedule.signal_s**2).sqrt()
        )
        torch.testing.assert_close((schedule.direction**2 + schedule.std**2).sqrt(), noise_s, rtol=1e-5, atol=1e-6)
        assert (schedule.std >= 0).all() and (schedule.direction >= 0).all()


def test_cps_by_hand():
    sigmas = torch.tensor([0.8, 0.6, 0.0])
    schedule = schedules.flow_schedule(sigmas, sigmas[:-1], 0.8, "cps")
    x_t, v = torch.full((2, 1), 1.0), torch.full((2, 1), 0.5)
    mean = samplers.step_mean(schedule, torch.arange(2), x_t, v)
    assert mean[0, 0].item() == pytest.approx(0.44395, abs=1e-5)
    assert schedule.std.tolist() == pytest.approx([0.57063, 0], abs=1e-5)
    assert schedule.stochastic.tolist() == [True, False]  # the last step of a flow goes to x_0 itself
    # all of the noise is new: the mean is x_0's share alone
    fresh = schedules.flow_schedule(sigmas, sigmas[:-1], 1.0, "cps")
    assert fresh.direction.tolist() == [0, 0] and fresh.std[0].item() == pytest.approx(0.6)


def test_ddim_is_cps_at_another_eta_at_each_step():
    # sin phi = sqrt((1 - a_t / a_s) / (1 - a_t)) at DDIM's eta 1
    native, _ = both_schedules(20, 1.0, "native")
    a_t, a_s = native.signal.double() ** 2, native.signal_s.double() ** 2
    for i, phi in enumerate(((1 - a_t / a_s) / (1 - a_t)).sqrt().asin().tolist()):
        cps, _ = both_schedules(20, phi / (torch.pi / 2), "cps")
        torch.testing.assert_close(cps.std[i], native.std[i], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(cps.direction[i], native.direction[i], rtol=1e-4, atol=1e-4)


def test_without_noise_every_kind_is_the_ode():
    for native, cps in zip(both_schedules(7, 0.0, "native"), both_schedules(7, 0.0, "cps"), strict=True):
        assert not native.stochastic.any() and not cps.stochastic.any() and not native.std.any()
        torch.testing.assert_close(native.direction, cps.direction, rtol=1e-6, atol=1e-7)
    # Euler's step of a flow: x + (sigma_s - sigma_t) v
    _, flow = both_schedules(7, 0.0, "native")
    x_t, v = noise(7, 1, 2, 2), noise(7, 1, 2, 2, seed=1)
    after = torch.cat([flow.noise[1:], torch.zeros(1)])
    euler = x_t + (after - flow.noise).view(-1, 1, 1, 1) * v
    torch.testing.assert_close(samplers.step_mean(flow, torch.arange(7), x_t, v), euler, rtol=1e-5, atol=1e-5)


def test_a_kind_that_is_none_is_refused():
    with pytest.raises(ValueError, match="sampler kind 'sde' is neither native nor cps"):
        ddim_schedule(ddim(), 5, 1.0, "sde")


# --- densities


@given(st.floats(0.01, 3), st.floats(0.01, 3), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_log_prob_and_kl_are_those_of_torch_averaged_over_the_latent(std_a, std_b, seed):
    x, mean, other = noise(3, 2, 3, 4, 4, seed=seed)
    std = torch.tensor([std_a, std_b])
    column = std.view(2, 1, 1, 1)
    own, reference = (torch.distributions.Normal(m.double(), column.double()) for m in (mean, other))
    log_prob = samplers.gaussian_log_prob(x, mean, std)
    torch.testing.assert_close(log_prob, own.log_prob(x.double()).mean((1, 2, 3)).float(), rtol=1e-4, atol=1e-5)
    kl = torch.distributions.kl_divergence(own, reference).mean((1, 2, 3)).float()
    torch.testing.assert_close(samplers.gaussian_kl(mean, other, std), kl, rtol=1e-4, atol=1e-6)


def test_log_prob_is_float32_whatever_comes_in():
    x, mean = noise(2, 4), noise(2, 4, seed=1)
    std = torch.tensor([0.5, 0.5])
    half = samplers.gaussian_log_prob(x.bfloat16(), mean.bfloat16(), std)
    assert half.dtype == torch.float32
    assert torch.equal(half, samplers.gaussian_log_prob(x.bfloat16().float(), mean.bfloat16().float(), std))


def test_the_gradient_of_log_prob_is_the_scaled_residual():
    # d/d mu of the average over D numbers: (x - mu) / (sigma^2 D).
    x, mean = noise(1, 5), noise(1, 5, seed=1).requires_grad_()
    samplers.gaussian_log_prob(x, mean, torch.tensor([0.2])).sum().backward()
    torch.testing.assert_close(mean.grad, (x - mean.detach()) / (0.2**2 * 5))


# --- the forward process


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_clean_and_noise_come_back_from_a_perfect_network(prediction):
    scheduler = ddim(prediction_type=prediction)
    schedule = ddim_schedule(scheduler, 10, 1.0)
    step = torch.arange(10)
    t, clean, eps = schedule.timesteps[step], noise(10, 2, 3, 3), noise(10, 2, 3, 3, seed=1)
    levels = schedules.ddpm_levels(scheduler)
    noised = samplers.add_noise(levels, t, clean, eps)
    torch.testing.assert_close(noised, scheduler.add_noise(clean, eps, t))
    target = samplers.training_target(levels, t, clean, eps)
    if prediction == "v_prediction":
        torch.testing.assert_close(target, scheduler.get_velocity(clean, eps, t))
    found = samplers.predict_clean(schedule, step, noised, target)
    torch.testing.assert_close(found, (clean, eps), rtol=1e-4, atol=1e-4)


def test_both_predictions_say_the_same():
    v, epsilon = (ddim_schedule(ddim(prediction_type=p), 8, 0.7) for p in ("v_prediction", "epsilon"))
    step, x_t, output = torch.arange(8), noise(8, 1, 3, 3), noise(8, 1, 3, 3, seed=1)
    _, as_epsilon = samplers.predict_clean(v, step, x_t, output)
    expected = samplers.step_mean(v, step, x_t, output)
    torch.testing.assert_close(samplers.step_mean(epsilon, step, x_t, as_epsilon), expected, rtol=1e-4, atol=1e-4)


# --- noise


# torch's CPU generator uses the low 32 bits of a seed: beyond them, two seeds may share their noise.
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=8), st.data())
@settings(max_examples=40, deadline=None)
def test_a_samples_noise_depends_on_its_own_seed_alone(seeds, data):
    everyone = samplers.sample_noise(torch.tensor(seeds), 2, (1, 2, 2))
    rows = data.draw(st.lists(st.integers(0, len(seeds) - 1), min_size=1, max_size=8))
    torch.manual_seed(data.draw(st.integers(0, 9)))  # nor on the global generator
    some = samplers.sample_noise(torch.tensor(seeds)[rows], 2, (1, 2, 2))
    assert torch.equal(some, everyone[rows])
    assert everyone.shape == (len(seeds), 3, 1, 2, 2) and everyone.dtype == torch.float32
    different = {seed: row.flatten().tolist() for seed, row in zip(seeds, everyone, strict=True)}
    assert len({tuple(row) for row in different.values()}) == len(different)


def test_noise_is_standard_normal_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    z = samplers.sample_noise(torch.arange(500), 3, (1, 2, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert abs(float(z.mean())) < 0.05 and abs(float(z.std()) - 1) < 0.05
    # Start noise and the steps' z of one seed are independent of each other.
    steps = z.flatten(2).permute(1, 0, 2).flatten(1)
    assert (torch.corrcoef(steps) - torch.eye(4)).abs().max() < 0.1


def test_a_trajectory_takes_start_noise_and_each_steps_z_in_order():
    policy, seeds = fake_policy(steps=5, batch=2), torch.tensor([4, 9, 2])
    drawn = policy.sample(["one", "two", "one"], seeds)
    z = samplers.sample_noise(seeds, 5, (2, 2, 2))
    torch.testing.assert_close(drawn.latents[:, 0], z[:, 0])
    for i in range(5):
        step = torch.full((3,), i)
        mean = policy.mean(drawn.latents[:, i], step, drawn.prompts).detach()
        expected = mean + policy.schedule.std[i] * z[:, i + 1]
        torch.testing.assert_close(drawn.latents[:, i + 1], expected)
        # log p is -z^2 / 2 - log sigma - log sqrt(2 pi), averaged.
        log_prob = -(z[:, i + 1] ** 2).mean((1, 2, 3)) / 2 - policy.schedule.std[i].log() - 0.9189385
        torch.testing.assert_close(drawn.log_probs[:, i], log_prob, rtol=1e-4, atol=1e-4)
