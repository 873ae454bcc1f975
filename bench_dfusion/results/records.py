"""The record a finished cell leaves: what ran, what it cost, what every judge said. JSON, typed, one schema.

`python -m bench_dfusion.results.records` prints that schema as JSON Schema; leaderboards/record.schema.json is its output.
"""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from bench_dfusion.errors import UsageError, plain
from bench_dfusion.tracks.schema import SETS, Track, content_sha256, hash_of
from bench_dfusion.util import files

if TYPE_CHECKING:
    import torch

    from bench_dfusion.rewards.contract import Reward

SCHEMA = 2
# Raised with every optional field that is added to this version. A record of a later revision is refused where it has a
# field that is not known here: what is not understood (that a run is a ceiling, say) must not be left out of a table.
REVISION = 2
# From a schema version the function that turns its content into the next version's; `read` applies them in order.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    # Version 2 only adds fields, which a record of version 1 lacks: they are absent.
    1: lambda content: {**content, "schema_revision": 0},
}
TOLERANCE = 1e-5  # of a judge's largest score: its means are taken in float32


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


def later(description: str) -> Any:
    """A field that records made before it do not have: None there, and then not written."""
    return Field(None, exclude_if=lambda value: value is None, description=f"{description}; absent: not recorded")


class Gain(Part):
    mean: float = Field(description="mean over prompts of trained − base on the same noise, in the judge's unit")
    low: float = Field(description="lower end of the 95 % interval")
    high: float = Field(description="upper end of the 95 % interval")
    kind: str = Field(description="how the interval was made; of one seed it covers the prompts, not the training")


class Verdict(Part):
    """One judge's figure for base and trained on the held-out prompts."""

    judge: str = Field(description="the reward plugin that judged")
    metric: str = Field(description="what it measured")
    trained_on: bool = Field(
        description="whether this judge was the training reward: then it is a ceiling and never ranks"
    )
    base: float = Field(
        description="mean over held-out images of the frozen base, of a checked base over all of its own"
    )
    trained: float = Field(description="mean over held-out images of the trained policy")
    gain: Gain = Field(description="the paired gain")
    templates: dict[str, tuple[float, float]] = Field(description="(base, trained) for each prompt template")
    per_prompt: list[tuple[float, float]] = Field(
        description="(base, trained) for each held-out prompt, in the track's order"
    )
    fingerprint: str = Field(description="hash of the judge's weights and rules")
    adjusted: list[float] | None = later(
        "the gain of each held-out prompt over the checked base, freed of the luck of its first pictures "
        "(statistics.adjusted_gains); gain is of these, so it is not quite trained − base"
    )
    slope: float | None = later("the slope b by which they were freed of it")

    @property
    def gains(self) -> list[float]:
        """The gain of each held-out prompt, in the track's order."""
        return self.adjusted if self.adjusted is not None else [trained - base for base, trained in self.per_prompt]


class Drift(Part):
    pixels: float = Field(
        description="root mean square pixel distance trained − base on the same noise, of all pictures or, where there is "
        "a checked base, of the first of each prompt (8-bit levels)"
    )
    kl: float = Field(
        description="mean per-step KL(trained || base) along trained trajectories, averaged over the latent (nats)"
    )
    diversity_base: float = Field(
        description="Vendi score within a prompt, mean over prompts, of the base (effective images)"
    )
    diversity_trained: float = Field(description="the same of the trained policy (effective images)")
    diversity_space: str = Field(description="what the Vendi score's embeddings are")


class Cost(Part):
    reward_queries: int = Field(description="images the training reward scored, targets included (count)")
    network_evaluations: int = Field(
        description="forwards of one sample through one branch, evaluation included (count)"
    )
    updates: int = Field(description="optimiser steps (count)")
    seconds: dict[str, float] = Field(description="wall time of each phase (s)")
    peak_memory_mb: float = Field(description="peak memory of the device, or of the process on a CPU (MB)")
    device: str = Field(description="the device's name")
    base_queries: int | None = later(
        "images of the base that the training reward scored to measure the rise: beside the budget, nothing is learnt from "
        "them (count)"
    )
    base_network_evaluations: int | None = later("forwards that drew them (count)")


