"""Scenes of coloured shapes: what can be in a picture, how a prompt says it, how it is drawn.

A scene has 1 to 4 shapes on a background that no prompt mentions: a soft gradient between two
nearly grey tones. The background plays the part that style and surroundings play in a photograph:
it is most of the picture, the start noise decides it, and a consistent sample should keep it.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np

SIZE = 64
SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 40, 40),
    "yellow": (235, 215, 40),
    "green": (40, 185, 60),
    "cyan": (40, 205, 215),
    "blue": (50, 70, 230),
    "purple": (190, 45, 205),
}
TEMPLATES = ("single", "count", "attributes", "relation")
NUMBERS = {"two": 2, "three": 3, "four": 4}
RELATIONS = ("left of", "right of", "above", "below")
PLURALS = {name: name + ("es" if name == "cross" else "s") for name in SHAPES}


@dataclass(frozen=True)
class Thing:
    """One kind of object a prompt asks for."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Spec:
    """What a prompt asks for: `count` objects of `things[0]`, or one of each of `things`."""

    template: str
    things: tuple[Thing, ...]
    count: int = 1
    relation: str | None = None

    @property
    def prompt(self) -> str:
        first = self.things[0]
        if self.template == "single":
            return f"a {first}"
        if self.template == "count":
            number = next(word for word, n in NUMBERS.items() if n == self.count)
            return f"{number} {first.colour} {PLURALS[first.shape]}"
        if self.template == "attributes":
            return f"a {first} and a {self.things[1]}"
        return f"a {first} {self.relation} a {self.things[1]}"

    @property
    def objects(self) -> tuple[Thing, ...]:
        """Every object the picture must hold, repeated as often as it is asked for."""
        return self.things * self.count

    @property
    def composition(self) -> str:
        """What the split of prompts is disjoint by: word order and direction do not matter."""
        if self.template in ("attributes", "relation"):
            return " + ".join(sorted(map(str, self.things)))
        return f"{self.count} {self.things[0]}"


def parse(prompt: str) -> Spec:
    """Read a prompt of the grammar. Raises ValueError naming what the grammar allows."""
    words = prompt.lower().split()
    singular = {plural: name for name, plural in PLURALS.items()}
    try:
        if words[0] in NUMBERS and len(words) == 3:
            return Spec("count", (_thing(words[1], singular[words[2]]),), NUMBERS[words[0]])
        if words[0] in ("a", "an"):
            first = _thing(words[1], words[2])
            rest = words[3:]
            if not rest:
                return Spec("single", (first,))
            if rest[-3] in ("a", "an"):
                second = _thing(rest[-2], rest[-1])
                joint = " ".join(rest[:-3])
                if joint == "and":
                    return Spec("attributes", (first, second))
                if joint in RELATIONS:
                    return Spec("relation", (first, second), relation=joint)
    except (IndexError, KeyError):
        pass
    raise ValueError(
        f"not a prompt of the micro world: {prompt!r}. It reads 'a red circle', 'three green rings', "
        f"'a red circle and a blue square' or 'a cyan ring above a red cross', with colours {', '.join(COLOURS)}, "
        f"shapes {', '.join(SHAPES)}, numbers {', '.join(NUMBERS)} and relations {', '.join(RELATIONS)}"
    )


def _thing(colour: str, shape: str) -> Thing:
    if colour not in COLOURS or shape not in SHAPES:
        raise KeyError(colour)
    return Thing(colour, shape)


