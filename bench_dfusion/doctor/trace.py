"""What a piece of code takes of a device, found by running it on tensors of the meta device, which hold no data.

`Trace` sees every operation: it keeps the sum of the storages alive, as a device's allocator would, and counts
floating-point operations, bytes read and written, and operations. Attention is the fused kernel's, which never holds
the attention matrix: a device would choose it, the meta device does not.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten: Any = torch.ops.aten
FUSED = aten._scaled_dot_product_flash_attention_for_cpu
FUSED_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Work:
    """Floating-point operations, bytes read and written, and operations (all counts)."""

    flops: float = 0.0
    moved: float = 0.0
    operations: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.moved + other.moved, self.operations + other.operations)

    def __mul__(self, by: float) -> Work:
        return Work(self.flops * by, self.moved * by, self.operations * by)

    def in_batches(self, rows: float, batch: int, traced: int) -> Work:
        """The cost of `rows` rows, `batch` at a time, from that of `traced` at once: every batch runs every operation."""
        return Work(
            self.flops * rows / traced, self.moved * rows / traced, self.operations * max(1.0, rows / max(1, batch))
        )


class Trace(TorchDispatchMode):
    """Inside, operations on meta tensors are counted; data that would go to the host is zeros, or True.

    live, peak   bytes of the storages made inside and still alive, now and at most
    kept         bytes that `keep` was shown for the backward pass, each storage once: to be read before that runs
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.flops = self.moved = self.operations = 0.0
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._kept: dict[int, int] = {}

    @property
    def cost(self) -> Work:
        return Work(self.flops, self.moved, self.operations)

    @property
    def kept(self) -> int:
        return sum(self._kept.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.is_meta:
            if func is aten._local_scalar_dense.default:
                return {torch.bool: True}.get(first.dtype, 0.0 if first.is_floating_point() else 0)
            if func is aten._to_copy.default and torch.device(kwargs.get("device") or "meta").type == "cpu":
                kind = kwargs.get("dtype") or first.dtype
                return torch.full((), kind is torch.bool, dtype=kind).expand(first.shape)
        out = func(*args, **kwargs)
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_meta]
        if outputs:
            inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            self._count(func, args, kwargs, out, inputs, outputs)
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        given = {t.untyped_storage()._cdata for t in inputs}
        made = [t.untyped_storage() for t in outputs if t.untyped_storage()._cdata not in given]
        for storage in made:
            self._alloc(storage)
        if made or func._schema.is_mutable:  # a view costs nothing
            self.operations += 1
            self.moved += sum(t.nbytes for t in {id(t): t for t in [*inputs, *outputs]}.values())
        packet = func._overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        elif packet is FUSED:
            self.flops += sdpa_flop_count(*(t.shape for t in args[:3]))
        elif packet is FUSED_BACKWARD:
            self.flops += sdpa_backward_flop_count(*(t.shape for t in args[:4]))

    def _alloc(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)

        def free(_: Any) -> None:
            self.live -= size
            self._alive.pop(key, None)
            self._kept.pop(key, None)

        self._alive[key] = weakref.ref(storage, free)

    def keep(self, tensor: Tensor) -> Tensor:
        """The pack hook of saved tensors: what is kept that was not there before, weights for example."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._alive:
            self._kept[storage._cdata] = storage.nbytes()
        return tensor


SDPA = F.scaled_dot_product_attention  # patched while tracing: a mode would not reach a checkpoint's second forward


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if not query.is_meta:
        return SDPA(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    if attn_mask is not None and attn_mask.dtype != query.dtype:
        attn_mask = attn_mask.to(query.dtype)
    return FUSED(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]  # type: ignore[no-any-return]


def _autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
    """torch.autocast, which knows no meta device: there the network computes in its own dtype."""
    return nullcontext() if device_type == "meta" else torch.amp.autocast_mode.autocast(device_type, *args, **kwargs)


@contextmanager
def tracing() -> Iterator[Trace]:
    """Run what is inside on the meta device and count (see `Trace`)."""
    own = torch.autocast
    torch.autocast, F.scaled_dot_product_attention = _autocast, _attention  # type: ignore[assignment,misc]
    try:
        with Trace() as trace:
            yield trace
    finally:
        torch.autocast, F.scaled_dot_product_attention = own, SDPA  # type: ignore[misc]
