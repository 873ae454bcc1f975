"""Tracks: what they extend, what they hold equal, where their prompts come from, and mistakes in a user's own."""

from __future__ import annotations

import csv
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from clip_bpe import clip_tokenizer

from bench_dfusion import cli, registry
from bench_dfusion.cli.options import out
from bench_dfusion.errors import UsageError
from bench_dfusion.runs.config import resolve
from bench_dfusion.tracks import schema, sources, words
from bench_dfusion.tracks.items import item_tokens
from bench_dfusion.tracks.prompts import read_prompts
from bench_dfusion.tracks.schema import Track
from bench_dfusion.tracks.sources import SOURCES, SourceSection
from bench_dfusion.util import files

DOCS = Path(__file__).parent.parent / "docs" / "tracks.md"
PROMPTS = Path(words.__file__).parent / "prompts"

# A published track never changes: another content is another version.
HASHES = {
    "micro": "9312766d56f12554d1624c0f52f4967b1c039b215853b13a5a93960bd6f25408",
    "micro-v2": "ecb4990e8dd8079e6f4ebd115c41522241b239da6e8e276fca23fb8d65a3ea05",
    "micro-fast": "0331e6385ecc84b76e6870ac2e083ed4119755d8f9e1faa16e56732e035f55d9",
    "sd21-animals": "8f56bb7c76a7c405aaac8dffe1784ecbc07df2c675290ec03f4290ea68f6a306",
    "sd21-materials": "73209a19ff6653de4d9b28e9faff2bab37c342178307a45c910ea36a525ba659",
    "sd21-relations": "806bea78af38b137f98c1964e6b393d747c60f223ce880c5aa935fc733dd8c10",
    "sd15-animals": "d2d01a76c76798dac9f8eb59325de0f552184469776335847b9fcde06934ce0c",
    "sd15-materials": "a1978cc97f82d924cb714f62407dbf9c862617e345b58b776c73fa9d9f1010d6",
    "sd15-relations": "2d930b477fe4e628491979e09fb018d7684726166c7216c230d39a2d86fc827a",
}
FROM_A_COPY = (
    *("geneval", "t2i-compbench", "partiprompts", "dsg"),
    *("dfusion-animals", "dfusion-materials", "dfusion-relations"),
)


def load(source: str | Path) -> Track:
    found: Track = schema.validate(Track, schema.read(source), "track")
    return found


@pytest.mark.parametrize("name", HASHES)
def test_a_shipped_track_stays_what_it_is(name: str) -> None:
    found = load(name)
    assert (found.name, found.hash) == (name.removesuffix("-v2"), HASHES[name])


def test_every_shipped_track_is_fixed_here_or_leaves_something_to_the_user() -> None:
    own = {name for name, plugin in registry.plugins("tracks").items() if plugin.source.startswith("bench-dfusion ")}
    assert own == {*HASHES, *FROM_A_COPY, "paper"}


# --- extends


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_track_extends_another_table_by_table_and_files_lie_beside_the_one_that_names_them(tmp_path: Path) -> None:
    write(tmp_path, "base/train.txt", "a cat\na dog\n")
    write(tmp_path, "own/held.txt", "a cow\tanimals\na car\tthings\n")
    write(
        tmp_path,
        "base/base.toml",
        'name = "base"\nversion = 4\nextends = "micro"\n[prompts]\ntrain = "train.txt"\nvalidation = []\n'
        "[sampler]\nsteps = 3\n[algorithms.dpo]\nbeta = 7.0\n",
    )
    path = write(
        tmp_path,
        "own/own.toml",
        'name = "own"\nversion = 1\nextends = "../base/base.toml"\n[prompts]\nheldout = "held.txt"\n[sampler]\neta = 0.5\n',
    )
    micro, own = load("micro"), load(path)
    assert own.id == "own-v1" and own.prompts.train == ("a cat", "a dog") and own.prompts.heldout == ("a cow", "a car")
    assert own.prompts.templates == {"a cow": "animals", "a car": "things"}  # none of micro's
    assert (own.sampler.steps, own.sampler.eta, own.sampler.guidance) == (3, 0.5, micro.sampler.guidance)
    assert own.algorithms["dpo"] == {**micro.algorithms["dpo"], "beta": 7.0}
    assert own.model == micro.model and own.evaluation == micro.evaluation