class Round(Part):
    round: int = Field(description="number of the round, from 0")
    queries: int = Field(description="reward queries spent up to its end (count)")
    reward: float | None = Field(description="mean training reward of the drawn samples, None where none are drawn")
    reward_sd: float | None = Field(description="standard deviation of the drawn samples' rewards")
    base_reward: float | None = Field(description="mean training reward of the pairs' bases, kept or not")
    winner_reward: float | None = Field(description="mean training reward of their targets (vanilla: references)")
    pairs: int = Field(description="pairs kept (count)")
    dropped: int = Field(description="pairs dropped because the winner did not score above the loser (count)")
    metrics: dict[str, float] = Field(description="means over the round of the loss and what the algorithm reports")
    base_on_prompts: float | None = later(
        "mean training reward of the base's pictures of the round's prompts, each prompt as often as in the round"
    )
    rise: float | None = later("reward − base_on_prompts: the rise on the same prompts")


class Provenance(Part):
    code: str | None = Field(description="git commit of the package's source, None outside a checkout")
    dirty: bool | None = Field(description="whether that checkout had changes")
    versions: dict[str, str] = Field(description="versions of Python and the packages that matter")
    plugins: dict[str, str] = Field(description="the distribution of each plugin")
    hardware: str = Field(description="processor, cores and system")
    model_sha256: str = Field(description="hash of the base model's weights and configuration")
    reward_fingerprint: str = Field(description="hash of the training reward's weights and rules")
    reward_components: dict[str, str] = Field(
        {}, description="of a weighted sum the same of each component by name, else empty"
    )
    lora_sha256: str = Field(description="hash of the trained LoRA file, or with lora.rank 0 of the network's")
    scores_sha256: str | None = later(
        "hash of scores.parquet beside the record: every judge's score of every held-out picture of the trained policy"
    )
    base_sha256: str | None = later(
        "hash of the track's checked base: its pictures' scores, drawn once for the track and never again in a cell"
    )
    prompts_seen: dict[str, str] | None = later(
        "hash of every prompt list of the track, by its name: train, validation (options were chosen on it), heldout"
    )

    @model_serializer(mode="wrap")
    def _without_empty(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A record of one reward stays as it was before there were sums, to the byte."""
        content: dict[str, Any] = serialize(self)
        return content if self.reward_components else {k: v for k, v in content.items() if k != "reward_components"}

    @property
    def trained_on(self) -> set[str]:
        """The fingerprints of everything that trained it: a judge that has one is no judge of it."""
        return {self.reward_fingerprint, *self.reward_components.values()}


class Rung(Part):
    """What was found at a rung of the track's ladder of budgets, beyond which the run went on."""

    rung: int = Field(ge=1, description="number of the rung, from 1")
    rounds: int = Field(ge=1, description="rounds up to it: the first of the record's (count)")
    verdicts: list[Verdict] = Field(description="what every judge said there")
    drift: Drift = Field(description="how far the policy was from the base")
    cost: Cost = Field(description="what the run had cost, the evaluations up to and with this one included")
    agreement: dict[str, float] | None = later("as of the record, of the pictures judged there")
    lora_sha256: str = Field(description="hash of the LoRA there")
    scores_sha256: str | None = later("as of the record, of the pictures judged there")


class Record(Part):
    """One cell's result."""

    schema_version: Literal[2] = Field(2, description="version of this schema")
    schema_revision: int = Field(REVISION, ge=0, description="revision of it: raised with every optional field added")
    status: Literal["finished", "failed"] = Field(
        description="failed: reward collapsed or turned non-finite; ranks as a miss"
    )
    evidence: str | None = Field(None, description="why the run failed")
    track: str = Field(description="the track's name and version")
    track_hash: str = Field(description="hash of everything the track fixes")
    cell_hash: str = Field(description="hash of the resolved configuration")
    algorithm: str = Field(description="the training backend")
    builder: str = Field(description="the builder of the consistent samples")
    reward: str = Field(description="the training reward")
    seed: int = Field(description="the training seed")
    given: dict[str, Any] = Field(description="the configuration as it was given")
    resolved: dict[str, Any] = Field(description="every option's value")
    tuning: str = Field("", description="how the track's suggestions for options were chosen, where it has any")
    verdicts: list[Verdict] = Field(description="what every judge said; the first ranks; empty where the run failed")
    drift: Drift | None = Field(None, description="how far the trained policy is from the base")
    rounds: list[Round] = Field(description="the training curve")
    cost: Cost = Field(description="what the run cost")
    provenance: Provenance = Field(description="what the numbers come from")
    submitter: str = Field(
        "", exclude_if=lambda value: not value, description="who submitted it; empty: the leaderboard's own keeper"
    )
    trained: bool | None = later("whether an optimiser's step was made on a gradient that was not zero")
    untrained: str | None = later("why nothing was trained, where trained is false")
    agreement: dict[str, float] | None = later(
        "rank correlation (Spearman) of the training reward and each judge on the same held-out pictures of the trained "
        "policy, by judge, in [−1, 1]"
    )
    rung: int | None = later(
        "number of the rung, from 1, that the record's figures are of, or on the way to which the run failed, of a track "
        "with rungs"
    )
    rungs: list[Rung] | None = later("what was found at the rungs before it, from the first, of a track with rungs")

    @property
    def name(self) -> str:
        return f"{self.algorithm}/{self.builder}/{self.reward}/seed {self.seed}"

    @property
    def rises(self) -> list[tuple[int, float]]:
        """(queries, rise of the training reward) of each round that drew samples: against the base on the same prompts, or
        in a record that lacks it against the first round."""
        drawn = [r for r in self.rounds if r.reward is not None and math.isfinite(r.reward)]
        if all(r.rise is not None for r in drawn):
            return [(r.queries, r.rise) for r in drawn if r.rise is not None]
        rewards = [(r.queries, r.reward) for r in drawn if r.reward is not None]
        return [(queries, reward - rewards[0][1]) for queries, reward in rewards]

    def reached(self, rung: int) -> bool:
        """Whether it has what there is to a rung of its track: figures, or that the run failed before it."""
        return self.status == "failed" or (self.rung or 1) >= rung

    def at(self, rung: int) -> Record | None:
        """The record as it was at a rung; of a run that failed on the way to it, the failed one. None where it was not
        reached."""
        if not self.reached(rung):
            return None
        found = next((r for r in self.rungs or [] if r.rung == rung), None)
        if found is None:
            return self
        rounds = self.rounds[: found.rounds]
        trained, untrained = training(rounds, found.cost.updates)
        own = {"lora_sha256": found.lora_sha256, "scores_sha256": found.scores_sha256}
        return self.model_copy(
            update={
                "status": "finished",
                "evidence": None,
                "verdicts": found.verdicts,
                "drift": found.drift,
                "rounds": rounds,
                "cost": found.cost,
                "agreement": found.agreement,
                "trained": trained,
                "untrained": untrained,
                "provenance": self.provenance.model_copy(update=own),
                "rung": rung,
                "rungs": [r for r in self.rungs or [] if r.rung < rung],
            }
        )

    @property
    def stages(self) -> list[Record]:
        """The record as it was at every rung, from the first; itself is the last."""
        earlier = [self.at(r.rung) for r in self.rungs or []]
        return [*(r for r in earlier if r is not None), self]

    def comparable(self) -> dict[str, Any]:
        """The record without what differs from run to run: timings, memory, hardware, code state, the encoding of a file."""
        content = self.model_dump(mode="json")
        rungs = content.get("rungs", [])
        for cost in (content["cost"], *(r["cost"] for r in rungs)):
            for key in ("seconds", "peak_memory_mb", "device"):
                del cost[key]
        for key in ("code", "dirty", "hardware", "versions"):
            del content["provenance"][key]
        for each in (content["provenance"], *rungs):
            each.pop("scores_sha256", None)  # another pyarrow writes another file
        return content


def read(path: Path) -> Record:
    """The record in a file: see `parse`, which raises the same UsageError."""
    try:
        return parse(path.read_bytes(), str(path))
    except OSError as error:
        raise UsageError(plain(f"{path} is no record, or only a part of one: {error}")) from None


def parse(data: bytes | str, source: str) -> Record:
    """A record from its JSON, of an older schema too where `MIGRATIONS` leads from it to this one.

    Raises UsageError, in one line that names the source, for what is no JSON, has NaN or infinite numbers, is of a newer
    schema or of an older one that nothing migrates, or does not fit the schema.
    """
    try:
        content = json.loads(data)
        json.dumps(content, allow_nan=False, ensure_ascii=False).encode()  # refuses NaN, 1e999 and half characters
    except (ValueError, RecursionError) as error:
        raise UsageError(plain(f"{source} is no record, or only a part of one: {error}")) from None
    try:
        record = Record.model_validate(_migrated(content))
        for section in _missing_sections(record):
            raise UsageError(f"resolved has no options of the {section}")
        return record
    except ValidationError as error:
        first = error.errors()[0]
        where, message = ".".join(map(str, first["loc"])), f"{first['msg']}"
        if first["type"] == "extra_forbidden":
            message = "no field of this schema; another program or another bench-dfusion may have written it"
            revision = content.get("schema_revision")
            if isinstance(revision, int) and revision > REVISION:
                message = f"a field of revision {revision}, this bench-dfusion reads {SCHEMA}.{REVISION}: update bench-dfusion"
        raise UsageError(plain(f"{source} is no record of schema {SCHEMA}: {where}: {message}")) from None
    except UsageError as error:
        raise UsageError(plain(f"{source}: {error}")) from None


def _migrated(content: Any) -> dict[str, Any]:
    """A record's content in this schema. Raises UsageError where it cannot be."""
    if not isinstance(content, dict) or "schema_version" not in content:
        raise UsageError(
            "no schema_version: no record of bench-dfusion, or older than its first schema; "
            "nothing migrates it, run its cell again"
        )
    version = content["schema_version"]
    if not isinstance(version, int) or isinstance(version, bool):
        raise UsageError(f"schema_version must be a whole number, not {json.dumps(version)}")
    if version > SCHEMA:
        raise UsageError(f"a record of schema {version}, this bench-dfusion reads {SCHEMA}: update bench-dfusion")
    while version < SCHEMA:
        if version not in MIGRATIONS:
            raise UsageError(
                f"a record of schema {version}, older than {SCHEMA}, and this bench-dfusion has no migration from it: "
                "run its cell again"
            )
        try:
            content = MIGRATIONS[version](content)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"damaged: no migration from schema {version} ({type(error).__name__}: {error})") from None
        version += 1
        content = {**content, "schema_version": version}
    return content


