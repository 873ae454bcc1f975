"""What a record must be to stand in a table, checked before any table, merge, page or publication is made.

A `Checker` looks at each record alone (`refuse`: what cannot be; `flags`: what its owner may look at and nobody publish)
and beside the others of its track (`take`: another base, one run under several names). What a record alone cannot show,
`bench-dfusion verify` does. `python -m bench_dfusion.results.checks FOLDER` prints what is known of the tracks below a folder,
for tracks/known.json.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from scipy import stats

from bench_dfusion import registry, tracks
from bench_dfusion.errors import PluginError, UsageError, plain
from bench_dfusion.results import checked_base, records, statistics
from bench_dfusion.results.checked_base import CheckedBase
from bench_dfusion.results.records import Record
from bench_dfusion.tracks import schema as track_files
from bench_dfusion.tracks.schema import Track
from bench_dfusion.util import files

KNOWN: dict[str, dict[str, Any]] = json.loads((tracks.HERE / "known.json").read_text(encoding="utf-8"))
DISTRIBUTION = "bench-dfusion"
SECTIONS = {"algorithm": ("algorithms", "algo"), "builder": ("builders", "builder"), "reward": ("rewards", "reward")}
REVISION = re.compile(r"[0-9a-f]{7,64}")
SHA256 = re.compile(r"[0-9a-f]{64}")
LARGEST = 1e12  # of any score, drift or cost
ROUNDING = 1e-5  # of a judge's range: scores are float32
# Other arithmetic (another device, another precision) draws the base a little otherwise: its mean moves by at most this
# share of the standard deviation over prompts. A micro run in float32 instead of bfloat16 moves it by .003, .016 of it.
ARITHMETIC = 0.02
ALIKE = 8  # prompts (and an eighth of all) whose scores two runs may share by chance before every judge


class Checker:
    """Checks records alone and beside each other. One serves a whole command: what it learns of plugins and tracks it keeps."""

    def __init__(self) -> None:
        self._plugins = {kind: registry.plugins(kind) for kind in registry.KINDS}
        self._loaded: dict[tuple[str, str], Any] = {}
        self._bases: dict[str, tuple[str, Record]] = {}  # the first record of each track that was judged
        self._loras: dict[str, tuple[str, Record]] = {}
        self._scores: dict[tuple[str, int, tuple[float, ...]], list[tuple[str, Record]]] = {}
        self._tracks: dict[str, dict[str, Any]] | None = None
        self._checked: dict[tuple[Path, str], CheckedBase | None] = {}  # by the runs' directory and the track's hash
        self._own_noise: dict[str, dict[str, list[float]]] = {}  # of a checked base the means over a run's own noise

    # One record

    def refuse(self, record: Record) -> None:
        """Raise UsageError, in one line with the field and the reason, where a record cannot be what a run left."""
        contradictions = records.check(record)
        if contradictions:
            more = f" (and {len(contradictions) - 1} more)" if len(contradictions) > 1 else ""
            raise UsageError(f"it contradicts itself: {contradictions[0]}{more}")
        stages = record.stages
        for stage in stages:
            problem = next(self._problems(stage), None)
            # Another machine may have drawn the base at a later rung.
            if problem is None and stage.verdicts:
                problem = next(_other_base(stage, _base(stages[0]), "that of rung 1"), None)
            if problem is not None:
                raise UsageError(plain(_at(stage, record) + problem))

    def flags(self, record: Record) -> list[str]:
        """Why a record that may stand in its owner's own table must not be published, one line each, `FIELD: reason`."""
        return [plain(flag) for flag in self._flags(record)]

    def _flags(self, record: Record) -> Iterator[str]:
        provenance = record.provenance
        if provenance.code is None:
            yield "provenance.code: no code revision (run from a checkout of a commit)"
        elif not REVISION.fullmatch(provenance.code):
            yield f"provenance.code: {provenance.code[:40]!r} is no code revision"
        elif provenance.dirty is not False:
            yield "provenance.dirty: the code had changes that no revision has"
        for section, (kind, key) in SECTIONS.items():
            name, source = getattr(record, section), provenance.plugins.get(key, "an unknown distribution")
            known = self._plugins[kind].get(name)
            if known and _distribution(known.source) == DISTRIBUTION and _distribution(source) != DISTRIBUTION:
                yield f"provenance.plugins.{key}: {name} is {DISTRIBUTION}'s own, and this one came from {source}"
        seeds = record.resolved["track"].get("seeds", 0)
        if not isinstance(seeds, int):
            yield "resolved.track.seeds: no number of seeds"
        elif record.seed >= seeds:
            yield f"seed: {record.seed} is none of the track's seeds, 0 to {seeds - 1}"
        builder = self._class("builder", record.builder)
        unmeasured = any(stage.verdicts and stage.agreement is None for stage in record.stages)
        if record.schema_revision and unmeasured and builder and builder.draws:
            yield "agreement: missing, and runs of this version measure how the training reward agrees with the judges"
        known_base = KNOWN.get(record.track, {}).get("base")
        if known_base and record.verdicts and _base(record) != known_base:
            yield "verdicts.per_prompt: the base was drawn by other arithmetic than the track's, to the last bits"

    def _problems(self, record: Record) -> Iterator[str]:
        yield from _numbers(record)
        track = track_of(record)
        configs = {}
        for section in SECTIONS:
            cls = self._class(section, getattr(record, section))
            if cls is not None:
                try:
                    configs[section] = _config(cls, record.resolved[section], section)
                except UsageError as error:
                    yield f"resolved{'.' if str(error).startswith(section) else ': '}{error}"
                    return
        yield from self._components(record)
        yield from self._known(record, track)
        judges = self._judges(track)
        for verdict in record.verdicts:
            if verdict.judge in judges:
                cls, _ = judges[verdict.judge]
                yield from _within(f"verdict of {verdict.judge}: per_prompt", cls.limits, verdict.per_prompt)
            gains = verdict.gains
            slack = records.TOLERANCE * max(abs(score) for pair in verdict.per_prompt for score in pair)
            if verdict.gain.low < min(gains) - slack or verdict.gain.high > max(gains) + slack:
                yield f"verdict of {verdict.judge}: gain: its interval is wider than the gains of its prompts"
        yield from _together(record, track, judges)
        yield from self._trained_on(record, judges)
        yield from self._costs(record, track, configs)
        yield from _drift(record, track)
        yield from _later(record, track)
        yield from self._stands_on(record, track)
        if not SHA256.fullmatch(record.provenance.lora_sha256):
            yield f"provenance.lora_sha256: {record.provenance.lora_sha256[:40]!r} is no SHA-256"

    def _stands_on(self, record: Record, track: Track) -> Iterator[str]:
        """Whether it names a checked base and its pictures' scores where its track has one, and the one that is shipped."""
        checked = track.evaluation.base_images_per_prompt is not None
        judged = {"base_sha256": record.verdicts or record.rungs, "scores_sha256": record.verdicts}
        for name, verdicts in judged.items():
            digest, needed = getattr(record.provenance, name), checked and bool(verdicts)
            if digest is None and needed:
                yield f"provenance.{name}: missing, and the track has a checked base"
            elif digest is not None and not needed and name == "base_sha256":
                which = "it was never judged" if checked else "the track has no checked base"
                yield f"provenance.{name}: given, and {which}"
            elif digest is not None and not SHA256.fullmatch(digest):
                yield f"provenance.{name}: {digest[:40]!r} is no SHA-256"
        if checked and record.verdicts and (base := self._base_of(track, checked_base.SHIPPED)) is not None:
            yield from self._on(record, base)

    def _base_of(self, track: Track, folder: Path) -> CheckedBase | None:
        """A track's checked base, of the package or among the runs in `folder`; None where it is in neither."""
        place = folder, track.hash
        if place not in self._checked:
            base = self._checked[place] = checked_base.load(track, folder)
            if base is not None:
                k = track.evaluation.images_per_prompt
                self._own_noise[base.sha256] = {
                    name: checked_base.means(own[:, :k]).tolist() for name, own in base.scores.items()
                }
        return self._checked[place]

    def _on(self, record: Record, base: CheckedBase) -> Iterator[str]:
        if record.provenance.base_sha256 != base.sha256:
            yield f"provenance.base_sha256: {record.provenance.base_sha256} is not the checked base of {record.track}, {base.sha256}"
            return
        for name, scores in _base(record).items():
            if scores != checked_base.means(base.scores[name]).tolist():
                yield f"verdict of {name}: per_prompt: its base is not what the checked base says"

    def beside(self, path: Path, record: Record) -> None:
        """Hold a record against the files it came with: the scores of its pictures, at each rung, and the checked base
        among the runs. Raises UsageError, in one line, where they say otherwise."""
        for stage in record.stages:
            file = records.rung_folder(path.parent, stage.rung or 1) / checked_base.SCORES
            if stage is record:
                file = records.beside(path, record, checked_base.SCORES)
            if not stage.verdicts or stage.provenance.scores_sha256 is None or not file.is_file():
                continue
            track = track_of(record)
            if track.evaluation.base_images_per_prompt is None:
                return
            problem = next(self._contradicted(file, stage, track, self._base_of(track, path.parent.parent)), None)
            if problem is not None:
                raise UsageError(plain(_at(stage, record) + problem))

    def _contradicted(self, file: Path, record: Record, track: Track, base: CheckedBase | None) -> Iterator[str]:
        if files.sha256(file) != record.provenance.scores_sha256:
            yield f"provenance.scores_sha256: {file} holds other scores"
            return
        if base is not None:
            yield from self._on(record, base)
        prompts, scores = checked_base.read_scores(file)
        shape = len(track.prompts.heldout), track.evaluation.images_per_prompt
        judges = {v.judge: v for v in record.verdicts}
        if prompts != track.prompts.heldout or set(scores) - {checked_base.REWARD} != set(judges):
            yield f"{file}: not the track's held-out prompts and judges"
            return
        for name, own in scores.items():
            if own.shape != shape or not np.isfinite(own).all():
                yield f"{file}: {name}: not {shape[1]} finite scores of each prompt"
                return
        for name, verdict in judges.items():
            trained = [t for _, t in verdict.per_prompt]
            if checked_base.means(scores[name]).tolist() != trained:
                yield f"verdict of {name}: per_prompt: trained is not the mean of the scores in {file}"
            if base is not None:
                again = statistics.adjusted_gains(base.scores[name], scores[name][None], track.prompts.labels)
                found = [*again.table[0].tolist(), again.slope]
                stated = [*(verdict.adjusted or []), verdict.slope or 0.0]
                if not np.allclose(found, stated, rtol=0, atol=ROUNDING * max(1.0, np.abs(own).max())):
                    yield f"verdict of {name}: adjusted: not what the scores of base and trained give"
        reward = scores.get(checked_base.REWARD)
        for name, value in (record.agreement or {}).items():
            rank = math.nan if reward is None else stats.spearmanr(reward.ravel(), scores[name].ravel()).statistic
            if not abs(rank - value) <= ROUNDING:
                yield f"agreement.{name}: {value:.6g}, but the scores in {file} give {rank:.6g}"

    def _class(self, section: str, name: str) -> Any:
        """The class of a plugin that is installed and can be imported, else None."""
        kind = SECTIONS[section][0]
        if (kind, name) not in self._loaded:
            found = self._plugins[kind].get(name)
            self._loaded[kind, name] = None
            if found is not None:
                with suppress(PluginError):
                    self._loaded[kind, name] = found.load()
        return self._loaded[kind, name]

    def _judges(self, track: Track) -> dict[str, tuple[Any, Any]]:
        """Class and options of those of the track's judges whose plugins are installed."""
        found = {}
        for text in track.evaluation.judges:
            name, _, option = text.partition(":")
            cls = self._class("reward", name)
            if cls is not None:
                values = {**track.rewards.get(name, {}), **({"score": option} if option else {})}
                with suppress(ValidationError):
                    found[text] = cls, cls.Config.model_validate(values)
        return found

    def _components(self, record: Record) -> Iterator[str]:
        components = record.resolved["reward"].get("components")
        for name, content in components.items() if isinstance(components, dict) else ():
            cls = self._class("reward", name)
            options = content.get("options") if isinstance(content, dict) else None
            if cls is not None:
                try:
                    _config(cls, options if isinstance(options, dict) else {}, f"reward.components.{name}.options")
                except UsageError as error:
                    yield f"resolved.{error}"

    def _known(self, record: Record, track: Track) -> Iterator[str]:
        """What is known of the tracks that the package ships: their hash, judges, base, and what a first round scores."""
        known = KNOWN.get(record.track)
        if known is None:
            return
        if record.track_hash != known["hash"]:
            yield (
                f"track_hash: {record.track_hash[:12]}… is not the {record.track} of {DISTRIBUTION}, "
                f"{known['hash'][:12]}…: give a track of your own another name"
            )
            return
        for verdict in record.verdicts:
            fingerprint = known.get("judges", {}).get(verdict.judge)
            if fingerprint and verdict.fingerprint != fingerprint:
                yield f"verdict of {verdict.judge}: fingerprint: other weights or rules than the judge of {record.track}"
        wide = next((s for v in record.verdicts for p in v.per_prompt for s in p if float(np.float32(s)) != s), None)
        if wide is not None and "base" in known:
            yield f"verdicts.per_prompt: {wide!r} is no float32, which the judges of {record.track} return"
        same = bool(record.verdicts) and _base(record) == known.get("base")
        if record.verdicts and "base" in known and not same:
            yield from _other_base(record, known["base"], f"that of {record.track}")
        first = record.rounds[0] if record.rounds else None
        drawn = known.get("first_rounds", {}).get(record.provenance.reward_fingerprint, [])
        if first is None or first.reward is None or first.reward_sd is None or record.seed >= len(drawn):
            return
        # No algorithm has trained yet: the base draws it, from noise that the seed alone decides.
        reward, sd = drawn[record.seed]
        count = track.budget.prompts_per_round * track.budget.samples_per_prompt
        own = all(_distribution(record.provenance.plugins.get(k, "")) == DISTRIBUTION for k in ("algo", "builder"))
        if (same and own and (first.reward, first.reward_sd) != (reward, sd)) or abs(
            first.reward - reward
        ) > 4 * sd / math.sqrt(count):
            yield (
                f"rounds.0.reward: {first.reward:.6g}, but the base draws {reward:.6g} for {record.reward} and seed "
                f"{record.seed}: another reward or another seed trained it"
            )

    def _trained_on(self, record: Record, judges: Mapping[str, tuple[Any, Any]]) -> Iterator[str]:
        """Whether each verdict says that its judge trained the run exactly where it did."""
        components = record.provenance.reward_components
        fingerprints = record.provenance.trained_on
        names = {record.reward, *components}
        for verdict in record.verdicts:
            cls, config = judges.get(verdict.judge, (None, None))
            trained = verdict.fingerprint in fingerprints or (cls is not None and cls.one_judge and cls.name in names)
            if cls is not None and verdict.trained_on != trained:
                yield f"verdict of {verdict.judge}: trained_on: {verdict.trained_on}, but the reward was {record.reward}"
            if cls is None or cls.name != record.reward:
                continue
            with suppress(UsageError):
                options = _config(cls, record.resolved["reward"], "reward")
                if options == config and record.provenance.reward_fingerprint != verdict.fingerprint:
                    yield f"provenance.reward_fingerprint: not that of the judge {verdict.judge}, which is the reward"

    def _costs(self, record: Record, track: Track, configs: Mapping[str, Any]) -> Iterator[str]:
        """Queries, rounds, updates and evaluations that fit the options and the budget."""
        cost, rounds, finished = record.cost, record.rounds, record.status == "finished"
        budget = track.budget
        drawn = budget.prompts_per_round * budget.samples_per_prompt
        sampled = [r for r in rounds if r.reward is not None]
        a_round = self._queries(record, configs, drawn)
        if a_round is not None:
            queries = budget.ladder[(record.rung or 1) - 1]
            expected = queries // (a_round or drawn)
            if len(rounds) > expected or (finished and len(rounds) != expected):
                yield f"rounds: {len(rounds)}, but the budget has {expected} of {a_round or drawn} queries"
            wrong = next((r for r in rounds if r.queries != (r.round + 1) * a_round), None)
            if wrong is not None:
                yield (
                    f"rounds.{wrong.round}.queries: {wrong.queries}, but {wrong.round + 1} rounds of {record.algorithm} "
                    f"with {record.builder} cost {(wrong.round + 1) * a_round}"
                )
            draws = self._class("builder", record.builder).draws
            if draws and len(sampled) < len(rounds):
                yield f"rounds: {record.builder} draws samples, and {len(rounds) - len(sampled)} rounds have no reward"
        if cost.reward_queries < drawn * len(sampled):
            yield (
                f"cost.reward_queries: {cost.reward_queries}, but {len(sampled)} rounds of {drawn} drawn samples were scored"
            )
        least = drawn * track.sampler.steps * len(sampled)
        judged = len(record.rungs or ()) + finished
        least += (
            judged
            * len(track.prompts.heldout)
            * track.evaluation.images_per_prompt
            * ((track.evaluation.sampler or track.sampler).steps)
        )
        if cost.network_evaluations < least:
            yield f"cost.network_evaluations: {cost.network_evaluations}, but drawing the samples alone takes {least}"
        algorithm = configs.get("algorithm")
        if algorithm is not None:
            trained = sum(bool(r.metrics) for r in rounds)
            least, most = trained * algorithm.inner_epochs, trained * algorithm.inner_epochs * algorithm.updates
            more = 0 if finished else algorithm.inner_epochs * algorithm.updates  # of the round in which it failed
            if not least <= cost.updates <= most + more:
                yield f"cost.updates: {cost.updates}, but {trained} rounds that trained make {least} to {most}"
        if finished and not sum(cost.seconds.values()) > 0:
            yield "cost.seconds: a run takes time"
        limits: Any = (None, None) if (cls := self._class("reward", record.reward)) is None else cls.limits
        for r in rounds:
            figures = [v for v in (r.reward, r.base_reward, r.winner_reward) if v is not None]
            yield from _within(f"rounds.{r.round}: rewards", limits, [figures])
            widest = math.inf if None in limits else limits[1] - limits[0]
            if r.reward_sd is not None and not 0 <= r.reward_sd <= widest:
                yield f"rounds.{r.round}.reward_sd: {r.reward_sd:.6g} is wider than the reward's range"
            if min(r.pairs, r.dropped, r.queries) < 0 or (r.reward is not None and r.pairs + r.dropped > drawn):
                yield f"rounds.{r.round}.pairs: {r.pairs} and {r.dropped} dropped of {drawn} drawn samples"

    def _queries(self, record: Record, configs: Mapping[str, Any], drawn: int) -> int | None:
        """The reward queries of a round by the builder's and the algorithm's own word; None where that is not known."""
        algorithm, builder = (self._class(s, getattr(record, s)) for s in ("algorithm", "builder"))
        if "algorithm" not in configs or "builder" not in configs:
            return None
        try:
            own = builder(configs["builder"]).queries(drawn) if builder.draws else 0
            return int(own + algorithm(configs["algorithm"]).queries(drawn))
        except Exception:  # a plugin's own code, which this table does not run
            return None

    # Beside others

    def take(self, where: str, record: Record) -> None:
        """Hold a record against those taken before it. Raises UsageError, in one line, where it cannot stand beside them.

        `where`: what messages call it.
        """
        self._same_base(where, next((s for s in reversed(record.stages) if s.verdicts), record))
        for stage in record.stages:
            self._take(where, stage)

    def _take(self, where: str, record: Record) -> None:
        other, before = self._loras.setdefault(record.provenance.lora_sha256, (where, record))
        if before is not record and _another_training(before, record):
            raise UsageError(
                f"provenance.lora_sha256: its LoRA is that of {other}, which another seed or reward trained"
            )
        twin = self._twin(record)
        if twin is not None:
            raise UsageError(
                f"verdicts.per_prompt: its trained scores are those of {twin}, which another seed or reward trained"
            )
        for i, scores in self._moved(record):
            self._scores.setdefault((record.track_hash, i, scores), []).append((where, record))

    def _same_base(self, where: str, record: Record) -> None:
        if not record.verdicts:
            return
        other, known = self._bases.setdefault(record.track_hash, (where, record))
        if known.provenance.base_sha256 != record.provenance.base_sha256:
            raise UsageError(
                f"provenance.base_sha256: it stands on another checked base than {other}: a track's base is drawn once, take "
                "its file to the other machine before the first run there"
            )
        if known is record or _base(known) == _base(record) or _judged(known) != _judged(record):
            return
        machine = [(r.provenance.hardware, r.cost.device, r.provenance.versions.get("torch")) for r in (known, record)]
        if machine[0] == machine[1]:
            judge = next(j for j, scores in _base(record).items() if scores != _base(known)[j])
            raise UsageError(
                f"verdict of {judge}: per_prompt: its base is not that of {other}, which the same machine drew to the "
                "last bit"
            )
        for problem in _other_base(record, _base(known), f"that of {other}"):
            raise UsageError(problem)

    def _twin(self, record: Record) -> str | None:
        """A record that another seed or reward trained and whose scores are this one's on too many prompts."""
        counts: Counter[str] = Counter()
        for i, scores in self._moved(record):
            found = self._scores.get((record.track_hash, i, scores), [])
            counts.update({where for where, other in found if _another_training(other, record)})
        most = max(counts.items(), key=lambda c: c[1], default=("", 0))
        prompts = len(record.verdicts[0].per_prompt) if record.verdicts else 0
        return most[0] if most[1] >= max(ALIKE, prompts / 8) else None

    def _moved(self, record: Record) -> list[tuple[int, tuple[float, ...]]]:
        """Of each prompt whose scores are not the base's on the same noise every judge's score; none where no judge tells
        pictures apart."""
        if not record.verdicts:
            return []
        columns = [[t for _, t in v.per_prompt] for v in record.verdicts]
        if not any(len(set(c)) >= 0.9 * len(c) for c in columns):
            return []
        base: Mapping[str, Sequence[float]] = _base(record)
        if record.provenance.base_sha256 is not None:
            base = self._own_noise.get(record.provenance.base_sha256, {})
        still = zip(*(base[v.judge] for v in record.verdicts), strict=True) if base else [()] * len(columns[0])
        rows = zip(still, zip(*columns, strict=True), strict=True)
        return [(i, trained) for i, (own, trained) in enumerate(rows) if tuple(own) != trained]

    # Options

    def by_rule(self, record: Record) -> bool | None:
        """Whether a run's options are those that its track's tuning chose beforehand; None where that is not known
        here: another track, or a plugin that is not installed."""
        content = self._suggestions(record)
        if content is None:
            return None
        algorithm, builder, reward = record.algorithm, record.builder, record.reward
        values = {
            "algorithm": {
                **content.get("algorithms", {}).get(algorithm, {}),
                **content.get("tuned", {}).get(algorithm, {}).get(builder, {}),
            },
            "builder": content.get("builders", {}).get(builder, {}),
            "reward": content.get("rewards", {}).get(reward, {}),
        }
        for section, options in values.items():
            cls = self._class(section, getattr(record, section))
            if cls is None and section == "reward":  # a sum or a function: its name says what it is
                continue
            if cls is None:
                return None
            try:
                chosen = cls.Config.model_validate(options).model_dump(mode="json")
            except ValidationError:
                return None
            own = {k: v for k, v in record.resolved[section].items() if k not in ("name", *PINNED.get(section, ()))}
            if any(k not in chosen or chosen[k] != v for k, v in own.items()):
                return False
        return True

    def _suggestions(self, record: Record) -> dict[str, Any] | None:
        if self._tracks is None:
            self._tracks = {}
            for name in self._plugins["tracks"]:
                with suppress(UsageError, PluginError):
                    content = track_files.read(name)
                    self._tracks[f"{content['name']}-v{content['version']}"] = content
        return self._tracks.get(record.track)