def test_what_belongs_to_a_replaced_part_goes_with_it(tmp_path: Path) -> None:
    head = 'name = "own"\nversion = 1\n'
    other = load(write(tmp_path, "model.toml", head + 'extends = "micro"\n[model]\nid = "some/model"\n')).model
    assert (other.id, other.sha256, other.autocast) == ("some/model", None, "bfloat16")
    section = '[prompts]\nsource = "lines"\nheldout = 0.5\n'
    source = schema.read(write(tmp_path, "source.toml", head + 'extends = "micro"\n' + section))["prompts"]
    assert source == {"source": "lines", "heldout": 0.5}
    lists = '[prompts]\ntrain = ["a cat"]\nheldout = ["a cow", "a car"]\n'
    listed = schema.read(write(tmp_path, "lists.toml", head + 'extends = "geneval"\n' + lists))["prompts"]
    assert listed == {"train": ["a cat"], "heldout": ["a cow", "a car"]}
    resized = schema.read(write(tmp_path, "size.toml", head + 'extends = "geneval"\n[prompts]\ntrain = 9\n'))["prompts"]
    assert resized == {"source": "geneval", "train": 9, "validation": 0.1, "heldout": 0.3}


def test_micro_fast_is_micro_in_little() -> None:
    micro, fast = load("micro"), load("micro-fast")
    assert fast.prompts.heldout == micro.prompts.heldout[::4] and fast.prompts.train == micro.prompts.train
    assert fast.prompts.templates == {p: (micro.prompts.templates or {})[p] for p in fast.prompts.heldout}
    assert set(fast.prompts.templates.values()) == set((micro.prompts.templates or {}).values())
    same = {"model", "sampler", "lora", "rewards", "algorithms", "builders", "tuned"}
    assert fast.model_dump(include=same) == micro.model_dump(include=same)
    assert fast.evaluation.judges == micro.evaluation.judges and fast.seeds == 3
    drawn = fast.budget.prompts_per_round * fast.budget.samples_per_prompt
    assert fast.budget.reward_queries == 576 and fast.budget.reward_queries % (drawn * 3 // 2) == 0


# --- the paper's templates


def test_the_files_are_what_the_words_give(tmp_path: Path) -> None:
    words.write(tmp_path)
    assert {p.name: p.read_bytes() for p in PROMPTS.iterdir()} == {p.name: p.read_bytes() for p in tmp_path.iterdir()}


PARTS = {
    "animals": lambda p: (p.split()[1], " ".join(p.split()[2:])),
    "materials": lambda p: tuple(p.split()[2:]),
    "relations": lambda p: (p.split()[1], p.split()[-1]),
}


@pytest.mark.parametrize("template", PARTS)
def test_sets_share_words_and_no_composition(template: str) -> None:
    for model in ("sd21", "sd15"):
        prompts = load(f"{model}-{template}").prompts
        assert [len(s) for s in (prompts.train, prompts.validation, prompts.heldout)] == [40, 20, 40]
    sets = [[PARTS[template](p) for p in s] for s in (prompts.train, prompts.validation, prompts.heldout)]
    every = [frozenset(pair) for pairs in sets for pair in pairs]
    assert len(set(every)) == 100 and all(len(pair) == 2 for pair in every)
    for pairs, times in zip(sets, (2, 1, 2), strict=True):
        for place in (0, 1):
            counts = Counter(pair[place] for pair in pairs)
            assert set(counts.values()) == {times} and len(counts) == 20
    if template == "materials":
        for s, times in zip((prompts.train, prompts.validation, prompts.heldout), (4, 2, 4), strict=True):
            assert set(Counter(p.split()[1] for p in s).values()) == {times}
    if template == "relations":
        assert Counter((prompts.templates or {}).values()) == {"left": 10, "right": 10, "above": 10, "below": 10}


def test_fusion_finds_the_items_of_every_prompt() -> None:
    tokenizer = clip_tokenizer()
    for path in PROMPTS.glob("*.txt"):
        template = path.name.partition("-")[0]
        for prompt in read_prompts(path)[0]:
            first, second = PARTS[template](prompt)
            nouns = {
                "animals": [first, second.split()[-1]],
                "materials": [second],
                "relations": [first, second],
            }[template]
            ids = tokenizer(prompt).input_ids
            assert [
                tokenizer.decode([ids[i] for i in item]).strip() for item in item_tokens(prompt, tokenizer)
            ] == nouns


# --- prompts from the user's copy


SCENES = [
    f"a {c} {thing}" for thing in ("lamp", "boat", "goat", "tent") for c in ("red", "blue", "green", "black", "white")
]


def geneval(folder: Path, prompts: list[tuple[str, str]]) -> Path:
    lines = [json.dumps({"tag": tag, "include": [{"class": "x", "count": 1}], "prompt": p}) for p, tag in prompts]
    return write(folder, "prompts/evaluation_metadata.jsonl", "\n".join(lines) + "\n")


def partiprompts(folder: Path, prompts: list[tuple[str, str]]) -> Path:
    lines = ["Prompt\tCategory\tChallenge\tNote", *(f"{p}\t{c}\tBasic\t" for p, c in prompts)]
    return write(folder, "PartiPrompts.tsv", "\n".join(lines) + "\n")


def dsg(folder: Path, prompts: list[tuple[str, str]]) -> Path:
    path = folder / "dsg-1k-anns.csv"
    folder.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["item_id", "text", "keywords", "proposition_id"])
        for number, (prompt, category) in enumerate(prompts):
            table.writerows([[f"{category}_{number}", prompt, "a, b", i] for i in (1, 2)])
    return path


