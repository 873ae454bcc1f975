"""Tiny random-weight pipelines of the real diffusers classes, saved and loaded back like a user's checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from clip_bpe import clip_tokenizer
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_flux import FluxAttention
from t5 import t5_tokenizer
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from bench_dfusion.diffusion.policy import Policy
from bench_dfusion.micro import pretrain
from bench_dfusion.models import loading
from bench_dfusion.models.loading import load_adapter
from bench_dfusion.testing.fakes import shake
from bench_dfusion.tracks.schema import ModelSection

BETAS: dict[str, Any] = {  # of every Stable Diffusion
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def tiny_sd(folder: Path, prediction_type: str = "epsilon") -> Path:
    """Stable Diffusion in small: cross-attention at 16² and 8², in the encoder, the middle and the decoder."""
    with _seeded():
        text = CLIPTextModel(_text_config(16))
        unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=(2, 4),  # the number of heads, in spite of its name
            norm_num_groups=8,
        )
        _sharpen(unet)
        vae = _autoencoder()
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, prediction_type=prediction_type)
    _sd(vae, text, unet, scheduler).save_pretrained(folder)
    return folder


def tiny_sd21(folder: Path) -> Path:
    """Stable Diffusion 2.1's shape: four levels of which the lowest has attention in the middle only, linear
    projections, a gelu text encoder, v-prediction."""
    with _seeded():
        text = CLIPTextModel(_text_config(16, hidden_act="gelu"))
        unet = UNet2DConditionModel(
            sample_size=24,
            block_out_channels=(8, 16, 16, 16),
            layers_per_block=1,
            down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
            up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
            cross_attention_dim=16,
            attention_head_dim=(1, 2, 4, 4),
            use_linear_projection=True,
            norm_num_groups=4,
        )
        _sharpen(unet)
        vae = _autoencoder()
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction")
    _sd(vae, text, unet, scheduler).save_pretrained(folder)
    return folder


def tiny_sdxl(folder: Path) -> Path:
    """Stable Diffusion XL in small: no attention at the top level, several blocks to a layer below, and the scheduler
    and the second tokenizer's padding that SDXL ships."""
    with _seeded():
        tokenizer = clip_tokenizer()
        tokenizer_2 = copy.deepcopy(tokenizer)
        tokenizer_2.pad_token = "!"
        unet = UNet2DConditionModel(
            sample_size=32,
            block_out_channels=(8, 16, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 2),
            cross_attention_dim=16 + 24,
            attention_head_dim=(1, 2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 12,
            norm_num_groups=4,
        )
        _sharpen(unet)
        pipe = StableDiffusionXLPipeline(
            vae=_autoencoder(),
            text_encoder=CLIPTextModel(_text_config(16)),
            text_encoder_2=CLIPTextModelWithProjection(_text_config(24, hidden_act="gelu", projection_dim=12)),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=EulerDiscreteScheduler(**BETAS),
        )
    pipe.save_pretrained(folder)
    return folder


def tiny_pixart(folder: Path) -> Path:
    """The embedded model's classes with 3 blocks of 2 heads × 8."""
    with _seeded():
        tokenizer = pretrain.make_tokenizer()
        text = pretrain.make_text_encoder(tokenizer)
        denoiser = pretrain.make_denoiser(layers=3, heads=2, head=8)
        _sharpen(denoiser)
        for block in denoiser.transformer_blocks:
            block.scale_shift_table.data[[2, 5]] += 1  # the gates of attention and MLP start near 0
            block.attn2.to_k.weight.data.mul_(5)  # no norm stands before this attention
        vae = pretrain.make_autoencoder()
    PixArtSigmaPipeline(tokenizer, text, vae, denoiser, pretrain.make_scheduler()).save_pretrained(folder)
    return folder


def tiny_sd3(folder: Path) -> Path:
    """Stable Diffusion 3.5 in small: three joint blocks, the first with a second attention of the picture alone, and
    normed queries and keys; a static shift."""
    with _seeded():
        network = SD3Transformer2DModel(
            sample_size=16,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=12 + 12,
            in_channels=4,
            out_channels=4,
            pos_embed_max_size=16,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )
        _sharpen(network)
        pipe = StableDiffusion3Pipeline(
            transformer=network,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_autoencoder(scaling_factor=1.5, shift_factor=0.06),
            text_encoder=CLIPTextModelWithProjection(_text_config(16, projection_dim=12)),
            tokenizer=clip_tokenizer(),
            text_encoder_2=CLIPTextModelWithProjection(_text_config(12, hidden_act="gelu", projection_dim=12)),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=_t5(32),
            tokenizer_3=t5_tokenizer(),
        )
    pipe.save_pretrained(folder)
    return folder


def tiny_flux(folder: Path) -> Path:
    """FLUX.1-dev in small: two double and two single blocks, told the guidance scale; a shift by the picture's size."""
    with _seeded():
        network = FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(2, 2, 4),
        )
        _sharpen(network)
        pipe = FluxPipeline(
            transformer=network,
            scheduler=FlowMatchEulerDiscreteScheduler(
                shift=3.0, use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=256
            ),
            vae=_autoencoder(scaling_factor=0.36, shift_factor=0.11),
            text_encoder=CLIPTextModel(_text_config(16)),
            tokenizer=clip_tokenizer(),
            text_encoder_2=_t5(32),
            tokenizer_2=t5_tokenizer(),
        )
    pipe.save_pretrained(folder)
    return folder


