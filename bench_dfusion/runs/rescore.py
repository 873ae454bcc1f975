"""Scoring again: a finished run from its saved LoRA, against its record; and weights that the suite did not train."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, ValidationError

from bench_dfusion.diffusion import lora as loras
from bench_dfusion.diffusion.policy import Policy
from bench_dfusion.errors import UsageError
from bench_dfusion.models import layout
from bench_dfusion.models.base import NotFinite
from bench_dfusion.models.loading import find, load_adapter
from bench_dfusion.results import checked_base, checks, companions, records
from bench_dfusion.results.checked_base import CheckedBase
from bench_dfusion.results.records import Drift, Part, Record, Verdict
from bench_dfusion.rewards.contract import Reward
from bench_dfusion.runs import base_drawing, evaluation, pictures, text_limits
from bench_dfusion.runs.trainer import make_policy
from bench_dfusion.tracks.schema import LOCAL, Track, content_sha256, hash_of
from bench_dfusion.util import files

TOLERANCE = 1e-3  # of the standard deviation over prompts of a judge's scores
ROUNDING = 1e-6  # of the largest value: float32's own

Status = Literal["matches", "differs slightly", "differs"]


@dataclass(frozen=True)
class Difference:
    """A figure of a record that comes out otherwise; `judge` is "drift" for the drift's figures."""

    judge: str
    what: str  # a prompt and "base" or "trained", or the name of a mean
    recorded: float
    found: float
    tolerance: float  # 0 where the two are of a different kind, nan and a number say

    @property
    def size(self) -> float:
        return abs(self.found - self.recorded)


@dataclass(frozen=True)
class Rescored:
    """A run scored again.

    provenance   what is not as the record says, one line each; where there is any, nothing was drawn
    differences  figures beyond their tolerance
    largest      the largest difference of one prompt's score, of each judge
    elsewhere    what is not as it was where the record was made (machine, device, versions), one line each
    """

    record: Record
    provenance: list[str]
    verdicts: list[Verdict]
    differences: list[Difference]
    largest: dict[str, float]
    exact: bool
    elsewhere: list[str]

    @property
    def status(self) -> Status:
        """matches: every figure within its tolerance, `TOLERANCE` of the standard deviation over prompts of a judge's
        scores. differs slightly: some are not, and every judge's mean of base, of trained and the gain are within half
        the width of the gain's interval. Else differs; so does what another provenance says."""
        if self.provenance:
            return "differs"
        if not self.differences:
            return "matches"
        near = True
        for old, new in zip(self.record.verdicts, self.verdicts, strict=True):
            half = (new.gain.high - new.gain.low) / 2
            means = ((old.base, new.base), (old.trained, new.trained), (old.gain.mean, new.gain.mean))
            near &= all(abs(a - b) <= half for a, b in means)
        return "differs slightly" if near else "differs"