def lines(folder: Path, prompts: list[tuple[str, str]]) -> Path:
    return write(folder, "mine.txt", "".join(f"{p}\t{c}\n" for p, c in prompts))


FORMATS = {"geneval": geneval, "partiprompts": partiprompts, "dsg": dsg, "lines": lines}
# Commas, quotes, a prompt again in other letters, and space around.
ROWS = [(p, "colour" if i < 15 else "few_things") for i, p in enumerate(SCENES)]
ODD = [('"open" on a box, a 5" nail', "colour"), ("A Red Lamp.", "colour"), ("  a  red lamp ", "colour")]


def sizes(source: str, **options: Any) -> dict[str, Any]:
    return {"source": source, "train": 8, "validation": 4, "heldout": 8, **options}


@pytest.mark.parametrize("source", FORMATS)
def test_every_format_gives_the_same_sets(source: str, tmp_path: Path) -> None:
    path = FORMATS[source](tmp_path, [*ROWS, *ODD])
    found = sources.resolve(sizes(source, train=None), path, "mine")
    assert found == sources.resolve(sizes("lines", train=None), lines(tmp_path / "plain", [*ROWS, *ODD]), "mine")
    every = [*found["train"], *found["validation"], *found["heldout"]]
    assert [len(found[k]) for k in schema.SETS] == [9, 4, 8]
    assert {p.lower().rstrip(".") for p in every} == {*SCENES, ODD[0][0]}
    # Every set has the categories in their proportions, 16 to 5.
    assert Counter(found["templates"].values()) == {"colour": 6, "few_things": 2}
    if source != "lines":
        assert sources.resolve(sizes(source, train=None), tmp_path, "mine") == found  # the directory around it