def check(record: Record) -> list[str]:
    """What a record says that its own numbers contradict, one line each; none of a sound record.

    Numbers are finite. Compared exactly: hashes, names, seed, judges, prompts and queries with the resolved configuration.
    Means over prompts may differ by TOLERANCE (1e-5) of the judge's largest score.
    """
    return [plain(problem) for problem in _problems(record)]


def _problems(record: Record) -> Iterator[str]:
    resolved = record.resolved
    try:
        json.dumps(record.model_dump(mode="json"), allow_nan=False)
    except ValueError:
        yield "a number is not finite"
        return
    missing = _missing_sections(record)
    if missing:
        yield f"resolved has no options of the {missing[0]}"
        return
    try:
        track = Track.model_validate(resolved["track"])
    except ValidationError as error:
        yield f"resolved.track is no track: {error.errors()[0]['msg']} ({'.'.join(map(str, error.errors()[0]['loc']))})"
        return
    yield from _identity_problems(record, track)
    problem = _ladder_problem(record, track)
    if problem:
        yield problem
        return
    for stage in record.stages:
        where = "" if stage is record else f"rung {stage.rung}: "
        yield from (where + problem for problem in _stage_problems(stage, track))


def _identity_problems(record: Record, track: Track) -> Iterator[str]:
    """Where names, hashes and seed of a record are not those of what was resolved."""
    resolved = record.resolved
    if record.track != track.id:
        yield f"track {record.track!r}, but the resolved track is {track.id!r}"
    if record.track_hash != hash_of(resolved["track"]):
        yield "track_hash is not the hash of the resolved track"
    if record.cell_hash != content_sha256(resolved):
        yield "cell_hash is not the hash of the resolved configuration"
    for section in ("algorithm", "builder", "reward"):
        name = resolved[section].get("name")
        if getattr(record, section) != name:
            yield f"{section} {getattr(record, section)!r}, but the resolved {section} is {name!r}"
    components = resolved["reward"].get("components")
    components = list(components) if isinstance(components, dict) else []
    if sorted(record.provenance.reward_components) != sorted(components):
        yield "provenance.reward_components are not those of the resolved reward"
    if record.seed != resolved.get("seed") or record.seed < 0:
        yield f"seed {record.seed}, but the resolved seed is {resolved.get('seed')!r}"
    if track.model.sha256 not in (None, record.provenance.model_sha256):
        yield "provenance.model_sha256 is not the hash of the track's model"