def run(folder: Path, device: str | None = None, model: str | None = None) -> Rescored:
    """Draw base and trained of a finished run again, from its saved LoRA on the same noise, and compare every figure.

    `model`: where the base model is now, if not where the record says. Hashes are compared first, of the track, the
    options, the LoRA, the judges and the model; where one differs nothing is drawn. Raises UsageError where there is
    no such run, or nothing to compare.
    """
    if not folder.is_dir():
        raise UsageError(f"no run directory {folder}; for a LoRA file of another trainer use --lora")
    record = records.read(folder / "record.json")
    if record.status == "failed":
        raise UsageError(f"{folder} failed ({record.evidence}): it was never judged, so there is nothing to compare")
    file = records.beside(folder / "record.json", record, companions.weights_file(record))
    if not file.is_file():
        raise UsageError(
            f"no file {file}: the record alone cannot be scored again; run its cell again, or get its trained weights"
        )
    try:
        track = Track.model_validate(record.resolved["track"])
    except (KeyError, ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise UsageError(f"{folder / 'record.json'} resolves to no track: {reason}") from None
    where = _device(device)
    judges = _judges(track, where)
    base = _base(record, track, folder)
    section = track.model.model_copy(update={"sha256": None, "id": model or _place(record, track)})
    adapter, model_sha256 = load_adapter(section, where, track.memory)
    found = {name: judge.fingerprint() for name, judge in judges.items()}
    problems = _provenance(record, track, file, model_sha256, found)
    if problems:
        return Rescored(record, problems, [], [], {}, False, [])
    policy = make_policy(track, adapter, record.seed, where)
    _load(file, policy.load, file)
    text_limits.say(adapter, track.prompts.heldout)
    trained_on = record.provenance.reward_components or {record.reward: record.provenance.reward_fingerprint}
    done = _evaluated(policy, track, judges, trained_on, base, str(folder))
    differences, largest = compare(record, done.verdicts, done.drift, track.prompts.heldout)
    exact = (done.verdicts, done.drift) == (record.verdicts, record.drift)
    return Rescored(record, [], done.verdicts, differences, largest, exact, _elsewhere(record, where, judges.values()))


def _base(record: Record, track: Track, folder: Path) -> CheckedBase | None:
    """The checked base that a record stands on. Raises UsageError where it is not here, or another is."""
    base = checked_base.load(track, folder.parent)
    if track.evaluation.base_images_per_prompt is not None and base is None:
        place = folder.parent / checked_base.file_name(track)
        raise UsageError(f"no {place}, the checked base of {track.id}: get it from where the record was made")
    if base is not None and base.sha256 != record.provenance.base_sha256:
        where = checked_base.find(track, folder.parent)
        raise UsageError(
            f"{where} is {base.sha256[:12]}…, the record stands on the checked base {record.provenance.base_sha256}"
        )
    return base


def _evaluated(
    policy: Policy,
    track: Track,
    judges: dict[str, Reward],
    trained_on: dict[str, str],
    base: CheckedBase | None,
    what: str,
) -> evaluation.Evaluation:
    try:
        return evaluation.evaluate(policy, track, judges, trained_on, base)
    except NotFinite as error:
        raise UsageError(f"{what} on {track.id}: {error}") from None


def _place(record: Record, track: Track) -> str:
    """Where the base model of a run was. Raises UsageError where it is no longer there."""
    if track.model.id != LOCAL:
        return track.model.id
    place = record.given.get("model")
    if not isinstance(place, str) or layout.local(place) is None:
        raise UsageError(f"the run's model was the directory {place}, which is not here: give --model, where it is now")
    return place


def compare(
    record: Record, verdicts: Sequence[Verdict], drift: Drift, prompts: Sequence[str]
) -> tuple[list[Difference], dict[str, float]]:
    """The figures of a record that are not those found, by judge in the track's order, prompts before means; and of
    each judge the largest difference of one prompt's score. The tolerance is the scores' own: see `Rescored.status`."""
    differences: list[Difference] = []
    largest: dict[str, float] = {}
    for old, new in zip(record.verdicts, verdicts, strict=True):
        scores = np.array(new.per_prompt)
        tolerance = float(TOLERANCE * scores.std(0).max() + ROUNDING * np.abs(scores).max())
        pairs = {
            f"{prompt!r} {which}": (a[i], b[i])
            for prompt, a, b in zip(prompts, old.per_prompt, new.per_prompt, strict=True)
            for i, which in enumerate(("base", "trained"))
        }
        largest[new.judge] = max(abs(a - b) for a, b in pairs.values())
        pairs |= {f"mean of {name}": (getattr(old, name), getattr(new, name)) for name in ("base", "trained")}
        pairs |= {
            f"gain {name}": (getattr(old.gain, name), getattr(new.gain, name)) for name in ("mean", "low", "high")
        }
        if old.adjusted and new.adjusted:
            freed = zip(prompts, old.adjusted, new.adjusted, strict=True)
            pairs |= {f"{prompt!r} adjusted gain": (a, b) for prompt, a, b in freed}
        pairs |= {"trained on this judge": (float(old.trained_on), float(new.trained_on))}
        for template in sorted(old.templates.keys() | new.templates.keys()):
            for i, which in enumerate(("base", "trained")):
                values = (v.templates.get(template, (np.nan, np.nan))[i] for v in (old, new))
                pairs[f"template {template!r} {which}"] = (next(values), next(values))
        differences += _beyond(new.judge, pairs, tolerance)
    own = record.drift
    for name, value in drift.model_dump(exclude={"diversity_space"}).items():
        recorded = np.nan if own is None else getattr(own, name)
        differences += _beyond("drift", {name: (recorded, value)}, (TOLERANCE + ROUNDING) * abs(value))
    return differences, largest


def _beyond(judge: str, pairs: dict[str, tuple[float, float]], tolerance: float) -> list[Difference]:
    return [Difference(judge, what, a, b, tolerance) for what, (a, b) in pairs.items() if not abs(a - b) <= tolerance]


def _provenance(record: Record, track: Track, file: Path, model_sha256: str, judges: dict[str, str]) -> list[str]:
    """What the record's hashes say otherwise, one line each."""
    resolved = content_sha256(record.resolved)
    provenance = record.provenance
    hashes = {
        "the track's hash": (hash_of(record.resolved["track"]), record.track_hash),
        "the hash of the options (cell_hash)": (resolved, record.cell_hash),
        f"the SHA-256 of {file}": (files.sha256(file), provenance.lora_sha256),
        f"the SHA-256 of the model {track.model.id}": (model_sha256, provenance.model_sha256),
    }
    recorded = {v.judge: v.fingerprint for v in record.verdicts}
    hashes |= {f"the fingerprint of the judge {n}": (h, recorded[n]) for n, h in judges.items() if n in recorded}
    problems = [f"{what} is {a[:12]}…, the record says {b[:12]}…" for what, (a, b) in hashes.items() if a != b]
    if list(recorded) != list(judges):
        problems.append(f"the track's judges are {', '.join(judges)}, the record has {', '.join(recorded) or 'none'}")
    for v in record.verdicts:
        if len(v.per_prompt) != len(track.prompts.heldout):
            held = len(track.prompts.heldout)
            problems.append(
                f"the record has {v.judge}'s scores of {len(v.per_prompt)} prompts, the track holds out {held}"
            )
    return problems


def _elsewhere(record: Record, device: torch.device, judges: Iterable[Reward]) -> list[str]:
    names = {"machine": (record.provenance.hardware, records.hardware()), "device": (record.cost.device, _name(device))}
    here = records.versions(judges)
    # What only the training reward runs on (its own environment) is not here: it scores nothing again.
    names |= {name: (old, here[name]) for name, old in record.provenance.versions.items() if name in here}
    return [f"{name}: {here} here, {old} in the record" for name, (old, here) in names.items() if old != here]


def base(
    track: Track, out: Path, device: str | None = None, again: bool = False
) -> tuple[Path, CheckedBase, CheckedBase | None]:
    """A track's checked base, drawn where it is not there yet, and its file; with `again` also the base drawn anew.
    Raises UsageError for a track that has none."""
    if track.evaluation.base_images_per_prompt is None:
        raise UsageError(
            f"{track.id} has no checked base: its runs draw the base themselves. "
            "--set track.evaluation.base_images_per_prompt=N makes a track that has one"
        )
    where, folder = _device(device), out / track.id
    judges = _judges(track, where)
    adapter, model_sha256 = load_adapter(track.model, where, track.memory)
    policy = make_policy(track, adapter, 0, where)
    text_limits.say(adapter, track.prompts.heldout)
    found = base_drawing.ensure(track, folder, policy, judges, model_sha256)
    path = checked_base.find(track, folder)
    assert found is not None and path is not None
    return path, found, base_drawing.draw(track, policy, judges, model_sha256) if again else None


def same_base(one: CheckedBase, other: CheckedBase) -> bool:
    """Whether two bases of a track are the same but for other arithmetic (`checks.ARITHMETIC`)."""
    return all(
        abs(a.mean() - b.mean()) <= checks.ARITHMETIC * checked_base.means(a).std() + checks.ROUNDING
        for a, b in ((one.scores[name], other.scores[name]) for name in one.scores)
    )


class Scale(Part):
    """The shape of a LoRA."""

    rank: int = Field(description="rank of most of its modules (count)")
    alpha: float = Field(description="its scale's numerator: the update is alpha / rank · B·A")
    modules: int = Field(description="modules it changes (count)")


class ScoredWeights(Part):
    """What the judges say of weights that the suite did not train: a checkpoint result, never ranked."""

    schema_version: Literal[1] = Field(1, description="version of this schema")
    label: str = Field(description="what the user calls it")
    kind: Literal["lora", "checkpoint"] = Field(
        description="a LoRA on the track's model, or a whole pipeline beside it"
    )
    source: str = Field(description="the path it was read from")
    sha256: str = Field(description="hash of the LoRA's file, or of the pipeline's weights and configuration")
    lora: Scale | None = Field(None, description="the LoRA's shape, None for a pipeline")
    track: str = Field(description="the track's name and version")
    track_hash: str = Field(description="hash of everything the track fixes")
    resolved: dict[str, Any] = Field(description="the track: everything it fixes")
    verdicts: list[Verdict] = Field(
        description="what every judge said; what the weights were trained on is not known, so that trained_on says nothing"
    )
    drift: Drift = Field(description="how far it is from the base")
    network_evaluations: int = Field(description="forwards of one sample through one branch (count)")
    seconds: float = Field(description="wall time of drawing and judging (s)")
    peak_memory_mb: float = Field(description="peak memory of the device, or of the process on a CPU (MB)")
    device: str = Field(description="the device's name")
    code: str | None = Field(description="git commit of the package's source, None outside a checkout")
    dirty: bool | None = Field(description="whether that checkout had changes")
    versions: dict[str, str] = Field(description="versions of Python and the packages that matter")
    hardware: str = Field(description="processor, cores and system")
    model_sha256: str = Field(description="hash of the base model's weights and configuration")


class Checkpoint(Policy):
    """A pipeline trained as a whole: its reference is the base's pipeline. The LoRA that a policy has stays at zero."""

    base: Policy

    @contextmanager
    def sampling(
        self, steps: int, eta: float | None, kind: str, guidance: float, resolution: int | None = None
    ) -> Iterator[None]:
        given = steps, eta, kind, guidance, resolution
        with self.base.sampling(*given), super().sampling(*given):
            yield

    @contextmanager
    def reference(self) -> Iterator[None]:
        own = {name: getattr(self, name) for name in ("adapter", "schedule", "_encoded")}
        try:
            for name in own:
                setattr(self, name, getattr(self.base, name))
            with torch.no_grad():
                yield
        finally:
            for name, value in own.items():
                setattr(self, name, value)


def score_weights(
    track: Track,
    out: Path,
    *,
    lora: Path | None = None,
    checkpoint: Path | None = None,
    name: str | None = None,
    device: str | None = None,
) -> tuple[Path, ScoredWeights]:
    """Score a LoRA's file or directory, or a pipeline's directory, that the suite did not train, on a track.

    Leaves `evaluation.json` and `base_trained.png` below `out` and returns their directory with the evaluation; what
    is there already is only read. Raises UsageError on weights that do not fit the track's model, before any compute.
    """
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UsageError(f"--name {name!r}: use letters, digits, '.', '_' and '-'")
    if (lora is None) == (checkpoint is None):
        raise UsageError("give one of a LoRA and a checkpoint")
    kind: Literal["lora", "checkpoint"] = "lora" if lora else "checkpoint"
    path = (lora or checkpoint or Path()).expanduser()
    if not path.exists() and kind == "checkpoint":
        raise UsageError(f"no pipeline directory {path}")
    file = loras.locate(path) if kind == "lora" else path
    digest = loras.digest(file) if kind == "lora" else find(str(path.absolute())).sha256()
    label = name or _label(file)
    short = hashlib.sha256(f"{kind} {digest} {track.hash}".encode()).hexdigest()[:8]
    folder = out / track.id / f"eval-{label}-{short}"
    if (folder / "evaluation.json").exists():
        return folder, read(folder / "evaluation.json")
    where = _device(device)
    judges = _judges(track, where)
    try:
        adapter, model_sha256 = load_adapter(track.model, where, track.memory)
        shape = None
        if kind == "lora":
            own = loras.read(file, adapter)
            shape = Scale(rank=own.config.r, alpha=own.config.lora_alpha, modules=len(own.config.target_modules or ()))
            policy = make_policy(track, adapter, 0, where, own.config)
            _load(file, policy.load_state, own.state)
        else:
            policy = _checkpoint(track, path, make_policy(track, adapter, 0, where), where)
    except UsageError:
        raise
    except ValueError as error:  # a scheduler or a network that is no policy
        raise UsageError(f"{path}: {error}") from error
    text_limits.say(policy.adapter, track.prompts.heldout)
    start = time.perf_counter()
    base = base_drawing.ensure(track, folder.parent, policy, judges, model_sha256)
    done = _evaluated(policy, track, judges, {}, base, str(path))
    pictures.base_and_trained(folder / "base_trained.png", done.base, done.trained, track.prompts.heldout)
    code, dirty = records.code_state()
    found = ScoredWeights(
        label=label,
        kind=kind,
        source=str(path),
        sha256=digest,
        lora=shape,
        track=track.id,
        track_hash=track.hash,
        resolved=track.fixed,
        verdicts=done.verdicts,
        drift=done.drift,
        network_evaluations=policy.network_evaluations,
        seconds=round(time.perf_counter() - start, 2),
        peak_memory_mb=round(records.peak_memory_mb(where), 1),
        device=_name(where),
        code=code,
        dirty=dirty,
        versions=records.versions(judges.values()),
        hardware=records.hardware(),
        model_sha256=model_sha256,
    )
    files.write_json(folder / "evaluation.json", found.model_dump(mode="json"))
    return folder, found


def read(path: Path) -> ScoredWeights:
    """Read an evaluation. Raises UsageError naming the file and the first thing wrong with it."""
    try:
        return ScoredWeights.model_validate_json(path.read_bytes())
    except (ValidationError, OSError) as error:
        text = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            text = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise UsageError(f"{path} is no evaluation: {text}; remove it to score again") from None


def _checkpoint(track: Track, path: Path, base: Policy, device: torch.device) -> Checkpoint:
    """The policy of a pipeline beside the base's. Raises UsageError where the two have no noise in common."""
    section = track.model.model_copy(update={"id": str(path.absolute()), "revision": None, "sha256": None})
    adapter, _ = load_adapter(section, device, track.memory)
    policy = make_policy(track, adapter, 0, device, kind=Checkpoint)
    assert isinstance(policy, Checkpoint)
    policy.base = base
    ours, theirs = (tuple(p.adapter.latent_shape) for p in (policy, base))
    if ours != theirs:
        raise UsageError(f"{path} has latents of {ours}, {track.model.id} of {theirs}: no noise is the same for both")
    if not torch.equal(policy.schedule.std, base.schedule.std):
        raise UsageError(f"{path} has another noise schedule than {track.model.id}: its steps cannot be compared")
    return policy


def _judges(track: Track, device: torch.device) -> dict[str, Any]:
    try:
        return evaluation.load_judges(track, device)
    except UsageError:
        raise
    except ValueError as error:  # a prompt it cannot score
        raise UsageError(str(error)) from error


def _load(file: Path, load: Callable[[Any], None], what: Any) -> None:
    try:
        load(what)
    except ValueError as error:
        raise UsageError(f"{file}: {error}") from None


def _label(path: Path) -> str:
    path = path.resolve()
    name = path.parent.name if path.name in (loras.FILE, loras.PEFT_FILE) else path.name.removesuffix(".safetensors")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "weights"


def _device(device: str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
