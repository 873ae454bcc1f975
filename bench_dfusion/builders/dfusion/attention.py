"""Capture and fusion of attention, set on a network for a while and taken off without a trace.

Keys and values are taken, and replaced, where the projections `to_k` and `to_v` return them, by forward
hooks: this is before the split into heads, so one row is one position's key for all heads, and it holds
for every attention processor and for LoRA on the projections. Probabilities of cross-attention, or of the
picture's part of joint attention, exist only inside the processor, so those layers get one that computes them in
the open.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bench_dfusion.models.base import Adapter


class OpenAttention:
    """A processor that runs a layer's own and keeps how the layer attends from the picture to the text.

    Kept are only layers whose queries are `positions` many.
    """

    def __init__(self, adapter: Adapter, kept: list[Tensor], positions: int, original: Any):
        self.adapter, self.kept, self.positions, self.original = adapter, kept, positions, original

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        **kwargs: Any,
    ) -> Any:
        rotary = {} if image_rotary_emb is None else {"image_rotary_emb": image_rotary_emb}
        result = self.original(attn, hidden_states, encoder_hidden_states, attention_mask, **rotary, **kwargs)
        if hidden_states.ndim == 3 and hidden_states.shape[1] == self.positions and encoder_hidden_states is not None:
            where = hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            self.kept.append(self.adapter.attention_map(attn, *where))
        return result


class AttentionHooks:
    """What is wired into a network while D-Fusion builds: recording of a reference, fusing of a target.

    Inside `recording()`, a forward leaves `keys_values` {layer: (K, V)}, each [B', rows, D] with one row for each
    position (and before them for each text token, where the layer attends to both), and `maps` [B', positions, tokens],
    the probabilities from picture to text averaged over heads and layers (B' counts both guidance branches,
    unconditional first). Inside `fusing(keys_values, masks)`, fused layers use the
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
                module.processor = OpenAttention(self.adapter, self._kept, self.positions, originals[name])
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
                text = self.adapter.text_rows(output.shape[1])
                inside = nn.functional.pad(resize_mask(mask, output.shape[1] - text), (text, 0))[..., None].bool()
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
