"""Prompts: what makes two of them one, and the files that they are read from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench_dfusion.errors import UsageError
from bench_dfusion.tracks import schema, sources
from bench_dfusion.tracks.prompts import read_prompts, same, shared, twice, unique

# ---------------------------------------------------------------- the same prompt


@pytest.mark.parametrize(
    "other",
    [
        *("A purple cup", "A PURPLE CUP", "a  purple\tcup ", "a purple cup.", "a purple cup!", "a purple, cup", "purple cup"),
        *("The purple cup", "\ufeffa purple cup", "a purple\u00a0cup", "a pur\u00adple cup", "a purple\u200b cup"),
        *("a purple\u2028cup", "a purple\x0bcup", "a purple\u3000cup", "a purple\x07 cup", "“a purple cup”", "a purple-cup"),
        *("ａ ｐｕｒｐｌｅ ｃｕｐ", "a purple\u2800cup", "a purple_cup", "…a purple cup…", "a purple cup\ufe0f"),
    ],
)  # fmt: skip
def test_spellings_of_one_prompt(other: str) -> None:
    assert same(other) == same("a purple cup") == "purple cup"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *(("a cup", "a cups"), ("3.5 litres", "35 litres"), ("3.5 litres", "3 5 litres"), ("2-3 dogs", "23 dogs")),
        *(("a book about C#", "a book about C"), ("the letter A", "the letter"), ("rosé", "rose"), ("?", "!"), ("a", "the")),
        *(("50% grey", "50 grey"), ("a dog", "a god"), ("赤い円", "青い円"), ("😀", "😁"), ("a", "")),
    ],
)  # fmt: skip
def test_prompts_that_are_two(one: str, other: str) -> None:
    assert same(one) != same(other)


def test_what_unicode_writes_in_several_ways_is_one() -> None:
    assert (
        same("rosé") == same("rose\u0301")
        and same("Straße") == same("STRASSE")
        and same("2–3 dogs") == same("2-3 dogs")
    )
    assert same("a dog’s bone") == same("a dog's bone") == same("a dog`s bone") and same("½ cup") == same("1/2 cup")


PROMPTS = st.text(max_size=30) | st.text("aA .,'-–3\u200b\u0301\u00a0é", max_size=12)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(PROMPTS)
def test_the_form_is_its_own_form_and_empty_for_nothing_only(prompt: str) -> None:
    form = same(prompt)
    assert same(form) == form and form == form.strip()
    assert bool(form) or not any(c.isalnum() for c in prompt)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    PROMPTS,
    st.sampled_from([" ", "\t", "\u00a0", "\u2028", "\u3000 "]),
    st.sampled_from(["\ufeff", "\u200b", "\u00ad"]),
)
def test_the_form_knows_neither_case_nor_spaces_nor_the_invisible_nor_a_full_stop(
    prompt: str, space: str, invisible: str
) -> None:
    prompt = f"dog {prompt}"
    assert same(prompt.casefold()) == same(prompt)
    assert same(space + prompt.replace(" ", space) + space) == same(prompt)
    assert same(invisible + prompt + invisible) == same(prompt)
    assert same(prompt + ".") == same(prompt) == same("the " + prompt)


def test_twins_and_lists_without_them() -> None:
    assert twice(["a cat", "a dog"]) is None and str(twice(["a cat", "a dog", "a cat"])) == "'a cat'"
    assert str(twice(["a cat", "A cat."])) == "'a cat' and 'A cat.', two spellings of one prompt"
    assert shared(["A cat.", "a fox"], ["a dog", "a cat"]) == [("A cat.", "a cat")]
    assert unique(["a cat", "a dog", "A cat.", "the dog", "a fox"]) == ["a cat", "a dog", "a fox"]


def section(**sets: Any) -> Any:
    content = {"train": ["a red bus"], "heldout": ["a purple cup", "two horses"], **sets}
    return schema.validate(schema.PromptsSection, content, "track.prompts")


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        ({"train": ["a fox", "A fox."]}, "prompts.train holds 'a fox' and 'A fox.', two spellings of one prompt"),
        ({"train": ["A purple  cup."]}, "prompts.train and prompts.heldout share 'A purple  cup.' and 'a purple cup', two"),
        ({"validation": ["\ufeffa purple cup"]}, "prompts.validation and prompts.heldout share '\\ufeffa purple cup' and"),
        ({"train": ["\u200b"]}, "prompts.train holds an empty prompt"),
        ({"train": ["a red\x00 bus"]}, "prompts.train holds a control character in 'a red\\x00 bus'"),
        ({"train": ["a red \ud800 bus"]}, "prompts.train holds a control character in 'a red \\ud800 bus'"),
    ],
)  # fmt: skip
def test_a_track_has_no_prompt_in_two_spellings(sets: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError) as refused:
        section(**sets)
    assert expected in str(refused.value)


def test_templates_are_of_a_prompt_in_any_spelling() -> None:
    found = section(templates={"A purple cup.": "things", "two horses": "animals", "a fox": "none"})
    assert found.templates == {"a purple cup": "things", "two horses": "animals", "a fox": "none"}


# ---------------------------------------------------------------- files


BUSES = ["a red bus, parked", 'a "blue" bus', "a green bus at night"]
KINDS = ["red", "", "green"]
TABLE = pandas.DataFrame({"id": [1, 2, 3], "prompt": BUSES, "category": [k or None for k in KINDS]})
FILES: dict[str, Callable[[Path], Any]] = {
    "p.csv": lambda path: TABLE.to_csv(path, index=False),
    "excel.csv": lambda path: TABLE.to_csv(path, index=False, sep=";", encoding="utf-8-sig"),
    "P.CSV": lambda path: TABLE.rename(columns=str.title).to_csv(path),
    "p.tsv": lambda path: TABLE.to_csv(path, sep="\t", index=False),
    "plain.tsv": lambda path: path.write_text(
        "Prompt\tCategory\n" + "".join(f"{p}\t{k}\n" for p, k in zip(BUSES, KINDS, strict=True))
    ),
    "p.json": lambda path: TABLE.to_json(path, orient="records"),
    "p.jsonl": lambda path: TABLE.to_json(path, orient="records", lines=True),
    "p.ndjson": lambda path: TABLE.rename(columns={"prompt": "text"}).to_json(path, orient="records", lines=True),
    "p.parquet": lambda path: TABLE.to_parquet(path),
    "categories.parquet": lambda path: TABLE.astype({"prompt": "category"}).to_parquet(path),
    "p.txt": lambda path: path.write_text(
        "".join(f"{p}\t{k}\r\n" for p, k in zip(BUSES, KINDS, strict=True)), newline="", encoding="utf-16"
    ),
    "prompts": lambda path: path.write_text("\n".join(f"{p}\t{k}" for p, k in zip(BUSES, KINDS, strict=True))),
}


@pytest.mark.parametrize("name", FILES)
def test_every_form_gives_the_same_prompts_and_templates(name: str, tmp_path: Path) -> None:
    FILES[name](tmp_path / name)
    assert read_prompts(tmp_path / name) == (BUSES, {BUSES[0]: "red", BUSES[2]: "green"})


@pytest.mark.parametrize(
    "content", [BUSES, [{"Prompt": p} for p in BUSES], [{"caption": p, "prompts": 1} for p in BUSES]]
)
def test_json_of_texts_and_of_objects(content: Any, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps(content, indent=1))
    (tmp_path / "p.jsonl").write_text("\n\n".join(map(json.dumps, content)))
    assert read_prompts(tmp_path / "p.json") == read_prompts(tmp_path / "p.jsonl") == (BUSES, {})


def test_lines_end_where_lines_end_and_nowhere_else(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(
        "\ufeffa red bus,\u2028seen from the side\na blue bus\x0bat\x0c night\r\ra green bus\x85parked\n\ufeffa fox".encode()
    )
    assert read_prompts(path)[0] == [
        "a red bus, seen from the side", "a blue bus at night", "a green bus parked", "a fox",
    ]  # fmt: skip
    path.with_suffix(".csv").write_bytes('prompt\n"a red\u2028bus\nat night"\n'.encode())
    assert read_prompts(path.with_suffix(".csv"))[0] == ["a red bus at night"]


REFUSED: list[tuple[str, bytes, str]] = [
    ("p.txt", b'{"prompt": "a red bus"}\n{"prompt": "a blue bus"}\n', "is JSON (.json; with an object a line .jsonl)"),
    ("p.txt", b'["a red bus", "a blue bus"]', "is JSON (.json), by its content: its name must end so"),
    ("p.txt", b'[\n  "a red bus"\n]', "is JSON (.json)"),
    ("p.txt", b'id,prompt\n1,"a red bus, parked"\n2,a fox\n', "is a table with the columns id, prompt (.csv)"),
    ("p", b"id;prompt\n1;a red bus\n2;a fox\n", "is a table with the columns id, prompt (.csv)"),
    ("p.txt", b"Prompt\tCategory\na red bus\tbuses\n", "is a table with the columns Prompt, Category (.tsv)"),
    ("p.txt", b"prompt\na red bus\n", "is a table with the column prompt (.csv)"),
    ("p.txt", "a rosé".encode("latin-1"), "no UTF-8 text"),
    ("p.txt", "\ufeffa bus".encode("utf-16-le") + b"\x00", "no UTF-16 text"),
    ("p.txt", "a red bus\na fox".encode("utf-16-le"), "line 1: a NUL character, so it is no text"),
    ("p.txt", b"a red bus\na \x1b[31mfox\n", "line 2: a prompt with the control character '\\x1b': remove it"),
    ("p.txt", b"a red bus\n\xe2\x80\x8b\n", "line 2: the prompt has no visible character"),
    ("p.txt", b"PK\x03\x04rest", "is a zip archive or an office document, no text"),
    ("p.txt", b"PAR1restPAR1", "is Parquet, no text: its name must end in .parquet"),
    ("p.csv", b"a red bus\na blue bus\n", "has no column prompt or text or caption; it has ['a red bus']"),
    ("p.csv", b'{"prompt": "a red bus"}\n', "has no column prompt"),
    ("p.csv", b"prompt\na red bus, parked\n", "row 1 below the header: 2 cells under 1 columns: write a prompt that"),
    ("p.csv", b'id,prompt\n1,"a red bus\n2,a blue bus\n', "line 3: unexpected end of data"),
    ("p.csv", b"id,prompt\n1,a red bus\n2,\n", "row 2 below the header: no prompt"),
    ("p.csv", b"id,prompt\n1,a red bus\n2\n", "row 2 below the header: no prompt"),
    ("p.csv", b"prompt,prompt\na,b\n", "has 2 columns prompt: leave one"),
    ("p.csv", b"", "has no column prompt"),
    ("p.csv", b"prompt\n", "holds no prompt"),
    ("p.tsv", b"a red bus\tbuses\n", "has no column prompt"),
    ("p.json", b'{"prompt": "a red bus"}\n{"prompt": "a fox"}', "is no JSON (Extra data: line 2 column 1 (char 24)); an object"),
    ("p.json", b'{"prompts": ["a red bus"]}', "is no list: give a list of prompts"),
    ("p.json", b'[{"prompt": "a red bus"}, {"prompt": null}]', "row 2: no prompt"),
    ("p.json", b'[{"prompt": "a red bus"}, {"title": "x"}]', "row 2: no prompt or text or caption; it has ['title']"),
    ("p.json", b'["a red bus", 4, "a fox"]', "row 2: 4 is no prompt: give a text"),
    ("p.json", b'["a red \\ud800 bus"]', "row 1: a prompt with the control character '\\ud800'"),
    ("p.json", b"[]", "holds no prompt"),
    ("p.json", b"[" * 100_000, "is no JSON"),
    ("p.jsonl", b'{"prompt": "a red bus"}\n\n{"prompt": "  "}', "line 3: no prompt"),
    ("p.jsonl", b'[\n"a red bus"\n]', "line 1 is no JSON"),
    ("p.jsonl", b'["a red bus"]', "line 1: ['a red bus'] is no prompt"),
    ("p.parquet", b"a red bus\n", "cannot be read as Parquet"),
    ("p.parquet", b"PAR1restPAR1", "cannot be read as Parquet"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "expected"), REFUSED)
def test_what_is_no_file_of_prompts_is_one_line(name: str, content: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError) as refused:
        read_prompts(path)
    assert str(refused.value).startswith(f"prompts file {path}") and expected in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "text", ["[cat] on a mat", "text", "text, neon sign, at night", '"a red bus"', "{a|b} cat", "# one"]
)
def test_prompts_that_look_like_another_form_and_are_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(f"{text}\na fox, at night, in snow\n")
    assert read_prompts(tmp_path / "p.txt")[0] == [text, "a fox, at night, in snow"]


@pytest.mark.parametrize("values", [["a fox", None], ["a fox", ""], [1, 2], [b"a fox", b"x"], [["a fox"], ["x"]]])
def test_columns_of_parquet_that_hold_no_prompts(values: list[Any], tmp_path: Path) -> None:
    pandas.DataFrame({"prompt": values}).to_parquet(tmp_path / "p.parquet")
    with pytest.raises(UsageError, match=r"p.parquet, row \d: "):
        read_prompts(tmp_path / "p.parquet")


def test_tracks_and_the_source_lines_read_every_form(tmp_path: Path) -> None:
    words = [f"a llama number {i}" for i in range(9)]
    pandas.DataFrame({"prompt": words, "template": "llamas"}).to_parquet(tmp_path / "held.parquet")
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"prompt": f"{w} in snow"}) for w in words))
    toml = '\ufeffname = "own"\r\nversion = 1\r\nextends = "micro"\r\n[prompts]\r\n'
    toml += 'validation = []\r\ntrain = "train.jsonl"\r\nheldout = "held.parquet"\r\n'
    (tmp_path / "own.toml").write_bytes(toml.encode())
    found = schema.read(tmp_path / "own.toml")["prompts"]
    assert found["heldout"] == words and set(found["templates"].values()) == {"llamas"} and len(found["train"]) == 9
    rows = sources.resolve({"source": "lines", "heldout": 3}, tmp_path / "held.parquet", "own")
    assert sorted(rows["train"] + rows["heldout"]) == words and set(rows["templates"]) == set(rows["heldout"])


def test_a_copy_takes_each_prompt_once_and_its_split_is_where_it_was(tmp_path: Path) -> None:
    def split(*lines: str) -> dict[str, Any]:
        (tmp_path / "p.txt").write_text("\n".join(lines))
        return sources.resolve({"source": "lines", "heldout": 2, "validation": 1}, tmp_path / "p.txt", "own")

    words = [f"a llama, number {i}" for i in range(6)]
    found = split(*words)
    # Computed by the rule of the first release: ranked by the SHA-256 of the case-folded prompt without its full stop.
    assert found["heldout"] == [words[5], words[3]] and found["validation"] == [words[2]]
    assert split(*words, "the LLAMA number\u00a03!") == found
