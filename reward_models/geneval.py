"""GenEval: whether a detector finds the objects that the prompt names, in their number, colour and place.

Ghosh et al. 2023 (arXiv 2310.11513); the decisions are those of github.com/djghosh13/geneval at 16f1681. Its prompts
are made of templates and COCO's 80 classes, so what a picture must show is read from the prompt; others are refused.
Detector: Mask2Former with Swin-S (69 M parameters, 0.3 GB), by default facebook/mask2former-swin-small-coco-instance of
the Hub, branch main: Meta's release (code MIT, its model zoo CC BY-NC 4.0, the Hub's card "other"). GenEval's own is
mmdet's training of the same architecture, which wants a patched mmcv: scores compare within this suite, not with
published tables to the digit. Colours: OpenAI's CLIP ViT-L/14 by open_clip (MIT, 428 M parameters, 1.7 GB).
Scores are 0 or 1, or with `score=share` in [0, 1].
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import copysign, hypot
from typing import Any, ClassVar, Literal

import torch
from bench_dfusion.reward_models.clip import image_size, open_clip_model
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from bench_dfusion.errors import UsageError
from bench_dfusion.rewards import weights
from bench_dfusion.rewards.contract import Reward, RewardConfig
from bench_dfusion.rewards.preprocessing import prepare
from bench_dfusion.util import hub

CLASSES = (  # noqa: SIM905 - COCO's, in its order, by GenEval's names
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, "
    "computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, "
    "clock, vase, scissors, teddy bear, hair drier, toothbrush"
).split(", ")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
COLOUR_TEXTS = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
BACKGROUND = 0x99 / 255
DETECTIONS = 100  # pairs of query and class of one picture (mmdet: max_per_image)

Box = tuple[int, int, int, int]  # left, top, right, bottom (pixels); right and bottom are outside


@dataclass(frozen=True)
class Asked:
    """What a prompt asks for; `position`: where it is, seen from the prompt's other object, which stands before it."""

    name: str
    count: int = 1
    colour: str | None = None
    position: str | None = None


@dataclass
class Found:
    """A detection; `mask`: bool [H, W]; `colour` is there where the prompt asks for one."""

    score: float
    box: Box
    mask: Tensor | None = None
    colour: str | None = None


# --- prompts


def _phrases() -> dict[str, Asked]:
    """Every noun phrase of GenEval's generator, which knows a, an, -s and -es: 'an apple', 'a red bus', 'two benchs'."""

    def article(word: str) -> str:
        return ("an " if word[0] in "aeiou" else "a ") + word

    numbers = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    found = {article(name): Asked(name) for name in CLASSES}
    found |= {f"{article(c)} {name}": Asked(name, colour=c) for name in CLASSES[1:] for c in COLOURS}  # no person
    plural = {name: name + ("es" if name.endswith("s") else "s") for name in CLASSES}
    found |= {f"{number} {plural[name]}": Asked(name, n) for name in CLASSES for n, number in enumerate(numbers, 2)}
    return found


PHRASES = _phrases()
PROMPT = re.compile("a photo of (.+?)(?: (and|left of|right of|above|below) (.+))?")


def parse(prompt: str) -> tuple[Asked, ...]:
    """The objects a prompt asks for. Raises ValueError where it is in none of GenEval's forms."""
    match = PROMPT.fullmatch(prompt)
    first, second = (PHRASES.get(match[i]) if match else None for i in (1, 3))
    if match and match[2] is None and first:
        return (first,)
    if match and first and second and first.name != second.name and first.count == second.count == 1:
        if match[2] == "and" and (first.colour is None) == (second.colour is None):
            return first, second
        if match[2] != "and" and first.colour is second.colour is None:
            return second, replace(first, position=match[2])
    raise ValueError(
        f"the reward geneval scores GenEval's prompts, not {prompt!r}: 'a photo of a bus', '... a bus and an apple', "
        "'... two buses', '... a red bus', '... a bus left of (right of, above, below) an apple', "
        "'... a red bus and a blue apple', with COCO's classes"
    )


# --- decisions


