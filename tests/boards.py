"""Small records of a small track, valid in every field, without training anything."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench_dfusion import records
from bench_dfusion.leaderboard import Board
from bench_dfusion.records import Cost, Drift, Gain, Provenance, Record, Round, Verdict
from bench_dfusion.track import Track

JUDGES = {"oracle": "share of what the prompt asks for, in [0, 1]", "clip": "cosine, in [-1, 1]"}
HELDOUT = {"a red ring": "single", "a cyan square": "single", "two blue rings": "count"}


def track(name: str = "tiny", heldout: dict[str, str] | None = None, judges: Sequence[str] = tuple(JUDGES)) -> Track:
    """A track of a few prompts; `heldout`: prompts and their templates."""
    heldout = heldout or HELDOUT
    content = {
        "name": name,
        "version": 1,
        "model": {"id": "micro"},
        "sampler": {"steps": 8},
        "prompts": {"train": ["a blue cross"], "heldout": list(heldout), "templates": heldout},
        "budget": {"reward_queries": 48, "prompts_per_round": 2, "samples_per_prompt": 4},
        "evaluation": {"judges": list(judges), "images_per_prompt": 2},
        "seeds": 3,
    }
    return Track.model_validate(content)


def record(
    algorithm: str = "dpo",
    builder: str = "dfusion",
    reward: str = "clip",
    seed: int = 0,
    *,
    of: Track | None = None,
    options: dict[str, Any] | None = None,
    gain: float = 0.1,
    failed: bool = False,
    **changes: Any,
) -> Record:
    """A record whose figures follow from its names, seed and `gain` (of every judge, about). `options` are the
    algorithm's; `failed` leaves what a collapse leaves; `changes` are fields of the record."""
    of = of or track()
    resolved = {
        "algorithm": {"name": algorithm, "learning_rate": 0.001, **(options or {})},
        "builder": {"name": builder},
        "reward": {"name": reward},
        "track": of.fixed,
        "seed": seed,
    }
    cell_hash = hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()
    rng = np.random.default_rng(int(cell_hash[:8], 16))
    values: dict[str, Any] = {
        "status": "failed" if failed else "finished",
        "evidence": "round 1: the gradient's norm is nan" if failed else None,
        "track": of.id,
        "track_hash": of.hash,
        "cell_hash": cell_hash,
        "algorithm": algorithm,
        "builder": builder,
        "reward": reward,
        "seed": seed,
        "given": {"algo": algorithm, "builder": builder, "reward": reward, "seed": seed},
        "resolved": resolved,
        "verdicts": [] if failed else [_verdict(j, of, reward, gain, rng) for j in of.evaluation.judges],
        "drift": None if failed else _drift(),
        "rounds": [_round(n) for n in range(2)],
        "cost": Cost(
            reward_queries=48,
            network_evaluations=640,
            updates=4,
            seconds={"sample": 1.5, "train": 2.25},
            peak_memory_mb=512.0,
            device="cpu",
        ),
        "provenance": Provenance(
            code=None,
            dirty=None,
            versions={"python": "3.11"},
            plugins={"algo": "bench-dfusion 0.1.0"},
            hardware="a processor",
            model_sha256=hashlib.sha256(b"model").hexdigest(),
            reward_fingerprint=hashlib.sha256(reward.encode()).hexdigest(),
            lora_sha256=hashlib.sha256(cell_hash.encode()).hexdigest(),
        ),
    }
    return Record(**(values | changes))


def _verdict(judge: str, of: Track, reward: str, gain: float, rng: np.random.Generator) -> Verdict:
    base = rng.uniform(0.2, 0.6, len(of.prompts.heldout))
    trained = base + gain + rng.normal(0, 0.02, len(base))
    gains = trained - base
    templates = of.prompts.templates or {}
    groups = {t: [i for i, p in enumerate(of.prompts.heldout) if templates.get(p) == t] for t in templates.values()}
    return Verdict(
        judge=judge,
        metric=JUDGES.get(judge, "points"),
        trained_on=judge == reward,
        base=float(base.mean()),
        trained=float(trained.mean()),
        gain=Gain(mean=float(gains.mean()), low=float(gains.min()), high=float(gains.max()), kind="BCa bootstrap"),
        templates={t: (float(base[rows].mean()), float(trained[rows].mean())) for t, rows in groups.items()},
        per_prompt=[(float(b), float(t)) for b, t in zip(base, trained, strict=True)],
        fingerprint=hashlib.sha256(judge.encode()).hexdigest(),
    )


def _drift() -> Drift:
    return Drift(pixels=5.0, kl=0.01, diversity_base=1.9, diversity_trained=1.8, diversity_space="pixels")


def _round(number: int) -> Round:
    return Round(
        round=number,
        queries=24 * (number + 1),
        reward=0.5 + 0.1 * number,
        reward_sd=0.2,
        base_reward=0.4,
        winner_reward=None,
        pairs=6,
        dropped=2,
        metrics={"loss": 0.69 - 0.01 * number},
    )


def write(folder: Path, *cells: Record) -> Path:
    """Run directories below `folder` that hold nothing but their records."""
    for cell in cells:
        records.write(folder / cell.track / f"{cell.algorithm}-{cell.cell_hash[:8]}" / "record.json", cell)
    return folder


def board(*cells: Record) -> Board:
    return Board(cells)
