"""From what a user gives to a resolved cell: defaults, the track's, a TOML file's, then `--set`, later over earlier."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_dfusion import errors, registry
from bench_dfusion.algorithm import Algorithm, AlgorithmConfig
from bench_dfusion.builders import preference_data
from bench_dfusion.builders.contract import Builder, BuilderConfig
from bench_dfusion.errors import PluginError, UsageError
from bench_dfusion.results import records
from bench_dfusion.rewards import sums, user_function
from bench_dfusion.rewards.contract import Reward, RewardConfig
from bench_dfusion.tracks import schema as track
from bench_dfusion.tracks import sources as prompt_sources
from bench_dfusion.tracks.prompts import read_prompts, same, shared, unique
from bench_dfusion.tracks.schema import Track

SECTIONS = {"algo": "algorithms", "builder": "builders", "reward": "rewards"}


@dataclass(frozen=True)
class Cell:
    """Track × algorithm × builder × reward × seed, every option resolved."""

    track: Track
    algorithm: type[Algorithm]
    algorithm_config: AlgorithmConfig
    builder: type[Builder]
    builder_config: BuilderConfig
    reward: type[Reward]
    reward_config: RewardConfig
    seed: int
    given: dict[str, Any]  # what the user wrote, as they wrote it
    sources: dict[str, str]  # the distribution of each plugin

    @property
    def resolved(self) -> dict[str, Any]:
        """Every option's value, JSON-able."""
        return {
            "algorithm": {"name": self.algorithm.name, **self.algorithm_config.model_dump(mode="json")},
            "builder": {"name": self.builder.name, **self.builder_config.model_dump(mode="json")},
            "reward": {"name": self.reward.name, **self.reward_config.model_dump(mode="json")},
            "track": self.track.fixed,
            "seed": self.seed,
        }

    @property
    def hash(self) -> str:
        return track.content_sha256(self.resolved)

    @property
    def description(self) -> dict[str, Any]:
        """What `cell.json` says of the cell before anything has run."""
        return {"given": self.given, "resolved": self.resolved, "hash": self.hash}

    @property
    def folder(self) -> str:
        """The cell's directory below the output directory."""
        names = (self.algorithm.name, self.builder.name, self.reward.name)
        return f"{self.track.id}/{records.folder_name(*names, self.seed, self.hash)}"


def resolve(
    *,
    track_source: str | None = None,
    algo: str,
    builder: str | None = None,
    reward: str | None = None,
    pairs: str | None = None,
    teachers: Sequence[str] | None = None,
    seed: int = 0,
    model: str | None = None,
    prompts: Path | None = None,
    settings: list[str] | None = None,
    config: Path | None = None,
) -> Cell:
    """Resolve what the command line gives into a cell. Raises UsageError, in one line, on anything wrong.

    builder   None: dfusion, or offline where `pairs` (a dataset's directory, file or Hub id) are given
    reward    with `pairs` the one that scored them, None: as the dataset says
    teachers  directories of runs, or LoRA files, for an algorithm that learns from them
    """
    track_source = track_source or default_track(model)
    if pairs is not None:
        builder, reward = "offline", _scored_by(pairs, builder, reward)
    if reward is None:
        raise UsageError("give --reward, for example clip (bench-dfusion list rewards), or --pairs PATH_OR_HUB_ID")
    names = {"algo": algo, "builder": builder or "dfusion", "reward": reward}
    classes = {section: registry.load(SECTIONS[section], names[section]) for section in ("algo", "builder")}
    classes["reward"] = reward_of(reward)
    content = track.read(track_source)
    file_options: Options = track.read_toml(config) if config else {}
    set_options = _settings(settings or [])
    given: dict[str, Any] = {"track": track_source, **names, "seed": seed}
    if config:
        given["config"] = file_options
    if settings:
        given["set"] = list(settings)
    if pairs is not None:
        given["pairs"] = pairs
        set_options = track.deep_merge(set_options, {"builder": {"pairs": pairs}})
    if teachers:
        given["teachers"] = list(teachers)
        set_options = track.deep_merge(set_options, {"algo": {"teachers": _teachers(teachers, algo, classes["algo"])}})
    for options in (file_options, set_options):
        _check_sections(options)
    if model is not None:
        given["model"] = model
    if prompts is not None:
        given["prompts"] = str(prompts)
    changes = track.deep_merge(file_options.get("track", {}), set_options.get("track", {}))
    resolved_track = _change_track(track_source, content, changes, model, prompts)
    if Path(resolved_track.model.id).is_absolute():  # where it was, which the resolved track does not say
        given["model"] = changes.get("model", {}).get("id") or model or content["model"]["id"]
    configs = _configs(names, classes, resolved_track, file_options, set_options)
    if seed < 0:
        raise UsageError(f"seed must be 0 or more, not {seed}")
    sources = {s: registry.plugins(SECTIONS[s])[names[s]].source for s in ("algo", "builder")}
    sources["reward"] = _source(reward)
    return Cell(
        resolved_track,
        classes["algo"],
        configs["algo"],
        classes["builder"],
        configs["builder"],
        classes["reward"],
        configs["reward"],
        seed,
        given,
        sources,
    )


