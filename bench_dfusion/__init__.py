"""bench-dfusion: which preference method aligns a text-to-image diffusion model best, at what cost, and the proof.

import bench_dfusion
record = bench_dfusion.run(algo="dpo", reward="clip")
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench_dfusion import _moved
from bench_dfusion.version import __version__ as __version__

if TYPE_CHECKING:
    from bench_dfusion.results.records import Record
    from bench_dfusion.runs.pairs import Keep

_moved.install()


def run(
    *,
    algo: str,
    reward: str | None = None,
    builder: str | None = None,
    pairs: str | None = None,
    out: str | Path = "runs",
    keep_pairs: Keep | None = None,
    rung: int = 1,
    **options: Any,
) -> Record:
    """Train and evaluate one cell, or go on where it was stopped; returns its record.

    `pairs`: train offline on a preference dataset, by path or Hub id, in the place of `reward` and `builder`.
    `options` are those of `bench_dfusion.runs.config.resolve`: track_source, teachers, seed, model, prompts, settings
    (a list of "SECTION.OPTION=VALUE"), config. `keep_pairs`: of which rounds the pairs stay, "all", "last" or
    "none". `rung`: of a track with rungs the one to end at. Raises UsageError on anything wrong, before any compute.
    """
    from bench_dfusion.runs.config import resolve
    from bench_dfusion.runs.trainer import run_cell

    cell = resolve(algo=algo, reward=reward, builder=builder, pairs=pairs, **options)
    return run_cell(cell, Path(out), keep_pairs=keep_pairs, rung=rung)
