"""Choosing the micro track's options: trials on its validation prompts, under one budget for every algorithm.

    python benchmarks/tune.py RUNS [ALGORITHM ...] [--table]

A trial is a run of the micro track with its own budget of reward queries, seed 0, the oracle's graded score as
reward (CLIP where the algorithm needs a reward with a gradient), judged on the 32 validation prompts with 12 images
each in the place of the held-out ones. At most MOST trials for each algorithm and builder, all of them listed in
TRIALS; every other option is the algorithm's own default. Trials choose options and rank nothing: one seed, and the
best of several flatters.

Finished trials in RUNS are only read, so several processes may share the work (one thread each is fastest).
`--table` prints the table of all finished ones instead of running any.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import bench_dfusion
from bench_dfusion import registry
from bench_dfusion.errors import UsageError
from bench_dfusion.results import records
from bench_dfusion.results.records import Record
from bench_dfusion.runs import config
from bench_dfusion.tracks import schema

MOST = 5
IMAGES = 12  # of each validation prompt: judged more finely than a table's 4

EARLY = {"step_weight": "sigma", "window": [0.0, 0.5]}
LATE = {"step_weight": "sigma", "window": [0.5, 1.0]}

UNCLAMPED = {"beta": 20.0, "ratio_clamp": 0.0}

TRIALS: dict[str, dict[str, list[dict[str, Any]]]] = {
    "dpo": {
        "vanilla": [{"learning_rate": 6e-3, **UNCLAMPED, **EARLY}],
        "dfusion": [
            {"learning_rate": 6e-3, **UNCLAMPED, **EARLY},
            {"learning_rate": 4e-3, **UNCLAMPED, "step_weight": "sigma", "window": [0.0, 1.0]},
            {"learning_rate": 4e-3, **UNCLAMPED, **LATE},
            {"learning_rate": 2e-3, **UNCLAMPED, **LATE},
            {"learning_rate": 1e-3, **UNCLAMPED, **LATE},
        ],
    },
    "diffusion-dpo": {
        "vanilla": [{"learning_rate": 4e-3, "beta": b} for b in (5000, 300, 50)],
        "dfusion": [{"learning_rate": 4e-3, "beta": b} for b in (300, 50)],
    },
    "ddpo": {
        "vanilla": [{"learning_rate": 4e-3, **EARLY}],
        "dfusion": [{"learning_rate": 2e-3, **LATE}],
    },
    "kto": {
        "vanilla": [{"learning_rate": 4e-3, "beta": 50}, {"learning_rate": 4e-3, "beta": 300}],
        "dfusion": [{"learning_rate": 4e-3, "beta": 300}, {"learning_rate": 4e-3, "beta": 50}],
    },
    "dgpo": {
        "vanilla": [{"learning_rate": 4e-3}, {"learning_rate": 1e-3}],
        "dfusion": [{"learning_rate": 2e-3}],
    },
    "sft": {
        "vanilla": [
            {"learning_rate": 1e-3},
            {"learning_rate": 4e-3},
            {"learning_rate": 1e-3, "levels": [0.5, 1.0]},
        ],
        "dfusion": [{"learning_rate": 1e-3}, {"learning_rate": 1e-3, "levels": [0.5, 1.0]}],
    },
    "rwr": {
        "vanilla": [{"learning_rate": 1e-3}, {"learning_rate": 4e-3}, {"learning_rate": 1e-3, "tau": 0.2}],
        "dfusion": [{"learning_rate": 1e-3}],
    },
    "dpok": {
        "vanilla": [{"learning_rate": 4e-3, "kl": 0.1, **EARLY}, {"learning_rate": 4e-3, "kl": 1.0, **EARLY}],
    },
    "grpo": {
        "vanilla": [{"learning_rate": 4e-3, **EARLY}, {"learning_rate": 8e-3, **EARLY}],
        "dfusion": [{"learning_rate": 4e-3, **LATE}],
    },
    "nft": {
        "vanilla": [{"learning_rate": 4e-3}, {"learning_rate": 1e-3}],
        "dfusion": [{"learning_rate": 2e-3}],
    },
    "crd": {
        "vanilla": [{"learning_rate": 4e-3}, {"learning_rate": 1e-3}, {"learning_rate": 4e-3, "kl": 1e-3}],
        "dfusion": [{"learning_rate": 2e-3}, {"learning_rate": 2e-3, "kl": 1e-3}],
    },
    "awm": {
        "vanilla": [{"learning_rate": 4e-3}, {"learning_rate": 1e-3}],
        "dfusion": [{"learning_rate": 2e-3}],
    },
    "fdfo": {
        "vanilla": [{"learning_rate": 4e-3}, {"learning_rate": 1e-3}],
        "dfusion": [{"learning_rate": 4e-3}, {"learning_rate": 1e-3}, {"learning_rate": 4e-3, "trust": 0.1}],
    },
    "draft": {
        "vanilla": [{"learning_rate": 1e-3}, {"learning_rate": 4e-3}],
    },
}


def trial(algorithm: str, builder: str, options: dict[str, Any]) -> dict[str, Any]:
    """What `bench_dfusion.run` needs for a trial: nothing in it depends on the options that the track has now."""
    own = registry.load("algorithms", algorithm).Config(**options).model_dump(mode="json")
    settings = [f"algo.{name}={json.dumps(value)}" for name, value in own.items()]
    validation = schema.read("micro")["prompts"]["validation"]
    settings += [
        f"track.prompts.heldout={json.dumps(validation)}",
        "track.prompts.validation=[]",
        f"track.evaluation.images_per_prompt={IMAGES}",
    ]
    reward = "clip" if algorithm == "draft" else "oracle"
    return {
        "track_source": "micro",
        "algo": algorithm,
        "builder": builder,
        "reward": reward,
        "seed": 0,
        "settings": settings,
    }


def taken(algorithm: str, builder: str, options: dict[str, Any]) -> bool:
    """Whether the track as it is now has these options for the algorithm and builder."""
    now = config.resolve(track_source="micro", algo=algorithm, builder=builder, reward="clip").algorithm_config
    return bool(now == registry.load("algorithms", algorithm).Config(**options))


def line(algorithm: str, builder: str, options: dict[str, Any], record: Record) -> str:
    gains = {v.judge: v.gain for v in record.verdicts}
    shown = ", ".join(f"{k} {_short(v)}" for k, v in options.items())
    bold = "**" if taken(algorithm, builder, options) else ""
    name = f"| {bold}{algorithm}, {builder}{bold} | {record.reward} | {shown or 'defaults'} "
    if not gains:
        return f"{name}| failed: {record.evidence} | | | |"
    graded = gains["oracle"]
    assert record.drift is not None
    return (
        f"{name}| {graded.mean:+.3f} [{graded.low:+.3f}, {graded.high:+.3f}] | {gains['oracle:full'].mean:+.3f} "
        f"| {gains['clip'].mean:+.3f} | {record.drift.kl:.4f} |"
    ).replace("-0", "−0")


def _short(value: object) -> str:
    if isinstance(value, list):
        return "–".join(f"{v:g}" for v in value)
    return f"{value:g}" if isinstance(value, float | int) else str(value)


def finished(runs: Path) -> dict[str, Record]:
    """The records in RUNS by what was tried."""
    found = {}
    for _, record in records.find(runs):
        options = {k: v for k, v in record.resolved["algorithm"].items() if k != "name"}
        found[key(record.algorithm, record.builder, options)] = record
    return found


def key(algorithm: str, builder: str, options: dict[str, Any]) -> str:
    own = registry.load("algorithms", algorithm).Config(**options).model_dump(mode="json")
    return json.dumps([algorithm, builder, own], sort_keys=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("algorithms", nargs="*", help=f"default: all ({', '.join(TRIALS)})")
    parser.add_argument("--table", action="store_true", help="print the table of finished trials, run nothing")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    done = finished(args.runs)
    for algorithm in args.algorithms or TRIALS:
        for builder, options in TRIALS[algorithm].items():
            assert len(options) <= MOST
            for own in options:
                record = done.get(key(algorithm, builder, own))
                if record is None and not args.table:
                    try:
                        record = bench_dfusion.run(**trial(algorithm, builder, own), out=args.runs, keep_pairs="none")
                    except UsageError as error:
                        print(error)  # another process has it
                if record is not None:
                    print(line(algorithm, builder, own, record), flush=True)


if __name__ == "__main__":
    main()