Options = dict[str, Any]  # by section: algo, builder, reward, track


def _teachers(teachers: Sequence[str], name: str, algorithm: type[Algorithm]) -> list[str]:
    """The option `teachers`. Raises Misfit where the algorithm learns from none."""
    if not algorithm.takes_teachers:
        able = ", ".join(_able("algorithms", "takes_teachers"))
        raise Misfit(f"{name} learns from no teacher: leave --teacher out, or take one of these: {able}")
    return list(teachers)


def _check_sections(options: Options) -> None:
    """Raise UsageError for a section that there is not, or one that is no section."""
    for key, value in options.items():
        if key not in (*SECTIONS, "track"):
            raise UsageError(errors.unknown("section", key, [*SECTIONS, "track"]))
        if not isinstance(value, dict):
            raise UsageError(f"{key} is a section: write {key}.OPTION=VALUE")


def _configs(
    names: Mapping[str, str], classes: Mapping[str, Any], on: Track, file_options: Options, set_options: Options
) -> dict[str, Any]:
    """The options of algorithm, builder and reward: the track's over the plugin's, a file's over those, then `--set`.

    Raises UsageError for an option that is wrong, or parts that do not fit each other or the track.
    """
    configs: dict[str, Any] = {}
    for section in ("algo", "builder"):
        defaults = getattr(on, SECTIONS[section]).get(names[section], {})
        if section == "algo":
            defaults = {**defaults, **on.tuned.get(names["algo"], {}).get(names["builder"], {})}
        values = {**defaults, **file_options.get(section, {}), **set_options.get(section, {})}
        configs[section] = track.validate(classes[section].Config, values, section)
    options = track.deep_merge(file_options.get("reward", {}), set_options.get("reward", {}))
    configs["reward"] = sums.configure(classes["reward"], names["reward"], options, on.rewards)
    _fit(classes["algo"], configs["algo"], classes["builder"], classes["reward"], on)
    configs["algo"] = classes["algo"].pinned(configs["algo"], on)
    configs["builder"] = classes["builder"].pinned(configs["builder"], on.prompts)
    return configs


def default_track(model: str | None) -> str:
    """The track where none is named: the embedded world, or with a model the settings for any."""
    return "micro-v2" if model is None else "paper"


def resolve_track(
    source: str | None = None, model: str | None = None, prompts: Path | None = None, settings: list[str] | None = None
) -> Track:
    """The track that `resolve` would train on, for what trains nothing. Raises UsageError on anything wrong."""
    source = source or default_track(model)
    options = _settings(settings or [])
    for key in options.keys() - {"track"}:
        raise UsageError(f"--set {key}.…: nothing is trained here, only track.OPTION can be set")
    return _change_track(source, track.read(source), options.get("track", {}), model, prompts)


