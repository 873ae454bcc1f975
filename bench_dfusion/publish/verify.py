"""Verifying what a table is made of: records drawn from a folder are evaluated again from their LoRAs, or run again."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bench_dfusion import registry
from bench_dfusion.algorithm import Algorithm
from bench_dfusion.builders.contract import Builder
from bench_dfusion.errors import UsageError, plain
from bench_dfusion.publish import repository
from bench_dfusion.results import checks, companions, records
from bench_dfusion.results.records import Record, Verdict
from bench_dfusion.rewards import sums, user_function
from bench_dfusion.runs import config, rescore, trainer
from bench_dfusion.tracks.schema import Track

How = Literal["evaluated again", "run again"]
Status = Literal["matches", "within rounding", "differs", "cannot be verified"]


@dataclass(frozen=True)
class Verified:
    """One record looked at again.

    status   matches: every figure within a thousandth of the standard deviation over prompts of a judge's scores, on the
             kind of machine that made the record to the last bit; within rounding: on another machine every judge's means
             within `checks.ARITHMETIC` of that standard deviation; differs: neither
    detail   what differs, or why it cannot be verified; of a match whether to the last bit
    """

    path: Path
    record: Record
    how: How
    status: Status
    detail: str


def run(
    folder: Path,
    sample: int = 3,
    rerun: int = 0,
    *,
    device: str | None = None,
    model: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Verified]:
    """Evaluate `sample` records of a folder again, and run `rerun` whole cells again.

    Which, a hash of all its records decides: nobody who adds a record chooses them. Every record is checked first
    (`checks.check`), of a published leaderboard against its tables too, and a LoRA or another companion that is not the
    record's is a difference. `model`: where the base model is now. `say` is told what comes next. Raises UsageError where
    the folder holds no record or one that cannot be.
    """
    if not folder.is_dir():
        raise UsageError(f"no directory {folder}")
    found = records.find(folder)
    if not found:
        raise UsageError(f"no record.json below {folder}")
    checks.check(found)
    repository.check(folder, found)
    order = drawn(found)
    done = []
    for number, (path, record) in enumerate(order[:sample], 1):
        say(f"{number} of {min(sample, len(order))}: {record.name}")
        done.append(_evaluated(path, record, device, model))
    for number, (path, record) in enumerate(order[:rerun], 1):
        say(f"run again, {number} of {min(rerun, len(order))}: {record.name}")
        done.append(_run_again(path, record, device))
    return done


def drawn(found: Sequence[tuple[Path, Record]]) -> list[tuple[Path, Record]]:
    """Records in an order that their content alone decides, wherever the files lie."""
    digests = {path: hashlib.sha256(record.model_dump_json().encode()).hexdigest() for path, record in found}
    seed = hashlib.sha256("".join(sorted(digests.values())).encode()).hexdigest()
    return sorted(found, key=lambda f: hashlib.sha256(f"{seed} {digests[f[0]]}".encode()).hexdigest())


def _evaluated(path: Path, record: Record, device: str | None, model: str | None) -> Verified:
    def said(status: Status, detail: str) -> Verified:
        return Verified(path, record, "evaluated again", status, plain(detail))

    if record.status == "failed":
        return said("cannot be verified", "a failed run: it was never judged")
    try:
        beside = companions.beside(path, record)
    except UsageError as error:
        return said("differs", str(error))
    if companions.weights_file(record) not in beside:
        return said("cannot be verified", "no LoRA: cannot be verified but by --rerun")
    try:
        again = rescore.run(path.parent, device, model)
    except UsageError as error:
        return said("cannot be verified", str(error))
    if again.provenance:
        return said("differs", again.provenance[0])
    if again.status == "matches":
        return said("matches", "to the last bit" if again.exact else _largest(again.largest))
    elsewhere = [line for line in again.elsewhere if line.startswith(("machine:", "device:", "torch:"))]
    return said(*_rounding(record, again.verdicts, elsewhere))


def _run_again(path: Path, record: Record, device: str | None) -> Verified:
    def said(status: Status, detail: str) -> Verified:
        return Verified(path, record, "run again", status, plain(detail))

    try:
        cell = cell_of(record)
    except UsageError as error:
        return said("cannot be verified", str(error))
    with tempfile.TemporaryDirectory(prefix="bench-dfusion-verify-") as work:
        try:
            again = trainer.run_cell(cell, Path(work), device, "none", rung=record.rung or 1)
        except UsageError as error:
            return said("cannot be verified", str(error))
    differing = records.differences(record, again)
    if not differing:
        return said("matches", "to the last bit")
    elsewhere = [] if _machine(record) == _machine(again) else [f"{_machine(again)} here, {_machine(record)} there"]
    if record.status != again.status or len(record.rounds) != len(again.rounds):
        return said("differs", differing[0])
    status, detail = _rounding(record, again.verdicts, elsewhere)
    return said(status, detail if elsewhere else differing[0])


def _rounding(record: Record, verdicts: Sequence[Verdict], elsewhere: Sequence[str]) -> tuple[Status, str]:
    """Whether the means of judges that scored again are those of a record but for other arithmetic, and what differs."""
    worst, where = 0.0, ""
    for old, new in zip(record.verdicts, verdicts, strict=True):
        spread = np.array(new.per_prompt).std(0).max() + checks.ROUNDING
        means = {"base": (old.base, new.base), "trained": (old.trained, new.trained)}
        for what, (a, b) in {**means, "gain": (old.gain.mean, new.gain.mean)}.items():
            if abs(a - b) / spread >= worst:
                worst, where = abs(a - b) / spread, f"{old.judge} {what} {a:.4f} in the record, {b:.4f} here"
    if elsewhere and worst <= checks.ARITHMETIC:
        return "within rounding", f"{where}; {elsewhere[0]}"
    return "differs", where


def _largest(largest: Mapping[str, float]) -> str:
    judge = max(largest, key=lambda j: largest[j])
    return f"largest difference of a prompt {largest[judge]:.2g} ({judge})"


def _machine(record: Record) -> str:
    return f"{record.provenance.hardware}, {record.cost.device}, torch {record.provenance.versions.get('torch')}"


def cell_of(record: Record) -> config.Cell:
    """The cell that a record is of, to run it again. Raises UsageError where a plugin is not installed or other, or what
    it trained on is not in the record (a dataset of pairs, a user's function, teachers)."""
    resolved = record.resolved
    track = Track.model_validate(resolved["track"])
    algorithm: type[Algorithm] = registry.load("algorithms", record.algorithm)
    builder: type[Builder] = registry.load("builders", record.builder)
    if not builder.draws:
        raise UsageError("it trained on a dataset of pairs, which the record does not hold")
    if algorithm.takes_teachers:
        raise UsageError("it learnt from other runs' LoRAs, which the record does not hold")
    for part in (record.reward, *(name for name, _ in sums.split(record.reward) or ())):
        if part not in registry.plugins("rewards") and user_function.is_one(part):  # its file, whoever's, would be run
            raise UsageError("it trained on a user's function, whose code the record does not hold")
    reward = config.reward_of(record.reward)

    def options(section: str) -> dict[str, Any]:
        return {k: v for k, v in resolved[section].items() if k != "name"}

    try:
        reward_options: Any = reward.Config.model_validate(options("reward"))
        if "components" in resolved["reward"]:
            own = {
                n: {**c["options"], "mean": c["mean"], "sd": c["sd"]}
                for n, c in options("reward")["components"].items()
            }
            reward_options = reward.configured(own, {})  # type: ignore[attr-defined]
        cell = config.Cell(
            track,
            algorithm,
            algorithm.Config.model_validate(options("algorithm")),
            builder,
            builder.Config.model_validate(options("builder")),
            reward,
            reward_options,
            record.seed,
            record.given,
            record.provenance.plugins,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"its options are not those of the plugins here ({str(error).splitlines()[0]})") from None
    if cell.hash != record.cell_hash:
        raise UsageError("its options come out otherwise here: use the bench-dfusion and the plugins that made it")
    return cell


def failures(done: Sequence[Verified]) -> Iterator[Verified]:
    """Those that contradict their record."""
    return (v for v in done if v.status == "differs")
