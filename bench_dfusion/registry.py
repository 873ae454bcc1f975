"""Plugins by entry point: algorithms, rewards, builders, models, tracks.

A plugin is whatever an installed distribution lists under `bench_dfusion.<kind>`; nothing is imported
before it is named, so a broken plugin breaks only the run that names it. `load_file` registers one file
for a first try.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import os
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

KINDS = ("algorithms", "rewards", "builders", "models", "tracks")
OURS = "bench_dfusion."  # how the names of this package's own modules begin
others: set[str] = set()  # the distributions and files of others whose code this process has imported


class UsageError(ValueError):
    """Something the user gave is wrong: shown as one line, exit status 2, before any compute."""


class PluginError(RuntimeError):
    """A plugin could not be imported; the message names it and its distribution."""


@dataclass(frozen=True)
class Plugin:
    kind: str
    name: str
    source: str  # the distribution's name and version, or a file
    entry: EntryPoint | None = None
    value: Any = None

    def load(self) -> Any:
        """Import the plugin. Raises PluginError, caused by the plugin's own exception."""
        if self.entry is None:
            return self.value
        if self.kind != "tracks" and not self.entry.value.startswith(OURS):
            others.add(self.source)
        try:
            with _contained(f"{self.kind[:-1]} plugin {self.name!r}", self.kind):
                return self.entry.load()
        except Exception as error:
            raise PluginError(
                f"{self.kind[:-1]} plugin {self.name!r} of {self.source} cannot be imported "
                f"({self.entry.value}): {type(error).__name__}: {error}"
            ) from error


def _contained(what: str, kind: str) -> AbstractContextManager[None]:
    """`foreign.contained`, without torch's import where tracks alone are asked for."""
    if kind == "tracks":
        return nullcontext()
    from bench_dfusion.util import foreign

    return foreign.contained(what)


_from_files: dict[tuple[str, str], Plugin] = {}


def plugins(kind: str) -> dict[str, Plugin]:
    """Every plugin of a kind by name. Raises PluginError where two distributions claim one name."""
    if kind not in KINDS:
        raise ValueError(f"no plugin kind {kind!r}: {', '.join(KINDS)}")
    found: dict[str, Plugin] = {}
    for entry, source in _installed(f"bench_dfusion.{kind}", _places()):
        if entry.name in found and found[entry.name].entry != entry:
            raise PluginError(
                f"two distributions register the {kind[:-1]} {entry.name!r}: {found[entry.name].source} and {source}; "
                "uninstall one, or rename its entry point"
            )
        found[entry.name] = Plugin(kind, entry.name, source, entry)
    for (of_kind, name), plugin in _from_files.items():
        if of_kind == kind:
            if name in found:
                raise PluginError(f"{plugin.source} registers the {kind[:-1]} {name!r}, which {found[name].source} has")
            found[name] = plugin
    return dict(sorted(found.items()))


@cache
def _installed(group: str, places: tuple[tuple[str, int], ...]) -> tuple[tuple[EntryPoint, str], ...]:
    """The entry points of a group with the distributions they are of. To find them the metadata of everything installed are
    read, so they are read again only where `places` differ."""
    return tuple(
        (entry, f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown distribution")
        for entry in entry_points(group=group)
    )


def _places() -> tuple[tuple[str, int], ...]:
    """Where Python looks for distributions, and when something was last installed or removed there (ns)."""
    found = []
    for path in map(os.path.abspath, sys.path):
        with suppress(OSError):
            found.append((path, os.stat(path).st_mtime_ns))
    return tuple(found)


def load(kind: str, name: str) -> Any:
    """The class (or track path) registered as `name`. Raises UsageError with the close matches."""
    found = plugins(kind)
    if name not in found:
        raise UsageError(unknown(kind[:-1], name, found))
    return found[name].load()


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """One line that says a name is unknown and which ones are near."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    # Of two as near, the one that begins alike: letters are swapped within a word more often than at its start.
    near.sort(key=lambda n: (-difflib.SequenceMatcher(None, n, name).ratio(), n[:1] != name[:1]))
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known) or 'none'}"
    return f"unknown {what} {name!r}; {hint}"


def plain(text: object) -> str:
    """Text from records, plugins and paths as one line a terminal can be shown: control characters are spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def load_file(path: Path) -> list[Plugin]:
    """Register the algorithms, rewards and builders that one Python file defines."""
    from bench_dfusion.algorithm import Algorithm
    from bench_dfusion.builders.contract import Builder
    from bench_dfusion.rewards.contract import Reward

    if not path.is_file():
        raise UsageError(f"no plugin file {path}")
    name = f"bench_dfusion_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is no Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    others.add(str(path))
    try:
        with _contained(f"plugin file {path}", "file"):
            spec.loader.exec_module(module)
    except Exception as error:
        raise PluginError(f"plugin file {path} cannot be imported: {type(error).__name__}: {error}") from error
    added = []
    for kind, base in (("algorithms", Algorithm), ("rewards", Reward), ("builders", Builder)):
        for value in vars(module).values():
            own = inspect.isclass(value) and issubclass(value, base) and value.__module__ == name
            if own and not inspect.isabstract(value):
                plugin = Plugin(kind, value.name, str(path), value=value)
                _from_files[kind, value.name] = plugin
                added.append(plugin)
    if not added:
        raise UsageError(f"{path} defines no subclass of Algorithm, Reward or Builder")
    return added