def _ladder_problem(record: Record, track: Track) -> str | None:
    """Why the rungs of a record are not a way up its track's ladder; None where they are."""
    ladder = track.budget.rungs
    if (record.rung is None, record.rungs is None) != (ladder is None, ladder is None):
        missing = ladder is not None
        return f"rung and rungs are {'missing, but' if missing else 'there, and'} the track has {'' if missing else 'no '}rungs"
    if ladder is None or record.rung is None or record.rungs is None:
        return None
    if not 1 <= record.rung <= len(ladder):
        return f"rung {record.rung}, but the track has {len(ladder)}"
    numbers = [r.rung for r in record.rungs]
    if numbers != list(range(1, record.rung)):
        return f"rungs {numbers}, but a run to rung {record.rung} passes {list(range(1, record.rung))}"
    before = 0
    for each in record.rungs:
        if not before < each.rounds <= len(record.rounds):
            return f"rung {each.rung}: {each.rounds} rounds, after {before} of {len(record.rounds)}"
        before = each.rounds
    for earlier, later in pairwise([*(r.cost for r in record.rungs), record.cost]):
        for name, value in _counts(earlier).items():
            if _counts(later).get(name, value) < value:
                return f"cost.{name}: {value} at a rung, and less at a later one"
    return None


def _counts(cost: Cost) -> dict[str, float]:
    """What a run's cost adds up, by field."""
    content = cost.model_dump(mode="json", exclude={"seconds", "device"})
    return content | {f"seconds.{name}": value for name, value in cost.seconds.items()}