def holds(relation: str, a: tuple[float, float], b: tuple[float, float], margin: float = 0.0) -> bool:
    """Whether centre `a` (x right, y down, pixels) stands in `relation` to centre `b`."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    along = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation]
    across = dy if relation in ("left of", "right of") else dx
    return along > abs(across) + margin


@dataclass(frozen=True)
class Placed:
    thing: Thing
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    objects: tuple[Placed, ...]
    tones: tuple[tuple[float, float, float], tuple[float, float, float]]
    angle: float


def sample_scene(spec: Spec, rng: random.Random) -> Scene:
    """A random clean scene that fulfils `spec`: no overlap, relations clear of the diagonal by 3 px."""
    wanted = spec.objects
    largest = 10.5 if len(wanted) <= 2 else 9.0
    while True:
        placed: list[Placed] = []
        for thing in wanted:
            for _ in range(60):
                r = rng.uniform(7.0, largest)
                x, y = rng.uniform(r + 1, SIZE - r - 1), rng.uniform(r + 1, SIZE - r - 1)
                if all(math.hypot(x - o.x, y - o.y) > 1.15 * (r + o.radius) + 2 for o in placed):
                    placed.append(Placed(thing, x, y, r))
                    break
        if len(placed) < len(wanted):
            continue
        if spec.relation and not holds(
            spec.relation, (placed[0].x, placed[0].y), (placed[1].x, placed[1].y), margin=3.0
        ):
            continue
        return Scene(tuple(placed), (_tone(rng), _tone(rng)), rng.uniform(0, 2 * math.pi))


def _tone(rng: random.Random) -> tuple[float, float, float]:
    grey = rng.uniform(0.08, 0.92)
    return tuple(min(1.0, max(0.0, grey + rng.uniform(-0.05, 0.05))) for _ in range(3))  # type: ignore[return-value]


_X, _Y = np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5)


def coverage(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    """Share of each pixel [64, 64] that a shape covers, from its signed distance (antialiased)."""
    dx, dy = _X - x, _Y - y
    r = np.hypot(dx, dy)
    if shape == "circle":
        d = r - 0.95 * radius
    elif shape == "ring":
        d = np.abs(r - 0.72 * radius) - 0.27 * radius
    elif shape == "square":
        d = np.maximum(np.abs(dx), np.abs(dy)) - 0.84 * radius
    elif shape == "cross":
        ax, ay = np.abs(dx), np.abs(dy)
        arm = 0.3 * radius
        d = np.minimum(np.maximum(ax - radius, ay - arm), np.maximum(ay - radius, ax - arm))
    else:  # an upright triangle, its three edges as half-planes
        foot = dy - 0.72 * radius
        side = (np.abs(dx) * 1.8 - (dy + 1.0 * radius)) / math.hypot(1.8, 1.0)
        d = np.maximum(foot, side)
    return np.clip(0.5 - d, 0.0, 1.0)


def render(scene: Scene) -> np.ndarray:
    """Draw a scene: uint8 [64, 64, 3]."""
    ramp = (_X - SIZE / 2) * math.cos(scene.angle) + (_Y - SIZE / 2) * math.sin(scene.angle)
    ramp = np.clip(ramp / SIZE + 0.5, 0, 1)[..., None]
    image = np.array(scene.tones[0]) * (1 - ramp) + np.array(scene.tones[1]) * ramp
    for o in scene.objects:
        alpha = coverage(o.thing.shape, o.x, o.y, o.radius)[..., None]
        image = image * (1 - alpha) + np.array(COLOURS[o.thing.colour]) / 255 * alpha
    return np.round(image * 255).astype(np.uint8)


def random_spec(template: str, rng: random.Random) -> Spec:
    """A random prompt of one template."""
    first = Thing(rng.choice(list(COLOURS)), rng.choice(SHAPES))
    if template == "single":
        return Spec(template, (first,))
    if template == "count":
        return Spec(template, (first,), rng.choice(list(NUMBERS.values())))
    # Both attributes differ, so that every swap of an attribute is an error.
    colours = [c for c in COLOURS if c != first.colour]
    shapes = [s for s in SHAPES if s != first.shape]
    second = Thing(rng.choice(colours), rng.choice(shapes))
    relation = rng.choice(RELATIONS) if template == "relation" else None
    return Spec(template, (first, second), relation=relation)
