"""Stable Diffusion 3 and 3.5: two CLIP text encoders and a T5, a transformer with joint attention."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from bench_dfusion.models.base import Conditioning, TextPart, square, token_ids, token_limit
from bench_dfusion.models.mmdit import MMDiTAdapter, text_block

T5_LENGTH = 256  # the pipeline's own


class SD3Adapter(MMDiTAdapter):
    """StableDiffusion3Pipeline (SD 3 medium, SD 3.5 medium and large)."""

    pipelines = ("StableDiffusion3Pipeline",)

    def __init__(self, pipe: Any):
        super().__init__(pipe)
        first, second = pipe.tokenizer, pipe.tokenizer_2
        limit = token_limit(second, pipe.text_encoder_2)
        # Their tokens share columns of the attention maps, which D-Fusion's mask reads by the first one's places.
        if first.get_vocab() != second.get_vocab() or self._token_limit != limit:
            raise ValueError("the two CLIP tokenizers of this Stable Diffusion 3 checkpoint differ")

    @classmethod
    def left_out(cls, parts: Collection[str]) -> tuple[str, ...]:
        """T5, where there is none: its states are then zeros, as in the pipeline."""
        return () if "text_encoder_3" in parts else ("text_encoder_3", "tokenizer_3")

    @classmethod
    def made_with(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        if square(config.get("sample_size", 1)) is None:
            # Its positions are among the weights: the number is only the pictures' side where none is given.
            return {"sample_size": config.get("pos_embed_max_size")}
        return super().made_with(config)

    def text_parts(self) -> tuple[TextPart, ...]:
        clip = TextPart(self.tokenizer, self.text_length, 0)
        t5 = (TextPart(self.pipe.tokenizer_3, T5_LENGTH, clip.length),) if self.pipe.tokenizer_3 is not None else ()
        return (clip, *t5)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Penultimate states of both CLIPs side by side, padded to T5's width and followed by T5's; both pooled ones."""
        states, pooled = [], []
        for tokenizer, encoder in (
            (self.pipe.tokenizer, self.pipe.text_encoder),
            (self.pipe.tokenizer_2, self.pipe.text_encoder_2),
        ):
            output = encoder(token_ids(tokenizer, prompts, self.text_length, encoder), output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled.append(output[0])
        clip, encoder = torch.cat(states, -1), self.pipe.text_encoder_3
        if encoder is None:
            width = cast(Any, self.network.config).joint_attention_dim
            t5 = clip.new_zeros(len(prompts), T5_LENGTH, width)
        else:
            t5 = encoder(token_ids(self.pipe.tokenizer_3, prompts, T5_LENGTH, encoder))[0]
        clip = functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return {"states": torch.cat([clip.to(t5), t5], 1), "pooled": torch.cat(pooled, -1)}

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        return self.network(
            latents,
            timestep=timestep,
            encoder_hidden_states=conditioning["states"],
            pooled_projections=conditioning["pooled"],
            return_dict=False,
        )[0]

    def attention_map(
        self, attn: Any, picture: Tensor, text: Tensor | None, mask: Tensor | None = None, rotary: Any = None
    ) -> Tensor:
        query = attn.to_q(picture).unflatten(-1, (attn.heads, -1))
        key, of_text = (
            layer(x).unflatten(-1, (attn.heads, -1)) for layer, x in ((attn.to_k, picture), (attn.add_k_proj, text))
        )
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        if attn.norm_added_k is not None:
            of_text = attn.norm_added_k(of_text)
        return text_block(query, torch.cat([key, of_text], 1), slice(key.shape[1], None))
