"""Records written by hand: a small track whose every number is known, for what reads records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench_dfusion import records
from bench_dfusion.records import Record
from bench_dfusion.track import Track

PROMPTS = ("a red circle", "two blue rings", "a red ring above a blue cross", "four green squares")


def track(**changes: Any) -> Track:
    content: dict[str, Any] = {
        "name": "tiny",
        "version": 1,
        "model": {"id": "micro"},
        "sampler": {"steps": 4},
        "prompts": {
            "train": ["a cyan square"],
            "heldout": list(PROMPTS),
            "templates": {PROMPTS[0]: "single", PROMPTS[1]: "count"},
        },
        "budget": {"reward_queries": 96, "prompts_per_round": 2},
        "evaluation": {"judges": ["oracle", "clip"]},
    }
    return Track.model_validate(content | changes)


def record(
    algorithm: str = "dpo",
    builder: str = "dfusion",
    reward: str = "clip",
    seed: int = 0,
    gain: float = 0.1,
    of: Track | None = None,
    **changes: Any,
) -> Record:
    """A finished run that gains `gain` + 0.01 × seed before the first judge, alternately more and less by prompt, and
    whose training reward rises by 0.2; `changes` replace fields."""
    own = of or track()
    prompts = own.prompts.heldout
    after = [0.5 + gain + 0.01 * seed + 0.02 * (-1) ** i for i in range(len(prompts))]
    mean = sum(after) / len(after)
    verdicts = [
        {
            "judge": judge,
            "metric": f"what {judge} measures",
            "trained_on": judge == reward,
            "base": 0.5,
            "trained": mean,
            "gain": {"mean": mean - 0.5, "low": mean - 0.55, "high": mean - 0.45, "kind": "BCa bootstrap"},
            "templates": {"single": (0.5, after[0]), "count": (0.5, after[1])},
            "per_prompt": [(0.5, a) for a in after],
            "fingerprint": judge * 4,
        }
        for judge in own.evaluation.judges
    ]
    rounds = [
        {
            "round": n,
            "queries": 32 * (n + 1),
            "reward": 0.4 + 0.1 * n,
            "reward_sd": 0.2,
            "base_reward": 0.3,
            "winner_reward": 0.6,
            "pairs": 8,
            "dropped": 1,
            "metrics": {"loss": 0.6},
        }
        for n in range(3)
    ]
    cell = f"{own.id}/{algorithm}/{builder}/{reward}/{seed}"
    content: dict[str, Any] = {
        "status": "finished",
        "track": own.id,
        "track_hash": own.hash,
        "cell_hash": cell,
        "algorithm": algorithm,
        "builder": builder,
        "reward": reward,
        "seed": seed,
        "given": {"algo": algorithm, "reward": reward, "seed": seed},
        "resolved": {
            "algorithm": {"name": algorithm, "beta": 20.0},
            "builder": {"name": builder},
            "reward": {"name": reward},
            "track": own.fixed,
            "seed": seed,
        },
        "verdicts": verdicts,
        "drift": {
            "pixels": 10.0,
            "kl": 0.02,
            "diversity_base": 2.0,
            "diversity_trained": 1.8,
            "diversity_space": "clip image embedding",
        },
        "rounds": rounds,
        "cost": {
            "reward_queries": 96,
            "network_evaluations": 1000,
            "updates": 6,
            "seconds": {"sample": 10.0, "train": 20.0},
            "peak_memory_mb": 512.0,
            "device": "cpu",
        },
        "provenance": {
            "code": "0123456789abcdef",
            "dirty": False,
            "versions": {"python": "3.11.0"},
            "plugins": {"algo": "bench-dfusion 0.1.0"},
            "hardware": "a processor, 1 threads",
            "model_sha256": "m" * 64,
            "reward_fingerprint": reward * 4,
            "lora_sha256": "l" * 64,
        },
    }
    return Record.model_validate(content | changes)


def failed(evidence: str, **where: Any) -> Record:
    """A run that collapsed after its second round."""
    whole = record(**where)
    return whole.model_copy(
        update={"status": "failed", "evidence": evidence, "verdicts": [], "drift": None, "rounds": whole.rounds[:2]}
    )


def save(folder: Path, *own: Record) -> Path:
    """Lay records out as runs do; returns the folder."""
    for each in own:
        name = f"{each.algorithm}-{each.builder}-{each.reward}-s{each.seed}"
        records.write(folder / each.track / name / "record.json", each)
    return folder


def register(folder: Path, cell: Record, error: str | None = None) -> None:
    """A cell that was registered and has no record, with the error its last try ended in."""
    own = folder / cell.track / f"{cell.algorithm}-{cell.builder}-{cell.reward}-s{cell.seed}"
    own.mkdir(parents=True)
    (own / "cell.json").write_text(json.dumps({"hash": cell.cell_hash, "resolved": cell.resolved, "given": cell.given}))
    if error is not None:
        (own / "error.json").write_text(json.dumps({"error": error}))