PINNED = {"builder": ("sha256", "pairs_per_round")}  # of offline pairs: whatever was given


def check(found: Sequence[tuple[Path | None, Record]], checker: Checker | None = None) -> None:
    """Raise UsageError, in one line that names the record, the field and the reason, where any of these records cannot be
    or cannot stand beside the others. Which base is the track's, most of them decide where it is not known."""
    checker = checker or Checker()
    bases = Counter((r.track_hash, json.dumps(_base(r))) for _, r in found if r.verdicts)
    order = sorted(found, key=lambda f: -bases[f[1].track_hash, json.dumps(_base(f[1]))])
    for path, record in order:
        where = f"{path} ({record.name})" if path else record.name
        try:
            checker.refuse(record)
            if path:
                checker.beside(path, record)
            checker.take(where, record)
        except UsageError as error:
            raise UsageError(plain(f"{where}: {error}")) from None


def _at(stage: Record, record: Record) -> str:
    """How messages begin that are about a record at an earlier rung."""
    return "" if stage is record else f"rung {stage.rung}: "


def track_of(record: Record) -> Track:
    """The track that a sound record resolves to."""
    return _track(json.dumps(record.resolved["track"], sort_keys=True))


@cache
def _track(content: str) -> Track:
    return Track.model_validate_json(content)


