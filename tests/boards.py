"""Records of runs that never ran, sound in themselves, and how runs leave them on the disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench_dfusion.results import records
from bench_dfusion.results.records import Record
from bench_dfusion.tracks.schema import Track
from bench_dfusion.util import files

WITHOUT_BETA = {"sft", "rwr", "ddpo", "dpok", "grpo", "nft", "awm", "draft"}
HELDOUT = {"a red ring": "single", "a blue ring": "single", "two red rings": "count", "two blue rings": "count"}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def track(heldout: dict[str, str] = HELDOUT, **changes: Any) -> Track:
    """A track of two judges and a few prompts, `heldout` with their templates; `changes` replace its sections."""
    content = {
        "name": "toy",
        "version": 1,
        "model": {"id": "toy", "sha256": digest("model")},
        "sampler": {"steps": 4},
        "prompts": {"train": ["a green ring"], "heldout": list(heldout), "templates": heldout},
        "budget": {"reward_queries": 96, "prompts_per_round": 2},
        "evaluation": {"judges": ["oracle", "clip"]},
        "seeds": 3,
    }
    return Track.model_validate(content | changes)


def record(
    algorithm: str = "dpo",
    builder: str = "dfusion",
    reward: str = "clip",
    seed: int = 0,
    *,
    gains: Sequence[float] | float | None = (0.1, 0.2, 0.3, 0.4),
    of: Track | None = None,
    options: dict[str, Any] | None = None,
    queries: int = 96,
    rounds: int | None = None,
    earlier: Sequence[Sequence[float] | float] = (),
    **changes: Any,
) -> Record:
    """One cell's record.

    `gains`: of each held-out prompt before the first judge, on a base of 0.5; a number: about that much of every prompt,
    bases being drawn for the track and noise for the cell; None: the run failed. The second judge sees half of it.
    `rounds`: None: as many as the budget has. `earlier`: of a track with rungs the gains at those before the record's. `options` are the algorithm's; `changes` replace fields, nothing else is
    made to fit.
    """
    of = of or track()
    beta = {} if algorithm in WITHOUT_BETA else {"beta": 20.0}
    algorithm_options = {"name": algorithm, **beta, **(options or {})}
    named = {"algorithm": algorithm_options, "builder": {"name": builder}, "reward": {"name": reward}}
    resolved = json.loads(json.dumps({**named, "track": of.fixed, "seed": seed}))
    cell_hash = digest(json.dumps(resolved, sort_keys=True))
    judges, failed = of.evaluation.judges, gains is None
    if rounds is None:
        drawn = of.budget.prompts_per_round * of.budget.samples_per_prompt
        a_round = {"vanilla": drawn, "same-noise": 2 * drawn}.get(builder, drawn * 3 // 2) if queries else drawn
        rounds = of.budget.ladder[len(earlier)] // a_round
        queries = min(queries, a_round * rounds)
    shape = (len(judges), len(of.prompts.heldout))
    if isinstance(gains, float):
        rng = np.random.default_rng(int(cell_hash[:8], 16))
        base = np.random.default_rng(int(of.hash[:8], 16)).uniform(0.2, 0.6, shape)
        gained = rng.normal(gains, 0.02, shape)
    else:
        base, gained = np.full(shape, 0.5), np.broadcast_to(gains or 0.0, shape)
    trained = base + gained / np.arange(1, len(judges) + 1)[:, None]
    content = {
        "status": "failed" if failed else "finished",
        "evidence": "round 1: reward returned nan" if failed else None,
        "track": of.id,
        "track_hash": of.hash,
        "cell_hash": cell_hash,
        "algorithm": algorithm,
        "builder": builder,
        "reward": reward,
        "seed": seed,
        "given": {"algo": algorithm, "builder": builder, "reward": reward, "seed": seed},
        "resolved": resolved,
        "verdicts": []
        if failed
        else [_verdict(j, reward, of, *s) for j, *s in zip(judges, base, trained, strict=True)],
        "drift": None if failed else DRIFT,
        "agreement": None if failed else dict.fromkeys(judges, 0.5),
        "rounds": [_round(n, queries * (n + 1) // rounds) for n in range(rounds)],
        "cost": {
            "reward_queries": queries,
            "network_evaluations": 1000 * (1 + len(earlier)),
            "updates": 2 * rounds,
            "seconds": {"sample": 1.5, "train": 2.5},
            "peak_memory_mb": 100.0,
            "device": "cpu",
        },
        "provenance": {
            "code": "0123456789abcdef",
            "dirty": False,
            "versions": {"python": "3.11"},
            "plugins": dict.fromkeys(("algo", "builder", "reward"), "bench-dfusion 0.1.0"),
            "hardware": "a processor, 1 threads",
            "model_sha256": of.model.sha256 or digest("model"),
            "reward_fingerprint": digest(reward),
            "lora_sha256": digest(f"{cell_hash} {gains}"),
        },
    }
    if of.budget.rungs:
        names: dict[str, Any] = {
            "algorithm": algorithm,
            "builder": builder,
            "reward": reward,
            "seed": seed,
            "of": of,
            "options": options,
        }
        passed = [record(**names, gains=gains, queries=queries, earlier=earlier[:n]) for n, gains in enumerate(earlier)]
        content |= {"rung": len(earlier) + 1, "rungs": [_rung(r) for r in passed]}
    return Record.model_validate(content | changes)


def _rung(passed: Record) -> dict[str, Any]:
    own = passed.model_dump(mode="json", include={"rung", "verdicts", "drift", "cost", "agreement"})
    return own | {"rounds": len(passed.rounds), "lora_sha256": passed.provenance.lora_sha256}


DRIFT = {"pixels": 2.0, "kl": 0.01, "diversity_base": 2.0, "diversity_trained": 1.5, "diversity_space": "pixels"}


def _verdict(judge: str, reward: str, of: Track, base: np.ndarray, trained: np.ndarray) -> dict[str, Any]:
    pairs = np.stack([base, trained], 1)
    gains = trained - base
    mean = float(gains.mean())
    low, high = max(mean - 0.1, float(gains.min())), min(mean + 0.1, float(gains.max()))
    names = [(of.prompts.templates or {}).get(p, "all") for p in of.prompts.heldout]
    return {
        "judge": judge,
        "metric": f"what {judge} measures",
        "trained_on": judge == reward,
        "base": float(base.mean()),
        "trained": float(trained.mean()),
        "gain": {"mean": mean, "low": low, "high": high, "kind": "BCa bootstrap"},
        "templates": {t: pairs[[n == t for n in names]].mean(0).tolist() for t in names},
        "per_prompt": pairs.tolist(),
        "fingerprint": digest(judge),
    }


def _round(number: int, queries: int) -> dict[str, Any]:
    return {
        "round": number,
        "queries": queries,
        "reward": 0.5 + 0.1 * number if queries else None,
        "reward_sd": 0.1 if queries else None,
        "base_reward": 0.4,
        "winner_reward": 0.6 if number else None,
        "pairs": 8,
        "dropped": 1,
        "metrics": {"loss": 0.5 - 0.01 * number},
    }


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
    """Where a run below `folder` leaves this record."""
    name = f"{of.algorithm}-{of.builder}-{of.reward}-s{of.seed}-{of.cell_hash[:8]}"
    return folder / of.track / name / "record.json"


def leave(folder: Path, *found: Record) -> Path:
    """Run directories below a folder that hold their records; returns the folder."""
    for each in found:
        records.write(place(folder, each), each)
    return folder


def register(folder: Path, of: Record, error: str | None = None) -> None:
    """Leave the cell of a record as a run that has no record: registered, and perhaps ended in an error."""
    cell = place(folder, of).parent
    files.write_json(cell / "cell.json", {"given": of.given, "resolved": of.resolved, "hash": of.cell_hash})
    if error is not None:
        files.write_json(cell / "error.json", {"error": error})
