"""Capture and fusion of attention, set on a network for a while and taken off without a trace.

Keys and values are taken, and replaced, where the projections `to_k` and `to_v` return them, by forward
hooks: this is before the split into heads, so one row is one position's key for all heads, and it holds
for every attention processor and for LoRA on the projections. Cross-attention probabilities exist only
inside the processor, so those layers get a processor that computes them in the open.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bench_dfusion.models.base import Adapter


class OpenCrossAttention:
    """A processor for diffusers' `Attention` that computes softmax(q k^T) itself and keeps the head average.

    Kept are only layers whose queries are `positions` many; other layers run their own processor.
    """

    def __init__(self, kept: list[Tensor], positions: int, original: Any):
        self.kept, self.positions, self.original = kept, positions, original

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        result = self.original(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)
        if hidden_states.ndim == 3 and hidden_states.shape[1] == self.positions and encoder_hidden_states is not None:
            self.kept.append(self.probabilities(attn, hidden_states, encoder_hidden_states, attention_mask))
        return result

    @staticmethod
    def probabilities(attn: Any, hidden: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        """Attention probabilities averaged over heads: [B, positions, tokens], float32."""
        if attn.norm_cross:
            text = attn.norm_encoder_hidden_states(text)
        query = attn.to_q(hidden).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        key = attn.to_k(text).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        scores = (query.float() @ key.float().transpose(-1, -2)) * attn.scale
        if mask is not None:
            scores = scores + mask.float().view(len(hidden), 1, 1, -1)
        return scores.softmax(-1).mean(1)


class Taps:
    """What is wired into a network while D-Fusion builds: recording of a reference, fusing of a target.

    Inside `recording()`, a forward leaves `keys_values` {layer: (K, V)}, each [B', positions, D], and `maps`
    [B', positions, tokens], the cross-attention probabilities averaged over heads and layers (B' counts both
    guidance branches, unconditional first). Inside `fusing(keys_values, masks)`, fused layers use the
    recorded keys and values where the mask is 1 and their own elsewhere.
    """

    def __init__(self, adapter: Adapter, layers: Sequence[str], map_side: int):
        self.adapter = adapter
        modules = adapter.attentions("self")
        unknown = [name for name in layers if name not in modules]
        if unknown:
            raise ValueError(f"no self-attention layer {unknown[0]!r}; the network has {', '.join(modules)}")
        self.modules = {name: modules[name] for name in layers}
        self.positions = map_side**2
        self.keys_values: dict[str, tuple[Tensor, Tensor]] = {}
        self._kept: list[Tensor] = []

    @property
    def maps(self) -> Tensor:
        if not self._kept:
            raise ValueError(
                f"no cross-attention layer works at {self.positions} positions, so there is no map to make the mask from"
            )
        return torch.stack(self._kept).mean(0)

    @contextmanager
    def recording(self) -> Iterator[None]:
        self.keys_values, self._kept = {}, []
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in self.modules}

        def keep(name: str, which: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Tensor) -> None:
                parts[name][which] = output.detach()

            return hook

        cross: dict[str, Any] = dict(self.adapter.attentions("cross"))
        originals = {name: module.processor for name, module in cross.items()}
        handles = []
        try:
            for name, module in cross.items():
                module.processor = OpenCrossAttention(self._kept, self.positions, originals[name])
            for name, module in self.modules.items():
                for which in ("k", "v"):
                    handles.append(getattr(module, f"to_{which}").register_forward_hook(keep(name, which)))
            yield
            self.keys_values = {name: (part["k"], part["v"]) for name, part in parts.items()}
        finally:
            for handle in handles:
                handle.remove()
            for name, module in cross.items():
                module.processor = originals[name]

    @contextmanager
    def fusing(self, keys_values: dict[str, tuple[Tensor, Tensor]], mask: Tensor) -> Iterator[None]:
        """`mask` [B', map_side²] in {0, 1}; resized (nearest) to each layer's own positions."""

        def fuse(recorded: Tensor) -> Any:
            def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
                inside = resize_mask(mask, output.shape[1])[..., None].bool()
                return torch.where(inside, recorded.to(output.dtype), output)

            return hook

        handles = []
        try:
            for name, module in self.modules.items():
                for which, recorded in zip("kv", keys_values[name], strict=True):
                    handles.append(getattr(module, f"to_{which}").register_forward_hook(fuse(recorded)))
            yield
        finally:
            for handle in handles:
                handle.remove()


def resize_mask(mask: Tensor, positions: int) -> Tensor:
    """A square mask [B, p] to another number of positions [B, q] by nearest neighbour."""
    if mask.shape[1] == positions:
        return mask
    side, other = int(mask.shape[1] ** 0.5), int(positions**0.5)
    image = mask.view(-1, 1, side, side).float()
    return nn.functional.interpolate(image, size=(other, other), mode="nearest").flatten(1).to(mask.dtype)
