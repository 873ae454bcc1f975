"""Prompts of published prompt sets, read from the user's own copy and split into train, validation and held-out.

Their licences do not all allow shipping the prompts, so a track names a source and how to split it, and `--prompts`
says where the copy is: a file or directory of the upstream repository, or `hf:REPO`, a dataset of the Hub (or a local
directory that datasets.load_dataset reads).

The split depends on the prompts alone, not on their order: within each category prompts are ranked by a hash of
their text, and categories are interleaved in proportion to their sizes. The held-out set is taken first, then
validation, then train. Where upstream has a split of its own (T2I-CompBench, D-Fusion), held-out prompts come from its
validation files, the others from its training files.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any, Literal

from pydantic import Field, field_validator

from bench_dfusion import errors
from bench_dfusion.errors import UsageError, plain
from bench_dfusion.tracks import schema
from bench_dfusion.tracks.prompts import PROMPT_COLUMNS, column, read_prompts, same
from bench_dfusion.tracks.schema import PromptsSection, Section
from bench_dfusion.util import files, hub, parallel, texts


class SourceSection(Section):
    """`[prompts]` of a track whose prompts come from the user's copy. A size is a count, or a share in (0, 1)."""

    source: str = Field(
        description="prompt set: geneval, t2i-compbench, partiprompts, dsg, d-fusion or lines (a prompts file of your own)"
    )
    sha256: str | None = Field(
        None,
        pattern="^[0-9a-f]{64}$",
        description="SHA-256 of the source's file (of several files: of lines `NAME SHA256`, one a file); None: not fixed",
    )
    heldout: int | float = Field(description="size of the held-out set (count, or share of the prompts)")
    validation: int | float = Field(0, description="size of the validation set (count or share)")
    train: int | float | None = Field(
        None, description="size of the train set (count or share); None: all that is left"
    )
    categories: tuple[str, ...] | None = Field(None, min_length=1, description="categories to take; None: all")
    max_words: int | None = Field(
        None,
        ge=1,
        description="longer prompts are left out (count); None: none is. CLIP's text encoders read 77 tokens",
    )
    items: bool = Field(False, description="leave out prompts in which D-Fusion's rule finds no item")

    @field_validator("heldout", "validation", "train", mode="before")
    @classmethod
    def _size(cls, value: Any) -> Any:
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
            return value
        if isinstance(value, float) and 0 < value < 1:
            return value
        raise ValueError("a size is a count (40) or a share between 0 and 1 (0.3)")


@dataclass(frozen=True)
class Row:
    """A prompt of a source, its category, and the set it is in upstream where there are any."""

    prompt: str
    category: str = ""
    split: Literal["train", "heldout"] | None = None

    @property
    def key(self) -> str:
        return same(self.prompt)

    @property
    def rank(self) -> str:
        """What a split goes by; not the key, so that splits stay where they were when the key changed."""
        return hashlib.sha256(self.prompt.casefold().rstrip(" .").encode()).hexdigest()


@dataclass(frozen=True)
class Source:
    """A published prompt set: what it is, where it lies in its repository, and how a file of it is read."""

    title: str
    home: str
    places: tuple[tuple[str, ...], ...]  # below a directory the user gives: the first whose patterns are all there
    parse: Callable[[Path], Iterator[Row]]

    @property
    def what(self) -> str:
        """What `--prompts` takes, in words."""
        patterns = " and ".join(self.places[0])
        return f"the directory with {patterns}" if "*" in patterns else f"the directory or its {patterns}"

    @property
    def hint(self) -> str:
        """What a user does to have the prompts."""
        if not self.places:
            return "give --prompts FILE, a prompt a line or a table with a column prompt"
        return f"get {self.home} and give --prompts COPY, {self.what}"


