"""Scenes of the second world: composed as people compose pictures, before a background that no prompt mentions.

One object stands near the middle; two stand side by side, or one above the other where the prompt says so; three
form a triangle, four a square. A mixed scene has its odd object at the top. The background has tinted tones, a horizon
or a gradient, waves as texture, and a light; it never has the chroma of an object (`oracle.CHROMA`).
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np

from bench_dfusion.micro.scenes import _X, _Y, COLOURS, SIZE, Placed, coverage
from bench_dfusion.micro.v2.grammar import Spec

IN_READING_ORDER = 0.75  # how often the first-named of two things joined by "and" stands left
JITTER = 2.0  # px, standard deviation of a slot's place
FARTHEST = 4.0  # px, the largest jitter a coordinate
SMALLEST_CROSS = 8.6  # px of radius; arms of smaller ones round to 4 or 6 px, too thin to be told from a circle
TINT = 0.07  # a channel's largest distance from its tone's grey, so that chroma stays under half of the oracle's 75


@dataclass(frozen=True)
class Background:
    """Two tones meet at a line (angle, offset in px from the middle), sharply at a horizon or over the whole picture.

    `waves` are (amplitude, period in px, angle, phase) of the texture, `light` is (strength, x, y, radius in px).
    """

    tones: tuple[tuple[float, ...], tuple[float, ...]]
    angle: float
    offset: float
    softness: float
    waves: tuple[tuple[float, float, float, float], ...]
    light: tuple[float, float, float, float]


@dataclass(frozen=True)
class Scene:
    objects: tuple[Placed, ...]
    background: Background


def slots(spec: Spec, rng: random.Random) -> list[tuple[float, float]]:
    """The place of each of the prompt's objects before jitter, px."""
    n = len(spec.objects)
    if n == 1:
        return [(32.0, 32.0)]
    if n == 2:
        places = [(32.0, 19.0), (32.0, 45.0)] if spec.relation in ("above", "below") else [(19.0, 32.0), (45.0, 32.0)]
        turned = spec.relation in ("right of", "below")
        if spec.template == "attributes":
            turned = rng.random() > IN_READING_ORDER
        return places[::-1] if turned else places
    if n == 3:
        return [(18.5, 42.0), (45.5, 42.0), (32.0, 17.0)]  # a mixed prompt's second thing comes last, at the top
    return [(19.0, 19.0), (45.0, 19.0), (19.0, 45.0), (45.0, 45.0)]


def sample_scene(spec: Spec, rng: random.Random) -> Scene:
    """A random clean scene that fulfils `spec`: no two objects touch, relations hold by far."""
    smallest, largest = {1: (9.0, 13.0), 2: (7.5, 10.5)}.get(len(spec.objects), (7.0, 9.5))
    while True:
        placed: list[Placed] = []
        for thing, place in zip(spec.objects, slots(spec, rng), strict=True):
            r = rng.uniform(max(smallest, SMALLEST_CROSS) if thing.shape == "cross" else smallest, largest)
            x, y = (
                min(SIZE - 1 - r, max(r + 1, v + max(-FARTHEST, min(FARTHEST, rng.gauss(0, JITTER))))) for v in place
            )
            placed.append(Placed(thing, x, y, r))
        if all(
            math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius + 3 for i, a in enumerate(placed) for b in placed[:i]
        ):
            return Scene(tuple(placed), sample_background(rng))


def sample_background(rng: random.Random) -> Background:
    def tone() -> tuple[float, ...]:
        grey = rng.uniform(0.12, 0.88)
        return tuple(min(1.0, max(0.0, grey + rng.uniform(-TINT, TINT))) for _ in range(3))

    horizon = rng.random() < 0.4
    waves = [
        (rng.uniform(0.02, 0.07), rng.uniform(14, 30), rng.uniform(0, math.pi), rng.uniform(0, 2 * math.pi))
        for _ in range(rng.choice((0, 1, 2)))
    ]
    return Background(
        tones=(tone(), tone()),
        angle=math.pi / 2 + rng.gauss(0, 0.08) if horizon else rng.uniform(0, 2 * math.pi),
        offset=rng.uniform(-14, 14) if horizon else 0.0,
        softness=rng.uniform(1.5, 5) if horizon else SIZE,
        waves=tuple(waves),
        light=(rng.uniform(-0.15, 0.25), rng.uniform(0, SIZE), rng.uniform(0, SIZE), rng.uniform(16, 40)),
    )


def paint(background: Background) -> np.ndarray:
    """The picture without its objects: float [64, 64, 3] in [0, 1]."""
    b, x, y = background, _X - SIZE / 2, _Y - SIZE / 2
    along = x * math.cos(b.angle) + y * math.sin(b.angle) - b.offset
    ramp = np.clip(along / b.softness + 0.5, 0, 1)[..., None]
    image = np.array(b.tones[0]) * (1 - ramp) + np.array(b.tones[1]) * ramp
    shade = np.zeros((SIZE, SIZE))
    for amplitude, period, angle, phase in b.waves:
        shade += amplitude * np.sin((x * math.cos(angle) + y * math.sin(angle)) * (2 * math.pi / period) + phase)
    strength, lx, ly, radius = b.light
    shade += strength * np.exp(-((_X - lx) ** 2 + (_Y - ly) ** 2) / (2 * radius**2))
    return np.clip(image + shade[..., None], 0, 1)


def render(scene: Scene) -> np.ndarray:
    """Draw a scene: uint8 [64, 64, 3]."""
    image = paint(scene.background)
    for o in scene.objects:
        alpha = coverage(o.thing.shape, o.x, o.y, o.radius)[..., None]
        image = image * (1 - alpha) + np.array(COLOURS[o.thing.colour]) / 255 * alpha
    return np.round(image * 255).astype(np.uint8)
