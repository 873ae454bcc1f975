"""What lies in a pipeline's weights files, and what its networks take: no file is opened beyond its header."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from bench_dfusion.models.layout import Layout


@dataclass(frozen=True)
class Stored:
    """The safetensors files of one part of a pipeline: bytes on disk, and parameters where every header was read."""

    size: int
    parameters: int | None


def stored(found: Layout) -> dict[str, Stored]:
    """What lies in the weights files of each part of a pipeline, here or on the Hub."""
    stored = {}
    for name, part in found.parts.items():
        if part.weights is not None:
            shapes = found.tensors(name)
            count = None if shapes is None else sum(math.prod(shape) for shape in shapes.values())
            stored[name] = Stored(found.size(name), count)
    return stored


def bytes_of(*networks: nn.Module | None) -> int:
    """The bytes of all parameters and buffers, each counted once."""
    tensors = {id(t): t.nbytes for m in networks if m is not None for t in [*m.parameters(), *m.buffers()]}
    return sum(tensors.values())