def _stage_problems(record: Record, track: Track) -> Iterator[str]:
    """What is wrong with a record as it was at a rung."""
    cost = record.cost
    counts = {
        "reward_queries": cost.reward_queries,
        "network_evaluations": cost.network_evaluations,
        "updates": cost.updates,
        "peak_memory_mb": cost.peak_memory_mb,
    }
    for name, value in {**counts, **{f"seconds.{k}": v for k, v in cost.seconds.items()}}.items():
        if value < 0:
            yield f"cost.{name} is negative"
    budget = track.budget.ladder[(record.rung or 1) - 1]
    if cost.reward_queries > budget:
        yield f"cost.reward_queries {cost.reward_queries} is more than the budget of {budget}"
    if [r.round for r in record.rounds] != list(range(len(record.rounds))):
        yield "rounds are not numbered from 0 on"
    spent = [r.queries for r in record.rounds]
    if spent != sorted(spent) or (spent and spent[-1] > cost.reward_queries):
        yield "rounds count more reward queries than cost.reward_queries, or ever fewer"
    elif record.status == "finished" and spent and spent[-1] != cost.reward_queries:
        yield f"cost.reward_queries {cost.reward_queries}, but the last round ends at {spent[-1]}"

    if record.status == "failed":
        if record.verdicts:
            yield "status failed, but judges gave verdicts"
        return
    judges = [v.judge for v in record.verdicts]
    if judges != list(track.evaluation.judges):
        yield f"verdicts of {judges}, but the track's judges are {list(track.evaluation.judges)}"
    for verdict in record.verdicts:
        yield from (f"verdict of {verdict.judge}: {p}" for p in _verdict_problems(verdict, track))
        if verdict.fingerprint in record.provenance.trained_on and not verdict.trained_on:
            yield f"verdict of {verdict.judge}: it is the training reward (one fingerprint), but trained_on is false"


