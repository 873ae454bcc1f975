"""Stable Diffusion 1.x and 2.x: a UNet with cross-attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench_dfusion.models.base import Adapter, Conditioning


class UNetAdapter(Adapter):
    """StableDiffusionPipeline (SD 1.4, 1.5, 2.1-base, 2.1)."""

    pipelines = ("StableDiffusionPipeline",)
    network_name = "unet"

    def __init__(self, pipe: Any):
        super().__init__(pipe)
        if getattr(self.network.config, "time_cond_proj_dim", None) is not None:
            raise ValueError("this UNet takes the guidance scale as an input (a distilled model): not supported")

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.text_length,
            truncation=True,
            return_tensors="pt",
        )
        encoder = self.pipe.text_encoder
        mask = (
            tokens.attention_mask.to(encoder.device) if getattr(encoder.config, "use_attention_mask", False) else None
        )
        return {"states": encoder(tokens.input_ids.to(encoder.device), attention_mask=mask)[0]}

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        return self.network(latents, timestep, encoder_hidden_states=conditioning["states"], return_dict=False)[0]

    def map_sides(self) -> tuple[int, ...]:
        config: Any = self.network.config
        sides, side = [], self.latent_shape[-1]
        for kind in config.down_block_types:
            sides += [side] * ("CrossAttn" in kind)
            last, side = side, (side + 1) // 2  # the downsampler's convolution rounds up; the last block has none
        middle = "CrossAttn" in (config.mid_block_type or "")
        return tuple(dict.fromkeys([*sides, *[last] * middle]))

    def fused_layers(self) -> tuple[str, ...]:
        """The mid block and every up block that has attention, never the encoder (the official choice)."""
        return tuple(n for n in self.attentions("self") if n.startswith(("mid_block.", "up_blocks.")))

    def save_lora(self, folder: Path, layers: Mapping[str, Tensor], scale: Mapping[str, Any]) -> None:
        type(self.pipe).save_lora_weights(
            folder,
            unet_lora_layers=dict(layers),
            safe_serialization=True,
            unet_lora_adapter_metadata=dict(scale) or None,
        )

    def lora_layers(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
        """diffusers' formats, older ones too, and kohya's."""
        from diffusers.utils import convert_unet_state_dict_to_peft

        layers, alphas = type(self.pipe).lora_state_dict(dict(tensors), unet_config=self.network.config)
        # diffusers gives some alphas by their layer's old name and then finds no module of it, unless all are equal.
        named = convert_unet_state_dict_to_peft({k.removesuffix(".alpha"): v for k, v in (alphas or {}).items()})
        return convert_unet_state_dict_to_peft(layers), {k.partition(".lora_")[0]: float(v) for k, v in named.items()}