def test_the_split_depends_on_nothing_but_the_prompts(tmp_path: Path) -> None:
    shuffled = random.Random(0).sample([*ROWS, *ODD], len(ROWS) + len(ODD))
    first, second = (
        sources.resolve(sizes("lines"), lines(tmp_path / n, rows), "mine")
        for n, rows in (("a", [*ROWS, *ODD]), ("b", shuffled))
    )
    assert first == second
    assert first["heldout"][:3] == ["a red boat", "a white lamp", "a white tent"]  # on every machine
    more = sources.resolve(sizes("lines", train=None, validation=0.2, heldout=0.4), tmp_path / "a/mine.txt", "mine")
    assert more["heldout"] == first["heldout"] and more["validation"] == first["validation"]
    assert len(more["train"]) == 9 and more["train"][:8] == first["train"]


def test_compbench_keeps_its_own_split(tmp_path: Path) -> None:
    for category, start in (("color", 0), ("non_spatial", 10)):
        own = SCENES[start : start + 10]
        write(tmp_path, f"examples/dataset/{category}_train.txt", "\n".join(own[:7]) + "\n")
        write(tmp_path, f"examples/dataset/{category}_val.txt", " \n".join(own[6:]) + "\n")  # one of them in both
        write(tmp_path, f"examples/dataset/{category}.txt", "a thing of no split\n")
        write(tmp_path, f"examples/dataset/{category}_val_seen.txt", own[6] + "\n")
    section = {"source": "t2i-compbench", "validation": 2, "heldout": 0.5}
    found = sources.resolve(section, tmp_path, "mine")
    assert found == sources.resolve(section, tmp_path / "examples" / "dataset", "mine")
    assert set(found["heldout"]) < {*SCENES[6:10], *SCENES[16:20]} and len(found["heldout"]) == 4
    assert {*found["train"], *found["validation"]} == {*SCENES[:6], *SCENES[10:16]} and len(found["validation"]) == 2
    assert Counter(found["templates"].values()) == {"color": 2, "non_spatial": 2}


def test_the_official_prompts_of_a_template_keep_their_split(tmp_path: Path) -> None:
    folder = tmp_path / "config" / "prompt"
    for n, start in ((1, 0), (2, 10)):
        write(folder, f"template{n}_train.json", json.dumps(SCENES[start : start + 6]))
        write(folder, f"template{n}_test.json", json.dumps(SCENES[start + 6 : start + 10]))
        write(folder, f"template{n}_item.json", json.dumps({p: [2] for p in SCENES[start : start + 10]}))
    write(folder, "template1_3prompt.json", json.dumps(["another list"]))
    section = {**schema.read("dfusion-materials")["prompts"], "heldout": 4}
    found = sources.resolve(section, tmp_path, "mine")
    assert set(found["train"]) == {*SCENES[10:16]} and set(found["heldout"]) == {*SCENES[16:]}
    assert found["validation"] == [] and found == sources.resolve(section, folder, "mine")
    with pytest.raises(UsageError, match="asks for 40 prompts and 4 are left"):
        sources.resolve(schema.read("dfusion-animals")["prompts"], tmp_path, "mine")
    write(folder, "template3_test.json", '{"a": 1}')
    with pytest.raises(UsageError, match="template3_test.json is no JSON list of prompts"):
        sources.resolve(section, tmp_path, "mine")
    with pytest.raises(UsageError, match="d-fusion has files for each category"):
        sources.resolve(section, "hf:someone/prompts", "mine")


def test_the_papers_tracks_train_as_the_official_code_does() -> None:
    for name in (n for n in HASHES if not n.startswith("micro")):
        found = resolve(track_source=name, algo="dpo", reward="clip")
        options: Any = found.algorithm_config
        assert (found.track.lora.rank, found.track.lora.alpha, found.track.lora.init) == (4, None, "gaussian")
        assert (options.learning_rate, options.weight_decay, options.grad_norm) == (1e-4, 1e-4, 1.0)
        assert options.updates * options.inner_epochs == 2  # optimiser steps a round
        assert (found.track.sampler.steps, found.track.sampler.eta, found.track.sampler.guidance) == (20, 1.0, 5.0)


