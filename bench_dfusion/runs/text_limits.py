"""What text encoders read of prompts: which they cut, and which are one prompt to the network after that."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from reprlib import Repr

from bench_dfusion.errors import UsageError, plain
from bench_dfusion.models.base import Adapter, TextReader
from bench_dfusion.tracks.prompts import same
from bench_dfusion.tracks.schema import PromptsSection
from bench_dfusion.util import parallel
from bench_dfusion.util.progress import bar

SHOWN = 3  # prompts in a line
CHUNK = 4096  # prompts tokenized at once

_short = Repr()
_short.maxstring = 64


@dataclass(frozen=True)
class Seen:
    """What one text encoder gets of each prompt: how many tokens it has, and those that are left of them."""

    reader: TextReader
    tokens: dict[str, int]
    kept: dict[str, tuple[int, ...]]

    @property
    def cut(self) -> list[str]:
        """The prompts of which not all is read."""
        return [prompt for prompt, count in self.tokens.items() if count > self.reader.length]


def check(adapter: Adapter, train: Sequence[str], prompts: PromptsSection) -> None:
    """Say, in a line each, which prompts are cut and which of one set the network cannot tell apart.

    train   the prompts that a run trains on: the track's, or those of offline pairs
    Raises UsageError, naming both, where one that is trained on and one held out are the same tokens to every text encoder.
    """
    sets = {"trained on": train, "held out": prompts.heldout}
    seen = read(adapter, [p for own in sets.values() for p in own])
    known: dict[tuple[tuple[int, ...], ...], tuple[str, str]] = {}
    twins = []
    for name, own in sets.items():
        for prompt in dict.fromkeys(own):
            key = tuple(s.kept[prompt] for s in seen)
            other, where = known.setdefault(key, (prompt, name))
            if where != name:
                one, two = _apart(other, prompt)
                raise UsageError(
                    f"{one} ({where}) and {two} ({name}) are one prompt to the network: "
                    f"{_names([s.reader for s in seen], limits=True)} {_s(len(seen), 'get')} the same tokens of "
                    "both; change one of them"
                )
            if same(other) != same(prompt):
                twins.append(f"{' and '.join(_apart(other, prompt))} ({name})")
    _say(_cut(seen))
    if twins:
        _say(f"the network cannot tell apart {_some(twins)}: the text encoders get the same tokens of both")


def say(adapter: Adapter, prompts: Sequence[str]) -> None:
    """Say in a line which prompts are cut, if any is."""
    _say(cut(adapter, prompts))


def cut(adapter: Adapter, prompts: Sequence[str]) -> str | None:
    """One line: how many and which prompts are cut, by which text encoder, at how many tokens. None where none is."""
    return _cut(read(adapter, prompts))


def read(adapter: Adapter, prompts: Sequence[str]) -> list[Seen]:
    """What each text encoder of a pipeline gets of prompts."""
    readers = adapter.text_readers()
    unique = list(dict.fromkeys(prompts))
    found = [Seen(reader, {}, {}) for reader in readers]
    chunks = [unique[i : i + CHUNK] for i in range(0, len(unique), CHUNK)]
    with bar("tokenize prompts", len(unique)) if len(chunks) > 1 else nullcontext() as progress:
        for chunk in chunks:
            texts = [adapter.text(prompt) for prompt in chunk]
            for seen in found:
                tokenizer, length = seen.reader.tokenizer, seen.reader.length
                whole = tokenizer(texts, verbose=False).input_ids  # verbose: a warning for those that are cut
                for prompt, text, ids in zip(chunk, texts, whole, strict=True):
                    seen.tokens[prompt] = len(ids)
                    if len(ids) > length:
                        ids = tokenizer(text, truncation=True, max_length=length).input_ids
                    seen.kept[prompt] = tuple(ids)
            if progress is not None:
                progress.advance(len(chunk))
    return found


def _cut(seen: Sequence[Seen]) -> str | None:
    every = dict.fromkeys(prompt for s in seen for prompt in s.cut)
    if not every:
        return None
    parts = []
    for (length, own), group in groupby(seen, key=lambda s: (s.reader.length, s.cut)):
        readers = list(group)
        who = f"{_names([s.reader for s in readers])} {_s(len(readers), 'read')}"
        if own:
            few = _some([f"{_short.repr(p)} ({readers[0].tokens[p]})" for p in own])
            parts.append(f"{who} the first {length} tokens of {few}")
        else:
            parts.append(f"{who} up to {length} tokens, so {'it' if len(every) == 1 else 'them'} whole")
    total = len(seen[0].tokens)
    return f"{len(every)} of {total} prompts {'is' if len(every) == 1 else 'are'} cut: {'; '.join(parts)}"


def _apart(one: str, other: str) -> tuple[str, str]:
    """Two prompts, shortened so that they look different."""
    shown = _short.repr(one), _short.repr(other)
    if shown[0] != shown[1]:
        return shown
    differ = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    start = max(0, next(differ, min(len(one), len(other))) - 24)
    return f"{one[:24] + '…' + one[start : start + 48]!r}…", f"{other[:24] + '…' + other[start : start + 48]!r}…"


def _say(line: str | None) -> None:
    if line and parallel.first():
        print(plain(line), file=sys.stderr, flush=True)


def _names(readers: Sequence[TextReader], limits: bool = False) -> str:
    names = [f"{r.name} ({r.kind}{f', {r.length} tokens' if limits else ''})" for r in readers]
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _some(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return f"{', '.join(texts[:SHOWN])}{more}"


def _s(count: int, verb: str) -> str:
    return verb if count > 1 else f"{verb}s"
