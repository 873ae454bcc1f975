"""The prompts of the tracks after D-Fusion's three templates, from word lists of this project's own.

A template crosses two lists of 20 words. Composition (i, i + shift) for one shift uses every word once; train and
held-out take two shifts each, validation one. So the sets share no composition, and every word stands equally often
in each: what is held out are combinations, not words. An object of a material has a colour too, which moves from
shift to shift. `python -m bench_dfusion.tracks.words` writes the files.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from bench_dfusion.util import files
from bench_dfusion.util.seeds import passes


def _words(text: str, separator: str = " ") -> list[str]:
    return text.split(separator)


ANIMALS = _words(
    "badger beaver camel crow donkey frog giraffe goose hamster hedgehog kangaroo koala lobster octopus otter owl panda "
    "penguin squirrel turtle"
)
ACTIVITIES = _words(
    "baking a cake,beating a drum,carrying an umbrella,climbing a ladder,drinking tea,driving a tractor,flying a kite,"
    "folding a towel,hammering a nail,ironing a shirt,knitting a scarf,lifting a dumbbell,mopping the floor,"
    "peeling a potato,pitching a tent,playing the violin,reading a newspaper,rowing a canoe,typing on a laptop,"
    "watering a plant",
    ",",
)
MATERIALS = _words(
    "bamboo cardboard ceramic clay concrete crystal denim felt glass knitted leather marble metal paper plastic plush "
    "rubber velvet wicker wooden"
)
COLOURS = _words("black blue brown green orange pink purple red white yellow")
OBJECTS = _words(
    "airplane basket bathtub bench bicycle boot bridge candlestick chair crown drum guitar helmet kettle lantern piano "
    "ship teapot train wardrobe"
)
THINGS = _words(
    "apple backpack ball barrel bucket cactus candle clock cup globe hat lamp melon mushroom pumpkin shoe suitcase "
    "telephone umbrella vase"
)
RELATIONS = ("on the left of", "on the right of", "above", "below")

T = TypeVar("T")

SHIFTS = {"train": 2, "validation": 1, "heldout": 2}
SEED = "tracks v1"


def prompts(template: str) -> dict[str, list[tuple[str, str]]]:
    """The (prompt, template for figures) of animals, materials or relations, by set: 40, 20 and 40."""
    first, second = {
        "animals": (ANIMALS, ACTIVITIES),
        "materials": (MATERIALS, OBJECTS),
        "relations": (THINGS, THINGS),
    }[template]
    n = len(first)
    a = _shuffled(first, template, "first")
    b = a if template == "relations" else _shuffled(second, template, "second")
    colours = _shuffled(COLOURS, template, "colours")
    # Of shifts s and n - s the pairs of one list are the same but for their order: half of them are taken.
    shifts = _shuffled(list(range(1, n // 2)), template, "shifts")
    result: dict[str, list[tuple[str, str]]] = {}
    for name, count in SHIFTS.items():
        result[name] = []
        for turn in range(count):
            shift = shifts.pop()
            pairs = [(a[i], b[(i + shift) % n]) for i in range(n)]
            if template == "relations":
                # Turned by one in the second round, so that a thing meets another relation there.
                relations = [RELATIONS[(i + turn) % len(RELATIONS)] for i in range(n)]
                result[name] += [
                    (f"{_a(x)} {r} {_a(y)}", r.removeprefix("on the ").removesuffix(" of"))
                    for (x, y), r in zip(pairs, relations, strict=True)
                ]
            elif template == "materials":
                # The colour of material i moves by 2 and that of object i + shift by 1 from one shift to the next.
                hues = [colours[(i + 2 * shift) % len(colours)] for i in range(n)]
                result[name] += [(_a(f"{h} {x} {y}"), template) for h, (x, y) in zip(hues, pairs, strict=True)]
            else:
                result[name] += [(f"{_a(x)} {y}", template) for x, y in pairs]
    return result


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _shuffled(values: list[T], *name: str) -> list[T]:
    return [values[i] for i in passes(len(values), 0, len(values), SEED, *name)]


def write(folder: Path) -> None:
    """Write TEMPLATE-SET.txt for every template and set: a prompt a line, a tab and its template."""
    for template in ("animals", "materials", "relations"):
        for name, rows in prompts(template).items():
            files.write_atomic(folder / f"{template}-{name}.txt", "".join(f"{p}\t{t}\n" for p, t in rows))


if __name__ == "__main__":
    write(Path(__file__).parent / "prompts")