def _distribution(source: str) -> str:
    """The name in `NAME VERSION`, of several (a sum's components) where it is one."""
    names = {part.strip().rpartition(" ")[0] for part in source.split(",")}
    return names.pop() if len(names) == 1 else ""


def _config(cls: Any, content: Mapping[str, Any], where: str) -> Any:
    """The typed options of a plugin. Raises UsageError where it does not have them or would take them otherwise."""
    values = {k: v for k, v in content.items() if k != "name"}
    config = track_files.validate(cls.Config, values, where)
    taken = config.model_dump(mode="json")
    for option, value in values.items():
        if taken.get(option, value) != value or isinstance(taken.get(option), bool) != isinstance(value, bool):
            raise UsageError(f"{where}.{option}: {value!r} is not how a run writes {taken[option]!r}")
    return config


def _base(record: Record) -> dict[str, list[float]]:
    """What each judge said of the base, prompt by prompt."""
    return {v.judge: [base for base, _ in v.per_prompt] for v in record.verdicts}


def _judged(record: Record) -> list[tuple[str, int]]:
    return [(v.fingerprint, len(v.per_prompt)) for v in record.verdicts]


def _other_base(record: Record, known: Mapping[str, Sequence[float]], whose: str) -> Iterator[str]:
    """Where a base is further from the known one than other arithmetic brings about."""
    for judge, scores in _base(record).items():
        own, other = np.array(scores), np.array(known.get(judge, scores))
        if own.shape == other.shape and abs(own.mean() - other.mean()) > ARITHMETIC * other.std() + ROUNDING:
            yield (
                f"verdict of {judge}: base: {own.mean():.6g} is not {whose}, {other.mean():.6g}, within what other "
                "arithmetic brings about"
            )


