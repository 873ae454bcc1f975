"""Which module knows which: rooms look down only, nothing goes round in a circle, lazy imports included."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import warnings
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from bench_dfusion import _moved

ROOT = Path(__file__).parents[1]
# From the ground up. What stands in one line with its room may import what stands above it here, and its own room.
ROOMS = [
    "errors",
    "version",
    "_moved",
    "util",
    "registry",
    "descriptions",
    "micro",
    "models",
    "diffusion",
    "tracks",
    "rewards",
    "results",
    "builders",
    "algorithm",
    "objectives",
    "testing",
    "plugin_files",
    "runs",
    "sweeps",
    "report",
    "publish",
    "doctor",
    "cli",
    "__init__",
    "__main__",
]
# The contracts stand above the registry, whose overloads name them for type checkers.
FOR_TYPES_ONLY = {"bench_dfusion.registry"}
PLUGINS = {"algorithms": "objectives", "reward_models": "rewards"}  # the highest room that plugins of ours may see


def modules() -> dict[str, Path]:
    found = {}
    for folder in ("bench_dfusion", *PLUGINS):
        for path in (ROOT / folder).rglob("*.py"):
            found[path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")] = path
    return found


def imports(tree: ast.AST, types: bool) -> Iterator[str]:
    """The modules and names that a file imports anywhere; without `types` not what is imported for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level and node.module, "imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from imports(node, types)


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """Of each module those of this project that it imports."""
    known = modules()

    def module_of(name: str) -> str | None:
        for folder in PLUGINS:
            name = name.replace(f"bench_dfusion.{folder}", folder)
        while name and name not in known:
            name = name.rpartition(".")[0]
        return name or None

    return {
        name: {
            module
            for imported in imports(ast.parse(path.read_text()), name not in FOR_TYPES_ONLY)
            if (module := module_of(imported)) not in (None, name)
        }
        for name, path in known.items()
    }  # type: ignore[misc]


def room(module: str) -> str:
    first, _, rest = module.partition(".")
    return first if first in PLUGINS else rest.partition(".")[0] or "__init__"


def test_no_module_imports_itself_by_way_of_others(graph) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_rooms_look_down(graph) -> None:
    assert {room(m) for m in graph} - PLUGINS.keys() == set(ROOMS), "a room has no place in the order"
    height = {name: n for n, name in enumerate(ROOMS)} | {own: ROOMS.index(top) for own, top in PLUGINS.items()}
    up = [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in others
        if room(module) != room(other) and height[room(other)] > height[room(module)]
    ]
    assert not up


def test_core_reaches_plugins_through_the_registry_alone(graph) -> None:
    reached = {f"{m} imports {o}" for m, others in graph.items() for o in others if room(o) in PLUGINS != room(m)}
    assert not {text for text in reached if not text.startswith(tuple(PLUGINS))}


def test_training_knows_nothing_of_what_is_made_of_its_results() -> None:
    code = "import sys, bench_dfusion.runs.trainer; print(*(m for m in sys.modules if m.startswith('bench_dfusion')))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not [m for m in loaded if room(m) in {"publish", "report", "doctor", "cli", "sweeps"}]


@pytest.mark.parametrize("old", sorted(set(_moved.MOVED) - {"launch.worker"}))
def test_old_names_of_modules_go_on_working(old: str) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        sys.modules.pop(f"bench_dfusion.{old}", None)
        module = importlib.import_module(f"bench_dfusion.{old}")
    for new in _moved.MOVED[old]:
        names = [n.name for n in ast.parse(modules()[f"bench_dfusion.{new}"].read_text()).body if hasattr(n, "name")]
        own = importlib.import_module(f"bench_dfusion.{new}")
        assert all(hasattr(module, name) for name in names)
        assert any(getattr(module, name) is getattr(own, name) for name in names)
        assert any(f"import bench_dfusion.{new}" in str(w.message) for w in said) or "and" in str(said[0].message)
    for renamed in (name for name in _moved.RENAMED if name.rpartition(".")[0] == old):
        assert getattr(module, renamed.rpartition(".")[2]).__name__ == _moved.RENAMED[renamed]
    with pytest.raises(AttributeError, match="has no attribute 'never_there'"):
        module.never_there  # noqa: B018
