"""What a plugin says of itself, read in its source: importing every plugin takes seconds, and a list needs two lines of each."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from bench_dfusion.registry import Plugin

ISOLATED = " [isolated: an environment of its own]"  # after what a reward with `requirements` is


@dataclass(frozen=True)
class Description:
    """In one line what a plugin is, and the paper it is from (empty where it names none)."""

    summary: str
    paper: str


def describe(plugin: Plugin) -> Description:
    """What a plugin is. It is imported where its source does not say. Raises PluginError where that fails."""
    found = _in_source(plugin)
    if found is None:
        value = plugin.load()
        if plugin.kind == "tracks":
            return Description(track_summary(value, Path(value())), "")
        found = Description(summary_of(value), str(getattr(value, "paper", "")))
    return found


def summary_of(value: Any) -> str:
    """The line of a loaded plugin: its `summary`, else the first of its docstring."""
    text = getattr(value, "summary", None) or (value.__doc__ or "").strip()
    note = ISOLATED if getattr(value, "requirements", ()) else ""
    return text.splitlines()[0] + note if text else ""


def track_summary(value: Any, path: Path) -> str:
    """The line of a track: of the function that an entry point names, else the first comment of its file."""
    line = path.read_text(encoding="utf-8").splitlines()[0] if path.is_file() else ""
    return summary_of(value) or line.removeprefix("#").strip()


def _in_source(plugin: Plugin) -> Description | None:
    """From the class or function that an entry point names, where it stands in its module as such with constant texts."""
    if plugin.entry is None or (path := _file(plugin.entry.module)) is None:
        return None
    try:
        body = ast.parse(path.read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return None
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == plugin.entry.attr:
            values = dict(_values(node, body))
            text = _text(values.get("summary")) or (ast.get_docstring(node) or "").strip()
            if text:
                note = ISOLATED if "requirements" in values else ""
                return Description(text.splitlines()[0] + note, _text(values.get("paper")))
    return None


def _values(node: ast.stmt, module: Sequence[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    """What a class gives to names, after what its bases in the same module do."""
    if not isinstance(node, ast.ClassDef):
        return
    bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
    for other in module:
        if isinstance(other, ast.ClassDef) and other.name in bases:
            yield from _values(other, module)
    for part in node.body:
        target = part.targets[0] if isinstance(part, ast.Assign) else getattr(part, "target", None)
        value = getattr(part, "value", None)
        if isinstance(target, ast.Name) and isinstance(value, ast.expr):
            yield target.id, value


def _text(value: ast.expr | None) -> str:
    """A constant text, empty where it is something else."""
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else ""


def _file(module: str) -> Path | None:
    """The source file of a module. Neither it nor the packages that it is in are imported."""
    parts = module.split(".")
    spec: ModuleSpec | None = None
    for n in range(1, len(parts) + 1):
        where = spec.submodule_search_locations if spec else None
        if n > 1 and where is None:
            return None
        spec = _spec(".".join(parts[:n]), where)
        if spec is None:
            return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def _spec(name: str, where: Any) -> ModuleSpec | None:
    known = sys.modules.get(name)
    if known is not None and known.__spec__ is not None:
        return known.__spec__
    finders = (finder for finder in sys.meta_path if hasattr(finder, "find_spec"))
    return next((spec for finder in finders if (spec := finder.find_spec(name, where)) is not None), None)
