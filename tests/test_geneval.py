"""The reward geneval: its prompts, its decisions by hand, a tiny Mask2Former and CLIP of the real classes."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from bench_dfusion.reward_models.geneval import (
    CLASSES,
    COLOURS,
    Asked,
    Box,
    Found,
    GenEval,
    GenEvalConfig,
    _instance,
    correct,
    overlap,
    parse,
    relations,
    select,
    share,
)
from PIL import Image
from torch.nn import functional

from bench_dfusion.errors import UsageError
from bench_dfusion.results import records

# --- prompts


def article(word: str) -> str:
    return f"{'an' if word.startswith(tuple('aeiou')) else 'a'} {word}"


def test_the_classes_are_cocos_in_its_order() -> None:
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

    renamed = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
    names = [n for n in MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"] if n not in ("__background__", "N/A")]
    assert [renamed.get(n, n) for n in names] == CLASSES


def test_every_prompt_that_the_generator_writes_is_read() -> None:
    for number, (a, b) in enumerate(pairwise([*CLASSES, CLASSES[0]])):
        colours = [COLOURS[(number + i) % len(COLOURS)] for i in (0, 3)]
        plural = a + "es" if a[-1] == "s" else a + "s"
        assert parse(f"a photo of {article(a)}") == (Asked(a),)
        assert parse(f"a photo of {article(a)} and {article(b)}") == (Asked(a), Asked(b))
        for count, word in ((2, "two"), (3, "three"), (4, "four")):
            assert parse(f"a photo of {word} {plural}") == (Asked(a, count),)
        for place in ("left of", "right of", "above", "below"):
            expected = (Asked(b), Asked(a, position=place))
            assert parse(f"a photo of {article(a)} {place} {article(b)}") == expected
        if "person" not in (a, b):  # the generator colours no person
            for colour in COLOURS:
                assert parse(f"a photo of {article(colour)} {a}") == (Asked(a, colour=colour),)
            first, second = (article(c) for c in colours)
            expected = (Asked(a, colour=colours[0]), Asked(b, colour=colours[1]))
            assert parse(f"a photo of {first} {a} and {second} {b}") == expected


def test_prompts_as_they_were_published() -> None:
    read = {
        "a photo of four toothbrushs": (Asked("toothbrush", 4),),
        "a photo of two computer keyboards": (Asked("computer keyboard", 2),),
        "a photo of a white teddy bear": (Asked("teddy bear", colour="white"),),
        "a photo of a yellow orange": (Asked("orange", colour="yellow"),),
        "a photo of a broccoli and a parking meter": (Asked("broccoli"), Asked("parking meter")),
        "a photo of a black kite and a green bear": (Asked("kite", colour="black"), Asked("bear", colour="green")),
        "a photo of a bear above a spoon": (Asked("spoon"), Asked("bear", position="above")),
    }
    assert {prompt: parse(prompt) for prompt in read} == read


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a bench",
        "A photo of a bench",
        "a photo of a bench.",
        "a photo of bench",
        "a photo of an bench",
        "a photo of a apple",
        "a photo of two bench",
        "a photo of two benches",
        "a photo of one benchs",
        "a photo of eleven benchs",
        "a photo of a lamp",
        "a photo of a mouse",
        "a photo of a gray bench",
        "a photo of a red person",
        "a photo of a bench and",
        "a photo of a bench and a bench",
        "a photo of a bench and a car and a dog",
        "a photo of a bench on a car",
        "a photo of a red bench and a car",
        "a photo of a red bench left of a blue car",
        "a photo of two benchs and a car",
        "a photo of a bench to the left of a car",
        "a photo of a bench\n",
    ],
)
def test_other_prompts_are_refused_in_one_line(prompt: str) -> None:
    with pytest.raises(ValueError, match="a bus left of \\(right of, above, below\\) an apple") as refused:
        parse(prompt)
    message = str(refused.value)
    assert repr(prompt) in message and len(message.splitlines()) == 1


# --- decisions, by hand


LEFT, RIGHT, DIAGONAL = (0, 40, 20, 60), (80, 40, 100, 60), (70, 0, 90, 20)


def seen(*detections: tuple[str, Box] | tuple[str, Box, str]) -> dict[str, list[Found]]:
    found: dict[str, list[Found]] = {name: [] for name in ("dog", "cat")}
    for name, box, *colour in detections:
        found[name].append(Found(0.95, box, colour=colour[0] if colour else None))
    return found


DECISIONS: list[tuple[str, list[Any], float, float]] = [  # prompt, detections, correct, share
    ("a dog", [], 0, 0),
    ("a dog", [("dog", LEFT)], 1, 1),
    ("a dog", [("dog", LEFT)] * 2, 1, 0),  # at least one is right; Flow-GRPO wants it exact
    ("a dog and a cat", [("cat", LEFT)], 0, 1 / 2),
    ("a dog and a cat", [("cat", LEFT), ("dog", LEFT)], 1, 1),
    ("three dogs", [("dog", LEFT)], 0, 1 / 3),
    ("three dogs", [("dog", LEFT)] * 2, 0, 2 / 3),
    ("three dogs", [("dog", LEFT)] * 3, 1, 1),
    ("three dogs", [("dog", LEFT)] * 4, 0, 2 / 3),  # four are excluded
    ("three dogs", [("dog", LEFT)] * 9, 0, 0),
    ("a red dog", [("dog", LEFT, "red")], 1, 1),
    ("a red dog", [("dog", LEFT, "blue")], 0, 1 / 2),
    ("a red dog", [("dog", LEFT, "blue"), ("dog", RIGHT, "red")], 0, 0),  # the surest one alone is asked
    ("a red dog", [("dog", LEFT, "red"), ("dog", RIGHT)], 1, 0),
    ("a red dog and a blue cat", [("dog", LEFT, "red"), ("cat", LEFT, "blue")], 1, 1),
    ("a red dog and a blue cat", [("dog", LEFT, "blue"), ("cat", LEFT, "red")], 0, 1 / 2),
    ("a red dog and a blue cat", [("dog", LEFT, "red")], 0, 1 / 2),
    ("a dog left of a cat", [("dog", LEFT), ("cat", RIGHT)], 1, 1),
    ("a dog right of a cat", [("dog", LEFT), ("cat", RIGHT)], 0, 2 / 3),
    ("a dog left of a cat", [("dog", LEFT), ("cat", DIAGONAL)], 1, 1),
    ("a dog below a cat", [("dog", LEFT), ("cat", DIAGONAL)], 0, 2 / 3),
    ("a dog left of a cat", [("dog", LEFT)], 0, 1 / 3),
    ("a dog left of a cat", [("cat", LEFT)], 0, 1 / 3),
    ("a dog left of a cat", [("dog", LEFT), ("cat", RIGHT), ("cat", LEFT)], 1, 1 / 3),
]


@pytest.mark.parametrize(("prompt", "detections", "whole", "part"), DECISIONS)
def test_what_is_decided(prompt: str, detections: list[Any], whole: float, part: float) -> None:
    asked, found = parse(f"a photo of {prompt}"), seen(*detections)
    assert correct(asked, found, 0.1) == whole
    assert share(asked, found, 0.1) == pytest.approx(part)


def test_where_a_box_is() -> None:
    a = (0, 0, 10, 10)
    assert relations(a, (20, 0, 30, 10), 0.1) == {"left of"} and relations((20, 0, 30, 10), a, 0.1) == {"right of"}
    assert relations(a, (0, 20, 10, 30), 0.1) == {"above"} and relations((0, 20, 10, 30), a, 0.1) == {"below"}
    assert relations(a, (20, 20, 30, 30), 0.1) == {"left of", "above"}  # 18 of 28.3 each way
    assert relations(a, (20, 11, 30, 21), 0.1) == {"left of"}  # down: 11 - 2 = 9 of 22.8
    assert relations(a, a, 0.1) == relations(a, (2, 0, 12, 10), 0.1) == set()  # 0.1 of 10 + 10 is 2
    assert relations(a, (4, 0, 14, 10), 0.1) == set() and relations(a, (5, 0, 15, 10), 0.1) == {
        "left of"
    }  # over a half
    assert relations(a, (2, 0, 12, 10), 0.0) == {"left of"}
    middle, near, far = (50, 50, 60, 60), 10, 11  # beside 18: 0.486 and 0.521 of the way
    for (x, y), sides in zip(((-1, -1), (1, 1)), (("left of", "above"), ("right of", "below")), strict=True):
        assert relations((50 + far * x, 50 + 18 * y, 60 + far * x, 60 + 18 * y), middle, 0.0) == set(sides)
        assert relations((50 + 18 * x, 50 + far * y, 60 + 18 * x, 60 + far * y), middle, 0.0) == set(sides)
        assert relations((50 + near * x, 50 + 18 * y, 60 + near * x, 60 + 18 * y), middle, 0.0) == {sides[1]}
        assert relations((50 + 18 * x, 50 + near * y, 60 + 18 * x, 60 + near * y), middle, 0.0) == {sides[0]}


def test_which_detections_count() -> None:
    def of(found: list[Found]) -> list[float]:
        return [f.score for f in found]

    boxes = [(0, 0, 9, 9), (5, 0, 14, 9), (50, 0, 59, 9), (0, 0, 9, 9)]
    found = [Found(s, b) for s, b in zip((0.5, 0.9, 0.3, 0.95), boxes, strict=True)]
    assert of(select(found, 0.3, 16, 1.0)) == [0.95, 0.9, 0.5]  # above, not at, the threshold
    assert of(select(found, 0.9, 16, 1.0)) == [0.95]
    assert of(select(found, 0.0, 2, 1.0)) == [0.95, 0.9]
    assert overlap(boxes[0], boxes[1]) == pytest.approx(50 / 150)  # 10 pixels wide, right and bottom counted in
    assert of(select(found, 0.0, 16, 0.5)) == [0.95, 0.9, 0.3]
    assert of(select(found, 0.0, 16, 0.3)) == [0.95, 0.3]


# --- the detector


PICTURES = (
    functional.interpolate(
        torch.rand(3, 3, 6, 6, generator=torch.Generator().manual_seed(0)), (40, 56), mode="bicubic"
    ).clamp(0, 1)
    * 255
).byte()
ALL = [Asked(name) for name in CLASSES]


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mask2Former of 0.1 M parameters with Swin, surer of itself than fresh weights are."""
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    torch.manual_seed(5)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4, out_features=stages)
    widths = dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim", "encoder_feedforward_dim"), 32)
    config = Mask2FormerConfig(
        backbone_config=swin,
        **widths,
        dim_feedforward=32,
        num_attention_heads=2,
        encoder_layers=1,
        decoder_layers=2,
        num_queries=30,
        id2label=dict(enumerate(CLASSES)),
    )
    model = Mask2FormerForUniversalSegmentation(config)
    model.class_predictor.weight.data.mul_(25)
    for parameter in model.model.transformer_module.decoder.mask_predictor.parameters():
        parameter.data.mul_(3)
    folder = tmp_path_factory.mktemp("detector")
    model.save_pretrained(folder)
    Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of a tiny open_clip architecture, registered under the file's name."""
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny-of-geneval.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(folder / "tiny-of-geneval.json")
    torch.manual_seed(11)
    path = folder / "tiny-of-geneval.pt"
    model = open_clip.create_model(path.stem, load_weights=False)
    for name, parameter in model.named_parameters():  # fresh weights call everything one colour
        if parameter.ndim > 1 and name != "visual.proj":
            parameter.data.mul_(6)
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def options(detector: Path, clip_file: Path) -> dict[str, Any]:
    return {"model": str(detector), "clip": clip_file.stem, "pretrained": str(clip_file), "batch": 2}