def split_changes(changes: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A user's changes of a source's section: those of the section, and whole lists of prompts that replace its own."""
    lists = {k: v for k, v in changes.items() if k in PromptsSection.model_fields and not isinstance(v, int | float)}
    return {k: v for k, v in changes.items() if k not in lists}, lists


def resolve(section: Mapping[str, Any], copy: Path | str | None, name: str) -> dict[str, Any]:
    """train, validation, heldout and templates (the held-out prompts' categories) of a track's source section.

    copy   file or directory of upstream, or hf:REPO
    name   the track's, for messages
    Raises UsageError in one line.
    """
    asked = check(section, name)
    source = SOURCES[asked.source]
    if copy is None:
        raise UsageError(f"track {name} takes its prompts from {source.title}: {source.hint}")
    rows = _with_prompts(_rows(asked, str(copy)), str(copy), source)
    kept = _kept(rows, asked)
    if not kept:
        raise UsageError(f"{copy}: none of its {len(rows)} prompts is left by categories, max_words and items")
    found = _split(kept, asked, f"track {name} on {copy}")
    if not found["train"] or len(found["heldout"]) < 2:
        raise UsageError(
            f"track {name}: {copy} has {len(kept)} prompts, which leaves {len(found['train'])} to train on and "
            f"{len(found['heldout'])} held out (1 and 2 at least): give the whole copy, or change the sizes"
        )
    return found


def check(section: Mapping[str, Any], name: str) -> SourceSection:
    """The section, validated. Raises UsageError."""
    if section.get("source") not in SOURCES:
        raise UsageError(f"track {name}: {errors.unknown('prompts.source', str(section.get('source')), SOURCES)}")
    return schema.validate(SourceSection, dict(section), "track.prompts")


def _rows(asked: SourceSection, copy: str) -> list[Row]:
    source = SOURCES[asked.source]
    if copy.startswith("hf:"):
        if asked.sha256:
            raise UsageError(f"the track fixes the sha256 of a file of {source.title}: give --prompts FILE, not {copy}")
        return _from_dataset(copy.removeprefix("hf:"), asked.source)
    path = Path(copy)
    if not path.exists():
        raise UsageError(f"no prompts at {copy}: {source.hint}")
    found = _find(path, source)
    if asked.sha256:
        digest = files.sha256(found[0]) if len(found) == 1 else _tree(found)
        if digest != asked.sha256:
            raise UsageError(
                f"{copy} hashes to {digest[:12]}…, the track fixes {asked.sha256[:12]}…: get the version it was made for"
            )
    rows = []
    for file in found:
        try:
            rows += [Row(" ".join(r.prompt.split()), " ".join(r.category.split()), r.split) for r in source.parse(file)]
        except csv.Error as error:
            raise UsageError(f"{file}: {error}") from None
    return rows


def _with_prompts(rows: list[Row], copy: str, source: Source) -> list[Row]:
    """The rows that have a prompt; says how many have none."""
    found = [row for row in rows if row.prompt]
    if not found:
        raise UsageError(f"{copy} holds no prompt of {source.title}")
    if len(found) < len(rows) and parallel.first():
        left_out = f"{copy}: left out {len(rows) - len(found)} of {len(rows)} rows, which have no prompt"
        print(plain(left_out), file=sys.stderr, flush=True)
    return found


def _find(path: Path, source: Source) -> list[Path]:
    """The files of a source at or below the path a user gave."""
    if path.is_file() and not any("*" in pattern for place in source.places for pattern in place):
        return [path]
    for place in source.places:
        found = [sorted(path.glob(pattern)) for pattern in place]
        if all(found):
            return [file for part in found for file in part]
    raise UsageError(f"{path} is no copy of {source.title}: {source.hint}")


def _tree(paths: list[Path]) -> str:
    lines = "".join(f"{p.name} {files.sha256(p)}\n" for p in paths)
    return hashlib.sha256(lines.encode()).hexdigest()


def _kept(rows: list[Row], asked: SourceSection) -> list[Row]:
    """Each prompt once, without what the section leaves out; one in two sets of upstream stays in the held-out one."""
    known = sorted({r.category for r in rows if r.category})
    for category in asked.categories or ():
        if category not in known:
            raise UsageError(errors.unknown("prompts.categories", category, known))
    unique: dict[str, Row] = {}
    for row in sorted(rows, key=lambda r: (r.split != "heldout", r.prompt, r.category)):
        unique.setdefault(row.key, row)
    return [
        row
        for row in unique.values()
        if (asked.categories is None or row.category in asked.categories)
        and (asked.max_words is None or len(row.prompt.split()) <= asked.max_words)
        and (not asked.items or _has_item(row.prompt))
    ]


def _has_item(prompt: str) -> bool:
    from bench_dfusion.tracks.items import find_items

    try:
        return bool(find_items(prompt))
    except ValueError:
        return False


def _split(rows: list[Row], asked: SourceSection, where: str) -> dict[str, Any]:
    own = any(row.split for row in rows)
    pool = _interleaved([row for row in rows if row.split != "train"])
    heldout = pool[: _count(asked.heldout, len(pool), len(pool), f"{where}: prompts.heldout")]
    if own:
        pool = _interleaved([row for row in rows if row.split == "train"])
        rest = pool
    else:
        rest = pool[len(heldout) :]
    validation = rest[: _count(asked.validation, len(pool), len(rest), f"{where}: prompts.validation")]
    rest = rest[len(validation) :]
    if asked.train is not None:
        rest = rest[: _count(asked.train, len(pool), len(rest), f"{where}: prompts.train")]
    templates = {row.prompt: row.category for row in heldout if row.category}
    return {
        "train": [row.prompt for row in rest],
        "validation": [row.prompt for row in validation],
        "heldout": [row.prompt for row in heldout],
        **({"templates": templates} if templates else {}),
    }


def _count(size: int | float, whole: int, left: int, what: str) -> int:
    count = size if isinstance(size, int) else round(size * whole)
    if count > left:
        raise UsageError(f"{what} asks for {count} prompts and {left} are left: lower it, or give the whole copy")
    return count


def _interleaved(rows: list[Row]) -> list[Row]:
    """The rows so that every beginning has the categories in their proportions; within one, by hash."""
    places: list[tuple[float, str, Row]] = []
    for category in {row.category for row in rows}:
        own = sorted((row for row in rows if row.category == category), key=lambda r: r.rank)
        places += [((i + 0.5) / len(own), row.rank, row) for i, row in enumerate(own)]
    return [row for _, _, row in sorted(places, key=lambda p: p[:2])]


# --- formats


def _geneval(path: Path) -> Iterator[Row]:
    """A JSON object a line, with `prompt` and `tag`."""
    for number, line in enumerate(texts.read(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise UsageError(
                f"{path}:{number} is no JSON object with a prompt: give GenEval's evaluation_metadata.jsonl"
            )
        yield Row(entry["prompt"], str(entry.get("tag") or ""))


def _compbench(path: Path) -> Iterator[Row]:
    """A prompt a line; the file's name is CATEGORY_train.txt or CATEGORY_val.txt."""
    category, _, part = path.stem.rpartition("_")
    for line in texts.read(path).split("\n"):
        if line.strip():
            yield Row(line, category, "train" if part == "train" else "heldout")


def _partiprompts(path: Path) -> Iterator[Row]:
    # Quotes in it are letters: prompts hold unpaired ones.
    yield from _table(path, "\t", csv.QUOTE_NONE, "Prompt", lambda row: row.get("Category") or "")


def _dsg(path: Path) -> Iterator[Row]:
    """Several rows a prompt; the data set it comes from stands before the number in item_id."""
    yield from _table(path, ",", csv.QUOTE_MINIMAL, "text", lambda row: (row.get("item_id") or "").rpartition("_")[0])


def _table(
    path: Path, delimiter: str, quoting: Any, of_prompts: str, category: Callable[[dict[str, str]], str]
) -> Iterator[Row]:
    table = csv.DictReader(io.StringIO(texts.read(path)), delimiter=delimiter, quoting=quoting)
    if of_prompts not in (table.fieldnames or ()):
        raise UsageError(f"{path} has no column {of_prompts!r}: it is not the file the track reads")
    for row in table:
        yield Row(row[of_prompts] or "", category(row))


def _dfusion(path: Path) -> Iterator[Row]:
    """A JSON list of prompts; the file's name is templateN_train.json or templateN_test.json."""
    category, _, part = path.stem.rpartition("_")
    try:
        prompts = json.loads(texts.read(path))
    except (ValueError, RecursionError):
        prompts = None
    if not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts):
        raise UsageError(f"{path} is no JSON list of prompts: give D-Fusion's config/prompt")
    yield from (Row(prompt, category, "train" if part == "train" else "heldout") for prompt in prompts)


def _lines(path: Path) -> Iterator[Row]:
    prompts, templates = read_prompts(path)
    yield from (Row(prompt, templates.get(prompt, "")) for prompt in prompts)


CATEGORY_COLUMNS = ("category", "template", "tag", "item_id")


def _from_dataset(repo: str, source: str) -> list[Row]:
    """The prompts of every split of a dataset that datasets.load_dataset reads."""
    if any("*" in pattern for place in SOURCES[source].places for pattern in place):
        raise UsageError(f"{source} has files for each category: give --prompts DIRECTORY, not hf:REPO")
    hub.look(repo)
    import datasets

    try:
        parts = datasets.load_dataset(repo)
    except Exception as error:  # the Hub's, the network's and every reader's own
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UsageError(f"no dataset {repo!r}, neither a directory here nor reachable on the Hub ({line})") from None
    rows = []
    for part in parts.values():
        wanted = column(part.column_names, PROMPT_COLUMNS)
        if wanted is None:
            raise UsageError(f"dataset {repo} has no column {', '.join(PROMPT_COLUMNS)}; it has {part.column_names}")
        category = column(part.column_names, CATEGORY_COLUMNS)
        categories = [str(c or "") for c in part[category]] if category else [""] * len(part)
        if category == "item_id":
            categories = [c.rpartition("_")[0] for c in categories]
        for number, (prompt, name) in enumerate(zip(part[wanted], categories, strict=True)):
            if not isinstance(prompt, str | None):
                raise UsageError(f"dataset {repo}, row {number}: {short(prompt)} is no prompt: give a text")
            rows.append(Row(" ".join((prompt or "").split()), " ".join(name.split())))
    return rows


SOURCES = {
    "geneval": Source(
        "GenEval",
        "https://github.com/djghosh13/geneval",
        (("prompts/evaluation_metadata.jsonl",), ("evaluation_metadata.jsonl",)),
        _geneval,
    ),
    "t2i-compbench": Source(
        "T2I-CompBench",
        "https://github.com/Karine-Huang/T2I-CompBench",
        (("examples/dataset/*_train.txt", "examples/dataset/*_val.txt"), ("*_train.txt", "*_val.txt")),
        _compbench,
    ),
    "partiprompts": Source(
        "PartiPrompts", "https://github.com/google-research/parti", (("PartiPrompts.tsv",),), _partiprompts
    ),
    "dsg": Source("DSG-1k", "https://github.com/j-min/DSG", (("dsg-1k-anns.csv",),), _dsg),
    "d-fusion": Source(
        "D-Fusion",
        "https://github.com/hu-zijing/D-Fusion",
        (
            ("config/prompt/template*_train.json", "config/prompt/template*_test.json"),
            ("template*_train.json", "template*_test.json"),
        ),
        _dfusion,
    ),
    "lines": Source("a file of your own", "", (), _lines),
}
