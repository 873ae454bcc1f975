"""Items and thresholds by hand: the official repository's files as they are, ours, and what is refused before compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from processes import SETTINGS

import bench_dfusion
from bench_dfusion.builders.dfusion.builder import DFusion, DFusionConfig
from bench_dfusion.errors import UsageError
from bench_dfusion.results import records
from bench_dfusion.runs.config import Cell, resolve

CAT, BUS, DOG, TREE = "a cat eating a sandwich", "a black and woolen bus", "the dog above the table", "a gnarly tree"
TRACK = f"""
name = "toy"
version = 1
[model]
id = "micro"
[sampler]
steps = 4
[prompts]
train = ["{CAT}", "{BUS}", "{DOG}"]
validation = ["{TREE}"]
heldout = ["a horse", "two cows and a fox"]
[budget]
reward_queries = 64
prompts_per_round = 2
samples_per_prompt = 4
[evaluation]
judges = ["oracle"]
"""
# In the form of the official files, which name more prompts than a run takes: indices, and thresholds beside them.
OFFICIAL_ITEMS = {CAT: [1, 4], BUS: [4], "a cat driving a car": [1, 4]}
OFFICIAL_THRESHOLDS = {CAT: [0.03, 0.005], BUS: [0.0], "a cat driving a car": [0.03, 0.01]}


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    (tmp_path / "toy.toml").write_text(TRACK)
    return tmp_path


def cell(folder: Path, *settings: str, **options: Any) -> Cell:
    track = str(folder / "toy.toml")
    return resolve(track_source=track, algo="dpo", reward="oracle", settings=list(settings), **options)


def written(path: Path, content: object) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_official_files_are_taken_as_they_are_and_their_content_names_the_cell(toy: Path) -> None:
    items, masks = written(toy / "item.json", OFFICIAL_ITEMS), written(toy / "mask.json", OFFICIAL_THRESHOLDS)
    both = cell(toy, f"builder.items_file={items}", f"builder.thresholds_file={masks}")
    resolved = both.resolved["builder"]
    assert resolved["items"] == {CAT: [1, 4], BUS: [4]} and resolved["thresholds"] == {CAT: [0.03, 0.005], BUS: [0.0]}
    assert "items_file" not in resolved and "thresholds_file" not in resolved
    assert json.loads(json.dumps(both.given))["set"] == [
        f"builder.items_file={items}",
        f"builder.thresholds_file={masks}",
    ]

    (toy / "elsewhere").mkdir()
    moved = [written(toy / "elsewhere" / n, Path(p).read_text()) for n, p in (("a.json", items), ("b.json", masks))]
    same = cell(toy, f"builder.items_file={moved[0]}", f"builder.thresholds_file={moved[1]}")
    direct = written(
        toy / "own.toml",
        f'[builder.items]\n"{CAT}" = [1, 4]\n"{BUS}" = [4]\n[builder.thresholds]\n"{CAT}" = [0.03, 0.005]\n"{BUS}" = [0]',
    )
    assert both.hash == same.hash == cell(toy, config=Path(direct)).hash
    written(toy / "elsewhere" / "b.json", {**OFFICIAL_THRESHOLDS, CAT: [0.03, 0.006]})
    changed = cell(toy, f"builder.items_file={moved[0]}", f"builder.thresholds_file={moved[1]}")
    assert len({both.hash, changed.hash, cell(toy).hash, cell(toy, f"builder.items_file={items}").hash}) == 4


def test_a_file_of_words_and_rules(toy: Path) -> None:
    words = written(toy / "items.toml", f'"{TREE}" = ["tree"]\n"{DOG}" = ["Dog", "the table"]\n')
    rules = written(toy / "rules.json", {TREE: ["max*0.5"], BUS: [0.02], DOG: ["otsu", 0.01]})
    resolved = cell(toy, f"builder.items_file={words}", f"builder.thresholds_file={rules}").resolved["builder"]
    assert resolved["items"] == {TREE: ["tree"], DOG: ["Dog", "the table"]}
    assert resolved["thresholds"] == {TREE: ["max*0.5"], BUS: [0.02], DOG: ["otsu", 0.01]}


def test_a_cell_without_them_is_the_published_one() -> None:
    published = (
        Path(__file__).parent.parent / "leaderboards" / resolve(track_source="micro", algo="dpo", reward="clip").folder
    )
    assert (published / "record.json").exists()


ITEMS_REFUSED: list[tuple[object, str]] = [
    ("{", "is no JSON"),
    ([1, 4], r"\[1, 4\] is no table of prompts"),
    ({CAT: 4}, f"'{CAT}' has 4: give it the list of its items"),
    ({CAT: []}, f"'{CAT}' has "),
    ({CAT: [1, 0.03]}, f"'{CAT}' has the item 0.03: give a word of it, or its number"),
    ({CAT: [True]}, f"'{CAT}' has the item True"),
    ({CAT: [1, 5]}, f"item 5 is no word of the prompt '{CAT}': give the word, or its number"),
    ({CAT: [-1]}, f"item -1 is no word of the prompt '{CAT}'"),
    ({CAT: ["dog"]}, f"item 'dog' is not in the prompt '{CAT}'"),
    (
        {BUS: ["bus"], "a cat eating a sandwhich": ["cat"]},
        f"no prompt 'a cat eating a sandwhich'; did you mean '{CAT}'",
    ),
    ({BUS: ["bus"], "xylophone": ["xylophone"]}, "no prompt 'xylophone'; leave it out"),
    ({BUS: [4], "A cat  eating a sandwich.": [1]}, f"no prompt 'A cat  eating a sandwich.'; did you mean '{CAT}'"),
    ({"a cat driving a car": [1, 4]}, f"names no prompt of the track, '{CAT}' for one"),
    ({}, "names no prompt of the track"),
]
THRESHOLDS_REFUSED: list[tuple[object, str]] = [
    ({CAT: [0.03, 1]}, f"'{CAT}' has the threshold 1: give a probability in"),
    ({CAT: [-0.01, 0.03]}, f"'{CAT}' has the threshold -0.01"),
    (f'{{"{CAT}": [NaN, 0.1]}}', f"'{CAT}' has the threshold nan"),
    ({CAT: ["0.02", 0.1]}, f"'{CAT}' has the threshold '0.02'"),
    ({CAT: ["mean+nan", 0.1]}, f"'{CAT}' has the threshold 'mean\\+nan'"),
    ({CAT: ["max*x", 0.1]}, f"'{CAT}' has the threshold 'max\\*x': unknown threshold"),
    ({CAT: [0.03]}, rf"'{CAT}' has 1 thresholds and 2 items \(cat, sandwich\): give one threshold for each item"),
    ({BUS: [0.03, 0.01]}, rf"'{BUS}' has 2 thresholds and 1 items \(bus\)"),
]


@pytest.mark.parametrize(
    ("option", "content", "expected"),
    [("items", *case) for case in ITEMS_REFUSED] + [("thresholds", *case) for case in THRESHOLDS_REFUSED],
)
def test_what_cannot_be_used_is_one_line_naming_file_prompt_and_fix(
    option: str, content: object, expected: str, toy: Path
) -> None:
    file = written(toy / "by-hand.json", content)
    with pytest.raises(UsageError, match=expected) as refused:
        cell(toy, f"builder.{option}_file={file}")
    assert str(refused.value).count(file) == 1 and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["builder.items_file=no.json"], "no file no.json"),
        (["builder.items_file=no.toml"], "no file no.toml"),
        (["builder.items_file=."], ".: Is a directory"),
        ([f'builder.items={{"{CAT}": [1]}}', "builder.items_file=x.json"], "builder.items or builder.items_file, not"),
        ([f'builder.items={{"{CAT}": [9]}}'], f"builder.items: the item 9 is no word of the prompt '{CAT}'"),
        ([f'builder.items={{"{TREE}s": ["trees"]}}'], f"builder.items: .*no prompt '{TREE}s'; did you mean '{TREE}'"),
        ([f'builder.thresholds={{"{CAT}": [0.1]}}'], f"builder.thresholds: the prompt '{CAT}' has 1 thresholds and 2"),
        (
            [f'builder.items={{"{CAT}": ["cat"]}}', f'builder.thresholds={{"{CAT}": [0.1, 0.2]}}'],
            rf"'{CAT}' has 2 thresholds and 1 items \(cat\)",
        ),
        (["builder.thresholds=0.1"], "builder.thresholds: 0.1 is no table of prompts"),
    ],
)
def test_options_that_cannot_be_used_are_one_line(settings: list[str], expected: str, toy: Path) -> None:
    with pytest.raises(UsageError, match=expected) as refused:
        cell(toy, *settings)
    assert "\n" not in str(refused.value)


def test_a_builder_whose_files_nobody_read_is_refused() -> None:
    with pytest.raises(ValueError, match="thresholds_file has not been read"):
        DFusion(DFusionConfig(thresholds_file="mask.json"))


def test_a_run_with_files_has_their_content_in_its_record_and_is_only_read_again(tmp_path: Path) -> None:
    items = written(tmp_path / "item.json", {"a cyan square": [1, 2], BUS: [4]})
    masks = written(tmp_path / "mask.json", {"a cyan square": [0.0, 0.02], "three green rings": [0.0]})
    files = [f"builder.items_file={items}", f"builder.thresholds_file={masks}"]
    settings = [*SETTINGS, "track.budget.reward_queries=12", *files]
    first, again = (bench_dfusion.run(algo="dpo", reward="oracle", settings=settings, out=tmp_path) for _ in range(2))
    assert first == again and len(list(tmp_path.rglob("cell.json"))) == 1
    assert first.resolved["builder"]["items"] == {"a cyan square": [1, 2]}
    assert first.resolved["builder"]["thresholds"] == {"a cyan square": [0.0, 0.02], "three green rings": [0.0]}
    assert not records.check(first)