@pytest.fixture(scope="module")
def eager(options: dict[str, Any]) -> GenEval:
    """Every detection counts."""
    return GenEval(GenEvalConfig(**options, threshold=0, counting_threshold=0, max_objects=1000))


def test_detections_are_those_of_transformers(eager: GenEval) -> None:
    """transformers takes masks to 384 × 384 whatever the picture's size, and as many detections as queries: here a
    picture of that size, and the best of ours. Its picture comes as a file does."""
    eager_size, eager.processor.size = eager.processor.size, {"height": 384, "width": 384}
    image = functional.interpolate(PICTURES[:1].float(), (384, 384), mode="bilinear").round().byte()
    (mine,) = eager.detect(image, [ALL])
    inputs = eager.processor(images=[Image.fromarray(image[0].permute(1, 2, 0).numpy())], return_tensors="pt")
    eager.processor.size = eager_size
    with torch.no_grad():
        out = eager.model(**inputs)
    (theirs,) = eager.processor.post_process_instance_segmentation(
        out, threshold=0, target_sizes=[(384, 384)], return_binary_maps=True
    )
    assert len(theirs["segments_info"]) >= 25
    for info, mask in zip(theirs["segments_info"], theirs["segmentation"], strict=True):
        rows, columns = np.nonzero(mask.numpy())
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        same = [f for f in mine[CLASSES[info["label_id"]]] if abs(f.score - info["score"]) < 2e-5 and f.box == box]
        assert any(torch.equal(f.mask, mask.bool()) for f in same if f.mask is not None)
    scores = [f.score for found in mine.values() for f in found]
    assert len(scores) == 100 and max(scores) > 0.3


