"""What a prompt of the second world asks for, and the prompt lists.

The grammar is the first world's with one template more: *mixed*, "two red circles and a blue square". The lists are
disjoint by composition: which objects and how many, whatever the phrasing. A held-out composition of two kinds of
object is asked for in two phrasings, so held-out prompts are clusters by `parse(prompt).composition`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations, product

from bench_dfusion.micro import scenes as first
from bench_dfusion.micro.prompts import SPLITS, split_apart
from bench_dfusion.micro.scenes import COLOURS, NUMBERS, RELATIONS, SHAPES, Thing

TEMPLATES = (*first.TEMPLATES, "mixed")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Spec(first.Spec):
    """What a prompt asks for; a *mixed* prompt asks for two of the first thing and one of the second."""

    turned: bool = False  # mixed: the second thing is named first

    @property
    def prompt(self) -> str:
        if self.template != "mixed":
            return super().prompt
        many, one = Spec("count", self.things[:1], 2).prompt, f"a {self.things[1]}"
        return f"{one} and {many}" if self.turned else f"{many} and {one}"

    @property
    def objects(self) -> tuple[Thing, ...]:
        return (self.things[0], *self.things) if self.template == "mixed" else super().objects

    @property
    def composition(self) -> str:
        return f"2 {self.things[0]} + {self.things[1]}" if self.template == "mixed" else super().composition

    @property
    def picture(self) -> Spec:
        """One and the same spec for all phrasings that the same pictures fulfil."""
        if self.template == "attributes":
            return replace(self, things=tuple(sorted(self.things, key=str)))
        if self.relation in ("right of", "below"):
            return replace(self, things=self.things[::-1], relation=OPPOSITE[self.relation])
        return replace(self, turned=False)


def parse(prompt: str) -> Spec:
    """Read a prompt of the grammar. Raises ValueError naming what the grammar allows."""
    words = prompt.lower().split()
    try:
        if len(words) == 7 and words[3] == "and" and "two" in words:
            turned = words[4] == "two"
            many, one = (
                first.parse(" ".join(w)) for w in ((words[4:], words[:3]) if turned else (words[:3], words[4:]))
            )
            if (many.template, one.template) == ("count", "single"):
                return Spec("mixed", many.things + one.things, turned=turned)
        known = first.parse(prompt)
    except ValueError as error:
        raise ValueError(f"{error}. It may also read 'two red circles and a blue square'") from None
    return Spec(known.template, known.things, known.count, known.relation)


# ---------------------------------------------------------------- lists

# How many compositions a list takes of each template; pairs serve both attributes and relation.
_TAKEN = {
    "train": {"single": 21, "count": 63, "attributes": 100, "relation": 100, "mixed": 100},
    "validation": {"single": 3, "count": 9, "attributes": 10, "relation": 10, "mixed": 10},
    "heldout": {"single": 6, "count": 18, "pair": 36, "mixed": 24},
}


def family(template: str) -> str:
    """Compositions are split within a family: single, count, pair (attributes and relation) or mixed."""
    return "pair" if template in ("attributes", "relation") else template


def differ(a: Thing, b: Thing) -> bool:
    """Both attributes of two things in a prompt differ, so that every swap of an attribute is an error."""
    return a.colour != b.colour and a.shape != b.shape


@cache
def compositions() -> dict[str, dict[str, tuple[Spec, ...]]]:
    """Every composition of the world, `[split][family]`."""
    things = [Thing(c, s) for c, s in product(COLOURS, SHAPES)]
    ordered = [(a, b) for a, b in permutations(things, 2) if differ(a, b)]
    families = {
        "single": [Spec("single", (t,)) for t in things],
        "count": [Spec("count", (t,), n) for t, n in product(things, NUMBERS.values())],
        "pair": [Spec("attributes", (a, b)) for a, b in ordered if things.index(a) < things.index(b)],
        "mixed": [Spec("mixed", pair) for pair in ordered],
    }
    return split_apart(families, "micro-v2")


@cache
def known(split: str) -> frozenset[str]:
    """The names of a split's compositions."""
    return frozenset(s.composition for specs in compositions()[split].values() for s in specs)


def draw(template: str, split: str, rng: random.Random) -> Spec:
    """A random prompt of a template within a split's compositions."""
    return phrase(rng.choice(compositions()[split][family(template)]), template, rng)


def random_spec(template: str, rng: random.Random) -> Spec:
    """A random prompt of a template, of any split."""
    return draw(template, rng.choice(SPLITS), rng)


def phrase(spec: Spec, template: str, rng: random.Random) -> Spec:
    """A random phrasing of a composition as a prompt of `template`."""
    if template in ("single", "count"):
        return spec
    if template == "mixed":
        return replace(spec, turned=rng.random() < 0.5)
    things = spec.things if rng.random() < 0.5 else spec.things[::-1]
    return Spec(template, things, relation=rng.choice(RELATIONS) if template == "relation" else None)


@cache
def prompts(split: str) -> tuple[str, ...]:
    """The prompt list of a split, template by template; held-out compositions of two things come in two phrasings."""
    rng = random.Random(f"micro-v2 {split}")
    families, taken = compositions()[split], _TAKEN[split]
    specs: list[Spec] = []
    for template, n in taken.items():
        if template == "pair":
            chosen = rng.sample(families["pair"], n)
            specs += [phrase(s, t, rng) for t in ("attributes", "relation") for s in chosen]
        elif template == "mixed" and split == "heldout":
            specs += [replace(s, turned=turned) for s in rng.sample(families["mixed"], n) for turned in (False, True)]
        else:
            specs += [phrase(s, template, rng) for s in rng.sample(families[family(template)], n)]
    return tuple(spec.prompt for spec in specs)
