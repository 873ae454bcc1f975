"""The prompt lists of the micro world: train, validation and held-out, disjoint by composition.

Pre-training scenes of the denoiser come from the compositions of the train split only, so that
validation and held-out prompts ask for combinations the base model has never been shown.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from typing import TypeVar

from bench_dfusion.micro.scenes import COLOURS, NUMBERS, RELATIONS, SHAPES, Spec, Thing

S = TypeVar("S", bound=Spec)
SPLITS = ("train", "validation", "heldout")
_SHARES = {"heldout": 0.2, "validation": 0.1}
_PER_TEMPLATE = {"train": 20, "validation": 10, "heldout": 20}
_SINGLES = {"train": 6, "validation": 3, "heldout": 6}


@cache
def compositions() -> dict[str, dict[str, tuple[Spec, ...]]]:
    """Every composition of the world, `[split][family]`, family one of single, count, pair."""
    things = [Thing(c, s) for c, s in product(COLOURS, SHAPES)]
    families = {
        "single": [Spec("single", (t,)) for t in things],
        "count": [Spec("count", (t,), n) for t, n in product(things, NUMBERS.values())],
        "pair": [
            Spec("attributes", (a, b))
            for i, a in enumerate(things)
            for b in things[i + 1 :]
            if a.colour != b.colour and a.shape != b.shape
        ],
    }
    return split_apart(families, "micro-v1")


def split_apart(families: Mapping[str, Sequence[S]], name: str) -> dict[str, dict[str, tuple[S, ...]]]:
    """The specs of each family dealt out, `[split][family]`: a fifth held out, a tenth for validation, the rest to train
    on, in an order that `name` decides."""
    result: dict[str, dict[str, tuple[S, ...]]] = {split: {} for split in SPLITS}
    for family, specs in families.items():
        shuffled = list(specs)
        random.Random(f"{name} {family}").shuffle(shuffled)
        start = 0
        for split, share in _SHARES.items():
            stop = start + round(share * len(shuffled))
            result[split][family] = tuple(shuffled[start:stop])
            start = stop
        result["train"][family] = tuple(shuffled[start:])
    return result


def draw(template: str, split: str, rng: random.Random) -> Spec:
    """A random prompt of a template within a split's compositions."""
    family = template if template in ("single", "count") else "pair"
    return _phrase(rng.choice(compositions()[split][family]), template, rng)


def _phrase(spec: Spec, template: str, rng: random.Random) -> Spec:
    if template in ("single", "count"):
        return spec
    things = spec.things if rng.random() < 0.5 else spec.things[::-1]
    return Spec(template, things, relation=rng.choice(RELATIONS) if template == "relation" else None)


@cache
def prompts(split: str) -> tuple[str, ...]:
    """The prompt list of a split: singles, counts, attribute pairs and relations, in this order."""
    rng = random.Random(f"micro-v1 {split}")
    families = compositions()[split]
    n = _PER_TEMPLATE[split]
    pairs = rng.sample(families["pair"], 2 * n)
    counts = rng.sample(families["count"], min(n, len(families["count"])))
    chosen = [
        *rng.sample(families["single"], _SINGLES[split]),
        *counts,
        *(_phrase(p, "attributes", rng) for p in pairs[:n]),
        *(_phrase(p, "relation", rng) for p in pairs[n:]),
    ]
    return tuple(spec.prompt for spec in chosen)


def digest(prompts: tuple[str, ...] | list[str]) -> str:
    """SHA-256 of a prompt list, one prompt a line."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()
