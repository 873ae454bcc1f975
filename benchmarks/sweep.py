"""What does a cell of a sweep cost beside its own work: many in one process, or a process for each?

    python benchmarks/sweep.py [--track micro-fast] [--seeds 1] [--queries 24]

Two by two short cells (dpo and ddpo on both builders, reward clip), as `bench-dfusion sweep` runs them, less what the
same sweep takes where all is finished; and one after another by `bench-dfusion run`, a process each. CPU seconds are
those of all processes, from start to end; what the two differ in is imports and loading. The records must be equal.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measuring

from bench_dfusion.results import records

ALGORITHMS, BUILDERS = ("dpo", "ddpo"), ("dfusion", "vanilla")


def timed(*words: str) -> dict[str, float]:
    """Seconds that a command takes, its children's CPU time included."""
    before, start = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-m", "bench_dfusion.cli", *words], check=True, stdout=subprocess.DEVNULL)
    after, wall = os.times(), time.perf_counter() - start
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"cpu seconds": cpu, "wall seconds": wall}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--track", default="micro-fast")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--queries", type=int, default=24)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    heldout = json.dumps(["a red circle", "two blue rings"])
    small = ["prompts.validation=[]", "prompts.templates=null", f"prompts.heldout={heldout}"]
    small += ["evaluation.images_per_prompt=2", f"budget.reward_queries={args.queries}"]
    small += ["budget.prompts_per_round=2", "budget.samples_per_prompt=4"]
    words = [f"--set=track.{setting}" for setting in small] + ["--reward", "clip", "--device", "cpu"]
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        lists = ["--algo", ",".join(ALGORITHMS), "--builder", ",".join(BUILDERS), "--seeds", str(args.seeds)]
        sweep = ["sweep", args.track, *lists, *words, "--out", str(where / "one")]
        whole, finished = timed(*sweep), timed(*sweep)
        result: dict[str, Any] = {"one process": {unit: whole[unit] - finished[unit] for unit in whole}}
        each: list[dict[str, float]] = []
        for seed in range(args.seeds):
            for algorithm in ALGORITHMS:
                for builder in BUILDERS:
                    own = ["--algo", algorithm, "--builder", builder, "--seed", str(seed)]
                    each.append(timed("run", "--track", args.track, *own, *words, "--out", str(where / "each")))
        result["a process each"] = {unit: sum(one[unit] for one in each) for unit in each[0]}
        one, other = ({p.parent.name: r.comparable() for p, r in records.find(where / n)} for n in ("one", "each"))
    assert one == other, "the records differ"
    for way in result.values():
        way |= {f"{unit} a cell": seconds / len(each) for unit, seconds in way.items()}
        way |= {unit: round(seconds, 2) for unit, seconds in way.items()}
    own = {unit: round(seconds, 2) for unit, seconds in finished.items()}
    measuring.write("sweep", {"cells": len(each), **result, "the sweep's own": own}, args.out)


if __name__ == "__main__":
    main()
