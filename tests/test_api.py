"""The functions of the package: the command's words, in Python."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import boards
import pytest

import bench_dfusion
from bench_dfusion.errors import UsageError
from bench_dfusion.results import tables
from bench_dfusion.results.leaderboard import Board

PUBLISHED = Path(__file__).parents[1] / "leaderboards" / "micro-v1"


def test_the_published_records_and_their_table() -> None:
    found = bench_dfusion.load_records(PUBLISHED)
    assert len(found) == 230 and {record.track for record in found} == {"micro-v1"}
    table = bench_dfusion.leaderboard(PUBLISHED)
    assert table.equals(tables.table(Board(tuple(found))))
    with pytest.raises(UsageError, match="--rung 2: micro-v1 has no rungs"):
        bench_dfusion.leaderboard(PUBLISHED, rung=2)


def test_a_table_is_of_one_track(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no run: give the folder of one track"):
        bench_dfusion.leaderboard(tmp_path)
    boards.leave(tmp_path, boards.record(), boards.record(of=boards.track(name="other")))
    with pytest.raises(UsageError, match="give the folder of one track"):
        bench_dfusion.leaderboard(tmp_path)


def test_one_thing_is_evaluated_at_a_time() -> None:
    with pytest.raises(UsageError, match="give one of run, lora and checkpoint"):
        bench_dfusion.eval("runs/x", lora="y")
    with pytest.raises(UsageError, match="unknown track 'mikro'"):
        bench_dfusion.eval(lora="y", track="mikro")


def test_a_sweep_is_planned_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown algorithm 'dpoo'"):
        bench_dfusion.sweep("micro", algo=["dpoo"], reward=["clip"], out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_was_a_module_is_a_function_and_still_has_what_was_in_it() -> None:
    code = """
import bench_dfusion
from bench_dfusion.leaderboard import Board, markdown
from bench_dfusion import leaderboard
try:
    leaderboard("nowhere at all")
except ValueError as error:
    print(error)
assert leaderboard.Board is Board and leaderboard.markdown is markdown and callable(bench_dfusion.leaderboard)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not done.returncode and "there is no run" in done.stdout, done.stderr