def _change_track(
    source: str, content: dict[str, Any], changes: dict[str, Any], model: str | None, prompts: Path | None
) -> Track:
    """A track's content with a user's changes, model and prompts, under a name of its own where they are fixed parts."""
    for part in ("model", "prompts"):
        if not isinstance(changes.get(part, {}), dict):
            raise UsageError(f"track.{part} is a section: write track.{part}.OPTION=VALUE")
    changes = dict(changes)
    if model is not None:
        changes = track.deep_merge({"model": {"id": model, "sha256": None, "revision": None}}, changes)
    custom = bool(changes.keys() - {"batch", *track.NOT_FIXED})
    if "source" in content.get("prompts", {}):
        asked, lists = prompt_sources.split_changes(changes.pop("prompts", {}))
        found = prompt_sources.resolve(track.deep_merge(content["prompts"], asked), prompts, source)
        content["prompts"] = track.deep_merge(found, lists)
    elif prompts is not None:
        custom = True
        held = changes.get("prompts", {}).get("heldout")
        own = _own_prompts(prompts, content.get("prompts", {}), held if isinstance(held, list) else [], source)
        changes = track.deep_merge({"prompts": own}, changes)
    for part, option in (("model", "--model DIR_OR_HUB_ID"), ("prompts", "--prompts FILE")):
        if part not in content and part not in changes:
            raise UsageError(f"track {source} leaves the {part} to you: give {option}")
    if changes:
        if "heldout" in changes.get("prompts", {}):  # the clusters were those of the prompts that go
            content["prompts"] = {k: v for k, v in content.get("prompts", {}).items() if k != "clusters"}
        content = track.deep_merge(track.without_rungs(content, changes), changes)
    # A track whose fixed part is changed is another: its records never mix with the published one's.
    if custom:
        content["name"] = f"{content.get('name', 'track')}-custom"
    resolved: Track = track.validate(Track, track.with_model_here(content), "track")
    judges_of(resolved)
    return resolved


def reward_of(text: str) -> type[Reward]:
    """The class of a registered reward, a weighted sum (`clip:0.7,aesthetic:0.3`) or a function (`FILE.py:NAME`).

    Raises UsageError where there is none, and PluginError where its code cannot be imported.
    """
    if text in registry.plugins("rewards"):
        return registry.load("rewards", text)  # type: ignore[no-any-return]
    parts = sums.split(text)
    if parts:
        return sums.of([(name, reward_of(name), weight) for name, weight in parts])
    if user_function.is_one(text):
        return user_function.load(text)
    return registry.load("rewards", text)  # type: ignore[no-any-return]  # raises, with the close matches


def _source(text: str) -> str:
    """The distribution, or the file, of a reward; of a sum's components."""
    known = registry.plugins("rewards")
    if text in known:
        return known[text].source
    parts = sums.split(text)
    return ", ".join(dict.fromkeys(_source(name) for name, _ in parts)) if parts else user_function.load(text).path.name


def judges_of(settings: Track) -> dict[str, tuple[type[Reward], RewardConfig]]:
    """The class and options of a track's judges by name; a name may carry an option, as in `oracle:full`."""
    found = {}
    known = registry.plugins("rewards")
    for text in settings.evaluation.judges:
        name, _, option = text.partition(":")
        if re.fullmatch(sums.NUMBER, option):
            raise UsageError(f"judge {text}: a judge has no weight: weighted sums are for --reward")
        if name not in known:
            raise UsageError(errors.unknown("judge", name, known))
        cls: type[Reward] = known[name].load()
        values = {**settings.rewards.get(name, {}), **({"score": option} if option else {})}
        found[text] = (cls, track.validate(cls.Config, values, f"judge {text}"))
    return found


def _scored_by(source: str, builder: str | None, reward: str | None) -> str:
    """The reward that scored offline pairs, as the dataset or else the user says."""
    if builder not in (None, "offline"):
        raise UsageError(f"--pairs takes the place of drawn samples: leave --builder {builder} out")
    found = preference_data.read(source).scored_by
    if found and reward is None:
        try:
            reward_of(found)
        except UsageError as error:
            raise UsageError(
                f"the pairs of {source} were scored by {found}, which is not here ({error}): give --reward as it was "
                "given, a function as FILE.py:FUNCTION"
            ) from None
    if found and reward and reward != found and reward_of(reward).name == found:
        return reward  # the same sum written otherwise, or the function's file
    if found and reward not in (None, found):
        raise UsageError(f"the pairs of {source} were scored by {found}, not by {reward}: leave --reward out")
    return reward or found or "given"


class Misfit(UsageError):
    """An algorithm that cannot train on what the builder, the reward or the sampler gives it."""


