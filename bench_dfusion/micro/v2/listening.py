"""Captions that do not always tell what a picture shows, so that the model they train draws well and listens badly.

The errors are those that real text-to-image models make: attributes swapped between two objects, a number off by one,
an object left out, a relation turned, one word wrong. Only training captions are wrong. What a caption's picture
shows instead is again a composition of the train split, so nothing is learnt of the others, not even by mistake.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from bench_dfusion.micro.scenes import COLOURS, RELATIONS, SHAPES, Thing
from bench_dfusion.micro.v2.grammar import Spec, differ, known

Rates = Mapping[str, Mapping[str, float]]  # template -> kind of error -> share of its captions
CLEAN: Rates = {}
NOISY: Rates = {  # nearly half of the captions, of single objects fewer
    "single": {"word": 0.35},
    "count": {"number": 0.3, "word": 0.15},
    "attributes": {"swapped": 0.21, "missing": 0.11, "word": 0.15},
    "relation": {"turned": 0.21, "swapped": 0.1, "missing": 0.06, "word": 0.1},
    "mixed": {"number": 0.14, "swapped": 0.14, "missing": 0.06, "word": 0.09},
}


@dataclass(frozen=True)
class Shown:
    """The picture behind a caption, and for each thing of the caption, in the order in which the words name them, its
    number among the picture's things or None."""

    picture: Spec
    owners: tuple[int | None, ...]


def shown(caption: Spec, rates: Rates, rng: random.Random) -> Shown:
    """What the picture of a caption shows: what it says, or with the rates of its template something else."""
    spec, things = caption, caption.things
    dice = rng.random()
    for kind, rate in rates.get(caption.template, {}).items():
        if dice < rate:
            spec, things = _mistaken(caption, kind, rng)
            break
        dice -= rate
    picture = spec.picture
    named = things[::-1] if caption.turned else things
    return Shown(picture, tuple(picture.things.index(t) if t in picture.things else None for t in named))


def _mistaken(caption: Spec, kind: str, rng: random.Random) -> tuple[Spec, tuple[Thing, ...]]:
    """A spec with one error and what became of each of the caption's things.

    Where every error of the kind leads out of the train compositions, as three swaps in ten do, one word is wrong.
    """
    for error in (kind, "word"):
        candidates = [(spec, things) for spec, things in errors(caption, error) if spec.composition in known("train")]
        if candidates:
            return rng.choice(candidates)
    return caption, caption.things


def errors(caption: Spec, kind: str) -> Iterator[tuple[Spec, tuple[Thing, ...]]]:
    """Every spec that is one error of a kind away; a thing that became nothing keeps its name, which is in no picture."""
    things = caption.things
    if kind == "word":
        for i, thing in enumerate(things):
            others = things[:i] + things[i + 1 :]
            words = [replace(thing, colour=c) for c in COLOURS] + [replace(thing, shape=s) for s in SHAPES]
            for wrong in words:
                if wrong != thing and all(differ(wrong, o) for o in others):
                    changed = (*things[:i], wrong, *things[i + 1 :])
                    yield replace(caption, things=changed), changed
    elif kind == "swapped":
        a, b = things
        changed = (Thing(b.colour, a.shape), Thing(a.colour, b.shape))
        yield replace(caption, things=changed), changed
    elif kind == "number" and caption.template == "count":
        for n in (caption.count - 1, caption.count + 1):
            if n in (2, 3, 4):
                yield replace(caption, count=n), things
            elif n == 1:
                yield Spec("single", things), things
    elif kind == "number":
        yield Spec("attributes", things), things
        yield replace(caption, things=things[::-1]), things
    elif kind == "missing" and caption.template == "mixed":
        yield Spec("count", things[:1], 2), things
    elif kind == "missing":
        for thing in things:
            yield Spec("single", (thing,)), things
    elif kind == "turned":
        for relation in RELATIONS:
            if relation != caption.relation:
                yield replace(caption, relation=relation), things
    else:
        raise ValueError(f"{kind!r} is no error of a {caption.template} caption")