def _another_training(a: Record, b: Record) -> bool:
    """Whether two runs that trained cannot have led to one LoRA: another seed or another reward."""
    own = [(r.seed, r.provenance.reward_fingerprint) for r in (a, b)]
    return own[0] != own[1] and not (own[0][0] == own[1][0] and not a.cost.updates and not b.cost.updates)


def _within(field: str, limits: tuple[float | None, float | None], scores: Sequence[Sequence[float]]) -> Iterator[str]:
    """The first score outside a reward's limits."""
    low, high = (-math.inf if limits[0] is None else limits[0]), (math.inf if limits[1] is None else limits[1])
    slack = ROUNDING * max((abs(x) for x in (low, high) if math.isfinite(x)), default=0.0)
    for pair in scores:
        for score in pair:
            if not low - slack <= score <= high + slack:
                yield f"{field}: {score:.6g} is outside the judge's range, {low:g} to {high:g}"
                return


def _together(record: Record, track: Track, judges: Mapping[str, tuple[Any, Any]]) -> Iterator[str]:
    """What a judge's plugin knows cannot be of its own scores on a prompt's pictures, several judges of one plugin
    together."""
    by_class: dict[Any, list[tuple[Any, Sequence[tuple[float, float]]]]] = {}
    for verdict in record.verdicts:
        if verdict.judge in judges:
            cls, config = judges[verdict.judge]
            by_class.setdefault(cls, []).append((config, verdict.per_prompt))
    own = track.evaluation.images_per_prompt
    counts = track.evaluation.base_images_per_prompt or own, own
    for cls, found in by_class.items():
        for i, prompt in enumerate(track.prompts.heldout):
            for which, what in enumerate(("base", "trained")):
                means = [(config, pairs[i][which]) for config, pairs in found]
                try:
                    reason = cls.impossible(means, prompt, counts[which])
                except ValueError:  # no prompt of its grammar
                    continue
                if reason:
                    yield f"verdict of {cls.name}: per_prompt.{i} {what} ({prompt!r}): {reason}"
                    return


