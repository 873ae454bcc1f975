"""Rewards: tiny networks of the real classes, saved and loaded as a user's weights are; sums; a user's own functions."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from bench_dfusion.reward_models import jpeg
from bench_dfusion.reward_models.aesthetic import PLACES, WIDTHS, Aesthetic, AestheticConfig
from bench_dfusion.reward_models.clip import Clip, ClipConfig
from bench_dfusion.reward_models.hpsv2 import HPSv2, HPSv2Config
from bench_dfusion.reward_models.oracle import Oracle, OracleConfig
from bench_dfusion.reward_models.pickscore import PickScore, PickScoreConfig
from bench_dfusion.reward_models.vqa import VQA, Question, VQAConfig, gated, read_questions
from PIL import Image
from processes import SETTINGS, TINY
from torch import Tensor, nn
from torch.nn import functional

import bench_dfusion
from bench_dfusion import registry
from bench_dfusion.builders.contract import ConsistentSamples
from bench_dfusion.errors import PluginError, UsageError
from bench_dfusion.results import records
from bench_dfusion.rewards import sums
from bench_dfusion.rewards.contract import Reward
from bench_dfusion.rewards.preprocessing import prepare
from bench_dfusion.runs import trainer
from bench_dfusion.runs.config import Misfit, judges_of, resolve, resolve_track
from bench_dfusion.testing.fakes import draw, fake_policy
from bench_dfusion.testing.rounds import PROMPTS as ROUND

SIDE = 32
PROMPTS = ["a red circle", "two blue rings", "a red circle"]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def pictures(count: int = 3, height: int = SIDE, width: int | None = None) -> Tensor:
    """Smooth random pictures uint8 [B, H, W, 3], away from black and white: resizing does not clip."""
    generator = torch.Generator().manual_seed(height)
    coarse = torch.rand(count, 3, 4, 4, generator=generator) * 0.4 + 0.3
    fine = functional.interpolate(coarse, (height, width or height), mode="bicubic")
    return (fine * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()


def floats(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).float().div(255)


# --- preprocessing


SHAPES = [(32, 32), (32, 35), (80, 80), (20, 20), (50, 77), (33, 32), (32, 37), (21, 30), (30, 25)]


@pytest.mark.parametrize("shape", SHAPES)
def test_preprocessing_is_open_clips(shape: tuple[int, int]) -> None:
    images = pictures(2, *shape)
    own = prepare(floats(images), SIDE, MEAN, STD)
    theirs = open_clip.image_transform(SIDE, is_train=False, mean=MEAN, std=STD)
    on_tensors = torch.stack([theirs(i) for i in floats(images)])
    torch.testing.assert_close(own, on_tensors, atol=1e-4, rtol=0)
    on_files = torch.stack([theirs(Image.fromarray(i)) for i in images.numpy()])
    assert (own - on_files).abs().max() < 1.5 / 255 / min(STD)  # theirs rounds to 8 bits


@pytest.mark.parametrize("shape", SHAPES)
def test_preprocessing_is_transformers(shape: tuple[int, int], pick_dir: Path) -> None:
    from transformers import CLIPImageProcessor

    images = pictures(2, *shape)
    processor = CLIPImageProcessor.from_pretrained(pick_dir)
    floating = processor(list(floats(images)), do_rescale=False, return_tensors="pt")["pixel_values"]
    own = prepare(floats(images), SIDE, MEAN, STD, fit="shortest-floor")
    torch.testing.assert_close(own, floating, atol=1e-4, rtol=0)
    bits = processor([Image.fromarray(i) for i in images.numpy()], return_tensors="pt")["pixel_values"]
    assert (own - bits).abs().max() < 1.5 / 255 / min(STD)


def test_preprocessing_of_hpsv2_pads_to_a_square() -> None:
    images = floats(pictures(1, 16, 64))
    plain = prepare(images, SIDE, (0.0,) * 3, (1.0,) * 3, fit="longest")
    assert plain.shape == (1, 3, SIDE, SIDE)
    assert not plain[..., :12, :].any() and not plain[..., 20:, :].any()
    expected = functional.interpolate(images, (8, 32), mode="bicubic", antialias=True)
    torch.testing.assert_close(plain[..., 12:20, :], expected)
    sharp = torch.zeros(1, 3, 64, 64)
    sharp[..., 32:] = 1.0
    assert prepare(sharp, 48, (0.0,) * 3, (1.0,) * 3, fit="longest").min() < 0  # upstream does not clip
    assert prepare(sharp, 48, (0.0,) * 3, (1.0,) * 3).min() == 0


# --- tiny weights


@pytest.fixture(scope="module", autouse=True)
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny open_clip architecture, by name; its text tower takes the real tokenizer."""
    vision = {"image_size": SIDE, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    path = tmp_path_factory.mktemp("clip") / "tiny-of-tests.json"
    path.write_text(json.dumps({"embed_dim": 768, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(path)
    return path.stem


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory: pytest.TempPathFactory, tiny_clip: str) -> Path:
    """Its weights as HPSv2's checkpoint has them."""
    torch.manual_seed(1)
    model = open_clip.create_model(tiny_clip, load_weights=False)
    path = tmp_path_factory.mktemp("hps") / "HPS_tiny.pt"
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def hps(clip_file: Path, tiny_clip: str) -> HPSv2:
    return HPSv2(HPSv2Config(weights=str(clip_file), model=tiny_clip, batch=2))


class UpstreamMLP(nn.Module):
    """The predictor as its repository lays it out: the numbers in `layers` are the checkpoint's."""

    def __init__(self) -> None:
        super().__init__()
        shapes = dict(zip(PLACES, pairwise(WIDTHS), strict=True))
        self.layers = nn.Sequential(*(nn.Linear(*shapes[i]) if i in shapes else nn.Dropout(0.2) for i in range(8)))


@pytest.fixture(scope="module")
def mlp() -> UpstreamMLP:
    torch.manual_seed(2)
    return UpstreamMLP().eval()


@pytest.fixture(scope="module")
def aesthetic(tmp_path_factory: pytest.TempPathFactory, clip_file: Path, tiny_clip: str, mlp: UpstreamMLP) -> Aesthetic:
    path = tmp_path_factory.mktemp("mlp") / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(mlp.state_dict(), path)
    return Aesthetic(AestheticConfig(weights=str(path), model=tiny_clip, pretrained=str(clip_file), batch=2))


@pytest.fixture(scope="module")
def pick_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from clip_bpe import clip_tokenizer
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(3)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    config = CLIPConfig(
        text_config={**tower, **tokens},
        vision_config={**tower, "image_size": SIDE, "patch_size": 8},
        projection_dim=8,
        logit_scale_init_value=1.5,
    )
    folder = tmp_path_factory.mktemp("pick")
    CLIPModel(config).save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pick(pick_dir: Path) -> PickScore:
    return PickScore(PickScoreConfig(model=str(pick_dir), processor=str(pick_dir), batch=2))


@pytest.fixture(scope="module")
def vqa_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2-VL of one layer with a byte tokenizer that has yes, no and Yes as tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    merges = [("y", "e"), ("ye", "s"), ("n", "o"), ("Y", "e"), ("Ye", "s"), ("Ġ", "yes")]
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(m) for m in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    control += ["<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens([AddedToken(c, special=True) for c in control])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    number = fast.convert_tokens_to_ids
    torch.manual_seed(4)
    model = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config={
                "vocab_size": len(fast),
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
            },
            vision_config={"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2},
            image_token_id=number("<|image_pad|>"),
            video_token_id=number("<|video_pad|>"),
            vision_start_token_id=number("<|vision_start|>"),
            vision_end_token_id=number("<|vision_end|>"),
        )
    )
    for parameter in model.parameters():
        parameter.data.mul_(3)  # fresh weights say about 0.5 to everything
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    images = Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=56 * 56)
    processor = Qwen2VLProcessor(images, fast, Qwen2VLVideoProcessor(), chat_template=template)
    folder = tmp_path_factory.mktemp("vqa")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vqa(vqa_dir: Path) -> VQA:
    return VQA(VQAConfig(model=str(vqa_dir), dtype="float32", batch=2))


# --- the arithmetic of each


def test_hpsv2_is_the_cosine_of_its_own_weights(hps: HPSv2, clip_file: Path, tiny_clip: str) -> None:
    images = pictures()
    plain = open_clip.create_model(tiny_clip, pretrained=str(clip_file)).eval()
    with torch.no_grad():
        image = plain.encode_image(
            (floats(images) - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        )
        text = plain.encode_text(open_clip.get_tokenizer(tiny_clip)(PROMPTS))
    expected = (image * text).sum(-1) / image.norm(dim=-1) / text.norm(dim=-1)  # no logit scale
    torch.testing.assert_close(hps.score(images, PROMPTS), expected, atol=1e-5, rtol=0)


def test_aesthetic_is_the_mlp_of_the_normalised_embedding(aesthetic: Aesthetic, mlp: UpstreamMLP) -> None:
    images = pictures()
    with torch.no_grad():
        prepared = (floats(images) - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        image = aesthetic.encoder(prepared)
        expected = mlp.layers(image / image.norm(dim=-1, keepdim=True))[:, 0]
    found = aesthetic.score(images, PROMPTS)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert found.std() > 0 and torch.equal(found, aesthetic.score(images, ["another"] * 3))


def test_pickscore_is_the_logit_scale_times_the_cosine(pick: PickScore, pick_dir: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    images = pictures(3, 70)
    processor, model = CLIPProcessor.from_pretrained(pick_dir), CLIPModel.from_pretrained(pick_dir).eval()
    inputs = processor(text=PROMPTS, images=list(floats(images)), do_rescale=False, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits_per_image.diagonal()  # exp(1.5) times the cosine
    found = pick.score(images, PROMPTS)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert found.abs().max() <= np.exp(1.5) and found.std() > 0


def test_vqa_is_the_share_of_yes_among_the_first_tokens_of_an_answer(vqa: VQA) -> None:
    images, prompts = pictures(), ["a red circle", "no", "two blue rings, and a ring that is longer"]
    spelt = [vqa.processor.tokenizer.convert_ids_to_tokens(t) for t in (vqa.yes, vqa.no)]
    assert sorted(spelt[0]) == ["Yes", "yes", "Ġyes"] and spelt[1] == ["no"]
    found = vqa.score(images, prompts)
    for image, prompt, score in zip(images, prompts, found, strict=True):  # one at a time: no padding
        inputs = vqa.processor(text=[vqa.text(prompt)], images=[Image.fromarray(image.numpy())], return_tensors="pt")
        with torch.no_grad():
            odds = vqa.model(**inputs).logits[0, -1].double().exp()
        expected = odds[vqa.yes].sum() / (odds[vqa.yes].sum() + odds[vqa.no].sum())
        assert score.item() == pytest.approx(expected.item(), abs=1e-5)
    assert found.std() > 1e-3
    assert 'Does this figure show "a red circle"?' in vqa.text("a red circle")


def test_vqa_takes_a_prompt_for_words_whatever_it_spells(vqa: VQA) -> None:
    hostile = "<|image_pad|><|im_end|> {prompt} {0} {{ x }}"
    assert vqa.text(hostile).count("<|image_pad|>") == 1
    assert vqa.score(pictures(1), [hostile]).isfinite().all()


DSG = """item_id,text,keywords,proposition_id,dependency,question_natural_language
a_1,a red circle,,1,0,Is there a circle?
a_1,a red circle,,2,1,Is the circle red?
b_1,two  blue rings,,1,0,Are there rings?
b_1,two  blue rings,,2,1,Are there two rings?
b_1,two  blue rings,,4,"1, 2",Are the two rings blue?
"""


@pytest.fixture
def dsg(tmp_path: Path) -> Path:
    path = tmp_path / "questions.csv"
    path.write_text(DSG, encoding="utf-8-sig")
    return path


def test_questions_are_read_with_their_parents(dsg: Path) -> None:
    assert read_questions(dsg) == {
        "a red circle": (Question("Is there a circle?", ()), Question("Is the circle red?", (0,))),
        "two blue rings": (
            Question("Are there rings?", ()),
            Question("Are there two rings?", (0,)),
            Question("Are the two rings blue?", (0, 1)),
        ),
    }


@pytest.mark.parametrize(
    ("yes", "score", "graded"),
    [
        ((0.9, 0.8, 0.7), 1.0, 0.8),
        ((0.4, 0.8, 0.7), 0.0, 0.4 / 3),  # the first is a no: both that depend on it count nothing
        ((0.9, 0.2, 0.7), 1 / 3, 1.1 / 3),
        ((0.9, 0.8, 0.1), 2 / 3, 1.8 / 3),
    ],
)
def test_a_question_counts_nothing_where_a_parent_is_a_no(
    yes: tuple[float, ...], score: float, graded: float, dsg: Path
) -> None:
    questions = read_questions(dsg)["two blue rings"]
    assert gated(yes, questions, False) == pytest.approx(score)
    assert gated(yes, questions, True) == pytest.approx(graded)


def test_only_a_no_of_the_parent_itself_counts_as_dsgs_code_has_it() -> None:
    chain = [Question("a", ()), Question("b", (0,)), Question("c", (1,))]
    assert gated((0.1, 0.9, 0.9), chain, False) == pytest.approx(1 / 3)


def test_vqa_asks_each_question_of_a_prompt(vqa_dir: Path, dsg: Path) -> None:
    images, prompts = pictures(), ["a red circle", "two blue rings", "a red circle"]
    options: dict[str, Any] = {"model": str(vqa_dir), "dtype": "float32", "batch": 2}
    asks = VQA(VQAConfig(question="{prompt} Please answer yes or no.", **options))
    for graded in (True, False):
        reward = VQA(VQAConfig(questions=str(dsg), graded=graded, **options))
        found = reward.score(images, prompts)
        for image, prompt, score in zip(images, prompts, found, strict=True):
            questions = read_questions(dsg)[prompt]
            yes = [asks.score(image[None], [q.text]).item() for q in questions]
            assert score.item() == pytest.approx(gated(yes, questions, graded), abs=1e-5)
        parts = torch.cat([reward.score(images[i : i + 2], prompts[i : i + 2]) for i in (0, 2)])
        assert torch.equal(parts, found)  # what `by_batch` promises
    reward.check([*prompts, "Two blue rings.", "the RED circle"])
    with pytest.raises(ValueError, match="has no questions for 'a blue ring'"):
        reward.check(["a blue ring"])
    assert len({VQA(VQAConfig(**options)).fingerprint(), asks.fingerprint(), reward.fingerprint()}) == 3


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("dependency", "depends", "no column dependency"),
        (DSG[DSG.index("a_1") :], "", "no question"),
        ("2,1,Is the", "2,7,Is the", "line 3: there is no proposition '7'"),
        ("Are there rings?", "  ", "line 4: no question, or a proposition_id twice"),
        (",4,", ",2,", "line 4: no question, or a proposition_id twice"),
    ],
)
def test_a_wrong_file_of_questions_is_one_line(old: str, new: str, expected: str, dsg: Path, refused) -> None:
    dsg.write_text(DSG.replace(old, new))
    words = ("run", "--algo", "dpo", "--reward", "vqa", "--set", f"reward.questions={dsg}")
    assert f"questions {dsg}" in (said := refused(*words)) and expected in said


def test_a_cell_is_of_the_questions_content(dsg: Path) -> None:
    first = VQAConfig(questions=str(dsg))
    dsg.write_text(DSG.replace("Is there a circle?", "Is a circle there?"))
    second = VQAConfig(questions=str(dsg))
    assert first.questions_sha256 != second.questions_sha256 and first.questions == second.questions
    with pytest.raises(ValueError, match="hashes to .*, not "):
        VQAConfig(questions=str(dsg), questions_sha256=first.questions_sha256)
    with pytest.raises(ValueError, match="no questions nowhere.csv"):
        VQAConfig(questions="nowhere.csv")
    with pytest.raises(ValueError, match="graded is for questions"):
        VQAConfig(graded=True)


def test_jpeg_is_the_size_of_the_file_in_kb(tmp_path: Path) -> None:
    images = pictures(2, 40)
    images[1] = torch.randint(0, 256, images[1].shape, generator=torch.Generator().manual_seed(0)).byte()
    sizes = []
    for number, image in enumerate(images.numpy()):
        Image.fromarray(image).save(tmp_path / f"{number}.jpg", quality=95)
        sizes.append((tmp_path / f"{number}.jpg").stat().st_size / 1000)
    large = jpeg.JpegIncompressibility(jpeg.JpegIncompressibility.Config())
    small = jpeg.JpegCompressibility(jpeg.JpegCompressibility.Config())
    assert large.score(images, PROMPTS).tolist() == pytest.approx(sizes) and sizes[1] > sizes[0]
    assert small.score(images, PROMPTS).tolist() == pytest.approx([-s for s in sizes])
    assert large.fingerprint() != small.fingerprint() == jpeg.JpegCompressibility(small.config).fingerprint()


@pytest.mark.parametrize("name", ["hps", "aesthetic", "pick"])
def test_scores_have_gradients_down_to_the_pixels(name: str, request: pytest.FixtureRequest) -> None:
    reward: Reward = request.getfixturevalue(name)
    assert reward.differentiable
    images = floats(pictures(2, 44)).requires_grad_()
    scores = reward.score_tensors(images, PROMPTS[:2])
    torch.testing.assert_close(scores, reward.score(pictures(2, 44), PROMPTS[:2]), atol=1e-5, rtol=1e-5)
    scores.sum().backward()
    assert images.grad is not None
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        direction = torch.randn(images.shape, generator=generator) * 1e-2
        with torch.no_grad():
            up, down = (reward.score_tensors(images + s * direction, PROMPTS[:2]).double().sum() for s in (1, -1))
        found, expected = (images.grad * direction).sum().item(), (up - down).item() / 2
        assert found == pytest.approx(expected, rel=0.05, abs=3e-6)


def test_fingerprints_tell_weights_and_rules_apart(
    hps: HPSv2, pick: PickScore, vqa: VQA, vqa_dir: Path, clip_file: Path, tiny_clip: str, tmp_path: Path
) -> None:
    content = torch.load(clip_file, weights_only=True)
    same, other = tmp_path / "same.pt", tmp_path / "other.pt"
    torch.save(content["state_dict"], same)  # as a bare state dict
    content["state_dict"]["logit_scale"] += 1
    torch.save(content, other)
    assert HPSv2(HPSv2Config(weights=str(same), model=tiny_clip)).fingerprint() == hps.fingerprint()
    assert HPSv2(HPSv2Config(weights=str(other), model=tiny_clip)).fingerprint() != hps.fingerprint()
    plain = Clip(ClipConfig(model=tiny_clip, pretrained=str(clip_file)))  # the same weights, other preprocessing
    assert len({plain.fingerprint(), hps.fingerprint(), pick.fingerprint(), vqa.fingerprint()}) == 4
    asked = VQA(VQAConfig(model=str(vqa_dir), dtype="float32", question="{prompt}?"))
    assert asked.fingerprint() != vqa.fingerprint()
    assert VQA(VQAConfig(model=str(vqa_dir), dtype="float32", batch=5)).fingerprint() == vqa.fingerprint()


def test_weights_that_are_not_to_be_had_are_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clip_file: Path, tiny_clip: str, pick_dir: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "wrong.pt")
    (tmp_path / "text.pt").write_text("not weights")
    torch.save({"state_dict": Path("x")}, tmp_path / "pickle.pt")
    wrong, text, pickled = (str(tmp_path / f"{n}.pt") for n in ("wrong", "text", "pickle"))
    mistakes: list[tuple[type[Reward], Any, str]] = [
        (HPSv2, HPSv2Config(), "HPS_v2.1_compressed.pt of xswu/HPSv2 on the Hub cannot be loaded"),
        (HPSv2, HPSv2Config(weights="missing.pt"), "no weights file missing.pt (option weights"),
        (HPSv2, HPSv2Config(weights=wrong, model=tiny_clip), "weights of another network"),
        (HPSv2, HPSv2Config(weights=text, model=tiny_clip), "no weights that can be read"),
        (HPSv2, HPSv2Config(weights=pickled, model=tiny_clip), "no weights that can be read"),
        (HPSv2, HPSv2Config(weights=wrong, model="ViT-H-41"), "unknown open_clip model 'ViT-H-41'; did you mean"),
        (Aesthetic, AestheticConfig(), "path in the option weights"),
        (Aesthetic, AestheticConfig(weights=wrong), "weights of another network"),
        (PickScore, PickScoreConfig(), "path in the option processor"),
        (PickScore, PickScoreConfig(processor=str(pick_dir)), "yuvalkirstain/PickScore_v1 cannot be loaded"),
        (VQA, VQAConfig(), "path in the option model"),
    ]
    for cls, config, expected in mistakes:
        with pytest.raises(UsageError) as refused:
            cls(config)
        message = str(refused.value)
        assert expected in message and (cls.name in message or "open_clip" in message), message
        assert len(message.splitlines()) == 1 and len(message) < 500
    with pytest.raises(ValueError, match="write {prompt} where"):
        VQAConfig(question="is it?")


# --- weighted sums


def a_cell(reward: str, **options: Any) -> Any:
    return resolve(**{"track_source": "micro", "algo": "dpo", "builder": "vanilla", "reward": reward, **options})


def test_how_a_sum_is_written() -> None:
    split = sums.split
    parts = [("clip", 0.7), ("oracle", 0.3)]
    assert split("clip:0.7,oracle:0.3") == split("clip:0.7+oracle:0.3") == split("clip-0.7+oracle-0.3") == parts
    assert split("jpeg-compressibility:-1e-2,a,b/f.py:score:2") == [
        ("jpeg-compressibility", -0.01),
        ("a,b/f.py:score", 2.0),
    ]
    assert split("jpeg--0.1+clip-1e+20") == [("jpeg", -0.1), ("clip", 1e20)]
    for single in ("clip", "oracle:full", "jpeg-compressibility", "foo-2", "rewards.py:score"):
        assert split(single) is None
    assert sums.listed("clip,clip:0.7,oracle:0.3,oracle") == ["clip", "clip:0.7,oracle:0.3", "oracle"]
    assert sums.listed("clip:1+oracle:2,clip:2+oracle:1") == ["clip:1+oracle:2", "clip:2+oracle:1"]


def test_a_sum_is_one_cell_however_it_is_written() -> None:
    first = a_cell("oracle:0.3,clip:0.7")
    assert first.reward.name == "clip-0.7+oracle-0.3" and first.reward.name in first.folder
    assert {a_cell(t).hash for t in ("clip:0.7,oracle:0.3", "clip:.70+oracle:3e-1", first.reward.name)} == {first.hash}
    assert a_cell("clip:0.7,oracle:0.4").hash != first.hash
    resolved = first.resolved["reward"]["components"]
    assert resolved["clip"] == {
        "weight": 0.7,
        "mean": 0.0,
        "sd": 1.0,
        "options": {"model": "micro", "pretrained": "laion2b_s32b_b79k", "batch": 128},  # model: the track's
    }
    assert "bench-dfusion" in first.sources["reward"]


def test_a_sum_is_its_components_weighted_by_hand() -> None:
    set_ = ["reward.oracle.score=full", "reward.clip.mean=0.25", "reward.clip.sd=0.5", "reward.clip.batch=2"]
    cell = a_cell("clip:0.7,oracle:-0.3", settings=set_)
    reward = cell.reward(cell.reward_config)
    clip, oracle = Clip(ClipConfig(model="micro")), Oracle(OracleConfig(score="full"))
    images = pictures(3, 64)
    expected = 0.7 * (clip.score(images, PROMPTS) - 0.25) / 0.5 - 0.3 * oracle.score(images, PROMPTS)
    torch.testing.assert_close(reward.score(images, PROMPTS), expected)
    assert reward.fingerprints() == {"clip": clip.fingerprint(), "oracle": oracle.fingerprint()}
    for other in ("clip:0.8,oracle:-0.3", "clip:0.7,oracle:-0.2"):
        changed = a_cell(other, settings=set_)
        assert changed.reward(changed.reward_config).fingerprint() != reward.fingerprint()
    shifted = a_cell("clip:0.7,oracle:-0.3", settings=[*set_, "reward.clip.sd=0.6"])
    assert shifted.reward(shifted.reward_config).fingerprint() != reward.fingerprint()


def test_a_sum_has_a_gradient_if_all_of_it_has() -> None:
    with pytest.raises(Misfit, match="clip-0.7\\+oracle-0.3 has none"):
        a_cell("clip:0.7,oracle:0.3", algo="draft")
    assert a_cell("clip:0.7,aesthetic:0.3", algo="draft").reward.differentiable


def test_the_gradient_of_a_sum(hps: HPSv2, aesthetic: Aesthetic) -> None:
    cls = sums.of([("hpsv2", HPSv2, 2.0), ("aesthetic", Aesthetic, 0.5)])
    options = {"hpsv2": dict(hps.config), "aesthetic": {**dict(aesthetic.config), "sd": 4}}
    both = cls(cls.configured(options, {}))
    images = floats(pictures(2)).requires_grad_()
    (found,) = torch.autograd.grad(both.score_tensors(images, PROMPTS[:2]).sum(), images)
    plain = 2 * hps.score_tensors(images, PROMPTS[:2]) + 0.5 * aesthetic.score_tensors(images, PROMPTS[:2]) / 4
    (expected,) = torch.autograd.grad(plain.sum(), images)
    torch.testing.assert_close(found, expected)


def test_a_judge_that_is_a_component_is_no_judge() -> None:
    from bench_dfusion.runs.evaluation import verdict

    track = resolve_track("micro", settings=[t.removeprefix("--set=") for t in TINY])
    scores = torch.zeros(len(track.prompts.heldout), 2)
    judges = {name: cls(config) for name, (cls, config) in judges_of(track).items()}

    def trained_on(fingerprints: dict[str, str]) -> dict[str, bool]:
        return {
            name: verdict(judge, name, scores, scores, track, fingerprints, False).trained_on
            for name, judge in judges.items()
        }

    def of(text: str) -> dict[str, bool]:
        cell = a_cell(text)
        return trained_on(cell.reward(cell.reward_config).fingerprints())

    assert of("clip:0.7,jpeg-compressibility:0.3") == {"oracle": False, "oracle:full": False, "clip": True}
    assert of("oracle:0.7,jpeg-compressibility:0.3") == {"oracle": True, "oracle:full": True, "clip": False}
    assert of("oracle:0.7,clip:0.3") == {"oracle": True, "oracle:full": True, "clip": True}
    assert trained_on({}) == trained_on({"jpeg": "x"}) == {"oracle": False, "oracle:full": False, "clip": False}


@pytest.mark.parametrize(
    ("reward", "options", "expected"),
    [
        ("clip:0.7,oracle", (), "'oracle' has no weight"),
        ("clip,oracle:0.3", (), "'clip' has no weight"),
        ("clip:0.7", (), "a sum has two rewards or more"),
        ("clip:0.7,klip:0.3", (), "unknown reward 'klip'; did you mean clip"),
        ("clip:0.7,oracle:0", (), "the weight of oracle must be a number other than 0"),
        ("clip:0.7,oracle:inf", (), "the weight of oracle must be a number, not inf"),
        ("clip:0.7,clip:0.3", (), "clip is in the sum twice"),
        ("clip:0.7,oracle:0.3,", (), "has no weight"),
        ("oracle:full", (), "unknown reward 'oracle:full'; did you mean oracle"),
        ("clip:0.7,oracle:0.3", ("reward.batch=2",), "unknown option reward 'batch'"),
        ("clip:0.7,oracle:0.3", ("reward.clip=2",), "write reward.clip.OPTION=VALUE"),
        ("clip:0.7,oracle:0.3", ("reward.clip.bach=2",), "unknown option reward.clip 'bach'; did you mean batch"),
        ("clip:0.7,oracle:0.3", ("reward.clip.sd=0",), "reward.clip.sd"),
        ("clip:0.7,given:0.3", (), "the reward given scores nothing"),
        ("clip", ('track.evaluation.judges=["oracle:0.5"]',), "a judge has no weight"),
        ("missing.py:score", (), "no file missing.py"),
        ("bad.py:scores", (), "unknown function 'scores'; did you mean score"),
        ("bad.py:score", (), "has the parameters (pictures)"),
        ("bad.py:needs_more", (), "has the parameters (images, prompts, answer)"),
        ("bad.py:later", (), "an async function"),
        ("bad.py:Upper", (), "lower-case letters"),
        ("bad.py:clip", (), "clip is a registered reward"),
        ("bad.py:few", (), "returned 1 scores for"),
        ("bad.py:words", (), "one number for each image"),
        ("bad.py:none", (), "returned None for 'a red square and a blue ring'"),
        ("bad.py:none:1,bad.py:nothing:2", (), "none of its rewards applies to 'a red square and a blue ring'"),
        ("bad.py:fine", ("reward.beta=1",), "takes no option, here beta"),
    ],
)
def test_a_mistake_is_one_line(
    reward: str, options: tuple[str, ...], expected: str, refused: Any, tmp_path: Path
) -> None:
    (tmp_path / "bad.py").write_text(BAD)
    sets = [f"--set={o}" for o in options]
    line = refused("run", "--algo", "dpo", "--builder", "vanilla", "--reward", reward, *TINY, *sets, cwd=tmp_path)
    assert expected in line, line


# --- a sum taken apart: test_advantages.py has what is made of it


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"reward": "oracle"},
            "takes a sum's rewards apart, and oracle is one reward: give --reward NAME:WEIGHT,NAME:WEIGHT",
        ),
        (
            {"algo": "rwr", "pairs": "ours"},
            "offline pairs hold no score of each reward of a sum: leave algo.components and algo.gardo out",
        ),
    ],
)
def test_the_option_is_refused_where_there_is_nothing_to_take_apart(
    given: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench_dfusion.runs.config._scored_by", lambda *_: "given")
    cell = {"track_source": "micro", "algo": "grpo", "settings": ["algo.components=each"], **given}
    with pytest.raises(Misfit, match=said) as refused:
        resolve(**cell)
    assert "\n" not in str(refused.value)


def test_a_cell_of_a_sum_keeps_its_hash_until_the_option_is_set() -> None:
    cells = [
        resolve(track_source="micro", algo="grpo", reward="clip:0.7,oracle:0.3", settings=settings)
        for settings in ([], ["algo.components=sum"], ["algo.components=each"])
    ]
    assert "components" not in cells[0].resolved["algorithm"]
    assert cells[2].resolved["algorithm"]["components"] == "each"
    assert cells[0].hash == cells[1].hash != cells[2].hash


@pytest.mark.parametrize("builder", ["dfusion", "branch"])
def test_a_run_keeps_each_rewards_score_beside_its_sample(
    builder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[ConsistentSamples] = []
    kind = registry.load("algorithms", "grpo")
    prepare = kind.prepare

    def watched(self: Any, policy: Any, samples: ConsistentSamples, generator: Any) -> Any:
        rounds.append(samples)
        return prepare(self, policy, samples, generator)

    monkeypatch.setattr(kind, "prepare", watched)
    settings = [*SETTINGS, "track.budget.reward_queries=24", "algo.components=each", "reward.oracle.mean=0.5"]
    record = bench_dfusion.run(
        algo="grpo", builder=builder, reward="clip:0.7,oracle:0.3", settings=settings, out=tmp_path
    )
    assert record.status == "finished" and rounds
    for samples in rounds:
        own = samples.samples.components
        assert own is not None and list(own.weights.items()) == [("clip", 0.7), ("oracle", 0.3)]
        assert own.scores.shape == (len(samples.samples), 2) and len(samples.samples) > samples.drawn
        rewards = 0.7 * own.scores[:, 0] + 0.3 * (own.scores[:, 1] - 0.5)
        torch.testing.assert_close(rewards, samples.samples.rewards)
    drawn = rounds[0].samples.components.scores[: rounds[0].drawn]
    said = record.rounds[0].metrics
    assert [said["reward_clip"], said["reward_oracle"]] == pytest.approx(drawn.mean(0).tolist())


def test_a_builder_that_returns_other_samples_than_it_had_scored_is_named() -> None:
    cell = resolve(track_source="micro", algo="grpo", reward="clip:0.7,oracle:0.3", settings=["algo.components=each"])
    run: Any = object.__new__(trainer.Run)
    run.cell, run.reward = cell, cell.reward(cell.reward_config)
    run.builder = cell.builder(cell.builder_config)
    samples = draw(fake_policy(), ROUND)
    apart = torch.arange(16.0).view(8, 2)
    run._scored = [(samples.rewards[:3], apart[:3]), (samples.rewards[3:], apart[3:])]
    assert torch.equal(run._components(samples).scores, apart)
    samples.rewards = samples.rewards.flip(0)
    with pytest.raises(PluginError, match="builder dfusion returns other samples than it had scored"):
        run._components(samples)


# --- a user's own function

BAD = """
def score(pictures): ...
def needs_more(images, prompts, answer): ...
async def later(images, prompts): ...
def Upper(images, prompts): ...
def clip(images, prompts): ...
def few(images, prompts): return [1.0]
def words(images, prompts): return ["good"] * len(prompts)
def none(prompts, completions, **kwargs): return [None] * len(prompts)
def nothing(completions, **kwargs): return [None] * len(completions)
def fine(images, prompts): return [1.0] * len(prompts)
"""

MINE = '''
from __future__ import annotations
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

@dataclass
class Scale:
    by: float = 255.0

def redness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    assert images.dtype == torch.uint8 and images.shape[-1] == 3 and len(images) == len(prompts)
    return images[..., 0].float().mean((1, 2)) / Scale().by

def trl(prompts: list[str], completions: list[Image.Image], **kwargs) -> list[float | None]:
    """How dark, of circles."""
    means = [1 - float(np.array(c).mean()) / 255 for c in completions]
    return [m if "circle" in p else None for m, p in zip(means, prompts, strict=True)]

def broken(images, prompts):
    return [1 / 0]

def undefined(images, prompts):
    return [float("nan")] * len(prompts)
'''


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


def test_functions_of_both_signatures(mine: Path) -> None:
    images = pictures()
    own, trl = a_cell(f"{mine}:redness"), a_cell(f"{mine}:trl")
    assert (own.reward.name, own.reward_config.signature) == ("redness", "images")
    assert (trl.reward.name, trl.reward_config.signature) == ("trl", "trl")
    assert str(mine) not in json.dumps(own.resolved) and own.sources["reward"] == "mine.py"
    reward, other = own.reward(own.reward_config), trl.reward(trl.reward_config)
    expected = images[..., 0].float().mean((1, 2)) / 255
    torch.testing.assert_close(reward.score(images, PROMPTS), expected)
    undefined = a_cell(f"{mine}:undefined")  # what is not finite is the loop's to judge: the run is a miss
    assert undefined.reward(undefined.reward_config).score(images, PROMPTS).isnan().all()
    with pytest.raises(UsageError, match="returned None for 'two blue rings'"):
        other.score(images, PROMPTS)
    both = a_cell(f"{mine}:redness:0.5,{mine}:trl:2", settings=["reward.redness.mean=0.1", "reward.trl.mean=0.2"])
    dark = 1 - images.float().mean((1, 2, 3)) / 255
    weighted = 0.5 * (expected - 0.1) + 2 * torch.where(torch.tensor([True, False, True]), dark - 0.2, 0.0)
    torch.testing.assert_close(both.reward(both.reward_config).score(images, PROMPTS), weighted)


def test_pairs_that_a_sum_scored(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench_dfusion.runs import config

    def read(source: str) -> Any:
        return type("Pairs", (), {"scored_by": "clip-0.7+redness-0.3"})

    monkeypatch.setattr(config.preference_data, "read", read)
    given = f"{mine}:redness:0.3,clip:0.7"
    assert config._scored_by("mine", None, given) == given
    with pytest.raises(UsageError, match="were scored by clip-0.7\\+redness-0.3, which is not here .*FILE.py:FUNCTION"):
        config._scored_by("mine", None, None)
    with pytest.raises(UsageError, match="were scored by clip-0.7\\+redness-0.3, not by clip: leave"):
        config._scored_by("mine", None, "clip")


def test_a_function_is_its_files_text(mine: Path) -> None:
    before = a_cell(f"{mine}:redness")
    elsewhere = mine.parent / "other.py"
    elsewhere.write_text(MINE)
    assert a_cell(f"{elsewhere}:redness").hash == before.hash  # wherever it lies
    mine.write_text(MINE.replace("255.0", "100.0"))
    after = a_cell(f"{mine}:redness")
    assert after.hash != before.hash
    old, new = (c.reward(c.reward_config) for c in (before, after))
    assert old.fingerprint() != new.fingerprint()
    ratio = new.score(pictures(1), ["a"]) / old.score(pictures(1), ["a"])
    assert ratio.item() == pytest.approx(2.55)  # the new text runs, not the old


def test_what_a_function_raises_is_shown_with_its_traceback(mine: Path) -> None:
    cell = a_cell(f"{mine}:broken")
    with pytest.raises(PluginError, match="reward broken of .* failed: ZeroDivisionError") as raised:
        cell.reward(cell.reward_config).score(pictures(1), ["a"])
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    mine.write_text("import no_such_module_of_mine\n")
    with pytest.raises(PluginError, match="mine.py cannot be imported: ModuleNotFoundError"):
        a_cell(f"{mine}:broken")


SHORT = ("--set=track.budget.reward_queries=16", "--set=algo.updates=1", "--keep-pairs=none")  # two rounds


def test_a_run_on_a_sum_with_functions_is_recorded_and_resumed(
    mine: Path, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the first round, it goes on; its record stands every check."""
    from bench_dfusion.runs.trainer import Run

    reward = "mine.py:redness:0.5+mine.py:trl:0.25+clip:1"
    words = (
        "run",
        "--algo",
        "dpo",
        "--builder",
        "vanilla",
        "--reward",
        reward,
        *TINY,
        "--set=track.budget.reward_queries=16",
    )
    whole = said(*words, "--out", "whole", cwd=mine.parent)
    assert whole.status == 0, whole.err
    save = Run._save

    def dying(run: Run) -> None:
        save(run)
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_save", dying)
    assert said(*words, cwd=mine.parent).status == 130
    monkeypatch.setattr(Run, "_save", save)
    assert said(*words, cwd=mine.parent).status == 0
    (path,) = (mine.parent / "runs").rglob("record.json")
    record, other = records.read(path), records.read(next((mine.parent / "whole").rglob("record.json")))
    assert record.comparable() == other.comparable()
    assert record.reward == "clip-1+redness-0.5+trl-0.25" and path.parent.name.startswith(
        f"dpo-vanilla-{record.reward}-s0"
    )
    assert {v.judge: v.trained_on for v in record.verdicts} == {"oracle": False, "oracle:full": False, "clip": True}
    assert sorted(record.provenance.reward_components) == ["clip", "redness", "trl"]
    assert records.check(record) == []
    honest = record.model_copy(deep=True)
    honest.verdicts[2].trained_on = False
    assert any("trained_on is false" in p for p in records.check(honest))
    again = said("eval", path.parent, cwd=mine.parent)
    assert again.status == 0 and "matches" in again.out
    assert said("merge", path, "--into", "board", cwd=mine.parent).status == 0
    assert (mine.parent / "board" / path.relative_to(mine.parent / "runs")).is_file()
    lines = [line.split() for line in said("leaderboard", "board").out.splitlines()]
    assert ["redness-0.5+"] in [words[:1] for words in lines]  # a line for each component


def test_a_sweep_gives_its_processes_the_reward_as_it_was_written(
    mine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from bench_dfusion.sweeps import local, queue

    started: list[list[str]] = []

    class Worker:
        alive = True

        def __init__(self, *about: object): ...

        def begin(self, words: list[str], log: Path) -> None:
            started.append(words)

    reward = f"clip:0.5+{mine}:redness:2"
    jobs, _ = queue.plan("micro-fast", ["dpo"], ["vanilla"], [reward], 1, tmp_path)
    monkeypatch.setattr(local, "Worker", Worker)
    local.Local(["cpu"]).start(jobs[0])
    assert started[0][started[0].index("--reward") + 1] == reward
    assert jobs[0].folder.name.startswith("dpo-vanilla-redness-2+clip-0.5-s0-")


def test_list_shows_the_rewards(said: Any) -> None:
    shown = said("list", "rewards").out
    for name in ("hpsv2", "aesthetic", "pickscore", "vqa", "jpeg-compressibility", "jpeg-incompressibility"):
        assert name[:14] in shown
    assert "xswu/HPSv2" in said("list", "rewards", "hpsv2").out.replace("\n", "")


# --- against upstream: wants its packages and weights (pytest -m upstream)


@pytest.mark.upstream
def test_hpsv2_against_upstream(tmp_path: Path) -> None:
    hpsv2 = pytest.importorskip("hpsv2", reason="hpsv2 is not installed")
    images = pictures(3, 512)
    expected = [
        float(hpsv2.score(Image.fromarray(i), p, hps_version="v2.1")[0])
        for i, p in zip(images.numpy(), PROMPTS, strict=True)
    ]
    found = HPSv2(HPSv2Config()).score(images, PROMPTS)
    assert found.tolist() == pytest.approx(expected, abs=2e-3)  # upstream runs under autocast on a GPU


@pytest.mark.upstream
def test_aesthetic_against_upstream() -> None:
    """OpenAI's own package `clip` encodes; the MLP is upstream's."""
    clip = pytest.importorskip("clip", reason="OpenAI's clip is not installed")
    from bench_dfusion.rewards import weights

    images = pictures(3, 512)
    model, transform = clip.load("ViT-L/14", device="cpu")
    head = UpstreamMLP().eval()
    config = AestheticConfig()
    path = weights.fetch("aesthetic", config.weights, config.revision, "weights")
    head.load_state_dict(torch.load(path, weights_only=True))
    with torch.no_grad():
        encoded = model.encode_image(torch.stack([transform(Image.fromarray(i)) for i in images.numpy()])).float()
        expected = head.layers(encoded / encoded.norm(dim=-1, keepdim=True))[:, 0]
    torch.testing.assert_close(Aesthetic(config).score(images, PROMPTS), expected, atol=2e-2, rtol=0)


@pytest.mark.upstream
def test_pickscore_against_its_cards_recipe() -> None:
    """transformers' processor and CLIPModel on PIL pictures, one pair at a time."""
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    from transformers import AutoProcessor, CLIPModel

    config, images = PickScoreConfig(), pictures(3, 512)
    try:
        processor, model = AutoProcessor.from_pretrained(config.processor), CLIPModel.from_pretrained(config.model)
    except OSError:
        pytest.skip("PickScore's weights are not here and the Hub is out of reach")
    expected = []
    for image, prompt in zip(images.numpy(), PROMPTS, strict=True):
        inputs = processor(text=prompt, images=Image.fromarray(image), return_tensors="pt", padding=True)
        with torch.no_grad():
            expected.append(model(**inputs).logits_per_image.item())
    assert PickScore(config).score(images, PROMPTS).tolist() == pytest.approx(expected, abs=5e-2)


@pytest.mark.upstream
def test_vqa_against_generation() -> None:
    """The first token that Qwen2.5-VL generates is yes where the score is above a half, else no."""
    from transformers import AutoModelForImageTextToText

    config, images = VQAConfig(batch=1), pictures(1, 224)
    try:
        reward = VQA(config)
    except UsageError:
        pytest.skip("the default model's weights are not here and the Hub is out of reach")
    assert isinstance(reward.model, AutoModelForImageTextToText._model_mapping[type(reward.model.config)])
    for prompt in ("blurred colours", "a photograph of a dog"):
        inputs = reward.processor(
            text=[reward.text(prompt)], images=[Image.fromarray(images[0].numpy())], return_tensors="pt"
        )
        answer = reward.model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1].item()
        assert answer in (reward.yes if reward.score(images, [prompt]) > 0.5 else reward.no)


@pytest.mark.upstream
def test_jpeg_against_ddpo() -> None:
    rewards = pytest.importorskip("ddpo_pytorch.rewards", reason="ddpo-pytorch is not installed")
    images = pictures(3, 512)
    for cls, theirs in (
        (jpeg.JpegIncompressibility, rewards.jpeg_incompressibility()),
        (jpeg.JpegCompressibility, rewards.jpeg_compressibility()),
    ):
        expected, _ = theirs(images.numpy(), PROMPTS, None)
        assert cls(cls.Config()).score(images, PROMPTS).tolist() == pytest.approx(expected.tolist())
