"""Pairwise win rates from records made by hand, and as the command prints them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from bench_dfusion.cli.options import out
from bench_dfusion.results import leaderboard, records, standings
from bench_dfusion.results.leaderboard import Board
from bench_dfusion.results.records import Record

PUBLISHED = Path(__file__).parents[1] / "leaderboards" / "micro-v1"


@cache
def real() -> Record:
    return records.read(next(iter(sorted(PUBLISHED.glob("*/record.json")))))


def record(algorithm: str, seed: int, trained: list[float] | None) -> Record:
    """A record with these scores of the trained policy, or of a run that collapsed."""
    change = {"algorithm": algorithm, "seed": seed, "cell_hash": f"{algorithm} {seed}"}
    if trained is None:
        return real().model_copy(update={**change, "status": "failed", "verdicts": []})
    verdict = real().verdicts[0].model_copy(update={"per_prompt": [(0.9, t) for t in trained]})
    return real().model_copy(update={**change, "verdicts": [verdict]})


def test_win_rates_by_hand() -> None:
    board = Board(
        (
            record("a", 0, [0.1, 0.5, 0.5, 0.9]),
            record("a", 1, [1.0, 1.0, 1.0, 1.0]),
            record("a", 2, [0.0, 0.0, 0.0, 0.0]),
            record("b", 0, [0.2, 0.5, 0.4, 0.1]),
            record("b", 1, [0.0, 0.0, 0.0, 0.0]),
            record("c", 1, None),
            record("d", 7, [0.3, 0.3, 0.3, 0.3]),
        )
    )
    frame = standings.win_rates(board)
    assert [n.partition("/")[0] for n in frame.index] == list("abcd") and list(frame.index) == list(frame.columns)
    # Seed 0: lost, tied, won, won: 2.5 of 4. Seed 1: 4 of 4. Seed 2 is not b's. c collapsed, d shares no seed.
    expected = [[np.nan, 6.5 / 8, 1, np.nan], [1.5 / 8, np.nan, 1, np.nan], [0, 0, np.nan, np.nan], [np.nan] * 4]
    np.testing.assert_allclose(frame.to_numpy(), expected)


@cache
def published() -> Board:
    (board,) = leaderboard.boards(PUBLISHED)
    return board


@pytest.mark.parametrize("width", [60, 80, 400])
def test_the_published_win_rates_add_up_and_are_printed_at_any_width(monkeypatch, said, width) -> None:
    frame = standings.win_rates(published())
    values = frame.to_numpy()
    off = ~np.eye(len(values), dtype=bool)
    np.testing.assert_allclose((values + values.T)[off], 1)
    monkeypatch.setattr(out, "width", width)
    monkeypatch.setattr(leaderboard, "boards", lambda folder: [published()])  # reading them takes seconds
    shown = said("leaderboard", PUBLISHED, "--wins").out.splitlines()
    assert max(map(len, shown)) <= width
    for number, (name, own) in enumerate(zip(frame.index, values, strict=True), 1):
        # A row's figures stand in as many blocks of columns as the width needs, its name before each.
        blocks = [line.split()[2:] for line in shown if line.split()[:2] == [str(number), name]]
        assert [c for block in blocks for c in block] == ["–" if np.isnan(v) else f"{100 * v:.0f}" for v in own]
    heads = [c for line in shown if line.strip() and all(c.isdigit() for c in line.split()) for c in line.split()]
    assert heads == [str(n) for n in range(1, len(frame) + 1)]
