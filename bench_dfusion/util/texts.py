"""Texts that users bring. Every file of theirs is read here, so that all are read alike."""

from __future__ import annotations

import codecs
from pathlib import Path

from bench_dfusion.errors import UsageError

# Of UTF-16 the mark is the beginning of UTF-32's, which goes first.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
OTHERS = {
    b"PK\x03\x04": "a zip archive or an office document",
    b"\x1f\x8b": "a gzip archive",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"%PDF": "a PDF document",
}


def read(path: Path, what: str = "") -> str:
    r"""The text of a file in UTF-8, or in UTF-16 or UTF-32 where a byte order mark begins it; without the mark.

    A line ends at \n, \r\n or \r alone, which are all \n here. `what` names the file in the messages. Raises
    UsageError, in one line, where there is no such file or it is no text.
    """
    name = f"{what} {path}".strip()
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"no {what or 'file'} {path}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UsageError(f"{name}: {getattr(error, 'strerror', None) or error}") from None
    if data.startswith(b"PAR1") and data.endswith(b"PAR1"):
        raise UsageError(f"{name} is Parquet, no text: its name must end in .parquet")
    for start, kind in OTHERS.items():
        if data.startswith(start):
            raise UsageError(f"{name} is {kind}, no text: save its content as UTF-8 text")
    encoding = next((e for mark, e in MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UsageError(f"{name}: no {encoding[:6].upper()} text ({error}); save it as UTF-8") from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise UsageError(f"{name}, line {line}: a NUL character, so it is no text: save it as UTF-8 text")
    return text