def test_a_mask_is_taken_back_to_the_picture() -> None:
    logits = torch.full((16, 8), -400.0)
    logits[4:8, 2:5] = 400.0  # of 16 × 8, for a network's 64 × 32, for a picture of 40 × 20
    found = _instance(0.8, logits, [(64, 32), (40, 20)])
    assert found is not None and found.mask is not None and found.box == (5, 10, 12, 20)
    assert found.mask.shape == (40, 20) and found.mask[11:19, 6:11].all()
    assert found.score == pytest.approx(0.8)
    assert _instance(0.8, -logits.abs(), [(64, 32), (40, 20)]) is None
    flat = _instance(0.8, torch.full((4, 4), 1.0), [(8, 8)])
    assert flat is not None and flat.score == pytest.approx(0.8 / (1 + np.exp(-1)))  # times the mask's mean probability


def test_thresholds_are_by_task(options: dict[str, Any], eager: GenEval) -> None:
    usual = GenEval(GenEvalConfig(**options, threshold=0.02, counting_threshold=0.1))
    every, counted, plain = (
        r.detect(PICTURES[:1], [asked])[0] for r, asked in ((eager, ALL), (usual, [Asked("dog", 2)]), (usual, ALL))
    )
    assert list(counted) == ["dog"]
    for name in CLASSES:
        scores = sorted((f.score for f in every[name]), reverse=True)
        assert [f.score for f in plain[name]] == pytest.approx([s for s in scores if s > 0.02][:16])
        (again,) = usual.detect(PICTURES[:1], [[Asked(name, 2)]])
        assert [f.score for f in again[name]] == pytest.approx([s for s in scores if s > 0.1][:16])


