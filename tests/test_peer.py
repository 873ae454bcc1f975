"""benchmarks/peer.py as far as it goes without TRL's environment: the work of our side, and the choice of TRL's batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import peer

    return peer


def test_our_round_does_the_work_that_is_stated(peer: Any, tmp_path: Path) -> None:
    """4 samples of 3 steps: each step once to draw and once to train, in two branches."""
    peer.make("tiny", tmp_path)
    side = peer.Ours(tmp_path, peer.Case("tiny", samples=4, steps=3, updates=2, batches=()), "cpu", batch=3)
    before = side.run.policy.weights()
    done = side.round()
    assert (side.batch, done["network_evaluations"], done["updates"]) == (3, 4 * 3 * 2 * 2, 2)
    assert any((v != before[k]).any() for k, v in side.run.policy.weights().items())
    # Of rank 4, for queries, keys, values and outputs of 4 blocks of 16 channels (1 down, 1 up with 2, and the middle's
    # of 32): self-attention 4 · 4 · 2c, cross-attention the same but for keys and values of 128 channels.
    sides = {16: 3, 32: 1}
    expected = sum(n * (16 * 2 * c + 4 * (2 * 2 * c + 2 * (c + 128))) for c, n in sides.items())
    assert done["trained_parameters"] == expected


def test_the_fastest_batches_are_chosen_among_those_that_trl_takes(peer: Any) -> None:
    """Sampling is fastest in 3 and training in 2, which TRL refuses together: sampling in 4 and training in 2 is next."""
    seconds = {(1, 1): (9, 9), (3, 3): (1, 5), (4, 2): (2, 1)}

    class Trl:
        def round(self, batches: tuple[int, int]) -> dict[str, float]:
            sampling, training = seconds[batches]
            return {"sampling": sampling, "training": training}

    case = peer.Case("tiny", samples=12, steps=1, updates=2, batches=tuple(seconds))
    best, tried = peer.scan(Trl(), case, lambda n: None)
    assert best == (4, 2)
    assert tried == {"sampling": {1: 9, 3: 1, 4: 2}, "training": {1: 9, 3: 5, 2: 1}}


def test_both_sides_score_a_picture_alike(peer: Any) -> None:
    """TRL's pictures are float [B, 3, H, W] in [0, 1], ours uint8 [B, H, W, 3]."""
    from peer_trl import brightness

    ours = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs = ours.permute(0, 3, 1, 2).float() / 255
    torch.testing.assert_close(brightness(ours, ["a", "b"]) / 255, brightness(theirs, ["a", "b"]))