def _fit(
    algorithm: type[Algorithm],
    config: AlgorithmConfig,
    builder: type[Builder],
    reward: type[Reward],
    settings: Track,
) -> None:
    """Raise Misfit if the algorithm needs more than the builder, the reward or the track's sampler has."""
    if algorithm.needs_density and settings.sampler.eta == 0:
        raise Misfit(
            f"{algorithm.name} trains on the probability of denoising steps, and with track.sampler.eta 0 they have none: "
            f"these do without: {', '.join(_able('algorithms', 'needs_density', False))}"
        )
    if algorithm.needs_gradient and not reward.differentiable:
        raise Misfit(
            f"{algorithm.name} follows the reward's gradient, and {reward.name} has none; "
            f"these have: {', '.join(_able('rewards', 'differentiable'))}"
        )
    if not builder.draws and not algorithm.offline:
        raise Misfit(
            f"{algorithm.name} learns from samples that the policy draws, and {builder.name} pairs are only pictures; "
            f"these learn from them: {', '.join(_able('algorithms', 'offline'))}"
        )
    parts = reward.parts if issubclass(reward, sums.WeightedSum) else {}
    auxiliary = [name for name, part in parts.items() if not part.weight]
    if len(auxiliary) == len(parts) > 0:
        raise Misfit(f"{reward.name}: one of the weights must be a number other than 0")
    if auxiliary and not config.needs_auxiliary:
        raise Misfit(
            f"the weight of {auxiliary[0]} must be a number other than 0: without weight it is an auxiliary reward, and "
            f"{algorithm.name} with these options takes none"
        )
    if config.needs_auxiliary and not auxiliary:
        raise Misfit(
            f"{algorithm.name} with these options compares the reward with auxiliary ones, of weight 0, and {reward.name} has "
            "none: give --reward NAME:1,OTHER:0"
        )
    if config.needs_embedding and not any(hasattr(part.reward, "embed") for part in parts.values()):
        raise Misfit(
            f"{algorithm.name} with these options takes the embedding of a reward of the sum, and none of {', '.join(parts)} "
            "has one: add one that has (clip:0), or leave the option out that asks for it (algo.gardo.diversity=none)"
        )
    if config.needs_components and not builder.draws:
        raise Misfit(
            f"{builder.name} pairs hold no score of each reward of a sum: leave algo.components and algo.gardo out"
        )
    if config.needs_components and not issubclass(reward, sums.WeightedSum):
        raise Misfit(
            f"algo.components = each takes a sum's rewards apart, and {reward.name} is one reward: "
            "give --reward NAME:WEIGHT,NAME:WEIGHT, or leave it out"
        )


def _able(kind: str, ability: str, wanted: bool = True) -> list[str]:
    """The plugins that have an ability (or have it not), those that cannot be imported left out."""
    able = []
    for name, plugin in registry.plugins(kind).items():
        with suppress(PluginError):
            able += [name] if getattr(plugin.load(), ability) == wanted else []
    return able


def _own_prompts(path: Path, track_prompts: dict[str, Any], given: list[str], name: str) -> dict[str, Any]:
    """The user's training prompts; every fourth is held out where neither the track nor `given` holds any."""
    own, _ = read_prompts(path)
    held = [p for p in (*track_prompts.get("heldout", []), *given) if isinstance(p, str)]
    if not held:
        own = unique(own)
        if len(own) < 8:
            raise UsageError(f"{path} holds {len(own)} prompts; every fourth is held out, so give at least 8")
        return {"train": [p for i, p in enumerate(own) if i % 4 != 3], "heldout": own[3::4]}
    for own_spelling, its in shared(own, held):
        what = f"a held-out prompt of {name}"
        if own_spelling != its:
            what = f"the held-out prompt {its!r} of {name} in another spelling"
        raise UsageError(f"{path}: {own_spelling!r} is {what}, never to be trained on")
    trained, validation = {same(p) for p in own}, track_prompts.get("validation", [])
    return {"train": own, "validation": [p for p in validation if not isinstance(p, str) or same(p) not in trained]}


def _settings(settings: list[str]) -> dict[str, Any]:
    """`algo.beta=0.2` to {"algo": {"beta": 0.2}}; values are JSON where they read as JSON, else strings."""
    result: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        parts = key.strip().split(".")
        if not equals or len(parts) < 2 or not all(parts):
            raise UsageError(f"--set {setting!r}: write SECTION.OPTION=VALUE, for example algo.beta=0.2")
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            parsed = None if value == "None" else value
        nested: dict[str, Any] = {parts[-1]: parsed}
        for part in reversed(parts[:-1]):
            nested = {part: nested}
        result = track.deep_merge(result, nested)
    return result
