"""Items and thresholds that a user gives by prompt, in place of those found by rule: read, and checked before compute."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from reprlib import repr as short
from typing import TypeVar

import torch

from bench_dfusion.builders.dfusion.masks import threshold
from bench_dfusion.errors import UsageError
from bench_dfusion.tracks import schema
from bench_dfusion.tracks.items import find_items, spans_of
from bench_dfusion.tracks.prompts import same
from bench_dfusion.util import texts

Items = dict[str, tuple[int | str, ...]]  # by prompt: words or phrases of it, or their numbers
Thresholds = dict[str, tuple[float | str, ...]]  # by prompt, one for each item: probabilities in [0, 1), or rules

Entry = TypeVar("Entry", bound=tuple[object, ...])


def items(content: object) -> Items:
    """`content` as items by prompt. Raises ValueError, naming the prompt, where it is none or not in its prompt."""
    return {p: tuple(_item(e, p) for e in entries) for p, entries in _lists(content, "items")}


def thresholds(content: object) -> Thresholds:
    """`content` as thresholds by prompt. Raises ValueError, naming the prompt, for what is none."""
    return {p: tuple(_threshold(e, p) for e in entries) for p, entries in _lists(content, "thresholds")}


def check_counts(items: Items | None, thresholds: Thresholds | None) -> None:
    """Raise ValueError, naming the prompt, where the thresholds are not as many as the items, given or found."""
    for prompt, rules in (thresholds or {}).items():
        names = (items or {}).get(prompt) or [item.noun for item in find_items(prompt)]
        if len(names) != len(rules):
            raise ValueError(
                f"the prompt {prompt!r} has {len(rules)} thresholds and {len(names)} items "
                f"({', '.join(map(str, names))}): give one threshold for each item"
            )


def given(
    check: Callable[[object], dict[str, Entry]],
    option: str,
    direct: dict[str, Entry] | None,
    file: str | None,
    prompts: Sequence[str],
) -> dict[str, Entry] | None:
    """What `option` says, directly or in `file`, of the track's `prompts`; `check` is `items` or `thresholds`.

    A prompt that the track lacks is an error where words are given. A file of numbers may name others beside the
    track's: the official ones list every prompt of a template, a run may take a few. Raises UsageError.
    """
    if file is None:
        return None if direct is None else _of_track(direct, prompts, f"builder.{option}", strict=True)
    if direct is not None:
        raise UsageError(f"give builder.{option} or builder.{option}_file, not both")
    try:
        content = check(_read(Path(file).expanduser()))
    except ValueError as error:
        raise UsageError(str(error) if file in str(error) else f"{file}: {error}") from None
    words = check is items and any(isinstance(e, str) for entries in content.values() for e in entries)
    return _of_track(content, prompts, file, strict=words)


def _read(path: Path) -> object:
    if path.suffix == ".toml":
        return schema.read_toml(path)
    try:
        return json.loads(texts.read(path))
    except UsageError:
        raise
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no JSON ({error}); a TOML file's name ends in .toml") from None


def _lists(content: object, what: str) -> Iterator[tuple[str, Sequence[object]]]:
    if not isinstance(content, dict):
        raise ValueError(f"{short(content)} is no table of prompts, each with the list of its {what}")
    for prompt, entries in content.items():
        if not isinstance(entries, list | tuple) or not entries:
            raise ValueError(f"the prompt {prompt!r} has {short(entries)}: give it the list of its {what}")
        yield prompt, entries


def _item(entry: object, prompt: str) -> int | str:
    if not isinstance(entry, int | str) or isinstance(entry, bool):
        raise ValueError(f"the prompt {prompt!r} has the item {short(entry)}: give a word of it, or its number from 0")
    spans_of(entry, prompt)
    return entry


def _threshold(entry: object, prompt: str) -> float | str:
    of = f"the prompt {prompt!r} has the threshold {short(entry)}"
    if isinstance(entry, str) and entry.startswith(("otsu", "mean+", "max*")):
        try:
            if threshold(torch.linspace(0, 1, 4)[None], entry).isfinite().all():
                return entry
        except ValueError as error:
            raise ValueError(f"{of}: {error}") from None
    if not isinstance(entry, int | float) or isinstance(entry, bool) or not 0 <= entry < 1:
        raise ValueError(f"{of}: give a probability in [0, 1), or 'otsu', 'mean+K' or 'max*K'")
    return float(entry)


def _of_track(content: dict[str, Entry], prompts: Sequence[str], source: str, strict: bool) -> dict[str, Entry]:
    found = {prompt: content[prompt] for prompt in prompts if prompt in content}
    # Another spelling is not taken: numbers of words count in the prompt as it is spelled.
    alike = {same(p): p for p in prompts if p not in content}
    for prompt in (p for p in content if p not in found):
        near = [alike[same(prompt)]] if same(prompt) in alike else []
        if strict and not near:
            near = difflib.get_close_matches(prompt, prompts, n=1)
        if strict or near:
            hint = f"did you mean {near[0]!r}?" if near else "leave it out"
            raise UsageError(f"{source}: the track has no prompt {prompt!r}; {hint}")
    if not found:
        raise UsageError(f"{source} names no prompt of the track, {prompts[0]!r} for one: give a file for this track")
    return found
