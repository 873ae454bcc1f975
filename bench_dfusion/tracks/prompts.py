"""Prompts: what makes two of them one, and the files that people keep them in."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from reprlib import repr as short
from typing import Any, NamedTuple

from bench_dfusion.errors import UsageError
from bench_dfusion.util import texts

# ---------------------------------------------------------------- the same prompt

ARTICLES = {"a", "an", "the"}
# One sign for what NFKC leaves apart: apostrophes, the minus, the fraction's stroke, and letters and signs that are blank.
ALIKE = {ord(c): "'" for c in "`´‘’‛ʼ"} | {0x2212: "-", 0x2044: "/"} | dict.fromkeys((0x2800, 0x3164, 0xFFA0), " ")
# What is not shown though its category does not say so: joiners and variation selectors.
INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]")
SIGNS = set("#%&@‰")  # punctuation to Unicode, but read as words


@lru_cache(maxsize=1 << 15)
def same(prompt: str) -> str:
    """The normal form of a prompt: two prompts are the same where it is equal, and only there.

    Neither case, spacing, punctuation, articles (a, an, the before another word), invisible characters nor the way
    a character is encoded (NFKC) makes another prompt; punctuation between two digits does ("3.5", "2-3"). Of a prompt
    of punctuation alone the form is its text, of one of invisible characters alone the empty text.
    """
    while True:  # until nothing changes: what is left out may bring together what composes
        form = _reduced(prompt)
        if form == prompt:
            return form
        prompt = form


def _reduced(prompt: str) -> str:
    text = prompt.translate(ALIKE)
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    if not text.isprintable():
        text = "".join(c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cf"))
    text = " ".join(INVISIBLE.sub("", text).split())
    words = re.sub(r"[^\w\s]|_", _mark, text).split()
    return " ".join(w for i, w in enumerate(words) if w not in ARTICLES or i == len(words) - 1) or text


def _mark(match: re.Match[str]) -> str:
    """What stands for a character that is no letter, digit or space."""
    mark, text, (start, end) = match.group(), match.string, match.span()
    category = unicodedata.category(mark)
    if category[0] != "P" or mark in SIGNS:
        return mark
    if start and text[start - 1].isdecimal() and end < len(text) and text[end].isdecimal():
        return "-" if category == "Pd" else mark
    return "" if mark == "'" else " "


class Twins(NamedTuple):
    """Two spellings of one prompt."""

    first: str
    second: str

    def __str__(self) -> str:
        if self.first == self.second:
            return repr(self.first)
        return f"{self.first!r} and {self.second!r}, two spellings of one prompt"


def twice(prompts: Iterable[str]) -> Twins | None:
    """The first prompt that is there twice, in its two spellings."""
    seen: dict[str, str] = {}
    for prompt in prompts:
        if same(prompt) in seen:
            return Twins(seen[same(prompt)], prompt)
        seen[same(prompt)] = prompt
    return None


def unique(prompts: Iterable[str]) -> list[str]:
    """Each prompt once, in the spelling and at the place where it is first."""
    found: dict[str, str] = {}
    for prompt in prompts:
        found.setdefault(same(prompt), prompt)
    return list(found.values())


def shared(prompts: Iterable[str], others: Iterable[str]) -> list[Twins]:
    """The prompts that are among the others too, each with its spelling there."""
    known = {same(other): other for other in others}
    return [Twins(prompt, known[same(prompt)]) for prompt in prompts if same(prompt) in known]


def unprintable(prompt: str) -> str | None:
    """The first character that no prompt can have: a control character that is no space, or half a character."""
    if prompt.isprintable():
        return None
    return next((c for c in prompt if not c.isspace() and unicodedata.category(c) in ("Cc", "Cs")), None)


# ---------------------------------------------------------------- files of prompts

PROMPT_COLUMNS = ("prompt", "text", "caption")
TEMPLATE_COLUMNS = ("template", "category")

Entry = tuple[str, Any, Any]  # where in the file, the prompt, its template


def read_prompts(path: Path) -> tuple[list[str], dict[str, str]]:
    """The prompts of a file in its order, and the templates of those that have one.

    The end of its name says how it is read: .csv, .tsv, .json, .jsonl, .ndjson and .parquet hold a column `prompt`
    (`PROMPT_COLUMNS`) and may hold one of `TEMPLATE_COLUMNS`; any other is text with a prompt a line, which a tab and
    a template may follow. Spaces of every kind within a prompt count as one. Raises UsageError, in one line, for what
    is of another form than its name says, and for a prompt that is none.
    """
    prompts: list[str] = []
    templates: dict[str, str] = {}
    for place, given, category in FORMS.get(path.suffix.lower(), _text)(path):
        where = f"prompts file {path}, {place}"
        if given is None or (isinstance(given, str) and not given.strip()):
            raise UsageError(f"{where}: no prompt")
        if not isinstance(given, str):
            raise UsageError(f"{where}: {short(given)} is no prompt: give a text")
        prompt = _plain(given)
        character = unprintable(prompt)
        if character is not None:
            raise UsageError(f"{where}: a prompt with the control character {character!a}: remove it")
        if not same(prompt):
            raise UsageError(f"{where}: the prompt has no visible character")
        prompts.append(prompt)
        if category is not None and category == category and _plain(str(category)):
            templates[prompt] = _plain(str(category))
    if not prompts:
        raise UsageError(f"prompts file {path} holds no prompt")
    return prompts, templates


def column(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    """The name that is the first wanted one, in any case."""
    plain = {name.strip().casefold(): name for name in reversed(names)}
    return next((plain[name] for name in wanted if name in plain), None)


def _plain(text: str) -> str:
    # A mark in the middle of a file is where two files were joined.
    return " ".join(text.replace("\ufeff", " ").split())


def _text(path: Path) -> Iterator[Entry]:
    text = _content(path)
    kind = _other_form(text)
    if kind:
        raise UsageError(f"prompts file {path} is {kind}, by its content: its name must end so")
    for number, line in enumerate(text.split("\n"), 1):
        if _plain(line):
            prompt, _, template = line.strip().partition("\t")
            yield f"line {number}", prompt, template


def _other_form(text: str) -> str | None:
    """The form, other than a prompt a line, that a text is plainly in."""
    lines = [line for line in text.split("\n") if line.strip()]
    first = lines[0].strip() if lines else ""
    if first.startswith(("[", "{")):
        value = _json(first)
        if isinstance(value, dict):
            return "JSON (.json; with an object a line .jsonl)"
        listed = isinstance(value, list) and any(isinstance(v, str | dict) for v in value)
        if listed or first in ("[", "{", "[{") or isinstance(_json(text), list | dict):
            return "JSON (.json)"
    for ending, delimiter in (("csv", ","), ("csv", ";"), ("tsv", "\t")):
        header = first.split(delimiter)
        if column(header, PROMPT_COLUMNS) and all(re.fullmatch(r"[\w.-]*", name) for name in header):
            if len(header) == 1 and first.casefold() != PROMPT_COLUMNS[0]:
                continue  # a prompt of the one word "text"
            with suppress(csv.Error):
                table = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
                if len(lines) > 1 and all(len(row) == len(header) for row in table):
                    return f"a table with the column{'s' * (len(header) > 1)} {', '.join(header)} (.{ending})"
    return None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _csv(path: Path) -> Iterator[Entry]:
    return _table(path, _content(path), (",", ";", "\t"), (csv.QUOTE_MINIMAL,))


def _tsv(path: Path) -> Iterator[Entry]:
    # Quotes may be letters there: prompts hold unpaired ones.
    return _table(path, _content(path), ("\t",), (csv.QUOTE_MINIMAL, csv.QUOTE_NONE))


def _table(path: Path, text: str, delimiters: Sequence[str], quotings: Sequence[Any]) -> Iterator[Entry]:
    first = text.lstrip("\n").partition("\n")[0]
    split = [(d, next(csv.reader([first], delimiter=d), [])) for d in delimiters]
    delimiter = next((d for d, names in split if column(names, PROMPT_COLUMNS)), delimiters[0])
    for quoting in quotings:
        try:
            # strict: an unpaired quote would swallow the rows below it
            table = csv.reader(
                io.StringIO(text), delimiter=delimiter, quoting=quoting, skipinitialspace=True, strict=True
            )
            rows = [row for row in table if row]
            break
        except csv.Error as error:
            problem = f"prompts file {path}, line {table.line_num}: {error}"
    else:
        raise UsageError(problem)
    header = rows[0] if rows else []
    wanted, template = _columns(path, header)
    for number, row in enumerate(rows[1:], 1):
        if len(row) > len(header):
            raise UsageError(
                f"prompts file {path}, row {number} below the header: {len(row)} cells under {len(header)} columns: "
                "write a prompt that holds the separator in quotes"
            )
        cells = dict(zip(header, [*row, *[""] * (len(header) - len(row))], strict=True))
        yield f"row {number} below the header", cells[wanted], cells.get(template or "")


def _json_list(path: Path) -> Iterator[Entry]:
    text = _content(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = "; an object a line is .jsonl, a prompt a line .txt"
        raise UsageError(f"prompts file {path} is no JSON ({error}){hint}") from None
    if not isinstance(content, list):
        raise UsageError(f"prompts file {path} is no list: give a list of prompts, or of objects with a prompt")
    for number, value in enumerate(content, 1):
        yield _object(path, f"row {number}", value)


def _json_lines(path: Path) -> Iterator[Entry]:
    for number, line in enumerate(_content(path).split("\n"), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UsageError(
                    f"prompts file {path}, line {number} is no JSON ({error}); a list over several lines is .json, "
                    "a prompt a line .txt"
                ) from None
            yield _object(path, f"line {number}", value)


def _object(path: Path, place: str, value: Any) -> Entry:
    if not isinstance(value, dict):
        return place, value, None
    wanted = column(list(value), PROMPT_COLUMNS)
    if wanted is None:
        raise UsageError(f"prompts file {path}, {place}: no {' or '.join(PROMPT_COLUMNS)}; it has {short(list(value))}")
    return place, value[wanted], value.get(column(list(value), TEMPLATE_COLUMNS) or "")


def _parquet(path: Path) -> Iterator[Entry]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open(path, "rb") as file:
            table = pq.ParquetFile(file)
            wanted, template = _columns(path, table.schema_arrow.names)
            found = table.read(columns=[wanted, *([template] if template else [])])
            columns = [found.column(name).to_pylist() for name in (wanted, template) if name]
    except FileNotFoundError:
        raise UsageError(f"no prompts file {path}") from None
    except UsageError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UsageError(f"prompts file {path} cannot be read as Parquet ({reason})") from None
    for number, row in enumerate(zip(*columns, strict=True), 1):
        yield f"row {number}", row[0], row[1] if template else None


def _columns(path: Path, names: Sequence[str]) -> tuple[str, str | None]:
    """The columns of the prompts and of their templates."""
    wanted = column(names, PROMPT_COLUMNS)
    if wanted is None:
        raise UsageError(
            f"prompts file {path} has no column {' or '.join(PROMPT_COLUMNS)}; it has {short(list(names))}: name the "
            "column so, or give a text file (.txt) with a prompt a line"
        )
    if names.count(wanted) > 1:
        raise UsageError(f"prompts file {path} has {names.count(wanted)} columns {wanted}: leave one")
    return wanted, column(names, TEMPLATE_COLUMNS)


def _content(path: Path) -> str:
    return texts.read(path, "prompts file")


FORMS: dict[str, Callable[[Path], Iterator[Entry]]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".json": _json_list,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".parquet": _parquet,
}
