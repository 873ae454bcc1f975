"""Stable Diffusion 3 and FLUX: flow matching as a policy, against diffusers' pipelines; D-Fusion in joint attention."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_dfusion.algorithms.sft import SFT, SFTConfig
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from tiny import policy_of
from torch import Tensor

from bench_dfusion.builders.contract import ConsistentSamples, Samples
from bench_dfusion.builders.dfusion.attention import AttentionHooks
from bench_dfusion.builders.dfusion.builder import DFusion, DFusionConfig
from bench_dfusion.diffusion import samplers
from bench_dfusion.diffusion.policy import Policy
from bench_dfusion.errors import UsageError
from bench_dfusion.models import schedules
from bench_dfusion.models.flux import pack, unpack
from bench_dfusion.models.loading import load_adapter
from bench_dfusion.models.schedulers import flow_matching
from bench_dfusion.tracks.schema import ModelSection

PROMPTS = ["a red circle", "a capybara and an axolotl"]
SEEDS = torch.tensor([3, 4])
SIDE = 32  # pixels: 16 x 16 latents, 8 x 8 tokens
GUIDANCE = 3.0


@pytest.fixture(scope="module", params=["sd3", "flux"])
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(f"{request.param}_dir")
    return found


@pytest.fixture(scope="module")
def both(folder: Path) -> tuple[Policy, Any]:
    """A policy whose LoRA adds nothing, and diffusers' pipeline of the same checkpoint."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return policy_of(folder, lora=0, guidance=GUIDANCE, resolution=SIDE), pipe


# ---------------------------------------------------------------- the SDE


falling = st.sets(st.integers(1, 99), min_size=2, max_size=8).map(lambda s: [i / 100 for i in sorted(s, reverse=True)])


@given(falling, st.booleans(), st.floats(0.05, 1), st.integers(0, 999))
def test_a_step_is_flow_grpos(sigmas: list[float], from_noise: bool, level: float, seed: int) -> None:
    """mu = x (1 + s²/2t dt) + v (1 + s² (1 - t)/2t) dt and std = s sqrt(-dt), as the paper writes them, in float64."""
    sigmas = ([1.0] if from_noise else []) + sigmas
    schedule = schedules.flow_schedule(torch.tensor([*sigmas, 0.0]), torch.tensor(sigmas) * 1000, level)
    g = torch.Generator().manual_seed(seed)
    x, v = torch.randn(2, len(sigmas), 1, 2, 2, generator=g)
    mean = samplers.step_mean(schedule, torch.arange(len(sigmas)), x, v)
    for i in range(len(sigmas) - 1):
        t, after = sigmas[i], sigmas[i + 1]
        dt, s2 = after - t, level**2 * t / (1 - (after if t == 1 else t))
        expected = x[i].double() * (1 + s2 / (2 * t) * dt) + v[i].double() * (1 + s2 * (1 - t) / (2 * t)) * dt
        torch.testing.assert_close(mean[i].double(), expected, rtol=1e-4, atol=1e-4 * (1 + s2))
        assert float(schedule.std[i]) == pytest.approx((s2 * -dt) ** 0.5, rel=1e-4)
    torch.testing.assert_close(mean[-1], x[-1] - sigmas[-1] * v[-1], rtol=1e-4, atol=1e-4)  # the network's x_0
    assert schedule.std[-1] == 0 and schedule.stochastic.tolist() == [True] * (len(sigmas) - 1) + [False]


def test_a_step_by_hand() -> None:
    # t = 1/2 to 1/4 at a = 1: s² = 1, std = 1/2; x_0 = x - v/2, epsilon = x + v/2; mu = 3/4 x_0 + (1/4 - 1/4) epsilon.
    schedule = schedules.flow_schedule(torch.tensor([0.5, 0.25, 0.0]), torch.tensor([500.0, 250.0]), 1.0)
    mean = samplers.step_mean(schedule, torch.tensor([0]), torch.full((1, 1), 2.0), torch.full((1, 1), 4.0))
    assert mean.item() == 0 and schedule.std.tolist() == [0.5, 0.0] and schedule.size.tolist() == [0.25, 0.25]