def test_prompts_are_left_out_by_category_length_and_items(tmp_path: Path) -> None:
    path = partiprompts(tmp_path, [*ROWS, ("42", "colour"), ("red", "few_things"), ("a dog " * 9, "few_things")])
    whole = {"source": "partiprompts", "heldout": 4}

    def kept(**options: Any) -> set[str]:
        found = sources.resolve({**whole, **options}, path, "mine")
        return {*found["train"], *found["heldout"]}

    assert kept(items=True, max_words=10) == set(SCENES)
    assert kept() - kept(items=True) == {"42", "red"}
    assert kept(categories=["few_things"]) == {*SCENES[15:], "red", " ".join(["a dog"] * 9)}


def test_a_dataset_directory_is_a_copy_too(tmp_path: Path) -> None:
    path = partiprompts(tmp_path / "data", [*ROWS, *ODD])
    write(
        tmp_path,
        "hub/all.csv",
        path.read_text().replace(ODD[0][0], '"""open"" on a box, a 5"" nail"').replace("\t", ","),
    )
    found = sources.resolve(sizes("partiprompts"), f"hf:{tmp_path / 'hub'}", "mine")
    assert found == sources.resolve(sizes("partiprompts"), path, "mine")
    write(tmp_path, "other/all.csv", "title\na cat\n")
    with pytest.raises(UsageError, match="no column prompt, text, caption; it has"):
        sources.resolve(sizes("partiprompts"), f"hf:{tmp_path / 'other'}", "mine")


def test_rows_without_a_prompt_are_counted_and_what_is_no_text_is_refused(tmp_path: Path, capsys) -> None:
    rows = [{"prompt": prompt, "category": category} for prompt, category in ROWS]
    blank = [{"prompt": None, "category": "x"}, {"prompt": " ", "category": "x"}]
    for name, found in (("with", [*rows, *blank]), ("without", rows)):
        write(tmp_path, f"{name}/all.jsonl", "".join(f"{json.dumps(row)}\n" for row in found))
    asked, copy = sizes("partiprompts"), f"hf:{tmp_path / 'with'}"
    assert sources.resolve(asked, copy, "mine") == sources.resolve(asked, f"hf:{tmp_path / 'without'}", "mine")
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert said == f"{copy}: left out 2 of {len(rows) + 2} rows, which have no prompt"
    write(tmp_path, "numbers/all.jsonl", '{"prompt": 1}\n{"prompt": 2}\n')
    with pytest.raises(UsageError, match="row 0: 1 is no prompt: give a text"):
        sources.resolve(asked, f"hf:{tmp_path / 'numbers'}", "mine")


def test_a_copy_may_be_fixed_by_its_hash(tmp_path: Path) -> None:
    path = geneval(tmp_path, ROWS)
    found = sources.resolve(sizes("geneval", sha256=files.sha256(path)), tmp_path, "mine")
    assert len(found["heldout"]) == 8
    with pytest.raises(UsageError, match="the track fixes 000000000000"):
        sources.resolve(sizes("geneval", sha256="0" * 64), tmp_path, "mine")


@pytest.mark.parametrize("name", FROM_A_COPY)
def test_a_track_of_a_published_set_says_where_the_copy_comes_from(name: str) -> None:
    with pytest.raises(UsageError) as refused:
        resolve(track_source=name, algo="dpo", reward="clip")
    message = str(refused.value)
    assert (
        SOURCES[schema.read(name)["prompts"]["source"]].home in message
        and "--prompts COPY" in message
        and len(message.splitlines()) == 1
    )


def test_the_prompts_found_are_in_the_hash_and_changes_make_another_track(tmp_path: Path) -> None:
    def cell(*settings: str, rows: list[tuple[str, str]] = ROWS) -> Track:
        path = geneval(tmp_path / str(len(rows)), rows)
        return resolve(track_source="geneval", algo="dpo", reward="clip", prompts=path, settings=list(settings)).track

    plain = cell()
    assert plain.id == "geneval-v2" and [len(getattr(plain.prompts, k)) for k in schema.SETS] == [12, 2, 6]
    assert cell(rows=ROWS[:-1]).hash != plain.hash == cell(rows=ROWS).hash
    smaller = cell("track.prompts.train=5")
    assert smaller.name == "geneval-custom" and smaller.prompts.train == plain.prompts.train[:5]
    assert cell('track.prompts.train=["a fox"]').prompts.train == ("a fox",)


