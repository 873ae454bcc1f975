"""The sheets of pictures: which prompts are shown, in which order, and that a sheet says so itself."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from bench_dfusion.runs import pictures


def changed(count: int, changes: dict[int, int]) -> tuple[Tensor, Tensor, list[str]]:
    """Base and trained of `count` prompts: those in `changes` differ by so many levels."""
    base = torch.full((count, 8, 8, 3), 100, dtype=torch.uint8)
    trained = base.clone()
    for i, levels in changes.items():
        trained[i] += levels
    return base, trained, [f"prompt {i}" for i in range(count)]


def test_what_changed_most_is_above_and_others_below(tmp_path: Path) -> None:
    base, trained, prompts = changed(50, {40: 100, 3: 50, 17: 75})
    pictures.base_and_trained(tmp_path / "sheet.png", base, trained, prompts, most=6)
    shown = pictures.prompts_of((tmp_path / "sheet.png").read_bytes())
    assert shown is not None and shown[:3] == ["prompt 40", "prompt 17", "prompt 3"]
    assert shown[3:] == ["prompt 0", "prompt 25", "prompt 49"]
    with Image.open(tmp_path / "sheet.png") as sheet:
        white = (torch.frombuffer(bytearray(sheet.convert("L").tobytes()), dtype=torch.uint8) > 250).float().mean()
    assert white < 0.9


@pytest.mark.parametrize("count", [1, 2, 3, 24, 25])
def test_few_prompts_are_all_shown_once(count: int, tmp_path: Path) -> None:
    pictures.base_and_trained(tmp_path / "sheet.png", *changed(count, {0: 9}))
    shown = pictures.prompts_of((tmp_path / "sheet.png").read_bytes())
    assert shown is not None and len(shown) == len(set(shown)) == min(count, 24) and shown[0] == "prompt 0"


def test_a_sheet_of_before_or_of_others_says_nothing() -> None:
    plain = io.BytesIO()
    Image.new("RGB", (4, 4)).save(plain, "PNG")
    assert pictures.prompts_of(plain.getvalue()) is None
    assert pictures.prompts_of(b"no picture") is None and pictures.prompts_of(b"") is None