@pytest.mark.parametrize(
    ("sigmas", "level", "said"), [([0.5, 0.7, 0], 0.7, "fall"), ([0.5, 0.2], 0.7, "to 0"), ([1, 0.5, 0], 1.5, "eta")]
)
def test_what_is_no_flow_is_refused(sigmas: list[float], level: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        schedules.flow_schedule(torch.tensor(sigmas), torch.tensor(sigmas[:-1]), level)


def test_velocity_says_clean_and_noise() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    levels = schedules.flow_levels(scheduler.sigmas.flip(0), scheduler.timesteps.flip(0))
    assert (levels.noise.diff() > 0).all() and levels.noise[-1] == 1
    clean, noise = torch.randn(2, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 300, 700, 999])
    x_t = samplers.add_noise(levels, t, clean, noise)
    torch.testing.assert_close(x_t, scheduler.scale_noise(clean, levels.timesteps[t], noise))
    output = samplers.training_target(levels, t, clean, noise)
    torch.testing.assert_close(output, noise - clean)
    torch.testing.assert_close(samplers.predict_clean(levels, t, x_t, output), (clean, noise), rtol=1e-4, atol=1e-5)


def test_other_flow_schedulers_are_refused() -> None:
    with pytest.raises(UsageError, match="FlowMatchHeun"):
        flow_matching(FlowMatchHeunDiscreteScheduler())
    with pytest.raises(UsageError, match="invert_sigmas"):
        flow_matching(FlowMatchEulerDiscreteScheduler(invert_sigmas=True))


@pytest.mark.parametrize("flux", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 1000, 1200])
def test_a_flow_of_any_number_of_steps(steps: int, flux: bool, request: pytest.FixtureRequest) -> None:
    adapter, _ = load_adapter(
        ModelSection(id=str(request.getfixturevalue("flux_dir" if flux else "sd3_dir")), resolution=SIDE), "meta"
    )
    schedule = adapter.schedule(steps, None)
    assert len(schedule) == steps and schedule.std.isfinite().all() and schedule.signal_s[-1] == 1


def test_flow_settings_that_make_no_sigmas_are_one_line(flux_dir: Path) -> None:
    adapter, _ = load_adapter(ModelSection(id=str(flux_dir), resolution=SIDE), "meta")
    for settings in ({"max_image_seq_len": 16}, {"base_shift": None}):
        adapter.scheduler = FlowMatchEulerDiscreteScheduler.from_config(adapter.scheduler.config, **settings)
        adapter.scheduler.register_to_config(**settings)
        with pytest.raises(ValueError, match="settings make no 3 steps"):
            adapter.schedule(3, None)


# ---------------------------------------------------------------- as diffusers' own pipelines


