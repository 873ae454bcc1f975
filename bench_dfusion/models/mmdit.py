"""Multimodal diffusion transformers (Esser et al. 2024): joint attention over picture and text, flow matching.

There is no cross-attention here, so D-Fusion is carried over, beyond its paper: the mask is made from the block of
the joint attention probabilities that leads from picture to text, and only the picture's keys and values are fused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from bench_dfusion.models import schedulers, schedules
from bench_dfusion.models.base import Adapter
from bench_dfusion.models.schedules import Levels, Schedule

NOISE_LEVEL = 0.7  # Flow-GRPO's a


class MMDiTAdapter(Adapter):
    """What transformers with joint attention and a flow-matching scheduler have in common."""

    network_name = "transformer"
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )  # Flow-GRPO's

    # the process

    @staticmethod
    def read_scheduler(scheduler: Any) -> Any:
        return schedulers.flow_matching(scheduler)

    noise = NOISE_LEVEL

    def schedule(self, steps: int, eta: float | None, kind: str = "native") -> Schedule:
        """Flow-GRPO's SDE, or cps, over the sigmas that the family's pipeline takes; `eta` is its noise level a."""
        try:
            self.scheduler.set_timesteps(**self.sigmas(steps))
        except (TypeError, ArithmeticError) as error:  # a setting that is null, or of another kind
            raise ValueError(f"the scheduler's settings make no {steps} steps: {error}") from None
        return schedules.flow_schedule(self.scheduler.sigmas, self.scheduler.timesteps, self.eta(eta, kind), kind)

    def sigmas(self, steps: int) -> dict[str, Any]:
        """What the family's pipeline asks of its scheduler's `set_timesteps`."""
        shift = {"mu": self.shift()} if self.scheduler.config.use_dynamic_shifting else {}
        return {"num_inference_steps": steps, **shift}

    def shift(self) -> float:
        """The shift of the sigmas, linear in the number of the picture's tokens (log units)."""
        config = self.scheduler.config
        low, high = config.base_image_seq_len, config.max_image_seq_len
        slope = (config.max_shift - config.base_shift) / (high - low)
        return float(config.base_shift + slope * (self.positions - low))

    def levels(self) -> Levels:
        """The sigmas that the scheduler's class sets for training: a fixed shift is in them, a dynamic one is not."""
        fresh = type(self.scheduler).from_config(self.scheduler.config)
        return schedules.flow_levels(fresh.sigmas.flip(0), fresh.timesteps.flip(0))

    # attention

    @property
    def positions(self) -> int:
        """The picture's tokens."""
        return (self.latent_shape[-1] // self.patch) ** 2

    def tune_for_cpu(self) -> None:
        cast(Any, self.pipe.vae).to(memory_format=torch.channels_last)

    def attentions(self, kind: str) -> dict[str, Any]:
        """ "self": every attention that has keys of the picture. "cross": those that join it with a text stream of its
        own weights; blocks that run both streams as one have none, so nothing tells text from picture there."""
        found = {n: m for n, m in self.network.named_modules() if n.endswith((".attn", ".attn2"))}
        if kind == "self":
            return found
        return {n: m for n, m in found.items() if getattr(m, "add_k_proj", None) is not None}

    def map_sides(self) -> tuple[int, ...]:
        return (self.latent_shape[-1] // self.patch,)

    def map_side(self) -> int:
        return self.map_sides()[0]

    def fused_layers(self) -> tuple[str, ...]:
        """Every attention of the second half of the blocks: as in a UNet, the half that writes, not the one that reads."""
        layers = self.attentions("self")
        blocks = list(dict.fromkeys(name.rpartition(".")[0] for name in layers))
        second = set(blocks[len(blocks) // 2 :])
        return tuple(name for name in layers if name.rpartition(".")[0] in second)

    def text_rows(self, rows: int) -> int:
        """Blocks that run both streams as one have the text first."""
        return rows - self.positions

    # LoRA

    def save_lora(self, folder: Path, layers: Mapping[str, Tensor], scale: Mapping[str, Any]) -> None:
        type(self.pipe).save_lora_weights(
            folder,
            transformer_lora_layers=dict(layers),
            safe_serialization=True,
            transformer_lora_adapter_metadata=dict(scale) or None,
        )


def text_block(query: Tensor, key: Tensor, text: slice) -> Tensor:
    """softmax(q kᵀ / √d) [B, P, N] averaged over heads, its columns `text` alone; q [B, P, heads, d], k [B, N, heads, d].

    One head at a time: all of them are gigabytes where a picture has 4,096 tokens.
    """
    total: Tensor | float = 0.0
    heads, width = query.shape[2:]
    for h in range(heads):
        scores = query[:, :, h].float() @ key[:, :, h].float().transpose(1, 2) / width**0.5
        total = total + scores.softmax(-1)[:, :, text]
    return cast(Tensor, total) / heads
