"""Full-size networks with random weights on a GPU: images a second, peak memory, share of the card's peak.

    python benchmarks/gpu.py [--models sd15,sdxl,sd35,flux] [--steps 4] [--tflops 989] [--offload]

The networks and decoders are those of Stable Diffusion 1.5 at 512², SDXL, Stable Diffusion 3.5 medium and FLUX.1-dev at
1024², in bfloat16, with text encoders of the right widths and one layer (prompts are encoded once, so their time does
not count). Timed after a first call: sampling, D-Fusion's targets (one reference for two bases), decoding, and one
forward and backward of DPO's pairs with gradient checkpointing. `of peak` is the network's arithmetic (counted by
torch) over the time and the card's dense bfloat16 peak (--tflops; an H100 SXM has 989). With --offload each network is
measured a second time with `track.memory.offload_network`: its frozen weights stay in the host's memory.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from bench_dfusion.builders.dfusion.builder import DFusion, DFusionConfig
from bench_dfusion.diffusion.policy import Policy, Trajectory
from bench_dfusion.models.loading import adapters_by_pipeline
from bench_dfusion.tracks.schema import MemorySection

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from clip_bpe import clip_tokenizer
from t5 import t5_tokenizer

PROMPTS = ["a red circle", "a cat and a dog"]
BETAS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}
FULL_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}


def clip(width: int, projection: int | None = None) -> Any:
    tokenizer, kind = clip_tokenizer(), CLIPTextModel if projection is None else CLIPTextModelWithProjection
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=8,
        projection_dim=projection or width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return kind(config)


def t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=len(t5_tokenizer()), d_model=4096, d_kv=64, d_ff=256, num_layers=1, num_heads=4)
    )


def sd15() -> Any:
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    return StableDiffusionPipeline(
        vae=AutoencoderKL(**FULL_VAE, latent_channels=4),
        text_encoder=clip(768),
        tokenizer=clip_tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(**BETAS, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_sd15(folder: Path) -> None:
    """Write the pipeline in bfloat16, for benchmarks that load one."""
    with torch.device("cuda"):
        sd15().to(dtype=torch.bfloat16).save_pretrained(folder)


def sdxl() -> Any:
    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        use_linear_projection=True,
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL(**FULL_VAE, latent_channels=4, force_upcast=False),
        text_encoder=clip(768),
        text_encoder_2=clip(1280, 1280),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(**BETAS, steps_offset=1),
    )


def sd35() -> Any:
    network = SD3Transformer2DModel(
        sample_size=128,
        num_layers=24,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL(**FULL_VAE, latent_channels=16, force_upcast=False),
        text_encoder=clip(768, 768),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(1280, 1280),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(),
        tokenizer_3=t5_tokenizer(),
    )


def flux() -> Any:
    return FluxPipeline(
        transformer=FluxTransformer2DModel(guidance_embeds=True),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=AutoencoderKL(**FULL_VAE, latent_channels=16, force_upcast=False),
        text_encoder=clip(768),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
    )


# Model: its pipeline, guidance, samples in one call of the network.
MODELS: dict[str, tuple[Callable[[], Any], float, int]] = {
    "sd15": (sd15, 5.0, 16),
    "sdxl": (sdxl, 5.0, 8),
    "sd35": (sd35, 4.5, 8),
    "flux": (flux, 3.5, 4),
}


def timed(function: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the second call, and GiB at its peak."""
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() / 2**30


def measure(name: str, steps: int, tflops: float, offload: bool) -> dict[str, Any]:
    make, guidance, batch = MODELS[name]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        pipe = make()
    torch.set_default_dtype(torch.float32)
    cls = adapters_by_pipeline()[type(pipe).__name__]
    pipe.scheduler = cls.read_scheduler(pipe.scheduler)
    adapter = cls(pipe)
    adapter.tune_for_cuda()
    adapter.save_memory(MemorySection(offload_network=offload))
    policy = Policy(adapter, steps=steps, guidance=guidance, batch=batch, device="cuda")
    prompts, seeds = [PROMPTS[i % 2] for i in range(batch)], torch.arange(batch)
    held: list[Trajectory] = []
    sampling, memory = timed(lambda: held.append(policy.sample(prompts, seeds)))
    drawn = held[-1]
    result: dict[str, Any] = {
        "pixels": adapter.image_side,
        "parameters (10⁹)": round(sum(p.numel() for p in adapter.network.parameters()) / 1e9, 2),
        "batch": batch,
        "branches": policy.branches,
        "images a second in 20 steps": round(batch / (sampling / steps * 20), 3),
        "sampling GiB": round(memory, 1),
        "mean square of the latents": float(drawn.final.double().square().mean()),
    }
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        policy.predict(drawn.latents[:, 0].cuda(), policy.schedule.timesteps[:1].expand(batch), prompts)
    result["TFLOP of a step of a sample"] = round(counter.get_total_flops() / batch / 1e12, 3)
    result["sampling of peak"] = round(counter.get_total_flops() * steps / sampling / (tflops * 1e12), 3)
    builder = DFusion(DFusionConfig())
    half = batch // 2
    references = torch.arange(half // 2 or 1).repeat_interleave(2)[:half]
    fusing, memory = timed(lambda: builder.targets(policy, drawn, references, torch.arange(half, 2 * half)))
    result |= {"targets a second in 20 steps": round(half / (fusing / steps * 20), 3), "fusing GiB": round(memory, 1)}
    decoding, memory = timed(lambda: policy.decode(drawn.final))
    result |= {"decoded images a second": round(batch / decoding, 2), "decoding GiB": round(memory, 1)}
    with torch.no_grad():
        step = torch.full((batch,), 1, device="cuda")
        where = drawn.latents[:, 1].cuda(), drawn.latents[:, 2].cuda(), step, prompts
        ratio = (policy.log_prob(*where).cpu() - drawn.log_probs[:, 1]).exp()
    result["ratio of unchanged weights − 1"] = float((ratio - 1).abs().max())
    adapter.network.enable_gradient_checkpointing()

    norms: list[float] = []

    def train() -> None:
        policy.log_prob(*where).sum().backward()
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in policy.parameters.values()])))
        for p in policy.parameters.values():
            p.grad = None

    training, memory = timed(train)
    result |= {"trained steps a second": round(batch / training, 2), "training GiB": round(memory, 1)}
    result["gradient norm is finite"] = all(math.isfinite(n) for n in norms)
    # A forward, the same again, and the gradient of its inputs: frozen weights have none.
    result["training of peak"] = round(3 * counter.get_total_flops() / training / (tflops * 1e12), 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tflops", type=float, default=989.0)
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {}
    for name in args.models.split(","):
        for offload in (False, True)[: 1 + args.offload]:
            label = f"{name}, offload_network" if offload else name
            found[label] = measure(name, args.steps, args.tflops, offload)
            print(label, found[label], flush=True)
            torch.cuda.empty_cache()
            measuring.write(
                "gpu", {"card": torch.cuda.get_device_name(), "peak TFLOP/s": args.tflops, "models": found}, args.out
            )


if __name__ == "__main__":
    main()