def test_prompts_are_encoded_as_the_pipeline_does(both: tuple[Policy, Any]) -> None:
    policy, pipe = both
    ours = policy.condition(PROMPTS)
    if policy.adapter.distilled:
        states, pooled, _ = pipe.encode_prompt(PROMPTS, PROMPTS)
        assert ours["guidance"].tolist() == [GUIDANCE] * 2
    else:
        states, empty, pooled, empty_pooled = pipe.encode_prompt(PROMPTS, PROMPTS, PROMPTS)
        states, pooled = torch.cat([empty, states]), torch.cat([empty_pooled, pooled])
    torch.testing.assert_close(ours["states"], states, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours["pooled"], pooled, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("steps", [3, 5])
def test_pictures_are_the_pipelines_own_where_nothing_is_random(both: tuple[Policy, Any], steps: int) -> None:
    """At a noise level of all but 0 the SDE is the ODE that diffusers solves: the same sigmas, guidance and decoder."""
    policy, pipe = both
    policy = Policy(policy.adapter, steps=steps, eta=1e-6, guidance=GUIDANCE)
    noise = samplers.sample_noise(SEEDS, steps, policy.adapter.latent_shape)[:, 0]
    latents = pack(noise) if policy.adapter.distilled else noise
    size = {"height": SIDE, "width": SIDE, "num_inference_steps": steps, "guidance_scale": GUIDANCE}
    expected = pipe(PROMPTS, **size, latents=latents, output_type="latent").images
    expected = unpack(expected, SIDE // 4) if policy.adapter.distilled else expected
    drawn = policy.sample(PROMPTS, SEEDS)
    assert torch.equal(policy.schedule.timesteps, pipe.scheduler.timesteps)
    assert (drawn.final - expected).abs().max() < 1e-4 * expected.abs().max()
    images = pipe(PROMPTS, **size, latents=latents, output_type="pt").images
    torch.testing.assert_close(policy.adapter.decode(drawn.final), images, atol=1e-4, rtol=0)
    assert images.std() > 0.05 and (images[0] - images[1]).abs().max() > 0.05


def test_levels_of_the_sampler_are_its_sigmas_and_the_network_is_told_them(folder: Path) -> None:
    """A picture's size shifts FLUX's sigmas, so that they are none of the training's."""
    policy = policy_of(folder, resolution=SIDE)
    trajectory = policy.sample(PROMPTS, SEEDS)
    samples = ConsistentSamples(
        Samples(trajectory, policy.decode(trajectory.final), torch.arange(2.0)),
        2,
        torch.tensor([[1, 0]]),
        torch.arange(2),
        torch.zeros(0, 3).long(),
    )
    algorithm = SFT(SFTConfig(levels="sampler", timesteps=12))
    rows = algorithm.prepare(policy, samples, torch.Generator().manual_seed(0))
    step = rows["t"] - policy.training_levels
    assert step.unique().tolist() == [0, 1, 2, 3] and rows["row"].tolist() == [1] * 12
    policy.adapter.scheduler.set_timesteps(**policy.adapter.sigmas(4))
    sigma = policy.adapter.scheduler.sigmas[step].view(-1, 1, 1, 1)
    noise = torch.cat(
        [samplers.sample_noise(seed[None], 0, policy.adapter.latent_shape)[:, 0] for seed in rows["noise"]]
    )
    clean = trajectory.final[rows["row"]]
    x_t = (1 - sigma) * clean + sigma * noise
    with torch.no_grad():
        found = algorithm.loss(policy, samples, rows).value
        told = policy.adapter.scheduler.timesteps[step]
        velocity = policy.predict(x_t, told, [PROMPTS[1]] * 12)
    torch.testing.assert_close(found, ((velocity - (noise - clean)) ** 2).mean(), rtol=1e-5, atol=1e-6)
    assert not torch.isin(told, policy.levels.timesteps[1 : policy.training_levels - 1]).all()


def test_pictures_and_latents_are_each_others_inverse_in_scale(both: tuple[Policy, Any]) -> None:
    policy, pipe = both
    images = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    config = pipe.vae.config
    mode = pipe.vae.encode(images * 2 - 1).latent_dist.mode()
    expected = (mode - config.shift_factor) * config.scaling_factor
    torch.testing.assert_close(policy.adapter.encode_images(images), expected, atol=1e-5, rtol=1e-4)


def test_a_resolution_that_patches_do_not_divide_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="resolution 30 is no multiple of 4"):
        load_adapter(ModelSection(id=str(folder), resolution=30))


# ---------------------------------------------------------------- D-Fusion in joint attention


class Watch:
    """The queries, keys and values of every attention as they reach the kernel, [B, tokens, heads, width]."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []
        plain = torch.nn.functional.scaled_dot_product_attention

        def watched(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            q, k, v = (x.detach().transpose(1, 2).clone() for x in (query, key, value))
            self.seen.append((q, k, v))
            return plain(query, key, value, *args, **kwargs)

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)

    def of(self, policy: Policy) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """By layer: of the network alone, whose attentions come in its own order, the text encoders' left out."""
        names = list(policy.adapter.attentions("self"))
        found = dict(zip(names, self.seen[-len(names) :], strict=True))
        self.seen = []
        return found


@pytest.fixture
def fusing(folder: Path) -> tuple[Policy, AttentionHooks]:
    policy = policy_of(folder, guidance=GUIDANCE, resolution=SIDE, batch=4)
    policy.condition(PROMPTS)
    return policy, AttentionHooks(policy.adapter, policy.adapter.fused_layers(), policy.adapter.map_side())


@pytest.mark.parametrize("how", ["null", "left out", "encoder alone"])
def test_stable_diffusion_3_without_t5(how: str, sd3_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sd3_dir, tmp_path / "sd3")
    index = json.loads((folder / "model_index.json").read_text())
    for part in ("text_encoder_3", "tokenizer_3") if how != "encoder alone" else ("text_encoder_3",):
        index[part] = [None, None]
        if how == "left out":
            del index[part]
        shutil.rmtree(folder / part)
    (folder / "model_index.json").write_text(json.dumps(index))
    policy = policy_of(folder, lora=0, guidance=GUIDANCE, resolution=SIDE)
    pipe = DiffusionPipeline.from_pretrained(sd3_dir, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    states, empty, pooled, empty_pooled = pipe.encode_prompt(PROMPTS, PROMPTS, PROMPTS)
    ours = policy.condition(PROMPTS)
    torch.testing.assert_close(ours["states"], torch.cat([empty, states]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours["pooled"], torch.cat([empty_pooled, pooled]), atol=1e-5, rtol=1e-5)
    assert [p.start for p in policy.adapter.text_parts()] == [0]
    assert DFusion(DFusionConfig())._tokens(policy, PROMPTS[1]) == [[2, 3, 4], [7, 8, 9, 10]]
    hollow, _ = load_adapter(ModelSection(id=str(folder)), "meta")
    assert hollow.pipe.text_encoder_3 is None
    index["tokenizer_3"], index["text_encoder_3"] = [None, None], ["transformers", "T5EncoderModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match="no text_encoder_3"):
        load_adapter(ModelSection(id=str(folder)))


def text_of(policy: Policy, rows: int) -> slice:
    """The text's rows of a joint sequence: SD 3 has them last, FLUX first."""
    return slice(0, rows - 64) if policy.adapter.distilled else slice(64, rows)


@torch.no_grad()
def test_maps_are_the_picture_to_text_block_of_the_joint_probabilities(
    fusing: tuple[Policy, AttentionHooks], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, taps = fusing
    x, step, watch = torch.randn(2, *policy.adapter.latent_shape), torch.tensor([1, 2]), Watch(monkeypatch)
    with taps.recording():
        policy.mean(x, step, PROMPTS)
    seen, total = watch.of(policy), []
    for name in policy.adapter.attentions("cross"):
        q, k, _ = seen[name]
        text = text_of(policy, k.shape[1])
        picture = [i for i in range(k.shape[1]) if i not in range(*text.indices(k.shape[1]))]
        scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / q.shape[-1] ** 0.5
        total.append(scores.softmax(-1).mean(1)[:, picture][:, :, text])
    torch.testing.assert_close(taps.maps.double(), torch.stack(total).mean(0), rtol=1e-4, atol=1e-7)
    assert taps.maps.shape == (2 * policy.branches, 64, sum(p.length for p in policy.adapter.text_parts()))


@torch.no_grad()
def test_a_full_mask_gives_the_references_keys_and_values_to_the_picture_alone(
    fusing: tuple[Policy, AttentionHooks], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, taps = fusing
    reference, target = torch.randn(2, 2, *policy.adapter.latent_shape, generator=torch.Generator().manual_seed(1))
    step, watch = torch.tensor([1, 1]), Watch(monkeypatch)
    with taps.recording():
        policy.mean(reference, step, PROMPTS)
    of_reference = watch.of(policy)
    policy.mean(target, step, PROMPTS)
    alone = watch.of(policy)
    mask = torch.ones(2 * policy.branches, 64)
    with taps.fusing(taps.keys_values, mask):
        policy.mean(target, step, PROMPTS)
    fused, first = watch.of(policy), next(iter(taps.modules))
    for name, (q, k, v) in fused.items():
        rows = k.shape[1]
        text = text_of(policy, rows) if rows > 64 else slice(0, 0)
        picture = torch.ones(rows, dtype=torch.bool)
        picture[text] = False
        pairs = zip((k, v), of_reference[name][1:], strict=True)
        same = [torch.equal(new[:, picture], old[:, picture]) for new, old in pairs]
        assert same == [name in taps.modules] * 2, name
        if name == first:  # before it nothing has changed, so that the text's rows are those of the target alone
            pairs = zip((k, v), alone[name][1:], strict=True)
            assert all(torch.equal(new[:, text], old[:, text]) for new, old in pairs)
            assert torch.equal(q, alone[name][0])


@torch.no_grad()
def test_half_a_mask_fuses_half_the_tokens(
    fusing: tuple[Policy, AttentionHooks], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, taps = fusing
    reference, target = torch.randn(2, 1, *policy.adapter.latent_shape, generator=torch.Generator().manual_seed(1))
    step, watch = torch.tensor([1]), Watch(monkeypatch)
    with taps.recording():
        policy.mean(reference, step, PROMPTS[:1])
    of_reference = watch.of(policy)
    policy.mean(target, step, PROMPTS[:1])
    alone = watch.of(policy)
    mask = torch.zeros(policy.branches, 64)
    mask[:, 7:39] = 1
    with taps.fusing(taps.keys_values, mask):
        policy.mean(target, step, PROMPTS[:1])
    name = next(iter(taps.modules))
    _, k, v = watch.of(policy)[name]
    start = k.shape[1] - 64 if policy.adapter.distilled else 0
    for i in range(64):
        source = of_reference if 7 <= i < 39 else alone
        for new, old in zip((k, v), source[name][1:], strict=True):
            assert torch.equal(new[:, start + i], old[:, start + i])


@pytest.mark.parametrize("empty", [True, False])
def test_targets_are_the_bases_where_the_mask_is_empty(folder: Path, empty: bool) -> None:
    policy = policy_of(folder, guidance=GUIDANCE, resolution=SIDE, batch=2)
    drawn = policy.sample([PROMPTS[1]] * 2, SEEDS)
    builder = DFusion(DFusionConfig(threshold=2.0 if empty else 0.0))
    targets, masks = builder.targets(policy, drawn, torch.tensor([0, 0]), torch.tensor([0, 1]))
    assert masks.unique().tolist() == [0.0 if empty else 1.0]
    assert torch.equal(targets.latents, drawn.latents) == empty
    if not empty:  # the reference fused with itself is itself
        torch.testing.assert_close(targets.latents[0], drawn.latents[0], rtol=1e-3, atol=1e-3)
        assert (targets.latents[1] - drawn.latents[1]).abs().max() > 0.01


def test_items_have_columns_in_every_stretch_of_the_text(folder: Path) -> None:
    policy = policy_of(folder, resolution=SIDE)
    found = DFusion(DFusionConfig())._tokens(policy, PROMPTS[1])
    tokenizer = policy.adapter.text_parts()[-1].tokenizer
    pieces = tokenizer.tokenize(PROMPTS[1])
    t5 = t5_places(pieces)
    if policy.adapter.distilled:
        assert found == t5
    else:
        clip = [[2, 3, 4], [7, 8, 9, 10]]
        assert found == [c + [77 + i for i in own] for c, own in zip(clip, t5, strict=True)]


def t5_places(pieces: list[str]) -> list[list[int]]:
    """Which pieces make "capybara" and "axolotl", by their letters."""
    ends = list(itertools.accumulate(len(p) for p in pieces))
    text, found = "".join(pieces), []
    for word in ("▁capybara", "▁axolotl"):
        start = text.index(word)
        inside = range(start + 2, start + len(word) + 1)  # a "▁" of its own is no piece of the word
        found.append([i for i, end in enumerate(ends) if end in inside])
    return found


def test_the_second_half_of_the_blocks_is_fused(folder: Path) -> None:
    policy = policy_of(folder, resolution=SIDE)
    expected = {
        False: ("transformer_blocks.1.attn", "transformer_blocks.2.attn"),
        True: ("single_transformer_blocks.0.attn", "single_transformer_blocks.1.attn"),
    }
    assert policy.adapter.fused_layers() == expected[policy.adapter.distilled]