def _drift(record: Record, track: Track) -> Iterator[str]:
    drift, pictures = record.drift, track.evaluation.images_per_prompt
    if drift is None:
        if record.status == "finished":
            yield "drift: missing"
        return
    checked = track.evaluation.base_images_per_prompt is not None
    limits = {
        "pixels": (0.0, 255.0),
        "kl": (0.0, None),
        "diversity_base": (1.0, float(pictures)),
        "diversity_trained": (1.0, float(pictures)),
    }
    for name, (low, high) in limits.items():
        value = getattr(drift, name)
        if value < low - 1e-6 or (high is not None and value > high + 1e-6):
            yield f"drift.{name}: {value:.6g} is outside {low:g} to {'∞' if high is None else f'{high:g}'}"
    same = all(b == t for v in record.verdicts for b, t in v.per_prompt)
    if drift.pixels == 0 and not same and not checked:  # there it is of the first picture of each prompt alone
        yield "drift.pixels: 0, but the judges saw other pictures than the base's"
    known = KNOWN.get(record.track, {})
    if known.get("base") == _base(record) and drift.diversity_base != known["diversity_base"]:
        yield (f"drift.diversity_base: {drift.diversity_base:.6g}, but the base has {known['diversity_base']:.6g}")


def _later(record: Record, track: Track) -> Iterator[str]:
    """The fields that only newer records have, where this one has them."""
    provenance = record.provenance
    seen = records.prompts_seen(track)
    for name, digest in (provenance.prompts_seen or {}).items():
        if name in seen and digest != seen[name]:
            yield f"provenance.prompts_seen.{name}: not the hash of the track's list"
    for judge, value in (record.agreement or {}).items():
        if not -1 - ROUNDING <= value <= 1 + ROUNDING:
            yield f"agreement.{judge}: {value:.6g} is no rank correlation"
    if (record.trained is False) != (record.untrained is not None):
        yield "untrained: given where trained is not false, or missing where it is"
    if record.trained and not record.cost.updates:
        yield "trained: true, but cost.updates is 0"
    for r in record.rounds:
        if r.rise is not None and (
            r.reward is None
            or r.base_on_prompts is None
            or abs(r.rise - (r.reward - r.base_on_prompts)) > ROUNDING * max(1.0, abs(r.reward))
        ):
            yield f"rounds.{r.round}.rise: not reward − base_on_prompts"