def select(found: Sequence[Found], threshold: float, max_objects: int, max_overlap: float) -> list[Found]:
    """The detections of one class that count, the surest first."""
    sure = sorted((f for f in found if f.score > threshold), key=lambda f: -f.score)[:max_objects]
    kept: list[Found] = []
    for one in sure:
        if max_overlap == 1 or all(overlap(one.box, other.box) < max_overlap for other in kept):
            kept.append(one)
    return kept


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, whose right and bottom pixels GenEval counts in."""

    def area(left: int, top: int, right: int, bottom: int) -> int:
        return max(right - left + 1, 0) * max(bottom - top + 1, 0)

    both = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    return both / (area(*a) + area(*b) - both)


def relations(a: Box, b: Box, threshold: float) -> set[str]:
    """Where a is, seen from b: the offset of the centres, less `threshold` of both sizes, points there within 60°."""
    offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    sizes = [a[i + 2] - a[i] + b[i + 2] - b[i] for i in (0, 1)]
    clear = [copysign(max(abs(o) - threshold * s, 0.0), o) for o, s in zip(offset, sizes, strict=True)]
    if all(abs(c) < 1e-3 for c in clear):
        return set()
    x, y = (c / hypot(*offset) for c in clear)
    seen = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in seen.items() if holds}


def correct(asked: Sequence[Asked], found: Mapping[str, Sequence[Found]], position_threshold: float) -> float:
    """GenEval's score: 1 where there is all that is asked for, else 0. More of it is right, save where it is counted."""
    for one in asked:
        best = found[one.name][: one.count]
        if len(best) < one.count or (one.count > 1 and len(found[one.name]) > one.count):
            return 0.0
        if one.colour and any(f.colour != one.colour for f in best):
            return 0.0
        if one.position:
            other = found[asked[0].name][0]
            if one.position not in relations(best[0].box, other.box, position_threshold):
                return 0.0
    return 1.0


def share(asked: Sequence[Asked], found: Mapping[str, Sequence[Found]], position_threshold: float) -> float:
    """Flow-GRPO's reward: the mean over the counts, each 1 − |found − asked| / asked, colours and positions, each 0 or
    1 and 0 unless the count is exact. Unlike in its server no count goes below 0 and a wrong position earns nothing."""
    exact = {one.name: len(found[one.name]) == one.count for one in asked}
    terms = []
    for one in asked:
        have = found[one.name]
        terms.append(max(0.0, 1 - abs(len(have) - one.count) / one.count))
        if one.colour:
            terms.append(float(exact[one.name] and have[0].colour == one.colour))
        if one.position:
            both, other = all(exact.values()), found[asked[0].name]
            seen = relations(have[0].box, other[0].box, position_threshold) if both else ()
            terms.append(float(one.position in seen))
    return sum(terms) / len(terms)


# --- the reward


class GenEvalConfig(RewardConfig):
    model: str = Field(
        "facebook/mask2former-swin-small-coco-instance",
        description="Mask2Former trained on COCO's instances: a directory or a Hub id",
    )
    revision: str | None = Field(None, description="Hub revision (commit or tag) of it; None: the default branch")
    clip: str = Field("ViT-L-14-quickgelu", description="open_clip architecture that tells colours (GenEval: ViT-L/14)")
    pretrained: str = Field("openai", description="its weights: open_clip checkpoint tag or file")
    score: Literal["correct", "share"] = Field(
        "correct",
        description="correct: GenEval's, 0 or 1; share: Flow-GRPO's, the mean of counts, colours and positions, in "
        "[0, 1] (Liu et al. 2025)",
    )
    threshold: float = Field(0.3, ge=0, le=1, description="score above which a detection counts (GenEval: 0.3)")
    counting_threshold: float = Field(
        0.9, ge=0, le=1, description="the same where the prompt names a number (GenEval: 0.9)"
    )
    max_objects: int = Field(  # ten may be asked for, and one more must be seen
        16, ge=11, description="detections of a class that count, the surest ones (count; GenEval: 16)"
    )
    max_overlap: float = Field(
        1.0, gt=0, le=1, description="IoU of boxes at which the less sure goes; 1: none goes (GenEval: 1)"
    )
    position_threshold: float = Field(
        0.1, ge=0, description="share of both sizes that the centres must differ by more than (GenEval: 0.1)"
    )
    batch: int = Field(8, ge=1, description="images in one forward (count)")


