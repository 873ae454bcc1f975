"""What a plugin says of itself, read in its source: importing every plugin takes seconds, and a list needs two lines of each."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from bench_dfusion.registry import Plugin


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
        found = Description(summary_of(value), str(getattr(value, "paper", "")))
    return found


def summary_of(value: Any) -> str:
    """The line of a loaded plugin: its `summary`, else the first of its docstring."""
    text = getattr(value, "summary", None) or (value.__doc__ or "").strip()
    return text.splitlines()[0] if text else ""


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
            constants = dict(_constants(node))
            text = constants.get("summary") or (ast.get_docstring(node) or "").strip()
            if text:
                return Description(text.splitlines()[0], constants.get("paper", ""))
    return None


def _constants(node: ast.ClassDef | ast.FunctionDef) -> Iterator[tuple[str, str]]:
    """The texts that a class body gives to names."""
    for part in node.body if isinstance(node, ast.ClassDef) else ():
        target = part.targets[0] if isinstance(part, ast.Assign) else getattr(part, "target", None)
        value = getattr(part, "value", None)
        if isinstance(target, ast.Name) and isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield target.id, value.value


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
