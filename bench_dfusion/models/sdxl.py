"""Stable Diffusion XL: a UNet that two text encoders, a pooled embedding and the picture's size condition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench_dfusion.models.base import Conditioning, token_ids, token_limit
from bench_dfusion.models.unet import UNetAdapter


class SDXLAdapter(UNetAdapter):
    """StableDiffusionXLPipeline (SDXL base, Turbo, and what is trained from them)."""

    pipelines = ("StableDiffusionXLPipeline",)

    def __init__(self, pipe: Any):
        super().__init__(pipe)
        network: Any = self.network
        config, encoders = network.config, (pipe.text_encoder, pipe.text_encoder_2)
        if None in encoders or config.addition_embed_type != "text_time":
            raise ValueError("an SDXL checkpoint needs two text encoders and a network with text_time embeddings")
        # The places of a prompt's tokens, which D-Fusion's mask reads, are asked of the first tokenizer alone.
        first, second = pipe.tokenizer, pipe.tokenizer_2
        if first.get_vocab() != second.get_vocab() or self._token_limit != token_limit(second, encoders[1]):
            raise ValueError("the two tokenizers of this SDXL checkpoint differ: tokens have no common place")
        wanted = network.add_embedding.linear_1.in_features
        found = config.addition_time_embed_dim * 6 + pipe.text_encoder_2.config.projection_dim
        if wanted != found:
            raise ValueError(
                f"this SDXL network wants an added embedding of {wanted} numbers and a size, a crop and a target size "
                f"make {found}: it is no text-to-image base (refiners are not supported)"
            )

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Penultimate hidden states of both encoders side by side; the second one's pooled embedding.

        The empty prompt is zeros where the checkpoint says so (`force_zeros_for_empty_prompt`).
        """
        states, pooled = [], torch.empty(0)
        for tokenizer, encoder in (
            (self.pipe.tokenizer, self.pipe.text_encoder),
            (self.pipe.tokenizer_2, self.pipe.text_encoder_2),
        ):
            output = encoder(token_ids(tokenizer, prompts, self.text_length, encoder), output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled = output[0]  # of the second: its projected end-of-text state
        conditioning = {"states": torch.cat([s.to(states[-1]) for s in states], -1), "pooled": pooled}
        if self.pipe.config.force_zeros_for_empty_prompt:
            empty = torch.tensor([p == "" for p in prompts], device=pooled.device)
            conditioning = {k: v.masked_fill(empty.view(-1, *[1] * (v.ndim - 1)), 0) for k, v in conditioning.items()}
        side = self.image_side
        times = torch.tensor([side, side, 0, 0, side, side], dtype=torch.float32)  # original size, crop, target size
        return conditioning | {"time_ids": times.expand(len(prompts), -1)}

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        added = {"text_embeds": conditioning["pooled"], "time_ids": conditioning["time_ids"]}
        return self.network(
            latents,
            timestep,
            encoder_hidden_states=conditioning["states"],
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