def _numbers(record: Record) -> Iterator[str]:
    """Numbers that nothing measured has: too large, negative zero."""
    measured = record.model_dump(mode="json", include={"verdicts", "drift", "rounds", "cost", "agreement", "seed"})
    for path, value in _leaves(measured, ""):
        if isinstance(value, float) and value == 0 and math.copysign(1, value) < 0 and ".metrics." not in path:
            yield f"{path}: negative zero"
        elif abs(value) > (1e38 if ".metrics." in path else LARGEST):
            yield f"{path}: {value if isinstance(value, float) else 'a number'} is larger than anything measured"


def _leaves(content: Any, path: str) -> Iterator[tuple[str, int | float]]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _leaves(value, f"{path}.{key}".lstrip("."))
    elif isinstance(content, list):
        for i, value in enumerate(content):
            yield from _leaves(value, f"{path}.{i}")
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield path, content


def facts(found: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """What `tracks/known.json` holds of the tracks of these records. Raises ValueError where they do not agree."""
    known: dict[str, dict[str, Any]] = {}
    for record in found:
        own = known.setdefault(record.track, {"hash": record.track_hash, "first_rounds": {}})
        judged = {"judges": {v.judge: v.fingerprint for v in record.verdicts}, "base": _base(record)}
        assert record.drift is not None
        for key, value in {**judged, "diversity_base": record.drift.diversity_base}.items():
            if own.setdefault(key, value) != value:
                raise ValueError(f"{record.name} has another {key}")
        first = record.rounds[0]
        drawn = own["first_rounds"].setdefault(record.provenance.reward_fingerprint, {})
        if drawn.setdefault(record.seed, [first.reward, first.reward_sd]) != [first.reward, first.reward_sd]:
            raise ValueError(f"{record.name} has another first round")
    for own in known.values():
        own["first_rounds"] = {f: [d[s] for s in sorted(d)] for f, d in sorted(own["first_rounds"].items())}
    return known


def dumped(known: Mapping[str, Mapping[str, Any]]) -> str:
    """Facts as `tracks/known.json` has them: a line for each of a track's."""
    tracks = [
        f" {json.dumps(name)}: {{\n"
        + ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in own.items())
        + "\n }"
        for name, own in known.items()
    ]
    return "{\n" + ",\n".join(tracks) + "\n}\n"


if __name__ == "__main__":
    print(dumped(facts([r for _, r in records.find(Path(sys.argv[1]))])), end="")
