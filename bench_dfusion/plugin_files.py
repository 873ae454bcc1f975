"""One Python file as a plugin, for a first try."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path

from bench_dfusion import registry
from bench_dfusion.algorithm import Algorithm
from bench_dfusion.builders.contract import Builder
from bench_dfusion.errors import PluginError, UsageError
from bench_dfusion.registry import Plugin
from bench_dfusion.rewards.contract import Reward
from bench_dfusion.util import foreign


def load_file(path: Path) -> list[Plugin]:
    """Register the algorithms, rewards and builders that one Python file defines."""
    if not path.is_file():
        raise UsageError(f"no plugin file {path}")
    name = f"bench_dfusion_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is no Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    registry.others.add(str(path))
    try:
        with foreign.contained(f"plugin file {path}"):
            spec.loader.exec_module(module)
    except Exception as error:
        raise PluginError(f"plugin file {path} cannot be imported: {type(error).__name__}: {error}") from error
    added = []
    for kind, base in (("algorithms", Algorithm), ("rewards", Reward), ("builders", Builder)):
        for value in vars(module).values():
            own = inspect.isclass(value) and issubclass(value, base) and value.__module__ == name
            if own and not inspect.isabstract(value):
                plugin = Plugin(kind, value.name, str(path), value=value)
                registry.register(plugin)
                added.append(plugin)
    if not added:
        raise UsageError(f"{path} defines no subclass of Algorithm, Reward or Builder")
    return added
