"""Plugins by entry point: algorithms, rewards, builders, models, tracks.

A plugin is whatever an installed distribution lists under `bench_dfusion.<kind>`; nothing is imported
before it is named, so a broken plugin breaks only the run that names it. `plugin_files` registers one file
for a first try.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from bench_dfusion import _moved
from bench_dfusion.errors import PluginError, UsageError, unknown
from bench_dfusion.version import __version__

if TYPE_CHECKING:  # the contracts look down at this module, which must not import them
    from bench_dfusion.algorithm import Algorithm
    from bench_dfusion.builders.contract import Builder
    from bench_dfusion.models.base import Adapter
    from bench_dfusion.rewards.contract import Reward

KINDS = ("algorithms", "rewards", "builders", "models", "tracks")
OURS = "bench_dfusion."  # how the names of this package's own modules begin
others: set[str] = set()  # the distributions and files of others whose code this process has imported


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


@cache
def shipped_tracks() -> dict[str, Path]:
    """The tracks in this package by the names that they are called by: NAME-vN.toml is NAME where no earlier version is
    there, else NAME-vN. A track of somebody else is an entry point: a function that returns the path of its file."""
    here = Path(__file__).parent
    found: dict[str, dict[int, Path]] = {}
    for folder in ("tracks", "micro"):
        for path in (here / folder).glob("*-v*.toml"):
            name, _, version = path.stem.rpartition("-v")
            found.setdefault(name, {})[int(version)] = path
    return {
        name if number == min(versions) else f"{name}-v{number}": path
        for name, versions in found.items()
        for number, path in versions.items()
    }


def plugins(kind: str) -> dict[str, Plugin]:
    """Every plugin of a kind by name. Raises PluginError where two distributions claim one name."""
    if kind not in KINDS:
        raise ValueError(f"no plugin kind {kind!r}: {', '.join(KINDS)}")
    found: dict[str, Plugin] = {}
    if kind == "tracks":
        ours = f"bench-dfusion {__version__}"
        found = {name: Plugin(kind, name, ours, value=_path(path)) for name, path in shipped_tracks().items()}
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


def _path(path: Path) -> Callable[[], Path]:
    return lambda: path


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


def check(kind: str, name: str) -> None:
    """Raise UsageError, with the close matches, where no plugin of a kind has this name. Nothing is imported."""
    found = plugins(kind)
    if name not in found:
        raise UsageError(unknown(kind[:-1], name, found))


def register(plugin: Plugin) -> None:
    """Take in a plugin that no distribution has, in the place of an earlier one of its kind and name."""
    _from_files[plugin.kind, plugin.name] = plugin


@overload
def load(kind: Literal["algorithms"], name: str) -> type[Algorithm]: ...
@overload
def load(kind: Literal["rewards"], name: str) -> type[Reward]: ...
@overload
def load(kind: Literal["builders"], name: str) -> type[Builder]: ...
@overload
def load(kind: Literal["models"], name: str) -> type[Adapter]: ...
@overload
def load(kind: Literal["tracks"], name: str) -> Callable[[], Path | str]: ...
@overload
def load(kind: str, name: str) -> Any: ...
def load(kind: str, name: str) -> Any:
    """The class (or track path) registered as `name`. Raises UsageError with the close matches."""
    check(kind, name)
    return plugins(kind)[name].load()


def __getattr__(name: str) -> Any:
    """What was here before it moved."""
    if name not in ("plain", "load_file"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _moved.attribute(__name__, name, ("errors", "plugin_files"))
