"""The command line as a process, on the embedded world with a tiny budget."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SETTINGS = [
    "track.budget.reward_queries=48",
    "track.budget.prompts_per_round=2",
    "track.budget.samples_per_prompt=4",
    "track.evaluation.images_per_prompt=2",
    'track.prompts.heldout=["a red circle", "two blue rings", "a red ring above a blue cross"]',
    'track.prompts.train=["three green rings", "a cyan square", "a red square and a blue ring"]',
    "track.prompts.validation=[]",
    "track.prompts.templates=null",
]
TINY = [f"--set={setting}" for setting in SETTINGS]


def command(*words: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `bench-dfusion ...` and return what it said."""
    return subprocess.run(
        [sys.executable, "-m", "bench_dfusion.cli", *words],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "160", **(env or {})},
        capture_output=True,
        text=True,
        timeout=300,
    )