def _missing_sections(record: Record) -> list[str]:
    found = {"track": {}, **record.resolved}
    return [s for s in ("algorithm", "builder", "reward", "track") if not isinstance(found.get(s), dict)]


def _verdict_problems(verdict: Verdict, track: Track) -> Iterator[str]:
    prompts, pairs = track.prompts.heldout, verdict.per_prompt
    if len(pairs) != len(prompts):
        yield f"{len(pairs)} prompts, but the track holds out {len(prompts)}"
        return
    limit = TOLERANCE * max(abs(score) for pair in pairs for score in pair)

    def means(rows: list[int]) -> tuple[float, float]:
        return sum(pairs[i][0] for i in rows) / len(rows), sum(pairs[i][1] for i in rows) / len(rows)

    base, trained = means(list(range(len(pairs))))
    checked = track.evaluation.base_images_per_prompt is not None
    if (verdict.adjusted is not None, verdict.slope is not None) != (checked, checked):
        yield f"adjusted and slope are {'missing, but' if checked else 'there, and'} the track has {'a' if checked else 'no'} checked base"
        return
    if len(verdict.gains) != len(pairs):
        yield f"adjusted has {len(verdict.gains)} prompts, but the track holds out {len(prompts)}"
        return
    groups: dict[str, list[float]] = {}
    for label, gain in zip(track.prompts.labels or prompts, verdict.gains, strict=True):
        groups.setdefault(label, []).append(gain)
    stated = {
        "base": (verdict.base, base),
        "trained": (verdict.trained, trained),
        "gain.mean": (verdict.gain.mean, sum(sum(g) / len(g) for g in groups.values()) / len(groups)),
    }
    names = [(track.prompts.templates or {}).get(p, "all") for p in prompts]
    if set(verdict.templates) != set(names):
        yield f"templates {sorted(verdict.templates)}, but the track's are {sorted(set(names))}"
    for template in set(verdict.templates) & set(names):
        expected = means([i for i, name in enumerate(names) if name == template])
        for what, says, is_ in zip(("base", "trained"), verdict.templates[template], expected, strict=True):
            stated[f"templates.{template} {what}"] = (says, is_)
    for what, (says, is_) in sorted(stated.items()):
        if not abs(says - is_) <= limit:
            yield f"{what} is {says:.6g}, but per_prompt gives {is_:.6g}"
    if not verdict.gain.low <= verdict.gain.high:
        yield "gain.low is above gain.high"


