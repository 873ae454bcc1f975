"""The embedded world: grammar, oracle, prompt lists, shipped weights."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench_dfusion import micro
from bench_dfusion.micro import oracle, prompts, scenes
from bench_dfusion.micro.scenes import Placed, Scene, Spec, Thing
from bench_dfusion.util import files

TONES = ((0.5, 0.5, 0.5), (0.6, 0.6, 0.6))


def draw(*objects: tuple[str, str, float, float]) -> np.ndarray:
    placed = tuple(Placed(Thing(c, s), x, y, 9.0) for c, s, x, y in objects)
    return scenes.render(Scene(placed, TONES, 0.0))


@given(st.sampled_from(scenes.TEMPLATES), st.integers(0, 10**9))
def test_every_prompt_reads_back_as_its_spec(template: str, seed: int) -> None:
    spec = scenes.random_spec(template, random.Random(seed))
    assert scenes.parse(spec.prompt) == spec


@pytest.mark.parametrize("text", ["", "a red", "five red circles", "a pink circle", "a red circle under a blue square"])
def test_prompts_outside_the_grammar_are_refused_with_the_grammar(text: str) -> None:
    with pytest.raises(ValueError, match="a red circle and a blue square"):
        scenes.parse(text)


def test_oracle_is_right_on_1000_clean_renders() -> None:
    rng = random.Random(7)
    for i in range(1000):
        spec = scenes.random_spec(scenes.TEMPLATES[i % 4], rng)
        verdict = oracle.judge(scenes.render(scenes.sample_scene(spec, rng)), spec)
        assert verdict.full == 1.0 and verdict.graded == 1.0 and not verdict.failed, (spec, verdict)


def test_oracle_tells_what_failed_and_grades_by_hand() -> None:
    image = draw(("red", "circle", 16, 32), ("blue", "square", 48, 32))
    assert oracle.judge(image, "a red circle left of a blue square").graded == 1.0
    # both objects match, the relation does not: 3/4
    right = oracle.judge(image, "a red circle right of a blue square")
    assert (right.full, right.graded, right.failed) == (0.0, 0.75, ("relation",))
    # one object right, the other has the colour only: (1 + 1/2) / 2
    shape = oracle.judge(image, "a red circle and a blue ring")
    assert shape.graded == 0.75 and shape.failed == ("shape",)
    # colours swapped: whichever way they are matched each has one half: (1/2 + 1/2) / 2
    swapped = oracle.judge(image, "a blue circle and a red square")
    assert swapped.graded == 0.5 and swapped.full == 0.0
    # a surplus object: 1 / max(1, 2)
    surplus = oracle.judge(image, "a red circle")
    assert surplus.graded == 0.5 and surplus.failed == ("count",)
    # one of four: 1 / 4
    assert oracle.judge(draw(("red", "circle", 32, 32)), "four red circles").graded == 0.25


def test_the_oracles_rules_are_those_of_their_version() -> None:
    """Clean, damaged and drawn pictures with the verdicts of version 1. Where this fails the rules have changed: raise
    `RULES` in reward_models/oracle.py, give the version fingerprints and a file of its own. Judges of one version are
    one judge, whatever their code."""
    from bench_dfusion.reward_models import oracle as reward

    golden = np.load(Path(__file__).parent / "data" / f"oracle-v{reward.RULES}.npz")
    assert len(golden["prompts"]) == 96 and golden["full"].mean() == 1 / 3
    for number, (image, prompt) in enumerate(zip(golden["images"], golden["prompts"], strict=True)):
        verdict = oracle.judge(image, str(prompt))
        seen = json.dumps([[s.colour, s.shape, s.area] for s in verdict.seen])
        expected = tuple(golden[name][number].item() for name in ("full", "graded", "failed", "seen"))
        assert (verdict.full, verdict.graded, ",".join(verdict.failed), seen) == expected, (number, prompt)
    for score, known in (("graded", "a1bf9292"), ("full", "1adfe50f")):
        own = reward.Oracle(reward.OracleConfig(score=score)).fingerprint()
        assert own.startswith(known) and own == reward.FINGERPRINTS[reward.RULES][score]


def test_full_and_graded_verdicts_go_together_as_the_reward_says() -> None:
    """On the golden pictures none is impossible, whichever four make a mean; what cannot be is."""
    from bench_dfusion.reward_models.oracle import Oracle, OracleConfig

    both = [OracleConfig(score="full"), OracleConfig(score="graded")]
    golden = np.load(Path(__file__).parent / "data" / "oracle-v1.npz")
    for image, prompt in zip(golden["images"][::5], golden["prompts"][::5], strict=True):
        others = [golden["images"][i] for i in (0, 30, 70)]
        scores = [oracle.judge(i, str(prompt)) for i in (image, *others)]
        means = [float(np.mean([v.full for v in scores])), float(np.mean([v.graded for v in scores]))]
        assert Oracle.impossible(list(zip(both, means, strict=True)), str(prompt), 4) is None
    for prompt, full, graded, possible in (
        ("a red ring", 0.5, 0.75, True),
        ("a red ring", 0.5, 0.76, False),
        ("four red rings", 0.5, 0.9375, True),
        ("four red rings", 0.5, 0.95, False),
        ("a red ring above a blue cross", 0.0, 0.75, True),
        ("a red ring above a blue cross", 0.0, 0.8, False),
        ("a red ring", 0.5, 0.49, False),
        ("a red ring", 0.6, 0.7, False),
        ("a red ring", 1.0, 1.0, True),
    ):
        reason = Oracle.impossible(list(zip(both, (full, graded), strict=True)), prompt, 4)
        assert (reason is None) == possible, (prompt, full, graded, reason)


def test_oracle_on_malformed_pictures() -> None:
    grey = np.full((64, 64, 3), 128, np.uint8)
    assert oracle.read(grey) == ()
    assert oracle.judge(grey, "a red circle").graded == 0.0
    speck = grey.copy()
    speck[10:14, 10:14] = scenes.COLOURS["red"]  # 16 px < SPECK
    assert oracle.read(speck) == ()
    bar = grey.copy()
    bar[30:33, 2:62] = scenes.COLOURS["red"]  # an object of no kind
    (seen,) = oracle.read(bar)
    assert seen.shape is None and seen.colour == "red"
    assert oracle.judge(bar, "a red circle").graded == 0.5
    touching = draw(("red", "square", 20, 32), ("red", "square", 33, 32))
    assert len(oracle.read(touching)) == 1
    with pytest.raises(ValueError, match="64x64x3"):
        oracle.read(np.zeros((32, 32, 3), np.uint8))


def test_prompt_lists_are_disjoint_by_composition_and_long_enough() -> None:
    kept = {s: {scenes.parse(p).composition for p in prompts.prompts(s)} for s in prompts.SPLITS}
    for a in prompts.SPLITS:
        for b in prompts.SPLITS:
            assert a == b or not kept[a] & kept[b]
    assert len(prompts.prompts("train")) >= 48
    assert len(prompts.prompts("validation")) >= 24
    assert len(prompts.prompts("heldout")) >= 48
    for split in prompts.SPLITS:
        assert {scenes.parse(p).template for p in prompts.prompts(split)} == set(scenes.TEMPLATES)


def test_shipped_prompt_files_are_what_the_module_makes() -> None:
    for split in prompts.SPLITS:
        lines = (micro.HERE / "prompts" / f"{split}.txt").read_text().splitlines()
        assert [line.split("\t")[0] for line in lines] == list(prompts.prompts(split))
        assert all(scenes.parse(p).template == t for p, t in (line.split("\t") for line in lines))


def test_pretraining_never_sees_validation_or_heldout_compositions() -> None:
    rng = random.Random(3)
    hidden = {scenes.parse(p).composition for s in ("validation", "heldout") for p in prompts.prompts(s)}
    drawn = [prompts.draw(rng.choice(scenes.TEMPLATES), "train", rng) for _ in range(3000)]
    assert not hidden & {s.composition for s in drawn}


def test_scene_rendering_is_repeatable_and_keeps_objects_apart() -> None:
    spec = Spec("count", (Thing("red", "ring"),), 4)
    first, second = (scenes.sample_scene(spec, random.Random(5)) for _ in range(2))
    assert first == second
    for i, a in enumerate(first.objects):
        for b in first.objects[:i]:
            assert np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius


def test_shipped_weights_are_small_and_are_what_the_track_fixes() -> None:
    from bench_dfusion.tracks import schema

    weights = [p for p in (micro.HERE / "weights").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in weights) <= 16e6
    assert not [p for p in weights if p.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    content = schema.read("micro")
    assert content["model"]["sha256"] == files.tree_sha256(micro.PIPELINE)


def test_plain_diffusers_loads_and_samples_the_pipeline() -> None:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(micro.PIPELINE)
    pipe.set_progress_bar_config(disable=True)
    out = pipe(
        ["a red circle", "three green rings"],
        height=64,
        width=64,
        num_inference_steps=8,
        guidance_scale=1.0,
        eta=1.0,
        use_resolution_binning=False,
        max_sequence_length=16,
        clean_caption=False,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    )
    assert out.images.shape == (2, 64, 64, 3) and np.isfinite(out.images).all()


def test_open_clip_loads_the_clip_and_it_knows_the_world(tmp_path: Path) -> None:
    import open_clip

    name = f"local-dir:{micro.CLIP}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    model.eval()
    rng = random.Random(11)
    specs = [scenes.random_spec("single", rng) for _ in range(24)]
    from PIL import Image

    images = torch.stack([preprocess(Image.fromarray(scenes.render(scenes.sample_scene(s, rng)))) for s in specs])
    with torch.no_grad():
        a = torch.nn.functional.normalize(model.encode_image(images), dim=-1)
        b = torch.nn.functional.normalize(model.encode_text(tokenizer([s.prompt for s in specs])), dim=-1)
    own = (a * b).sum(-1)
    other = (a * b.roll(1, 0)).sum(-1)
    assert (own > other).float().mean() > 0.9


def test_our_sampling_equals_the_plain_pipeline() -> None:
    """The Policy's steps are the pipeline's own DDIM steps, given the same noise."""
    from bench_dfusion.diffusion import samplers
    from bench_dfusion.diffusion.policy import Policy
    from bench_dfusion.models.loading import load_adapter
    from bench_dfusion.tracks.schema import ModelSection

    adapter, _ = load_adapter(ModelSection(id="micro"))
    policy = Policy(adapter, steps=8, guidance=2.0)
    names = ["a red circle", "two blue squares and more"]
    seeds = torch.tensor([3, 4])
    ours = policy.sample(names, seeds)
    noise = samplers.sample_noise(seeds, 8, adapter.latent_shape)
    scheduler = adapter.scheduler
    scheduler.set_timesteps(8)
    x = noise[:, 0]
    cond, mask, neg, neg_mask = adapter.pipe.encode_prompt(names, True, max_sequence_length=16)
    for i, t in enumerate(scheduler.timesteps):
        with torch.no_grad():
            both = adapter.network(
                torch.cat([x, x]),
                encoder_hidden_states=torch.cat([neg, cond]),
                encoder_attention_mask=torch.cat([neg_mask, mask]),
                timestep=t.repeat(4),
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
                return_dict=False,
            )[0]
        u, c = both.chunk(2)
        x = scheduler.step(u + 2.0 * (c - u), t, x, eta=1.0, variance_noise=noise[:, i + 1]).prev_sample
    torch.testing.assert_close(ours.final, x, atol=2e-4, rtol=1e-3)
