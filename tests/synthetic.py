"""Records of runs that never ran, sound in themselves: their numbers follow from the gains given."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench_dfusion import files, records
from bench_dfusion.records import Record
from bench_dfusion.track import Track

JUDGES = ("oracle", "clip")
PROMPTS = ("a red ring", "a blue ring", "two red rings", "two blue rings")


def track(**changes: Any) -> Track:
    """A track of four held-out prompts, two templates and two judges."""
    content = {
        "name": "toy",
        "version": 1,
        "model": {"id": "toy", "sha256": digest("model")},
        "sampler": {"steps": 4},
        "prompts": {
            "train": ["a green ring"],
            "heldout": PROMPTS,
            "templates": {p: "count" if p.startswith("two") else "single" for p in PROMPTS},
        },
        "budget": {"reward_queries": 96, "prompts_per_round": 2},
        "evaluation": {"judges": JUDGES},
    }
    return Track.model_validate({**content, **changes})


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def record(
    gains: Sequence[float] | None = (0.1, 0.2, 0.3, 0.4),
    algorithm: str = "dpo",
    builder: str = "dfusion",
    reward: str = "clip",
    seed: int = 0,
    of: Track | None = None,
    queries: int = 96,
    rounds: int = 2,
    **options: Any,
) -> Record:
    """One cell's record. `gains` of each prompt before the first judge, the others' half as large; None: the run
    failed. `options` are the algorithm's."""
    of = of or track()
    resolved = {
        "algorithm": {"name": algorithm, **options},
        "builder": {"name": builder},
        "reward": {"name": reward},
        "track": of.fixed,
        "seed": seed,
    }
    names = [(of.prompts.templates or {}).get(p, "all") for p in of.prompts.heldout]
    verdicts = []
    for number, judge in enumerate(of.evaluation.judges if gains is not None else ()):
        base = np.full(len(names), 0.5)
        trained = base + np.array(gains) / (1 + number)
        pairs = np.stack([base, trained], 1)
        gain = float((trained - base).mean())
        verdicts.append(
            records.Verdict(
                judge=judge,
                metric="a share",
                trained_on=judge == reward,
                base=float(base.mean()),
                trained=float(trained.mean()),
                gain=records.Gain(mean=gain, low=gain - 0.1, high=gain + 0.1, kind="BCa bootstrap"),
                templates={t: tuple(pairs[[n == t for n in names]].mean(0).tolist()) for t in dict.fromkeys(names)},
                per_prompt=[tuple(p) for p in pairs.tolist()],
                fingerprint=digest(judge),
            )
        )
    curve = [
        records.Round(
            round=i,
            queries=queries * (i + 1) // rounds,
            reward=0.5 + 0.1 * i if queries else None,
            reward_sd=0.1 if queries else None,
            base_reward=0.4,
            winner_reward=0.6,
            pairs=8,
            dropped=0,
            metrics={"loss": 0.5},
        )
        for i in range(rounds)
    ]
    return Record(
        status="failed" if gains is None else "finished",
        evidence="round 1: reward returned nan" if gains is None else None,
        track=of.id,
        track_hash=of.hash,
        cell_hash=digest(json.dumps(resolved, sort_keys=True)),
        algorithm=algorithm,
        builder=builder,
        reward=reward,
        seed=seed,
        given={"algo": algorithm, "reward": reward, "seed": seed},
        resolved=json.loads(json.dumps(resolved)),
        verdicts=verdicts,
        drift=None
        if gains is None
        else records.Drift(pixels=2.0, kl=0.01, diversity_base=2.0, diversity_trained=1.5, diversity_space="pixels"),
        rounds=curve,
        cost=records.Cost(
            reward_queries=queries,
            network_evaluations=1000,
            updates=4,
            seconds={"sample": 1.5, "train": 2.5},
            peak_memory_mb=100.0,
            device="cpu",
        ),
        provenance=records.Provenance(
            code=None,
            dirty=None,
            versions={"python": "3.11"},
            plugins={"algo": "bench-dfusion 0.1.0"},
            hardware="a computer",
            model_sha256=of.model.sha256 or digest("model"),
            reward_fingerprint=digest(reward),
            lora_sha256=digest(f"{algorithm} {builder} {reward} {seed} {gains}"),
        ),
    )


def changed(original: Record, path: str, value: Any) -> Record:
    """The record with the value at a dotted path replaced, nothing else made to fit."""
    content = original.model_dump(mode="json")
    *parents, last = path.split(".")
    inner: Any = content
    for key in parents:
        inner = inner[int(key) if isinstance(inner, list) else key]
    inner[int(last) if isinstance(inner, list) else last] = value
    return Record.model_validate(content)


def place(folder: Path, of: Record) -> Path:
    name = f"{of.algorithm}-{of.builder}-{of.reward}-s{of.seed}-{of.cell_hash[:8]}"
    return folder / of.track / name / "record.json"


def leave(folder: Path, *found: Record) -> Path:
    """Write records below a folder as the trainer does; returns the folder."""
    for each in found:
        records.write(place(folder, each), each)
    return folder


def register(folder: Path, of: Record, error: str | None = None) -> None:
    """Leave the cell of a record as a run that has no record: registered, and perhaps ended in an error."""
    cell = place(folder, of).parent
    files.write_json(cell / "cell.json", {"given": of.given, "resolved": of.resolved, "hash": of.cell_hash})
    if error is not None:
        files.write_json(cell / "error.json", {"error": error})