# --- a user's own track, and mistakes in it


OWN = """
name = "mine"
version = 1
[model]
id = "micro"
[sampler]
steps = 4
[prompts]
train = ["a red ring", "a blue ring"]
heldout = ["a red cross", "a blue cross"]
[budget]
reward_queries = 96
prompts_per_round = 2
[evaluation]
judges = ["oracle"]
"""
EXTENDS = 'name = "mine"\nversion = 1\nextends = '


def changed(old: str, new: str) -> str:
    assert old in OWN
    return OWN.replace(old, new)


SOURCE = changed('train = ["a red ring", "a blue ring"]\nheldout = ["a red cross", "a blue cross"]', "{}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (changed("steps = 4", "stepz = 4"), "unknown option track.sampler 'stepz'; did you mean steps"),
        (changed("[sampler]", "[sampelr]"), "did you mean sampler"),
        (
            changed("[budget]\nreward_queries = 96\nprompts_per_round = 2\n", ""),
            "track.budget is missing: what a run may",
        ),
        (changed("reward_queries = 96\n", ""), "track.budget.reward_queries is missing: images the training reward"),
        (changed('"a red cross"', '"a red ring"'), "prompts.train and prompts.heldout share 'a red ring'"),
        (changed("version = 1", "version = 0"), "track.version"),
        (changed("version = 1", 'version = "one"'), "track.version"),
        (changed('"mine"', '"My Track"'), "track.name"),
        (changed('["oracle"]', '["orakle"]'), "unknown judge 'orakle'; did you mean oracle"),
        (changed('["oracle"]', '["oracle:fully"]'), "judge oracle:fully.score"),
        (changed("steps = 4", "steps = four"), "mine.toml"),
        (changed("[model]\nid", "model"), "mine.toml: model is a section"),
        (changed('["a red ring", "a blue ring"]', '"missing.txt"'), "no prompts file missing.txt"),
        (changed('["a red ring", "a blue ring"]', '"empty.txt"'), "prompts file empty.txt holds no prompt"),
        (changed('["a red ring", "a blue ring"]', '"latin.txt"'), "prompts file latin.txt: no UTF-8 text"),
        (EXTENDS + '"mikro"', "mine.toml: extends: unknown track 'mikro'; did you mean micro"),
        (EXTENDS + '"other.toml"', "extends: no track file other.toml"),
        (EXTENDS + '"mine.toml"', "in a loop, mine.toml -> mine.toml"),
        (EXTENDS + '"loop.toml"', "in a loop, mine.toml -> loop.toml -> mine.toml"),
        (EXTENDS + "5", "extends takes a track's name or a TOML file, not 5"),
        ('name = "mine"\nextends = "micro"', "needs its own version"),
        ('version = 1\nextends = "micro"', "needs its own name"),
        (changed("version = 1", ""), "mine.toml: a track needs its own version: raised with every change"),
        ('name = "micro"\nversion = 1\nextends = "micro"', "give another name or version"),
        (SOURCE.format('source = "genevil"\nheldout = 4'), "unknown prompts.source 'genevil'; did you mean geneval"),
        (SOURCE.format('source = "geneval"\nheldout = 4\nshare = 2'), "unknown option track.prompts 'share'"),
        (SOURCE.format('source = "geneval"'), "track.prompts.heldout is missing"),
        (SOURCE.format('source = "geneval"\nheldout = 1.5'), "a size is a count (40) or a share"),
        (SOURCE.format('source = "geneval"\nheldout = 4'), "mine.txt:1 is no JSON object with a prompt"),
        (SOURCE.format('source = "dsg"\nheldout = 4'), "mine.txt has no column 'text'"),
        (SOURCE.format('source = "t2i-compbench"\nheldout = 4'), "mine.txt is no copy of T2I-CompBench: get https"),
        (SOURCE.format('source = "lines"\nheldout = 9'), "prompts.heldout asks for 9 prompts and 2 are left"),
        (SOURCE.format('source = "lines"\nheldout = 2\ncategories = ["ring"]'), "unknown prompts.categories 'ring'"),
        (SOURCE.format('source = "lines"\nheldout = 2'), "has 2 prompts, which leaves 0 to train on and 2 held out"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(
    text: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    write(tmp_path, "mine.toml", text)
    write(tmp_path, "empty.txt", "\n")
    write(tmp_path, "loop.toml", 'name = "loop"\nversion = 1\nextends = "mine.toml"')
    write(tmp_path, "mine.txt", "a red ring\na red cross\n")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    monkeypatch.chdir(tmp_path)
    copy = ("--prompts", "mine.txt") if "source =" in text else ()
    with pytest.raises(UsageError):  # already before a reward or a model is loaded
        resolve(track_source="mine.toml", algo="dpo", reward="oracle", prompts=Path(copy[1]) if copy else None)
    assert expected in refused("run", "--algo", "dpo", "--reward", "oracle", "--track", "mine.toml", *copy)
    assert not (tmp_path / "runs").exists()


def test_a_track_that_is_no_text_is_one_line(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "mine.toml").write_bytes(b'name = "caf\xe9"')
    assert "mine.toml: no UTF-8 text" in refused("list", "tracks", "mine.toml", cwd=tmp_path)


def test_list_shows_every_track_and_what_is_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[..., Any]
) -> None:
    write(tmp_path, "mine.toml", OWN)
    monkeypatch.setattr(out, "width", 200)
    shown = said("list", "tracks", cwd=tmp_path).out
    listed = {
        line.split()[0]: line.split(None, 1)[1]
        for line in shown.splitlines()
        if line[:1].strip() and " " in line.strip()
    }
    for name in registry.plugins("tracks"):
        assert listed[name].startswith(("Stable Diffusion", "The embedded world", "D-Fusion's own settings"))
    shown = said("list", "tracks", "micro").out
    assert HASHES["micro"] in shown and '"reward_queries": 4608' in shown
    shown = said("list", "tracks", "dsg").out
    assert (
        "prompts: from DSG-1k, not in this package; get https://github.com/j-min/DSG" in shown
        and '"heldout": 200' in shown
    )
    status, shown, _ = said("list", "tracks", "mine.toml")
    assert status == 0 and f"mine-v1, hash {load('mine.toml').hash}" in shown


# --- documentation


def key_rows() -> list[str]:
    """A row of the documentation's tables for every key of a track."""
    rows = []
    sections = {
        name: f.annotation for name, f in Track.model_fields.items() if f.annotation in schema.Section.__subclasses__()
    }
    models = [("", Track), *((f"{n}.", m) for n, m in sections.items()), ("prompts.", SourceSection)]
    for prefix, model in models:
        for name, info in model.model_fields.items():
            if name in sections and not prefix:
                continue
            default = "required" if info.is_required() else f"`{json.dumps(info.get_default())}`"
            meaning = "; ".join(t for t in (info.description, cli.plugins._range(info.metadata)) if t)
            rows.append(f"| `{prefix}{name}` | {default} | {meaning} |".replace("`null`", "none"))
    return rows


def test_the_documentation_has_every_key() -> None:
    text = DOCS.read_text(encoding="utf-8").splitlines()
    missing = [row for row in key_rows() if row not in text]
    assert not missing, "\n".join(missing)


def test_the_documentation_lists_every_track_and_its_example_is_one(tmp_path: Path) -> None:
    text = DOCS.read_text(encoding="utf-8")
    for name in [*HASHES, *FROM_A_COPY, "paper"]:
        assert f"| `{name}` " in text
    example = text.split("```toml\n")[1].split("```")[0]
    assert load(write(tmp_path, "example.toml", example)).name == "rings"
