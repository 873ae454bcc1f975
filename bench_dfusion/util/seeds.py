"""Seeds and orders from names: the same on every machine, whatever ran before."""

from __future__ import annotations

import hashlib

import torch


def seed_of(*parts: object) -> int:
    """A 63-bit seed from any values, the same on every machine."""
    return int.from_bytes(hashlib.sha256("\n".join(map(str, parts)).encode()).digest()[:8], "big") >> 1


def passes(total: int, start: int, count: int, *name: object) -> list[int]:
    """Items start to start + count - 1 of endless passes over range(total), each shuffled anew by `name` and its number."""
    orders: dict[int, torch.Tensor] = {}
    chosen = []
    for position in range(start, start + count):
        lap, place = divmod(position, total)
        if lap not in orders:
            orders[lap] = torch.randperm(total, generator=torch.Generator().manual_seed(seed_of(*name, lap)))
        chosen.append(int(orders[lap][place]))
    return chosen
