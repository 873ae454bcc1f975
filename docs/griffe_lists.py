"""How the API reference reads this project's docstrings: lines of `name   meaning` become a list."""

from __future__ import annotations

import re
from typing import Any

import griffe

ENTRY = re.compile(r"^(?P<names>[\w`.*]+(?:, [\w`.*]+)*) {2,}(?P<text>\S.*)$")


def listed(docstring: str) -> str:
    """The docstring with each stretch of such lines, and the indented lines that go on with one, as a Markdown list."""
    lines: list[str] = []
    within = False
    for line in docstring.splitlines():
        entry = ENTRY.match(line)
        if entry:
            lines += ([] if within or not lines or not lines[-1] else [""]) + [f"- `{entry['names']}`: {entry['text']}"]
            within = True
        elif within and line.startswith("  "):
            lines[-1] += f" {line.strip()}"
        else:
            lines += [""] * (within and bool(line.strip())) + [line]
            within = False
    return "\n".join(lines)


class Lists(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **more: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = listed(obj.docstring.value)
