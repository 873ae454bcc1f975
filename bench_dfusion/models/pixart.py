"""PixArt: a transformer without convolutions, with cross-attention to the text. The embedded model's family."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench_dfusion.errors import UsageError
from bench_dfusion.models import layout
from bench_dfusion.models.base import Adapter, Conditioning, square
from bench_dfusion.util import files


class PixArtAdapter(Adapter):
    """PixArtSigmaPipeline and PixArtAlphaPipeline without micro-conditions (resolution, aspect ratio)."""

    pipelines = ("PixArtSigmaPipeline", "PixArtAlphaPipeline")
    network_name = "transformer"

    def __init__(self, pipe: object):
        super().__init__(pipe)
        if self.network.use_additional_conditions:
            raise ValueError("PixArt checkpoints with micro-conditions (use_additional_conditions) are not supported")

    @classmethod
    def made_with(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        if square(config.get("sample_size", 1)) is None:
            raise UsageError(
                f"transformer/config.json of this model has the sample_size {json.dumps(config['sample_size'])}, from which PixArt's "
                "positions are made: write the latent's side there (track.model.resolution does not say it)"
            )
        return super().made_with(config)

    @property
    def text_length(self) -> int:
        # PixArt's tokenizers are T5's with no length of their own; the pipeline's default is 300.
        return min(300, self._token_limit or 300)

    def text(self, prompt: str) -> str:
        return prompt.lower().strip()  # as the pipeline does

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        tokens = self.tokenizer(
            [self.text(p) for p in prompts],
            padding="max_length",
            max_length=self.text_length,
            truncation=True,
            return_tensors="pt",
        )
        encoder = self.pipe.text_encoder
        ids, mask = tokens.input_ids.to(encoder.device), tokens.attention_mask.to(encoder.device)
        return {"states": encoder(ids, attention_mask=mask)[0], "mask": mask}

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        output = self.network(
            latents,
            encoder_hidden_states=conditioning["states"],
            encoder_attention_mask=conditioning["mask"],
            timestep=timestep,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        # Checkpoints that also learn the variance output it in the second half of the channels.
        return output[:, : latents.shape[1]]

    def map_sides(self) -> tuple[int, ...]:
        return (self.latent_shape[-1] // self.patch,)

    def fused_layers(self) -> tuple[str, ...]:
        """Every block: there is no encoder to leave out (measured on the embedded model: docs/micro.md)."""
        return tuple(self.attentions("self"))

    def save_lora(self, folder: Path, layers: Mapping[str, Tensor], scale: Mapping[str, Any]) -> None:
        """diffusers has no LoRA loader for PixArt: the keys are what its other transformer pipelines use."""
        named = {f"transformer.{k}": v for k, v in layers.items()}
        packed = json.dumps({f"transformer.{k}": v for k, v in scale.items()})
        files.save_tensors(folder / layout.LORA, named, header={layout.LORA_HEADER: packed} if scale else {})
