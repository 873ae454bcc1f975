"""FLUX.1: a CLIP's pooled embedding and a T5's states, joint attention with rotary positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench_dfusion.models.base import Conditioning, TextPart, token_ids, token_limit
from bench_dfusion.models.mmdit import MMDiTAdapter, text_block

PATCH = 2  # the pipeline packs 2 x 2 places of the latent into one token


class FluxAdapter(MMDiTAdapter):
    """FluxPipeline: FLUX.1-dev, which is told the guidance scale, and FLUX.1-schnell, which is not."""

    pipelines = ("FluxPipeline",)

    def __init__(self, pipe: Any):
        super().__init__(pipe)
        config: Any = self.network.config
        self.distilled = bool(config.guidance_embeds)
        limit = token_limit(pipe.tokenizer_2, pipe.text_encoder_2)
        self._states_length = min(512, limit or 512)  # 512 is the pipeline's own
        if config.in_channels != (config.out_channels or config.in_channels):
            raise ValueError("this FLUX network takes a picture beside the latent (Fill, Canny, Depth): not supported")

    def tune_for_cuda(self) -> None:
        """Attention by torch's flash and memory-efficient kernels, for the whole process: cuDNN's backward gives NaN, or
        touches memory that is not its own, in bfloat16 here (H100, torch 2.11). It is some 5 to 10 % faster elsewhere.
        """
        torch.backends.cuda.enable_cudnn_sdp(False)

    @property
    def latent_channels(self) -> int:
        config: Any = self.network.config
        return int(config.in_channels) // PATCH**2

    @property
    def own_latent_side(self) -> int:
        return int(self.pipe.default_sample_size)

    @property
    def patch(self) -> int:
        return PATCH

    @property
    def text_length(self) -> int:
        return self._states_length

    def text_parts(self) -> tuple[TextPart, ...]:
        return (TextPart(self.pipe.tokenizer_2, self.text_length, 0),)

    def sigmas(self, steps: int) -> dict[str, Any]:
        sigmas = None if self.scheduler.config.get("use_flow_sigmas") else np.linspace(1.0, 1 / steps, steps)
        return super().sigmas(steps) | {"sigmas": sigmas}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """T5's states and CLIP's pooled one."""
        clip, t5 = self.pipe.text_encoder, self.pipe.text_encoder_2
        pooled = clip(token_ids(self.pipe.tokenizer, prompts, super().text_length, clip)).pooler_output
        return {"states": t5(token_ids(self.pipe.tokenizer_2, prompts, self.text_length, t5))[0], "pooled": pooled}

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        states, side = conditioning["states"], latents.shape[-1] // PATCH
        places = torch.arange(side, device=latents.device, dtype=torch.float32)
        rows, columns = torch.meshgrid(places, places, indexing="ij")
        packed = self.network(
            pack(latents),
            timestep=timestep.to(latents.dtype) / 1000,
            guidance=conditioning.get("guidance"),
            pooled_projections=conditioning["pooled"],
            encoder_hidden_states=states,
            txt_ids=torch.zeros(states.shape[1], 3, device=latents.device),
            img_ids=torch.stack([torch.zeros_like(rows), rows, columns], -1).view(-1, 3),
            return_dict=False,
        )[0]
        return unpack(packed, side)

    def attention_map(
        self, attn: Any, picture: Tensor, text: Tensor | None, mask: Tensor | None = None, rotary: Any = None
    ) -> Tensor:
        from diffusers.models.embeddings import apply_rotary_emb

        query = attn.norm_q(attn.to_q(picture).unflatten(-1, (-1, attn.head_dim)))
        key = attn.norm_k(attn.to_k(picture).unflatten(-1, (-1, attn.head_dim)))
        of_text = attn.norm_added_k(attn.add_k_proj(text).unflatten(-1, (-1, attn.head_dim)))
        tokens = of_text.shape[1]
        key = apply_rotary_emb(torch.cat([of_text, key], 1), rotary, sequence_dim=1)
        query = apply_rotary_emb(query, tuple(part[tokens:] for part in rotary), sequence_dim=1)
        return text_block(query, key, slice(0, tokens))

    def lora_layers(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
        """diffusers' format and the others that it converts (kohya's, XLabs')."""
        layers, alphas = type(self.pipe).lora_state_dict(dict(tensors), return_alphas=True)
        return layers, {k.removesuffix(".alpha"): float(v) for k, v in (alphas or {}).items()}


def pack(latents: Tensor) -> Tensor:
    """[B, C, H, W] to tokens [B, H/2 · W/2, 4 C], each a patch of 2 x 2 with its channels outermost."""
    b, c, h, w = latents.shape
    patches = latents.view(b, c, h // PATCH, PATCH, w // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // PATCH**2, c * PATCH**2)


def unpack(tokens: Tensor, side: int) -> Tensor:
    """The inverse of `pack` for `side`² tokens."""
    patches = tokens.view(len(tokens), side, side, -1, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, side * PATCH, side * PATCH)
