"""What the page and the picture share: marks of builders, text made harmless to look at, axes."""

from __future__ import annotations

import math
from collections.abc import Iterable

# Okabe and Ito's colours, for a light and a dark ground, each with a shape of its own.
MARKS = (
    ("circle", "#0072B2", "#56B4E9"),
    ("square", "#D55E00", "#E69F00"),
    ("triangle", "#009E73", "#2BB58C"),
    ("diamond", "#A9527F", "#CC79A7"),
    ("down", "#5F5F5F", "#B5B5B5"),
    ("cross", "#8A7400", "#F0E442"),
    ("star", "#000000", "#FFFFFF"),
)
KNOWN = ("dfusion", "vanilla", "same-noise", "branch", "offline")


def marks_of(builders: Iterable[str]) -> dict[str, int]:
    """The number of each builder's mark in MARKS: the same on every page for those the package brings."""
    others = sorted(set(builders) - set(KNOWN))
    return {name: number % len(MARKS) for number, name in enumerate([*KNOWN, *others])}


def visible(text: str) -> str:
    """Text with control characters, and those that turn its direction, shown rather than obeyed."""
    text = text.encode("utf-8", "replace").decode()  # lone surrogates have no UTF-8
    return "".join(_symbol(c) for c in text)


def _symbol(character: str) -> str:
    code = ord(character)
    if code < 0x20 and character not in "\t\n":
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    turns = 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069 or code in (0x200E, 0x200F, 0x61C)
    return f"⟨U+{code:04X}⟩" if turns or 0x80 <= code < 0xA0 or code in (0xFFFE, 0xFFFF) else character


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most `most` + 1 round numbers from `low` to `high`, both inside."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * f for f in (1, 2, 2.5, 5, 10) if span / (power * f) <= most)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]
