"""Modules by the names that they had when the package was one flat floor: an import of an old name goes on working.

An old module stands for one or several of today's, and warns (DeprecationWarning) where it is imported.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from types import CodeType, ModuleType
from typing import Any

ROOT = "bench_dfusion."
MOVED: dict[str, tuple[str, ...]] = {
    "arithmetic": ("diffusion.arithmetic",),
    "baseline": ("runs.baseline",),
    "checked_base": ("results.checked_base", "runs.base_drawing"),
    "checks": ("results.checks",),
    "companions": ("results.companions",),
    "config": ("runs.config",),
    "consistent": ("builders.contract",),
    "dataset": ("publish.dataset", "publish.tree", "publish.card"),
    "display": ("cli.display",),
    "evaluation": ("runs.evaluation",),
    "files": ("util.files",),
    "foreign": ("util.foreign",),
    "fusion.attention": ("builders.dfusion.attention",),
    "fusion.builder": ("builders.dfusion.builder",),
    "fusion.by_hand": ("builders.dfusion.by_hand",),
    "fusion.items": ("tracks.items",),
    "fusion.masks": ("builders.dfusion.masks",),
    "hub": ("util.hub",),
    "images": ("rewards.preprocessing",),
    "isolated": ("rewards.isolated",),
    "launch.cluster": ("sweeps.cluster",),
    "launch.local": ("sweeps.local",),
    "launch.node": ("sweeps.node",),
    "launch.storage": ("sweeps.storage",),
    "launch.worker": ("cli.worker",),
    "leaderboard": ("results.leaderboard", "results.tables", "results.standings", "results.figures"),
    "loaded": ("runs.loaded",),
    "lora": ("diffusion.lora",),
    "merge": ("results.merge",),
    "model_card": ("runs.model_card", "publish.model"),
    "pairs": ("runs.pairs", "builders.preference_data"),
    "parallel": ("util.parallel",),
    "picture_reader": ("util.picture_reader",),
    "pictures": ("runs.pictures",),
    "policy": ("diffusion.policy",),
    "progress": ("util.progress",),
    "prompt_sources": ("tracks.sources",),
    "prompts": ("tracks.prompts",),
    "records": ("results.records",),
    "rescore": ("runs.rescore",),
    "reward": ("rewards.contract",),
    "samplers": ("diffusion.samplers", "models.schedules"),
    "scorer_worker": ("rewards.scorer_worker",),
    "seeds": ("util.seeds",),
    "statistics": ("results.statistics",),
    "teachers": ("objectives.teachers",),
    "text_limits": ("runs.text_limits",),
    "texts": ("util.texts",),
    "track": ("tracks.schema",),
    "trainer": ("runs.trainer",),
    "user_function": ("rewards.user_function",),
    "verify": ("publish.verify",),
    "weighted_sum": ("rewards.sums",),
    "weights": ("rewards.weights",),
    "fusion": (),
    "objectives.stepwise": ("builders.stored_steps",),
    "launch": ("sweeps.launcher",),
}

# By the old module and name: what has another name now.
RENAMED = {
    "track.merge": "deep_merge",
    "dataset.merge": "merged",
    "companions.weights": "weights_file",
    "rescore.weights": "score_weights",
    "rescore.Evaluation": "ScoredWeights",
    "teachers.weights": "read_weights",
    "fusion.attention.Taps": "AttentionHooks",
    "reward.dealt_out": "scored_in_shards",
}


def attribute(module: str, name: str, places: Sequence[str]) -> Any:
    """What `name` of the old module is, in the first of today's modules that has it. Raises AttributeError."""
    for place in places:
        found = importlib.import_module(ROOT + place)
        if hasattr(found, name):
            return getattr(found, name)
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


class _Called(ModuleType):
    """An old module in whose place the package has a function of the same name."""

    def __call__(self, *given: Any, **options: Any) -> Any:
        package = importlib.import_module(ROOT.rstrip("."))
        return package._Leaderboard()(*given, **options)


class _Old(MetaPathFinder, InspectLoader):
    """Finds and loads the old names, after everything that exists."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        old = name.removeprefix(ROOT)
        if not name.startswith(ROOT) or old not in MOVED:
            return None
        return spec_from_loader(name, self, is_package=any(other.startswith(f"{old}.") for other in MOVED))

    def exec_module(self, module: ModuleType) -> None:
        name, places = module.__name__, MOVED[module.__name__.removeprefix(ROOT)]
        if places:
            now = " and ".join(ROOT + place for place in places)
            warnings.warn(f"{name} has moved: import {now}", DeprecationWarning, stacklevel=2)

        def of(attribute_name: str) -> Any:
            if attribute_name.startswith("__"):
                raise AttributeError(attribute_name)
            known = RENAMED.get(f"{name.removeprefix(ROOT)}.{attribute_name}", attribute_name)
            return attribute(name, known, places)

        module.__dict__["__getattr__"] = of
        if name == f"{ROOT}leaderboard":  # which is a function of the package too, and has to stay one
            module.__class__ = _Called

    def get_source(self, fullname: str) -> None:
        return None

    def get_code(self, fullname: str) -> CodeType | None:
        """That of today's module, for `python -m`."""
        spec = find_spec(ROOT + MOVED[fullname.removeprefix(ROOT)][0])
        assert spec and isinstance(spec.loader, InspectLoader)
        return spec.loader.get_code(spec.name)


def install() -> None:
    """Let the old names be found; once is enough."""
    if not any(isinstance(finder, _Old) for finder in sys.meta_path):
        sys.meta_path.append(_Old())
