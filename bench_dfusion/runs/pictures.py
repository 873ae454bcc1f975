"""Pictures a run leaves: base beside trained, and reference / base / target with the mask."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from bench_dfusion.util import files

if TYPE_CHECKING:
    from torch import Tensor

    from bench_dfusion.builders.contract import ConsistentSamples

PROMPTS = "prompts"  # the name of what a sheet says of itself in its file
SIDE = 96  # px of one picture in a grid
TEXT = 15  # px of a caption line


def base_and_trained(path: Path, base: Tensor, trained: Tensor, prompts: Sequence[str], most: int = 24) -> None:
    """For up to `most` of the prompts base (left) and trained (right) on the same noise: of each prompt one picture, uint8
    [P, H, W, 3]. Half of them are those whose pixels changed most, the others are evenly taken from the rest."""
    change = (trained.float() - base.float()).abs().flatten(1).mean(1)
    order = change.argsort(descending=True, stable=True).tolist()
    first, rest = order[: most // 2], sorted(order[most // 2 :])
    sections = {
        "changed most": first,
        "of the others, evenly taken": [rest[i] for i in evenly(len(rest), most - most // 2)],
    }
    _grid(
        path,
        {
            heading: [(prompts[i], ["base", "trained"], [base[i].numpy(), trained[i].numpy()]) for i in chosen]
            for heading, chosen in sections.items()
        },
        columns=3,
    )


def prompts_of(sheet: bytes) -> list[str] | None:
    """The prompts on a sheet in the order of its pictures; None where its file does not say."""
    try:
        with Image.open(io.BytesIO(sheet), formats=["PNG"]) as picture:
            found = json.loads(picture.info.get(PROMPTS, "null"))
    except Exception:  # of what others sent: every decoder raises kinds of its own
        return None
    return found if isinstance(found, list) and all(isinstance(p, str) for p in found) else None


def evenly(count: int, most: int = 24) -> list[int]:
    """Up to `most` of the numbers below `count`, evenly taken."""
    return np.unique(np.linspace(0, max(0, count - 1), min(most, count)).round().astype(int)).tolist()


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
    _grid(path, {"": cells}, columns=2)


def _overlay(image: np.ndarray, mask: Tensor) -> np.ndarray:
    """The picture, darkened where the mask (share of the fused steps) is low."""
    import torch

    size = image.shape[:2]
    weight = torch.nn.functional.interpolate(mask[None, None].float(), size=size, mode="nearest")[0, 0].numpy()
    return (image * (0.25 + 0.75 * weight[..., None])).astype(np.uint8)


Cell = tuple[str, list[str], list[np.ndarray]]  # title, a label for each picture, the pictures


def _grid(path: Path, sections: Mapping[str, Sequence[Cell]], columns: int) -> None:
    """Sections of cells, one below the other, each under its heading where that has one."""
    sections = {heading: cells for heading, cells in sections.items() if cells}
    if not sections:
        return
    wide = len(next(iter(sections.values()))[0][2])
    gap, width, height = 10, wide * SIDE, SIDE + 2 * TEXT + 2
    heads = {heading: TEXT + gap if heading else 0 for heading in sections}
    rows = {heading: -(-len(cells) // columns) for heading, cells in sections.items()}
    whole = sum(heads.values()) + sum(rows.values()) * (height + gap) + gap
    sheet = Image.new("RGB", (columns * (width + gap) + gap, whole), "white")
    draw, font, bold = ImageDraw.Draw(sheet), ImageFont.load_default(12), ImageFont.load_default(15)
    top = gap
    for heading, cells in sections.items():
        draw.text((gap, top), heading, "black", bold)
        top += heads[heading]
        for n, (title, labels, images) in enumerate(cells):
            x, y = gap + n % columns * (width + gap), top + n // columns * (height + gap)
            draw.text((x, y), _fit(title, width, font), "black", font)
            for i, (label, image) in enumerate(zip(labels, images, strict=True)):
                picture = Image.fromarray(image).resize((SIDE - 2, SIDE - 2), Image.Resampling.LANCZOS)
                sheet.paste(picture, (x + i * SIDE, y + TEXT))
                draw.text((x + i * SIDE, y + TEXT + SIDE), _fit(label, SIDE - 4, font), "#555555", font)
        top += rows[heading] * (height + gap)
    data, words = io.BytesIO(), PngInfo()
    words.add_itxt(PROMPTS, json.dumps([title for cells in sections.values() for title, *_ in cells]))
    sheet.save(data, "PNG", optimize=True, pnginfo=words)
    files.write_atomic(path, data.getvalue())


def _fit(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    text = " ".join(text.split())
    while text and font.getlength(text) > width:
        text = text[:-2].rstrip() + "…" if len(text) > 2 else ""
    return text