def test_colours_are_what_clip_says_of_the_object_on_grey(eager: GenEval, clip_file: Path) -> None:
    """GenEval's recipe on Pillow pictures with open_clip's own preprocessing."""
    transform = open_clip.image_transform(
        32, is_train=False, mean=eager.preprocess.mean, std=eager.preprocess.std, interpolation="bicubic"
    )
    model = open_clip.create_model(clip_file.stem, pretrained=str(clip_file)).eval()
    tokenizer = open_clip.get_tokenizer(clip_file.stem)
    torch.manual_seed(7)
    told = set()
    for number, image in enumerate(PICTURES):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        for left, top, right, bottom in ((0, 0, 40, 20), (8, 4, 20, 38), (30, 10, 56, 40)):
            mask = torch.zeros(40, 56, dtype=torch.bool)
            mask[top:bottom, left:right] = torch.rand(bottom - top, right - left) > 0.3
            found = Found(1.0, (left, top, right, bottom), mask)
            with torch.no_grad():
                eager.colour(image, found, CLASSES[number])
                grey = Image.new("RGB", picture.size, "#999999")
                crop = Image.composite(picture, grey, Image.fromarray(mask.numpy())).crop(found.box)
                embedded = model.encode_image(transform(crop)[None])[0]
                logits = []
                for colour in COLOURS:
                    ends = (f" {CLASSES[number]}", f"-colored {CLASSES[number]}", " object")
                    each = model.encode_text(tokenizer([f"a photo of a {colour}{end}" for end in ends]))
                    mean = sum(e / e.norm() for e in each)
                    logits.append((embedded @ mean / mean.norm()).item())
            first, second = sorted(logits)[:-3:-1]
            if first - second > 1e-2 * np.std(logits):  # Pillow rounds to 8 bits
                assert found.colour == COLOURS[int(np.argmax(logits))]
                told.add(found.colour)
    assert len(told) > 2


