"""The oracle of the second world: the first one's eyes and scores, on the larger grammar."""

from __future__ import annotations

import numpy as np

from bench_dfusion.micro import oracle as first
from bench_dfusion.micro.v2.grammar import Spec, parse

Verdict = first.Verdict
read = first.read


def judge(image: np.ndarray, prompt: str | Spec) -> Verdict:
    """How well a picture fulfils a prompt, scored as `bench_dfusion.micro.oracle.judge` does."""
    return first.judge(image, parse(prompt) if isinstance(prompt, str) else prompt)