def differences(known: Record, new: Record) -> list[str]:
    """Every place where two records of one cell give another result, with both values; none where they agree.

    What does not count is what differs from run to run (see `Record.comparable`), how the options were written, which
    release ran them, who submitted them, and a later field that one of the two has not. Of two that reached different
    rungs what they say of the earlier one is compared: see `further`.
    """
    rung = min(known.rung or 1, new.rung or 1)
    known, new = known.at(rung) or known, new.at(rung) or new

    def result(record: Record) -> dict[str, Any]:
        content = record.comparable()
        # Of one cell the hash tells no more than the resolved batch.
        for key in ("given", "tuning", "cell_hash", "schema_revision", "submitter"):
            content.pop(key, None)
        del content["provenance"]["plugins"]
        return content

    a, b = result(known), result(new)
    _without_absent(Record, a, b)
    _without_absent(Provenance, a["provenance"], b["provenance"])
    _without_absent(Cost, a["cost"], b["cost"])
    for model, key in ((Round, "rounds"), (Verdict, "verdicts"), (Rung, "rungs")):
        for one, other in zip(a.get(key, []), b.get(key, []), strict=False):
            _without_absent(model, one, other)
    for one, other in zip(a.get("rungs", []), b.get("rungs", []), strict=False):
        _without_absent(Cost, one["cost"], other["cost"])
    return [plain(found) for found in _unequal(a, b)]


def further(known: Record, new: Record) -> bool:
    """Whether a record of the same cell says what the known one does, if `differences` finds none, and more: it takes the
    known one's place."""
    return (new.rung or 1) > (known.rung or 1)


def _without_absent(model: type[Part], a: dict[str, Any], b: dict[str, Any]) -> None:
    """Leave out of both what one of them was made too early to have."""
    for name, info in model.model_fields.items():
        if info.exclude_if is not None and (name in a) != (name in b):
            a.pop(name, None)
            b.pop(name, None)


def _unequal(known: Any, new: Any, where: str = "") -> Iterator[str]:
    if isinstance(known, dict) and isinstance(new, dict):
        pairs = [(str(k), known.get(k), new.get(k)) for k in [*known, *(k for k in new if k not in known)]]
    elif isinstance(known, list) and isinstance(new, list) and len(known) == len(new):
        pairs = [(str(i), *both) for i, both in enumerate(zip(known, new, strict=True))]
    else:
        if known != new:
            yield f"{where} is {_short(known)} there and {_short(new)} here"
        return
    for key, a, b in pairs:
        yield from _unequal(a, b, f"{where}.{key}".lstrip("."))


def _short(value: Any) -> str:
    text = f"a list of {len(value)}" if isinstance(value, list) else repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a record of version SCHEMA."""
    content = Record.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:bench-dfusion:record:{SCHEMA}",
        "title": "bench-dfusion record",
        "description": "One cell's result: a track, an algorithm, a builder, a reward and a seed. Numbers are finite.",
        **{k: v for k, v in content.items() if k not in ("title", "description", "required")},
        "required": ["schema_version", *content["required"]],  # pydantic would take it for given
    }


def prompts_seen(track: Track) -> dict[str, str]:
    """The hash of each of a track's prompt lists that is not empty, by its name, in the order of the list."""
    lists = {name: getattr(track.prompts, name) for name in SETS}
    return {name: content_sha256(list(prompts)) for name, prompts in lists.items() if prompts}


def training(rounds: Sequence[Round], updates: int) -> tuple[bool, str | None]:
    """Whether anything was trained, and if not why: `Record.trained` and `Record.untrained`."""
    drawn = [r for r in rounds if r.reward is not None and r.reward_sd is not None]
    alike = drawn and all((r.reward_sd or 0) <= 1e-6 * max(1.0, abs(r.reward or 0)) for r in drawn)
    because = "; the training reward gave every sample of a round the same score" if alike else ""
    if not updates:
        return False, f"no update was made: no round left anything to train on{because}"
    norms = [r.metrics["grad_norm"] for r in rounds if "grad_norm" in r.metrics]
    if norms and not any(norms):
        return False, f"no gradient arrived: its norm was 0 in every round{because}"
    return True, None


