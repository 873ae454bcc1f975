"""The oracle: reads a picture of the micro world exactly and says how well it fulfils a prompt.

Objects are found as connected regions of one palette colour; a region's kind is the template it
overlaps best. On malformed pictures the reading is defined, not guessed:

- regions under `SPECK` pixels are dust and ignored;
- a region whose best template overlap is under `MIN_IOU` is an object of no kind: it counts as an
  object (so it costs precision), its colour can still match, its shape cannot;
- touching regions of one colour are one object; touching regions of different colours are two;
- the nearly grey background is never an object, whatever its tone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from bench_dfusion.micro.scenes import COLOURS, SHAPES, SIZE, Spec, Thing, coverage, holds, parse

CHROMA = 75  # 8-bit levels between the largest and smallest channel: half of the palest palette colour's
SPECK = 24  # px, under a tenth of the median object
MIN_IOU = 0.6

_PALETTE = np.array(list(COLOURS.values()), dtype=float)
_NAMES = tuple(COLOURS)


@dataclass(frozen=True)
class Seen:
    """One object in a picture. `shape` is None where it is malformed; `x`, `y` in pixels."""

    colour: str
    shape: str | None
    x: float
    y: float
    area: int
    iou: float


@dataclass(frozen=True)
class Verdict:
    """What the oracle says of one picture: `full` 0 or 1, `graded` in [0, 1], and what went wrong."""

    full: float
    graded: float
    failed: tuple[str, ...]
    seen: tuple[Seen, ...]


def read(image: np.ndarray) -> tuple[Seen, ...]:
    """The objects in a picture: uint8 [64, 64, 3]."""
    if image.shape != (SIZE, SIZE, 3) or image.dtype != np.uint8:
        raise ValueError(f"the oracle reads uint8 images of {SIZE}x{SIZE}x3, not {image.dtype} {image.shape}")
    pixels = image.astype(float)
    low, high = pixels.min(-1, keepdims=True), pixels.max(-1, keepdims=True)
    chroma = (high - low)[..., 0]
    hue = (pixels - low) / np.maximum(high - low, 1)
    palette_low = _PALETTE.min(-1, keepdims=True)
    palette_hue = (_PALETTE - palette_low) / (_PALETTE.max(-1, keepdims=True) - palette_low)
    nearest = ((hue[:, :, None] - palette_hue) ** 2).sum(-1).argmin(-1)
    found = []
    for index, colour in enumerate(_NAMES):
        labels, _ = ndimage.label((chroma > CHROMA) & (nearest == index), structure=np.ones((3, 3)))
        for k, where in enumerate(ndimage.find_objects(labels), 1):
            region = labels == k
            area = int(region.sum())
            if area < SPECK:
                continue
            shape, iou = _kind(region, where)
            y, x = ndimage.center_of_mass(region)
            found.append(Seen(colour, shape, x + 0.5, y + 0.5, area, iou))
    return tuple(found)


def _kind(region: np.ndarray, where: tuple[slice, slice]) -> tuple[str | None, float]:
    top, bottom, left, right = where[0].start, where[0].stop, where[1].start, where[1].stop
    width, height = right - left, bottom - top
    best, best_iou = None, 0.0
    for shape in SHAPES:
        # The bounding box fixes the template: extents of each shape in units of its radius.
        w, up, down = {
            "circle": (1.9, 0.95, 0.95),
            "ring": (1.98, 0.99, 0.99),
            "square": (1.68, 0.84, 0.84),
            "cross": (2.0, 1.0, 1.0),
            "triangle": (1.911, 1.0, 0.72),
        }[shape]
        radius = 0.5 * (width / w + height / (up + down))
        x, y = (left + right) / 2, (top + bottom) / 2 + (up - down) / 2 * radius
        template = coverage(shape, x, y, radius) > 0.5
        iou = float((template & region).sum() / max(1, (template | region).sum()))
        if iou > best_iou:
            best, best_iou = shape, iou
    return (best if best_iou >= MIN_IOU else None), best_iou


def judge(image: np.ndarray, prompt: str | Spec) -> Verdict:
    """How well a picture fulfils a prompt.

    Objects asked for and objects seen are matched one to one (Hungarian method) with half a point
    for the colour and half for the shape; `graded` is the sum of points over the larger of both
    numbers of objects, so that missing and surplus objects both cost. A relation is a quarter of
    the graded score, given where the two fully matched objects stand as asked.
    """
    spec = parse(prompt) if isinstance(prompt, str) else prompt
    seen = read(image)
    wanted = spec.objects
    points = np.array([[_points(w, s) for s in seen] for w in wanted]).reshape(len(wanted), len(seen))
    rows, cols = linear_sum_assignment(-points)
    score = float(points[rows, cols].sum()) / max(len(wanted), len(seen))
    failed = []
    if len(seen) != len(wanted):
        failed.append("count")
    if any(wanted[r].colour != seen[c].colour for r, c in zip(rows, cols, strict=True)):
        failed.append("colour")
    if any(wanted[r].shape != seen[c].shape for r, c in zip(rows, cols, strict=True)):
        failed.append("shape")
    if spec.relation:
        at = {r: seen[c] for r, c in zip(rows, cols, strict=True) if points[r, c] == 1.0}
        right = len(at) == 2 and holds(spec.relation, (at[0].x, at[0].y), (at[1].x, at[1].y))
        score = 0.75 * score + 0.25 * right
        if not right:
            failed.append("relation")
    return Verdict(float(not failed), score, tuple(failed), seen)


def _points(wanted: Thing, seen: Seen) -> float:
    return 0.5 * (wanted.colour == seen.colour) + 0.5 * (wanted.shape == seen.shape)
