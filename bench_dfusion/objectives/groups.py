"""Samples that one row of the loss takes together: a prompt's, at one noise level, padded to the largest group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench_dfusion.algorithm import Rows


def group_rows(samples: Tensor, groups: Sequence[Tensor], timesteps: int, **columns: Tensor) -> Rows:
    """One row for each of `groups` (places in sample rows [M]) and each of its `timesteps` levels.

    `member` [R, members] are the samples' rows, -1 where padded; `columns` [M] likewise, 0 where padded.
    """
    width = max((len(own) for own in groups), default=1)
    rows = {"member": torch.full((len(groups), width), -1)}
    rows |= {name: torch.zeros(len(groups), width) for name in columns}
    for i, own in enumerate(groups):
        for name, values in {"member": samples, **columns}.items():
            rows[name][i, : len(own)] = values[own]
    return {name: values.repeat_interleave(timesteps, 0) for name, values in rows.items()}


def each_member(rows: Rows) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Which places of the groups hold a member [R, members], and the members' rows, levels and noises, flat.

    A column `noise` is [R], of the whole group, or [R, members].
    """
    real = rows["member"] >= 0
    columns = rows["t"], rows["noise"]
    t, noise = ((c if c.ndim == 2 else c[:, None]).expand(real.shape)[real] for c in columns)
    return real, (rows["member"][real], t, noise)


def padded(real: Tensor, flat: Tensor) -> Tensor:
    """Values of the members, flat as in `each_member`, in their places [R, members], 0 where padded."""
    return torch.zeros(real.shape, device=flat.device).masked_scatter(real, flat)