def write(path: Path, record: Record) -> None:
    files.write_json(path, record.model_dump(mode="json"))


def rung_folder(folder: Path, rung: int) -> Path:
    """Where the run in `folder` keeps LoRA, scores and pictures of a rung, unless it is the ladder's last."""
    return folder / "rungs" / str(rung)


def beside(path: Path, record: Record, name: str) -> Path:
    """A file of the run that left `record` at `path`: of a rung below the last the copy that a run that goes on leaves
    alone, if it is there."""
    copy = rung_folder(path.parent, record.rung or 0) / name
    return copy if record.status == "finished" and copy.is_file() else path.with_name(name)


def folder_name(algorithm: str, builder: str, reward: str, seed: int, cell_hash: str) -> str:
    """The name of a cell's directory below its track's."""
    return f"{algorithm}-{builder}-{reward}-s{seed}-{cell_hash[:8]}"


def below(folder: Path, name: str) -> list[Path]:
    """The files of a name below a folder, by path; not those in hidden folders, where a sweep keeps unfinished tries."""
    found = sorted(folder.rglob(name))
    return [p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts)]


def find(folder: Path) -> list[tuple[Path, Record]]:
    """Every record below a folder, by path."""
    return [(path, read(path)) for path in below(folder, "record.json")]


@dataclass(frozen=True)
class Unfinished:
    """A cell that was registered (cell.json) and has no record, with the error its last try ended in (error.json)."""

    folder: Path
    track: str
    track_hash: str
    cell_hash: str
    algorithm: str
    builder: str
    reward: str
    seed: int
    resolved: dict[str, Any]
    error: str | None


def find_unfinished(folder: Path) -> list[Unfinished]:
    """Every registered cell below a folder without a record, by path. Raises UsageError for a damaged file."""
    found = []
    for path in below(folder, "cell.json"):
        if path.with_name("record.json").exists():
            continue
        try:
            content = files.read_json(path)
            resolved = content["resolved"]
            track = Track.model_validate(resolved["track"])
            error = path.with_name("error.json")
            found.append(
                Unfinished(
                    folder=path.parent,
                    track=track.id,
                    track_hash=track.hash,
                    cell_hash=content["hash"],
                    algorithm=resolved["algorithm"]["name"],
                    builder=resolved["builder"]["name"],
                    reward=resolved["reward"]["name"],
                    seed=resolved["seed"],
                    resolved=resolved,
                    error=files.read_json(error)["error"] if error.exists() else None,
                )
            )
        except (ValueError, KeyError, TypeError, OSError) as problem:
            raise UsageError(f"{path} describes no cell ({problem}); remove it, or run its cell again") from None
    return found


def code_state() -> tuple[str | None, bool | None]:
    """(commit, dirty) of the checkout this package runs from."""
    here = Path(__file__).parents[2]
    if not (here / ".git").exists():
        return None, None
    try:
        commit = _git(here, "rev-parse", "HEAD")
        return commit, bool(_git(here, "status", "--porcelain"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()


def versions(rewards: Iterable[Reward] = ()) -> dict[str, str]:
    """Versions of Python, of the packages that matter, and of what these rewards run in environments of their own."""
    names = ("bench-dfusion", "torch", "diffusers", "transformers", "peft", "open_clip_torch", "numpy", "scipy")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    for reward in rewards:
        found |= reward.versions()
    return found


def hardware() -> str:
    import torch

    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            model = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{model}, {torch.get_num_threads()} threads, {platform.system()} {platform.release()}"


def peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 1e6
    with suppress(OSError, StopIteration), open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith("VmHWM:")).split()[1]) * 1024 / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def restart_peak_memory(device: torch.device) -> None:
    """From now on `peak_memory_mb` is of what follows; on a CPU only where Linux lets a process say so."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    print(json.dumps(schema(), indent=1, ensure_ascii=False))
