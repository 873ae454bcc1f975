"""The second embedded world: grammar, scenes, oracle, prompt lists, noise in captions, recipe."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench_dfusion import micro
from bench_dfusion.errors import UsageError
from bench_dfusion.micro import oracle as first_oracle
from bench_dfusion.micro import pretrain as first
from bench_dfusion.micro.scenes import Thing
from bench_dfusion.micro.v2 import grammar, listening, oracle, pretrain, scenes
from bench_dfusion.runs import config
from bench_dfusion.util import files

RED_CIRCLE, BLUE_SQUARE = Thing("red", "circle"), Thing("blue", "square")


@given(st.sampled_from(grammar.TEMPLATES), st.integers(0, 10**9))
def test_every_prompt_reads_back_as_its_spec(template: str, seed: int) -> None:
    spec = grammar.random_spec(template, random.Random(seed))
    assert grammar.parse(spec.prompt) == spec
    assert spec.picture.composition == spec.composition
    assert Counter(spec.picture.objects) == Counter(spec.objects)


def test_phrasings_share_composition_and_picture() -> None:
    one = grammar.parse("two red circles and a blue square")
    turned = grammar.parse("a blue square and two red circles")
    assert one.objects == (RED_CIRCLE, RED_CIRCLE, BLUE_SQUARE)
    assert turned != one and turned.picture == one.picture and turned.composition == one.composition
    left, right = (
        grammar.parse("a red circle left of a blue square"),
        grammar.parse("a blue square right of a red circle"),
    )
    assert left.picture == right.picture != grammar.parse("a red circle above a blue square").picture


@pytest.mark.parametrize(
    "text", ["", "three red circles and a blue square", "two red circles and two blue squares", "a b"]
)
def test_prompts_outside_the_grammar_are_refused_with_the_grammar(text: str) -> None:
    with pytest.raises(ValueError, match="two red circles and a blue square"):
        grammar.parse(text)


def test_lists_are_disjoint_by_composition_and_long_enough() -> None:
    specs = {split: [grammar.parse(p) for p in grammar.prompts(split)] for split in grammar.SPLITS}
    names = {split: {s.composition for s in of} for split, of in specs.items()}
    for split, of in specs.items():
        assert len(set(grammar.prompts(split))) == len(of)
        assert names[split] <= grammar.known(split)
        assert {s.template for s in of} == set(grammar.TEMPLATES)
        for other in grammar.SPLITS:
            assert split == other or not grammar.known(split) & grammar.known(other)
    assert len(specs["train"]) >= 300 and len(specs["validation"]) >= 32 and len(specs["heldout"]) >= 128
    phrasings = Counter(s.composition for s in specs["heldout"])
    assert all(phrasings[s.composition] == len(s.things) for s in specs["heldout"])


def test_oracle_is_right_on_1000_clean_renders_and_blind_to_backgrounds() -> None:
    rng = random.Random(7)
    sharp = []
    for i in range(1000):
        spec = grammar.random_spec(grammar.TEMPLATES[i % 5], rng)
        scene = scenes.sample_scene(spec, rng)
        verdict = oracle.judge(scenes.render(scene), spec)
        assert verdict.full == 1.0 and verdict.graded == 1.0 and not verdict.failed, (spec, verdict)
        sharp += [seen.iou >= 0.8 for seen in verdict.seen]
        background = scenes.paint(scene.background) * 255
        assert np.ptp(background, axis=-1).max() < first_oracle.CHROMA / 2
    assert np.mean(sharp) > 0.99


def test_oracle_scores_a_mixed_prompt_by_hand() -> None:
    spec = grammar.parse("two red circles and a blue square")
    image = scenes.render(scenes.sample_scene(spec, random.Random(0)))
    assert oracle.judge(image, "a blue square and two red circles").full == 1.0
    # two of three objects match, the third has half of its attributes: 5/6
    assert oracle.judge(image, "two red circles and a blue ring").graded == pytest.approx(5 / 6)
    # a surplus object: 2 of 3
    assert oracle.judge(image, "a red circle and a blue square").graded == pytest.approx(2 / 3)


def test_scenes_are_composed() -> None:
    def place(prompt: str, seed: int) -> list[tuple[float, float]]:
        spec = grammar.parse(prompt)
        return [(o.x, o.y) for o in scenes.sample_scene(spec, random.Random(seed)).objects]

    for seed in range(20):
        ((x, y),) = place("a red circle", seed)
        assert abs(x - 32) <= 4 and abs(y - 32) <= 4
        *pair, odd = place("two red circles and a blue square", seed)
        assert all(odd[1] < y - 10 for _, y in pair)
    first_left = [a[0] < b[0] for a, b in (place("a red circle and a blue square", i) for i in range(300))]
    assert 0.68 < np.mean(first_left) < 0.82


def test_captions_are_wrong_at_their_rates_and_stay_within_the_train_compositions() -> None:
    rng = random.Random(1)
    pictures = {spec for specs in pretrain.pictures().values() for spec in specs}
    for template in grammar.TEMPLATES:
        wrong = 0
        for _ in range(2000):
            caption = grammar.draw(template, "train", rng)
            seen = listening.shown(caption, listening.NOISY, rng)
            assert seen.picture in pictures
            assert all(o is None or 0 <= o < len(seen.picture.things) for o in seen.owners)
            wrong += seen.picture != caption.picture
            assert listening.shown(caption, listening.CLEAN, rng).picture == caption.picture
        nominal = sum(listening.NOISY[template].values())
        assert abs(wrong / 2000 - nominal) < 0.035, template  # three standard errors


@pytest.mark.parametrize(
    ("prompt", "kind", "others"),
    [
        ("a red circle and a blue square", "swapped", {"a blue circle and a red square"}),
        ("three red circles", "number", {"two red circles", "four red circles"}),
        ("a red circle left of a blue square", "missing", {"a red circle", "a blue square"}),
        (
            "two red circles and a blue square",
            "number",
            {"a blue square and a red circle", "two blue squares and a red circle"},
        ),
        (
            "a red circle above a blue square",
            "turned",
            {
                "a blue square above a red circle",
                "a red circle left of a blue square",
                "a blue square left of a red circle",
            },
        ),
    ],
)
def test_errors_of_captions_are_those_of_their_kind(prompt: str, kind: str, others: set[str]) -> None:
    caption = grammar.parse(prompt)
    assert {spec.picture.prompt for spec, _ in listening.errors(caption, kind)} == others
    with pytest.raises(ValueError, match="no error of a"):
        list(listening.errors(caption, "blurred"))


def test_places_follow_the_caption_not_the_picture() -> None:
    """'a blue square and a red circle' of a picture kept as circle, square; a left-out thing has no place."""
    n = 400
    _, kept = pretrain.draw_pictures(0, n, 0)
    tokenizer = first.make_tokenizer()
    rates = {"attributes": {"missing": 0.5}}
    draw = pretrain.Heard(torch.arange(n).float()[:, None], torch.from_numpy(kept), tokenizer, rates, 0)
    data = draw(3)
    assert torch.equal(data.latents, draw(3).latents) and not torch.equal(data.latents, draw(4).latents)
    colours = {tokenizer(c).input_ids[1]: c for c in ("red", "yellow", "green", "cyan", "blue", "purple")}
    missing = 0
    for row, ids, places in zip(data.latents[:, 0].long().tolist(), data.ids, data.places, strict=True):
        things = pretrain.picture(row, 0).things
        for token, place in zip(ids.tolist(), places, strict=True):
            if token in colours:
                mine = [i for i, t in enumerate(things) if t.colour == colours[token]]
                if mine:
                    assert torch.equal(place, torch.from_numpy(kept[row][mine[0]]).float())
                missing += not mine and not place.any()
    assert missing > 0


@pytest.mark.slow
def test_many_renders_by_processes_are_those_of_one() -> None:
    jobs = [(i, 0) for i in range(4 * first.CHUNK + 1)]
    threads = torch.rand(512, 512) @ torch.rand(512, 512)  # torch's threads run by now
    assert threads.isfinite().all()
    for (image, places), job in zip(first.rendered(pretrain._draw, jobs), jobs, strict=True):
        alone, here = pretrain._draw(job)
        assert (image == alone).all() and (places == here).all()


def test_steps_and_work_directories_are_checked(tmp_path: Path) -> None:
    assert pretrain.parse_steps(["denoiser=7"]) == pretrain.STEPS | {"denoiser": 7}
    for word in ("denoiser", "denoiser=0", "painter=3", "decoder=x"):
        with pytest.raises(UsageError, match="STAGE=NUMBER"):
            pretrain.parse_steps([word])
    pretrain.same_recipe(tmp_path, {"seed": 0})
    pretrain.same_recipe(tmp_path, {"seed": 0})
    with pytest.raises(UsageError, match="another --work"):
        pretrain.same_recipe(tmp_path, {"seed": 1})


def test_a_killed_training_goes_on_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "BATCH", 4)
    tokenizer = first.make_tokenizer()
    _, places = pretrain.draw_pictures(0, 200, 0)
    latents = torch.randn(200, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    draw = pretrain.Heard(latents, torch.from_numpy(places), tokenizer, listening.NOISY, 0)

    def trained(work: Path, *stops: int) -> list[torch.Tensor]:
        for steps in stops:
            text, net = pretrain.networks(False, tokenizer, 0)
            first.train_denoiser(work, text, net, tokenizer, draw, steps, 0, rate=1e-3, schedule=pretrain.hold)
        guided = first.Guided(text, net, 3.0, 8, torch.device("cpu"))  # in one process, right after its training
        assert all(torch.equal(a, b) for a, b in zip(guided.net.parameters(), net.parameters(), strict=True))
        return [*text.state_dict().values(), *net.state_dict().values()]

    whole, resumed = trained(tmp_path / "whole", 4), trained(tmp_path / "parts", 2, 4)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    start = pretrain.networks(False, tokenizer, 0)[1].state_dict().values()
    assert not all(torch.equal(a, b) for a, b in zip(whole[-len(start) :], start, strict=True))
    with pytest.raises(UsageError, match="holds no pre-training"):
        pretrain.checkpointed(tmp_path)


def test_the_reward_reads_both_worlds() -> None:
    from bench_dfusion.reward_models.oracle import Oracle, OracleConfig

    rng, reward = random.Random(0), Oracle(OracleConfig())
    prompts = [*grammar.prompts("validation")[::5], "a red circle", "two blue rings and a red cross"]
    pictures = np.stack([scenes.render(scenes.sample_scene(grammar.parse(p), rng)) for p in prompts])
    reward.check(prompts)
    assert reward.score(torch.from_numpy(pictures), prompts).min() == 1
    assert reward.impossible([(OracleConfig(score="full"), 0.5), (OracleConfig(), 0.95)], prompts[-1], 2)
    with pytest.raises(ValueError, match="two red circles and a blue square"):
        reward.check(["a purple cow"])


def test_the_clip_of_the_world_is_trained_on_true_captions_of_every_split(tmp_path: Path, monkeypatch) -> None:
    world = pretrain.everything(60, 3)
    assert {s.template for s in world.specs} == set(grammar.TEMPLATES)
    for image, spec in zip(world.images, world.specs, strict=True):
        assert oracle.judge(image, spec).full == 1
    seen = {s.composition for s in pretrain.everything(600, 3).specs}
    assert all(seen & grammar.known(split) for split in grammar.SPLITS)
    tokenizer = first.make_tokenizer()
    trained = first.train_clip(tmp_path, world, tokenizer, 1, 0, batch=8)
    again = first.train_clip(tmp_path / "on", world, tokenizer, 1, 0, batch=8, start=trained.state_dict())
    assert not all(torch.equal(a, b) for a, b in zip(trained.parameters(), again.parameters(), strict=True))
    first.package_clip(tmp_path / "clip", again, tokenizer)
    monkeypatch.setitem(micro.CLIPS, "micro-v2", tmp_path / "clip")
    from bench_dfusion.reward_models.clip import Clip, ClipConfig

    scores = Clip(ClipConfig(model="micro-v2")).score(
        torch.from_numpy(world.images[:4]), [s.prompt for s in world.specs[:4]]
    )
    assert scores.shape == (4,) and scores.isfinite().all()
    monkeypatch.setitem(micro.CLIPS, "micro-v2", tmp_path / "none")
    with pytest.raises(UsageError, match="python -m bench_dfusion.micro.v2.pretrain"):
        Clip(ClipConfig(model="micro-v2"))


def test_the_track_is_made_of_the_lists() -> None:
    settings = config.resolve_track("micro-v2")
    lists = {split: getattr(settings.prompts, split) for split in grammar.SPLITS}
    assert lists == {split: grammar.prompts(split) for split in grammar.SPLITS}
    assert settings.prompts.templates == {p: grammar.parse(p).template for p in lists["heldout"]}
    assert settings.prompts.labels == tuple(grammar.parse(p).composition for p in lists["heldout"])
    assert len(lists["heldout"]) == 144 and len(set(settings.prompts.labels)) == 84
    assert (settings.evaluation.images_per_prompt, settings.evaluation.base_images_per_prompt) == (16, 64)
    assert settings.model.sha256 == files.tree_sha256(micro.PIPELINES["micro-v2"])


def test_the_weights_are_small_and_name_no_machine() -> None:
    folders = [micro.PIPELINE.parent, micro.PIPELINES["micro-v2"].parent]
    assert sum(p.stat().st_size for f in folders for p in f.rglob("*") if p.is_file()) < 17e6
    for path in folders[1].rglob("*.json"):
        assert not any(word in path.read_text() for word in ("/work", "/root", "/home", "/tmp", "_name_or_path"))


def test_the_base_draws_sharply_and_the_clip_knows_it() -> None:
    """A few pictures: sharp, composed, about half of them what was asked for."""
    from bench_dfusion.reward_models.clip import Clip, ClipConfig

    from bench_dfusion.models.loading import load_adapter
    from bench_dfusion.runs.trainer import make_policy

    settings = config.resolve_track("micro-v2")
    adapter, _ = load_adapter(settings.model)
    policy = make_policy(settings, adapter, 0, torch.device("cpu"))
    prompts = list(grammar.prompts("validation"))
    pictures = policy.decode(policy.sample(prompts, torch.arange(len(prompts))).final)
    seen = [oracle.judge(image, p) for image, p in zip(pictures.numpy(), prompts, strict=True)]
    assert 0.3 < np.mean([v.full for v in seen]) < 0.75
    assert np.mean([region.iou >= 0.8 for v in seen for region in v.seen]) > 0.7
    scores = Clip(ClipConfig(model="micro-v2")).score(pictures, prompts)
    assert np.corrcoef(scores, [v.graded for v in seen])[0, 1] > 0.3


def test_a_guided_prediction_is_taken_from_what_a_picture_shows() -> None:
    tokenizer = first.make_tokenizer()
    text, net = (m.eval() for m in pretrain.networks(False, tokenizer, 0))
    net.set_default_attn_processor()
    guided = first.Guided(text, net, 3.0, 8, torch.device("cpu"))
    assert guided.levels(torch.arange(0, 1, 1 / 16)).tolist() == [n for t in guided.timesteps.tolist() for n in (t, t)]
    assert guided.timesteps[0] == 999 and len(guided.timesteps) == 8
    tokens = tokenizer(["a red circle", "two blue rings"], padding="max_length", return_tensors="pt").input_ids
    empty = tokenizer([""] * 2, padding="max_length", return_tensors="pt").input_ids
    x_t, t = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([999, 124])
    with torch.no_grad():
        said, unsaid = (first.predict(text, net, x_t, words, t, tokenizer) for words in (tokens, empty))
        assert not torch.allclose(said, unsaid)
        for p in net.parameters():  # what is trained is not what is learnt from
            p.zero_()
    torch.testing.assert_close(guided(x_t, tokens, t, tokenizer), unsaid + 3 * (said - unsaid), atol=1e-4, rtol=1e-4)


def test_wrong_captions_come_with_what_their_pictures_show() -> None:
    tokenizer = first.make_tokenizer()
    _, places = pretrain.draw_pictures(0, 400, 0)
    wrong = {t: {"word": 0.5} for t in grammar.TEMPLATES}
    draw = pretrain.Heard(torch.arange(400.0)[:, None], torch.from_numpy(places), tokenizer, wrong, 0)
    batch = draw(0)
    words = [tokenizer.decode(t, skip_special_tokens=True) for t in batch.ids]
    shown = [tokenizer.decode(t, skip_special_tokens=True) for t in batch.shown]
    pictures = [pretrain.picture(int(row), 0) for row in batch.latents[:, 0]]
    assert [grammar.parse(s).picture for s in shown] == pictures
    told = [grammar.parse(w).picture == p for w, p in zip(words, pictures, strict=True)]
    assert 0.3 < np.mean(told) < 0.7
    assert all(w == s for w, s, same in zip(words, shown, told, strict=True) if same), "a phrasing is kept"