class GenEval(Reward):
    name = "geneval"
    summary = (
        "objects, counts, colours, positions that GenEval's prompts name, found by a detector (69 + 428 M parameters)"
    )
    paper = "Ghosh et al. 2023 (GenEval); Cheng et al. 2022 (Mask2Former); Liu et al. 2025 (Flow-GRPO) for share"
    unit = "0 or 1; share: in [0, 1]"
    limits = (0.0, 1.0)
    Config: ClassVar[type[RewardConfig]] = GenEvalConfig
    by_batch = True
    one_judge = True
    config: GenEvalConfig

    def __init__(self, config: GenEvalConfig, device: torch.device | str = "cpu"):
        import open_clip
        from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor

        super().__init__(config, device)
        try:
            self.processor: Any = Mask2FormerImageProcessor.from_pretrained(
                hub.look(config.model), revision=config.revision
            )
            model = Mask2FormerForUniversalSegmentation.from_pretrained(
                config.model, revision=config.revision, dtype=torch.float32
            )
        except Exception as error:  # of transformers, the Hub's client, safetensors: many kinds
            raise weights.missing(self.name, config.model, "model", error) from None
        labels = model.config.id2label
        if len(labels) != len(CLASSES) or (labels[0], labels[len(CLASSES) - 1]) != (CLASSES[0], CLASSES[-1]):
            raise UsageError(
                f"reward geneval: {config.model} tells {len(labels)} classes, from {labels[0]} on, not COCO's "
                f"{len(CLASSES)} from {CLASSES[0]} to {CLASSES[-1]}: take a Mask2Former trained on COCO's instances"
            )
        self.model: Any = model.eval().requires_grad_(False).to(self.device)
        self.clip, self.preprocess = open_clip_model(self.name, config.clip, config.pretrained, self.device)
        self.tokenizer = open_clip.get_tokenizer(config.clip)
        self._colours: dict[str, Tensor] = {}

    def check(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            parse(prompt)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        rule = correct if self.config.score == "correct" else share
        asked, size, scores = [parse(p) for p in prompts], self.config.batch, []
        with torch.no_grad():
            for i in range(0, len(images), size):
                part, parsed = images[i : i + size].to(self.device).permute(0, 3, 1, 2), asked[i : i + size]
                for image, wanted, found in zip(part, parsed, self.detect(part, parsed), strict=True):
                    for one in wanted:
                        if one.colour and found[one.name]:
                            self.colour(image, found[one.name][0], one.name)
                    scores.append(rule(wanted, found, self.config.position_threshold))
        return torch.tensor(scores, dtype=torch.float32)

    def detect(self, images: Tensor, asked: Sequence[Sequence[Asked]]) -> list[dict[str, list[Found]]]:
        """For images uint8 [B, 3, H, W] on the device the detections that count, of the classes asked for, by name."""
        inputs = self.processor(images=list(images), return_tensors="pt").to(self.device)
        out = self.model(**inputs)
        config, sizes = self.config, (inputs["pixel_values"].shape[-2:], images.shape[-2:])
        results = []
        for wanted, classes, masks in zip(asked, out.class_queries_logits, out.masks_queries_logits, strict=True):
            threshold = config.counting_threshold if wanted[0].count > 1 else config.threshold
            found: dict[str, list[Found]] = {one.name: [] for one in wanted}
            likely = classes.softmax(-1)[:, :-1]
            best = likely.flatten().topk(min(DETECTIONS, likely.numel()))
            for score, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                query, label = divmod(place, len(CLASSES))
                if score > threshold and CLASSES[label] in found:  # the mask's share only lowers the score
                    one = _instance(score, masks[query], sizes)
                    found[CLASSES[label]] += [one] if one else []
            results.append({n: select(f, threshold, config.max_objects, config.max_overlap) for n, f in found.items()})
        return results

    def colour(self, image: Tensor, found: Found, name: str) -> None:
        """Set the colour of a detection in an image uint8 [3, H, W]: what CLIP calls the object, all else being grey."""
        left, top, right, bottom = found.box
        crop = torch.where(found.mask, image / 255, BACKGROUND)[:, top:bottom, left:right]  # type: ignore[arg-type]
        cfg = self.preprocess
        pixels = prepare(crop[None], image_size(cfg), cfg.mean, cfg.std)
        found.colour = COLOURS[int((self.clip.encode_image(pixels) @ self._texts(name).T).argmax())]

    def _texts(self, name: str) -> Tensor:
        """The embeddings [10, D] of an object in each colour: the mean direction over COLOUR_TEXTS."""
        if name not in self._colours:
            texts = [t.format(colour=c, name=name) for c in COLOURS for t in COLOUR_TEXTS]
            each = functional.normalize(self.clip.encode_text(self.tokenizer(texts).to(self.device)), dim=-1)
            self._colours[name] = functional.normalize(each.unflatten(0, (len(COLOURS), -1)).mean(1), dim=-1)
        return self._colours[name]

    def fingerprint(self) -> str:
        if not hasattr(self, "_hash"):
            options = self.config.model_dump(exclude={"model", "revision", "pretrained", "batch"})
            processor = sorted((k, str(v)) for k, v in self.processor.to_dict().items() if not k.startswith("_"))
            rules = f"geneval {options} {processor} {self.preprocess} {CLASSES} {COLOURS} {COLOUR_TEXTS}"
            self._hash = weights.fingerprint(rules, self.model, self.clip)
        return self._hash


def _instance(score: float, logits: Tensor, sizes: Sequence[Sequence[int]]) -> Found | None:
    """The detection of a query whose class has the probability `score`, from its mask's logits [h, w], resized to the
    network's picture and then to the original, as mmdet does; None where the mask is empty."""
    logits = logits[None, None]
    for size in sizes:
        logits = functional.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)
    mask = logits[0, 0] > 0
    if not mask.any():
        return None
    (top, bottom), (left, right) = (mask.any(1 - axis).nonzero()[[0, -1], 0].tolist() for axis in (0, 1))
    return Found(score * logits[0, 0][mask].sigmoid().mean().item(), (left, top, right + 1, bottom + 1), mask)
