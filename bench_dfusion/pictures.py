"""Pictures a run leaves: base beside trained, and reference / base / target with the mask."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bench_dfusion import files

if TYPE_CHECKING:
    from torch import Tensor

    from bench_dfusion.consistent import ConsistentSamples

SIDE = 96  # px of one picture in a grid
TEXT = 15  # px of a caption line


def base_and_trained(path: Path, base: Tensor, trained: Tensor, prompts: Sequence[str], most: int = 24) -> None:
    """For up to `most` of the prompts, evenly taken, base (left) and trained (right) on the same noise: of each prompt
    one picture, uint8 [P, H, W, 3]."""
    cells = []
    for i in evenly(len(prompts), most):
        cells.append((prompts[i], ["base", "trained"], [base[i].numpy(), trained[i].numpy()]))
    _grid(path, cells, columns=3)


def evenly(count: int, most: int = 24) -> list[int]:
    """Up to `most` of the numbers below `count`, evenly taken."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int)).tolist()


def triples(path: Path, samples: ConsistentSamples, most: int = 18) -> None:
    """Reference, base and target (or winner) of a round, one triple of each prompt in turn, with rewards and mask."""
    seen: dict[str, list[int]] = {}
    for k, row in enumerate(samples.triples[:, 0].tolist()):
        seen.setdefault(samples.samples.prompts[row], []).append(k)
    order = [own[i] for i in range(max(map(len, seen.values()), default=0)) for own in seen.values() if i < len(own)]
    cells = []
    for k in order[:most]:
        reference, base, winner = samples.triples[k].tolist()
        images = [samples.samples.images[r].numpy() for r in (reference, base, winner)]
        rewards = [float(samples.samples.rewards[r]) for r in (reference, base, winner)]
        names = ["reference", "base", "winner" if winner == reference else "target"]
        if len(samples.masks):
            images.insert(1, _overlay(images[0], samples.masks[k]))
            names.insert(1, "its mask")
            rewards.insert(1, float("nan"))
        labels = [n if r != r else f"{n} {r:.2f}" for n, r in zip(names, rewards, strict=True)]
        cells.append((samples.samples.prompts[base], labels, images))
    _grid(path, cells, columns=2)


def _overlay(image: np.ndarray, mask: Tensor) -> np.ndarray:
    """The picture, darkened where the mask (share of the fused steps) is low."""
    import torch

    size = image.shape[:2]
    weight = torch.nn.functional.interpolate(mask[None, None].float(), size=size, mode="nearest")[0, 0].numpy()
    return (image * (0.25 + 0.75 * weight[..., None])).astype(np.uint8)


def _grid(path: Path, cells: Sequence[tuple[str, list[str], list[np.ndarray]]], columns: int) -> None:
    if not cells:
        return
    wide = len(cells[0][2])
    gap, width, height = 10, wide * SIDE, SIDE + 2 * TEXT + 2
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for n, (title, labels, images) in enumerate(cells):
        x, y = gap + n % columns * (width + gap), gap + n // columns * (height + gap)
        draw.text((x, y), _fit(title, width, font), "black", font)
        for i, (label, image) in enumerate(zip(labels, images, strict=True)):
            picture = Image.fromarray(image).resize((SIDE - 2, SIDE - 2), Image.Resampling.LANCZOS)
            sheet.paste(picture, (x + i * SIDE, y + TEXT))
            draw.text((x + i * SIDE, y + TEXT + SIDE), _fit(label, SIDE - 4, font), "#555555", font)
    data = io.BytesIO()
    sheet.save(data, "PNG", optimize=True)
    files.write_atomic(path, data.getvalue())


def _fit(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    text = " ".join(text.split())
    while text and font.getlength(text) > width:
        text = text[:-2].rstrip() + "…" if len(text) > 2 else ""
    return text