_tokenizers: dict[tuple[tuple[Path, int], ...], Any] = {}  # by their files and when those were written (ns)


@contextmanager
def tokenizers_read_once() -> Iterator[None]:
    """CLIP's vocabulary takes as long to read as the rest of a tiny pipeline, and nothing changes a tokenizer."""
    load = loading._load

    def kept(found: Any, name: str, *rest: Any) -> Any:
        if not name.startswith("tokenizer"):
            return load(found, name, *rest)
        key = tuple((p, p.stat().st_mtime_ns) for p in sorted(found.parts[name].folder.iterdir()))
        if key not in _tokenizers:
            _tokenizers[key] = load(found, name, *rest)
        return _tokenizers[key]

    with patch.object(loading, "_load", kept):
        yield


def policy_of(folder: Path, lora: float = 0.1, **options: Any) -> Policy:
    """The policy of a saved pipeline, its LoRA moved off zero by `lora`; `options` are the Policy's."""
    section = ModelSection(id=str(folder), resolution=options.pop("resolution", None))
    with tokenizers_read_once():
        adapter, _ = load_adapter(section, memory=options.pop("memory", None))
    policy = Policy(adapter, **{"steps": 4, **options})
    if lora:
        shake(policy, lora)
    return policy


def _sd(vae: AutoencoderKL, text: CLIPTextModel, unet: UNet2DConditionModel, scheduler: Any) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=clip_tokenizer(),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _text_config(width: int, **options: Any) -> CLIPTextConfig:
    tokenizer = clip_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )


def _autoencoder(**options: float) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        **options,
    )


def _t5(width: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(t5_tokenizer()), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return T5EncoderModel(config)


@contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _sharpen(network: nn.Module) -> None:
    """Attention of fresh weights is all but uniform and adds little: give it contrast and weight."""
    for module in network.modules():
        if isinstance(module, Attention | FluxAttention):
            names = {"to_q": 3, "to_k": 3, "to_v": 2, "add_k_proj": 3, "add_q_proj": 3, "norm_q": 3, "norm_k": 3}
            for name, factor in names.items():
                layer = getattr(module, name, None)
                if isinstance(weight := getattr(layer, "weight", None), torch.Tensor):
                    weight.data.mul_(factor)
            for layer in list(getattr(module, "to_out", None) or [])[:1]:
                layer.weight.data.mul_(2)