PROMPTS = ["a photo of a red dog", "a photo of two buses", "a photo of a dog above a cat"]


def test_scores_are_the_decisions_on_the_detections(options: dict[str, Any], eager: GenEval) -> None:
    images = PICTURES.permute(0, 2, 3, 1)
    names = [next(n for n, f in found.items() if len(f) == 1) for found in eager.detect(PICTURES, [ALL] * 3)]
    graded = GenEval(GenEvalConfig(**{**dict(eager.config), "score": "share", "batch": 3}))
    prompts = [f"a photo of {article(name)}" for name in names]
    assert graded.score(images, prompts).tolist() == eager.score(images, prompts).tolist() == [1.0, 1.0, 1.0]
    coloured = [[f"a photo of {article(c)} {name}" for name in names] for c in COLOURS]
    whole = torch.stack([eager.score(images, p) for p in coloured])
    assert whole.sum(0).tolist() == [1.0, 1.0, 1.0]  # each has one colour
    part = torch.stack([graded.score(images, p) for p in coloured])
    torch.testing.assert_close(part, (1 + whole) / 2)
    usual = GenEval(GenEvalConfig(**options))
    assert usual.score(images, PROMPTS).dtype == torch.float32 and usual.score(images, PROMPTS).tolist() == [0.0] * 3


def test_fingerprints_tell_weights_and_rules_apart(options: dict[str, Any], eager: GenEval, tmp_path: Path) -> None:
    usual = GenEval(GenEvalConfig(**options))
    assert GenEval(GenEvalConfig(**{**options, "batch": 7})).fingerprint() == usual.fingerprint()
    other = torch.load(options["pretrained"], weights_only=True)
    other["logit_scale"] += 1
    torch.save(other, tmp_path / "other.pt")
    changed = [
        eager,
        GenEval(GenEvalConfig(**options, score="share")),
        GenEval(GenEvalConfig(**{**options, "pretrained": str(tmp_path / "other.pt")})),
    ]
    assert len({usual.fingerprint(), *(c.fingerprint() for c in changed)}) == 4


def test_weights_that_are_not_to_be_had_are_one_line(
    monkeypatch: pytest.MonkeyPatch, detector: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="mask2former-swin-small-coco-instance cannot be loaded .* option model$"):
        GenEval(GenEvalConfig())
    for path in detector.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["id2label"]["0"] = "wall"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="tells 80 classes, from wall on, not COCO's 80 from person to toothbrush"):
        GenEval(GenEvalConfig(model=str(tmp_path)))


def test_a_run_trains_on_it_and_is_judged_by_it(
    options: dict[str, Any], said: Any, refused: Any, tmp_path: Path
) -> None:
    own = [f"--set=reward.{k}={v}" for k, v in {**options, "threshold": 0, "score": "share"}.items()]
    judge = [f"--set=track.rewards.geneval.{k}={v}" for k, v in {**options, "threshold": 0}.items()]
    sizes = ["budget.reward_queries=8", "budget.prompts_per_round=1", "budget.samples_per_prompt=4"]
    sizes += ["sampler.steps=4", "evaluation.base_images_per_prompt=null"]
    prompts = [
        "prompts.train=['a photo of a dog', 'a photo of a red bus']",
        "prompts.heldout=['a photo of a cat', 'a photo of two cats']",
        "prompts.validation=[]",
        "prompts.templates=null",
        "evaluation.judges=['geneval']",
        "evaluation.images_per_prompt=2",
    ]
    track = [f"--set=track.{s}".replace("'", '"') for s in (*sizes, *prompts)]
    words = ("run", "--algo=dpo", "--builder=vanilla", "--reward=geneval", "--keep-pairs=none")
    line = refused(*words, *own, *judge, *track[:3], track[-2], cwd=tmp_path, bars=True)
    assert "the reward geneval scores GenEval's prompts, not" in line
    run = said(*words, *own, *judge, *track, cwd=tmp_path)
    assert run.status == 0, run.err
    record = records.read(next(tmp_path.rglob("record.json")))
    (verdict,) = record.verdicts
    assert verdict.judge == "geneval" and verdict.trained_on  # on its share, another fingerprint
    assert verdict.fingerprint != record.provenance.reward_fingerprint
