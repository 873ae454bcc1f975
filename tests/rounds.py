"""Runs that are stopped in the middle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from bench_dfusion.builders.contract import ConsistentSamples
from bench_dfusion.runs import trainer


@contextmanager
def stopped_in_round(number: int) -> Iterator[None]:
    """Inside, a run is stopped, as by Ctrl-C, before round `number` trains; it must come to that."""
    improve = trainer.Run._improve

    def stopped(self: trainer.Run, samples: ConsistentSamples, now: int) -> dict[str, float]:
        if now == number:
            raise KeyboardInterrupt
        return improve(self, samples, now)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Run, "_improve", stopped)
        with pytest.raises(KeyboardInterrupt):
            yield
