"""The recipe that made the shipped weights: `python -m bench_dfusion.micro.pretrain --work DIR`.

Stages, each resumable after a kill (a checkpoint every two minutes, every step seeded by its number):
a CLIP tokenizer for the grammar, an autoencoder, a small CLIP in open_clip's format, the text encoder
and the denoiser together, and the package (a diffusers pipeline directory and an open_clip directory).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from bench_dfusion.micro import prompts as lists
from bench_dfusion.micro.scenes import (
    COLOURS,
    NUMBERS,
    PLURALS,
    SHAPES,
    SIZE,
    Placed,
    Spec,
    coverage,
    random_spec,
    sample_scene,
)
from bench_dfusion.micro.scenes import render as draw_scene
from bench_dfusion.util import files
from bench_dfusion.util.progress import bar

GRID = 8  # latent positions a side
CHANNELS = 16
CONTEXT = 16  # text tokens
CHECKPOINT_EVERY = 120.0  # s
CHUNK = 250  # pictures that a process renders at a time
HAS_BF16 = torch.cpu._is_avx512_bf16_supported()
MIX = {"single": 0.13, "count": 0.27, "attributes": 0.3, "relation": 0.3}


Job = TypeVar("Job")
Result = TypeVar("Result")
CPU = torch.device("cpu")

# ---------------------------------------------------------------- data


@dataclass
class World:
    """Rendered scenes: images uint8 [N, 64, 64, 3], the prompts' specs, and the place of each thing asked for [N, 2, 64]."""

    images: np.ndarray
    specs: list[Spec]
    places: np.ndarray


def _scene(job: tuple[int, int, bool]) -> tuple[np.ndarray, Spec, np.ndarray]:
    seed, index, everything = job
    rng = random.Random(f"{seed}:{index}")
    template = rng.choices(list(MIX), list(MIX.values()))[0]
    spec = random_spec(template, rng) if everything else lists.draw(template, "train", rng)
    scene = sample_scene(spec, rng)
    return draw_scene(scene), spec, thing_places(spec, scene.objects)


def thing_places(spec: Spec, objects: Sequence[Placed]) -> np.ndarray:
    """The share of each latent position that all objects of a thing cover together, for each of `spec.things`: [2, 64]."""
    result = np.zeros((2, GRID * GRID), np.float16)
    step = SIZE // GRID
    for i, thing in enumerate(spec.things):
        covered = sum(coverage(thing.shape, o.x, o.y, o.radius) for o in objects if o.thing == thing)
        result[i] = np.clip(covered, 0, 1).reshape(GRID, step, GRID, step).mean((1, 3)).reshape(-1)
    return result


def make_world(n: int, seed: int, everything: bool = False) -> World:
    """`n` scenes of the train compositions, or of `everything` (the CLIP's world knows them all)."""
    images, specs, places = zip(*rendered(_scene, [(seed, i, everything) for i in range(n)]), strict=True)
    return World(np.stack(images), list(specs), np.stack(places))


def rendered(draw: Callable[[Job], Result], jobs: Sequence[Job]) -> list[Result]:
    """`draw` of every job in order; of many, by a process for each core, which starts anew: torch's threads may hold
    locks that a forked process would wait for without end. Raises BrokenProcessPool where such a process dies."""
    with ExitStack() as stack:
        parts: Iterable[Result] = map(draw, jobs)
        if len(jobs) > 4 * CHUNK:  # a process takes seconds to start
            cores = len(os.sched_getaffinity(0))
            pool = ProcessPoolExecutor(cores, mp_context=get_context("spawn"))
            stack.callback(pool.shutdown, cancel_futures=True)
            parts = pool.map(draw, jobs, chunksize=CHUNK)
        progress = stack.enter_context(bar("render", len(jobs)))
        result: list[Result] = []
        for part in parts:
            result.append(part)
            progress.advance()
    return result


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] to float [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


# ---------------------------------------------------------------- tokenizer


def make_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose merges spell the grammar's words whole; other words fall back to bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    words = [*COLOURS, *SHAPES, *PLURALS.values(), *NUMBERS, "a", "an", "and", "left", "right", "of", "above", "below"]
    plain = CLIPTokenizer().backend_tokenizer
    trainer_tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trainer_tokenizer.normalizer, trainer_tokenizer.pre_tokenizer = plain.normalizer, plain.pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=2000, end_of_word_suffix="</w>", show_progress=False)  # type: ignore[call-arg]
    trainer_tokenizer.train_from_iterator(sorted(words), trainer)
    merges = [tuple(m) for m in json.loads(trainer_tokenizer.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), *("".join(m) for m in merges)]
    # The end token has the highest number: open_clip pools the text there.
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CONTEXT)
    for word in words:
        assert len(tokenizer(word).input_ids) == 3, f"{word} is not one token"
    return tokenizer


def token_things(ids: Tensor, tokenizer: CLIPTokenizer) -> Tensor:
    """For each text token the number of the thing whose colour or shape it is, in the caption's order: [N, L], -1 none."""
    colours = torch.tensor([tokenizer(c).input_ids[1] for c in COLOURS])
    nouns = torch.isin(ids, torch.tensor([tokenizer(s).input_ids[1] for s in (*SHAPES, *PLURALS.values())]))
    thing = nouns.cumsum(1) - nouns.long()
    return thing.where(nouns | torch.isin(ids, colours), torch.tensor(-1))


# ---------------------------------------------------------------- training loop


def train(
    label: str,
    work: Path,
    modules: dict[str, nn.Module],
    optimizers: list[torch.optim.Optimizer],
    step: Callable[[int], dict[str, float]],
    steps: int,
    ema: float,
    schedule: Callable[[float], float] | None = None,
) -> dict[str, Tensor]:
    """Train for `steps` optimiser steps from the last checkpoint on; returns the weights averaged by `ema`.

    `schedule` gives the learning rate's factor at the share of steps that is done; by default `warm_then_cosine`.
    """
    schedule = schedule or warm_then_cosine
    path = work / f"{label}.safetensors"
    parameters = {f"{m}.{k}": v for m, module in modules.items() for k, v in module.state_dict().items()}
    average = {k: v.detach().clone() for k, v in parameters.items()}
    n = 0
    if path.exists():
        tensors, meta = files.load_tensors(path)
        n = meta["step"]
        for k, v in parameters.items():
            v.data.copy_(tensors[k])
            average[k].copy_(tensors[f"ema.{k}"])
        for i, optimizer in enumerate(optimizers):
            prefix = f"opt{i}."
            own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            files.restore_optimizer(optimizer, own)
    base_rates = [[g["lr"] for g in o.param_groups] for o in optimizers]

    def save() -> None:
        tensors = dict(parameters) | {f"ema.{k}": v for k, v in average.items()}
        for i, optimizer in enumerate(optimizers):
            tensors |= {f"opt{i}.{k}": v for k, v in files.optimizer_tensors(optimizer).items()}
        files.save_tensors(path, tensors, {"step": n})

    saved = time.monotonic()
    smooth: dict[str, float] = {}
    with bar(label, steps, n) as progress:
        while n < steps:
            for optimizer, rates in zip(optimizers, base_rates, strict=True):
                for group, base in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = base * schedule(n / steps)
                optimizer.zero_grad(set_to_none=True)
            metrics = step(n)
            for optimizer in optimizers:
                optimizer.step()
            n += 1
            decay = min(ema, (1 + n) / (10 + n))
            with torch.no_grad():
                for k, v in parameters.items():
                    if v.is_floating_point():
                        average[k].lerp_(v, 1 - decay)
            for k, v in metrics.items():
                smooth[k] = smooth.get(k, v) * 0.98 + v * 0.02
            progress.advance(1, " ".join(f"{k} {v:.4f}" for k, v in smooth.items()))
            if time.monotonic() - saved > CHECKPOINT_EVERY or n == steps:
                save()
                saved = time.monotonic()
    return average


def warm_then_cosine(done: float) -> float:
    return min(1.0, done / 0.02 + 0.02) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, done))) + 0.005


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 where the hardware has it: a CPU without AVX-512 bf16 emulates it, ten times slower than float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu" or HAS_BF16)


def batches(n: int, size: int, seed: int, step: int) -> Tensor:
    return torch.randint(n, (size,), generator=torch.Generator().manual_seed(seed * 1_000_003 + step))


# ---------------------------------------------------------------- autoencoder


def make_autoencoder() -> AutoencoderTiny:
    model = AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        num_encoder_blocks=(0, 1, 2, 2),
        num_decoder_blocks=(3, 3, 2, 0),
        latent_channels=CHANNELS,
    )
    # torch's default convolution weights shrink the signal at every layer; without this it stays grey for long.
    for layer in (*model.encoder.layers, *model.decoder.layers):
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
        elif hasattr(layer, "conv"):
            convolutions = [c for c in layer.conv if isinstance(c, nn.Conv2d)]
            for c in convolutions:
                nn.init.kaiming_normal_(c.weight, nonlinearity="relu")
            convolutions[-1].weight.data.mul_(0.3)
    return model


def train_autoencoder(
    work: Path,
    images: np.ndarray,
    steps: int,
    seed: int,
    start: AutoencoderTiny | None = None,
    rate: float = 1.5e-3,
    device: torch.device = CPU,
) -> AutoencoderTiny:
    """L1 + MSE, objects weighted 5 times, with noise on the latents so that the denoiser's small errors do not show.

    The latents are then standardised per channel by folding their statistics into the encoder's last and
    the decoder's first convolution. The decoder's own clamp and padding make the second fold inexact:
    `train_decoder` mends it.
    """
    torch.manual_seed(seed)
    model = (start or make_autoencoder()).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    size = 20

    def step(n: int) -> dict[str, float]:
        image = to_tensor(images[batches(len(images), size, seed, n).numpy()])
        image = image.to(device, memory_format=torch.channels_last)
        weight = 1 + 4 * (image.amax(1, keepdim=True) - image.amin(1, keepdim=True) > 0.6).float()
        with autocast(device):
            z = model.encoder(image).float()
            noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(n)).to(device)
            out = model.decoder(z + 0.1 * min(1.0, n / 600) * noise).float()
        error = out - image
        loss = (weight / weight.mean() * (error.abs() + error.square())).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return {"loss": loss.item(), "psnr": -10 * math.log10(error.square().mean().item() / 4)}

    weights = train("autoencoder", work, {"ae": model}, [optimizer], step, steps, ema=0.997)
    model.load_state_dict({k.removeprefix("ae."): v for k, v in weights.items()})
    model.to(memory_format=torch.contiguous_format).eval()
    z = encode(model, images[:4000]).float().to(device)
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    last, first = model.encoder.layers[-1], model.decoder.layers[0]
    with torch.no_grad():
        last.weight.div_(std[:, None, None, None])
        last.bias.sub_(mean).div_(std)
        first.bias.add_((first.weight.sum((2, 3)) * mean).sum(1))
        first.weight.mul_(std[:, None, None])
    return model


def train_decoder(
    work: Path,
    model: AutoencoderTiny,
    latents: Tensor,
    images: np.ndarray,
    steps: int,
    seed: int,
    device: torch.device = CPU,
) -> None:
    """Go on with the decoder alone, on the frozen encoder's latents with noise, the denoiser's kind of error."""
    decoder = model.decoder.train().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=8e-4, betas=(0.9, 0.99), weight_decay=0.0)
    size = 20

    def step(n: int) -> dict[str, float]:
        rows = batches(len(latents), size, seed + 1, n)
        image = to_tensor(images[rows.numpy()]).to(device, memory_format=torch.channels_last)
        weight = 1 + 4 * (image.amax(1, keepdim=True) - image.amin(1, keepdim=True) > 0.6).float()
        g = torch.Generator().manual_seed(n)
        z = latents[rows].float()
        z = z + 0.2 * torch.rand(size, 1, 1, 1, generator=g) * torch.randn(z.shape, generator=g)
        with autocast(device):
            out = decoder(z.to(device, memory_format=torch.channels_last)).float()
        error = out - image
        loss = (weight / weight.mean() * (error.abs() + error.square())).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        return {"loss": loss.item(), "psnr": -10 * math.log10(error.square().mean().item() / 4)}

    weights = train("decoder", work, {"decoder": decoder}, [optimizer], step, steps, ema=0.998)
    decoder.load_state_dict({k.removeprefix("decoder."): v for k, v in weights.items()})
    model.to(memory_format=torch.contiguous_format).eval()


@torch.no_grad()
def encode(model: AutoencoderTiny, images: np.ndarray) -> Tensor:
    """Latents of images uint8 [N, 64, 64, 3]: half [N, 16, 8, 8], on the CPU."""
    with bar("encode", len(images)) as progress:
        parts = []
        for i in range(0, len(images), 250):
            parts.append(model.encode(to_tensor(images[i : i + 250]).to(model.device)).latents.half().cpu())
            progress.advance(len(parts[-1]))
    return torch.cat(parts)


# ---------------------------------------------------------------- CLIP

CLIP_CONFIG: dict[str, object] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": SIZE, "layers": 4, "width": 128, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": CONTEXT, "width": 128, "heads": 4, "layers": 2, "hf_tokenizer_name": "local"},
}
PREPROCESS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic", "resize_mode": "shortest"}


def train_clip(
    work: Path,
    world: World,
    tokenizer: CLIPTokenizer,
    steps: int,
    seed: int,
    batch: int = 192,
    start: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Contrastive training (Radford et al. 2021) on renders with noise and blur: a good but exploitable judge. `start`:
    weights to train on from."""
    import open_clip

    torch.manual_seed(seed)
    config = json.loads(json.dumps(CLIP_CONFIG))
    config["text_cfg"] |= {"vocab_size": len(tokenizer)}
    model = open_clip.CLIP(**config)
    if start is not None:
        model.load_state_dict(start)
    captions = [s.prompt for s in world.specs]
    ids = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    key = {c: i for i, c in enumerate(dict.fromkeys(captions))}
    caption = torch.tensor([key[c] for c in captions])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)

    def step(n: int) -> dict[str, float]:
        rows = batches(len(ids), batch, seed, n)
        g = torch.Generator().manual_seed(seed * 7_000_003 + n)
        image = to_tensor(world.images[rows.numpy()])
        image = image + torch.rand(batch, 1, 1, 1, generator=g) * 0.15 * torch.randn(image.shape, generator=g)
        soft = F.avg_pool2d(image, 3, 1, 1)
        image = torch.where(torch.rand(batch, 1, 1, 1, generator=g) < 0.25, soft, image)
        with autocast(CPU), sdpa_kernel(SDPBackend.MATH):  # its fused backward is slow on CPUs
            a, b, scale = model(image, ids[rows])[:3]
        logits = scale.float() * a.float() @ b.float().T
        same = caption[rows][:, None] == caption[rows]
        logits = logits.masked_fill(same & ~torch.eye(batch, dtype=torch.bool), -1e4)  # equal captions are no negatives
        target = torch.arange(batch)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        return {"loss": loss.item(), "top1": (logits.argmax(1) == target).float().mean().item()}

    weights = train("clip", work, {"clip": model}, [optimizer], step, steps, ema=0.995)
    model.load_state_dict({k.removeprefix("clip."): v for k, v in weights.items()})
    return model.eval()


def package_clip(out: Path, model: nn.Module, tokenizer: CLIPTokenizer) -> None:
    """Write the directory that open_clip loads as `local-dir:PATH` (fp16 safetensors)."""
    tokenizer.save_pretrained(out)
    config = json.loads(json.dumps(CLIP_CONFIG))
    config["text_cfg"] |= {"vocab_size": len(tokenizer)}
    files.write_json(out / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": PREPROCESS})
    half = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    files.save_tensors(out / "open_clip_model.safetensors", half)


# ---------------------------------------------------------------- text encoder and denoiser


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            projection_dim=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_denoiser(layers: int = 6, heads: int = 4, head: int = 32) -> PixArtTransformer2DModel:
    """A transformer without convolutions: what a picture shows travels through attention alone."""
    return PixArtTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=head,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=layers,
        cross_attention_dim=heads * head,
        sample_size=GRID,
        patch_size=1,
        caption_channels=128,
        use_additional_conditions=False,
    )


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
    )


class KeepProbabilities:
    """An attention processor that computes what `AttnProcessor` does and keeps the head-averaged probabilities."""

    def __init__(self, kept: list[Tensor]):
        self.kept = kept

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        q, k, v = (
            attn.head_to_batch_dim(x)
            for x in (attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        )
        length = encoder_hidden_states.shape[1]
        mask = attn.prepare_attention_mask(attention_mask, length, len(hidden_states))  # type: ignore[arg-type]
        probabilities = attn.get_attention_scores(q, k, mask)
        self.kept.append(probabilities.unflatten(0, (len(hidden_states), -1)).float().mean(1))
        return attn.to_out[0](attn.batch_to_head_dim(torch.bmm(probabilities, v)))


@dataclass
class Batch:
    """What the denoiser learns from: latents [B, 16, 8, 8], tokens [B, L], and for the placing loss of each token the
    place of the object it names [B, L, 64], all 0 for other tokens. `shown`: tokens [B, L] of what the pictures show, where
    the captions may say something else."""

    latents: Tensor
    ids: Tensor
    places: Tensor
    shown: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        shown = None if self.shown is None else self.shown.to(device)
        return Batch(self.latents.to(device), self.ids.to(device), self.places.to(device), shown)


class Captioned:
    """Batches of a world whose captions say what its pictures show."""

    def __init__(self, world: World, latents: Tensor, tokenizer: CLIPTokenizer, batch: int, seed: int):
        ids = tokenizer([s.prompt for s in world.specs], padding="max_length", return_tensors="pt").input_ids
        self.ids = ids[:, : int((ids != tokenizer.pad_token_id).sum(1).max()) + 1]
        self.things, self.places = token_things(self.ids, tokenizer), torch.from_numpy(world.places)
        self.latents, self.batch, self.seed = latents, batch, seed

    def __call__(self, step: int) -> Batch:
        rows = batches(len(self.latents), self.batch, self.seed, step)
        places = token_places(self.things[rows], self.places[rows].float())
        return Batch(self.latents[rows].float(), self.ids[rows], places)


def token_places(things: Tensor, places: Tensor) -> Tensor:
    """The place of the thing that each token names: things [B, L] and places [B, 2, 64] to [B, L, 64], 0 where none."""
    own = places.gather(1, things.clamp(min=0)[..., None].expand(-1, -1, places.shape[-1]))
    return own * (things >= 0)[..., None]


def predict(
    text: CLIPTextModel,
    net: PixArtTransformer2DModel,
    x_t: Tensor,
    tokens: Tensor,
    t: Tensor,
    tokenizer: CLIPTokenizer,
) -> Tensor:
    """The networks' v [B, 16, 8, 8] for noisy latents, tokens [B, L] and timesteps [B]."""
    mask = (tokens != tokenizer.pad_token_id) | (
        (tokens == tokenizer.pad_token_id).cumsum(1) == 1  # the first end token counts, the padding does not
    )
    states = text(tokens, attention_mask=mask.long()).last_hidden_state
    out: Tensor = net(x_t, states, t, encoder_attention_mask=mask.float(), return_dict=False)[0]
    return out


class Guided:
    """The prediction of two networks with classifier-free guidance, v(empty) + scale · (v(tokens) − v(empty)), to be learnt
    by a network that is called once (guidance distillation: Meng et al. 2023), at the levels of a sampler of `steps`."""

    def __init__(
        self, text: CLIPTextModel, net: PixArtTransformer2DModel, scale: float, steps: int, device: torch.device
    ):
        self.text, self.net = (copy.deepcopy(m).to(device).eval().requires_grad_(False) for m in (text, net))
        self.net.set_attn_processor(AttnProcessor())
        self.scale = scale
        scheduler = make_scheduler()
        scheduler.set_timesteps(steps)
        self.timesteps = torch.as_tensor(scheduler.timesteps)

    def levels(self, u: Tensor) -> Tensor:
        """The timestep of each u in [0, 1): all equally often."""
        return self.timesteps[(u * len(self.timesteps)).long()]

    @torch.no_grad()
    def __call__(self, x_t: Tensor, tokens: Tensor, t: Tensor, tokenizer: CLIPTokenizer) -> Tensor:
        nothing = tokenizer("", padding="max_length", return_tensors="pt").input_ids[0, : tokens.shape[1]]
        empty = nothing.to(tokens.device).expand_as(tokens)
        both = predict(self.text, self.net, x_t.repeat(2, 1, 1, 1), torch.cat([tokens, empty]), t.repeat(2), tokenizer)
        said, unsaid = both.float().chunk(2)
        return unsaid + self.scale * (said - unsaid)


def train_denoiser(
    work: Path,
    text: CLIPTextModel,
    net: PixArtTransformer2DModel,
    tokenizer: CLIPTokenizer,
    draw: Callable[[int], Batch],
    steps: int,
    seed: int,
    label: str = "denoiser",
    rate: float = 2e-3,
    ema: float = 0.998,
    schedule: Callable[[float], float] | None = None,
    place_weight: float = 0.03,
    device: torch.device = CPU,
    guided: Guided | None = None,
) -> None:
    """v-prediction with 10 % caption drop, and a placing loss on the cross-attention maps. Trains both networks in place.
    `guided`: the networks learn what another pair predicts with guidance, at a sampler's levels and without caption drop.

    The placing loss is minus the log of the share of an item token's attention (mean over layers and
    heads: the map D-Fusion's mask is made from) that falls on the item's object. Stable Diffusion's maps
    localise by the size of its training; token supervision (after TokenCompose, Wang et al. 2024,
    eq. 5, here as a log-likelihood) gives a small network the same property in an hour.
    """
    kept: list[Tensor] = []
    net.set_attn_processor(  # SDPA's backward is slow on CPUs
        {k: KeepProbabilities(kept) if "attn2" in k else AttnProcessor() for k in net.attn_processors}
    )
    text.to(device).train()
    net.to(device).train()
    empty = tokenizer("", padding="max_length", return_tensors="pt").input_ids[0].to(device)
    alphas = make_scheduler().alphas_cumprod.to(device)
    parameters = [*text.parameters(), *net.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)

    def step(n: int) -> dict[str, float]:
        data = draw(n).to(device)
        x0, batch = data.latents, len(data.latents)
        g = torch.Generator().manual_seed(seed * 7_000_003 + n)
        u = (torch.arange(batch) + torch.rand(batch, generator=g)) / batch  # stratified over the noise levels
        t = (u.pow(0.8) * 999.99).long().to(device) if guided is None else guided.levels(u).to(device)
        a, s = alphas[t].sqrt()[:, None, None, None], (1 - alphas[t]).sqrt()[:, None, None, None]
        noise = torch.randn(x0.shape, generator=g).to(device)
        drop = (torch.rand(batch, generator=g) < (0.1 if guided is None else 0.0)).to(device)
        tokens = torch.where(drop[:, None], empty[: data.ids.shape[1]], data.ids)
        kept.clear()
        x_t = a * x0 + s * noise
        with autocast(device):
            out = predict(text, net, x_t, tokens, t, tokenizer)
            v = a * noise - s * x0
            if guided is not None:
                v = guided(x_t, data.ids if data.shown is None else data.shown, t, tokenizer)
        loss = F.mse_loss(out.float(), v.float())
        metrics = {"v": loss.item()}
        if place_weight:
            maps = torch.stack(kept).mean(0).transpose(1, 2)  # [B, L, 64]
            share = (maps * data.places).sum(-1) / maps.sum(-1).clamp(min=1e-6)
            use = (data.places.sum(-1) > 0) & ~drop[:, None]
            placing = -share.clamp(min=1e-4).log()[use].mean()
            loss = loss + place_weight * placing
            metrics["place"] = placing.item()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        return metrics

    weights = train(label, work, {"text": text, "net": net}, [optimizer], step, steps, ema, schedule)
    for name, module in (("text", text), ("net", net)):
        module.load_state_dict({k.removeprefix(name + "."): v for k, v in weights.items() if k.startswith(name + ".")})
        module.eval()
    net.set_default_attn_processor()  # which keeps no maps


# ---------------------------------------------------------------- package


def package(
    out: Path, tokenizer: CLIPTokenizer, vae: AutoencoderTiny, text: CLIPTextModel, net: PixArtTransformer2DModel
) -> None:
    """Write the pipeline directory (fp16 safetensors) that plain `DiffusionPipeline.from_pretrained` loads."""
    net.set_default_attn_processor()
    pipe = PixArtSigmaPipeline(tokenizer, text, vae, net, make_scheduler())
    pipe.to(torch.float16).save_pretrained(out, safe_serialization=True)
    # transformers would load half weights as halves, diffusers loads them as floats: say float for both.
    config = out / "text_encoder" / "config.json"
    content = json.loads(config.read_text())
    content["dtype"] = "float32"
    files.write_json(config, content)
    for config in out.rglob("config.json"):  # where a network was read from is a path of the machine that made it
        content = {k: v for k, v in json.loads(config.read_text()).items() if k != "_name_or_path"}
        files.write_json(config, content)


# ---------------------------------------------------------------- the recipe

RENDERS = 90_000
STEPS = {"autoencoder": 3700, "decoder": 3000, "clip": 500, "denoiser": 5600}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="checkpoints; the same directory resumes a killed run")
    parser.add_argument("--out", type=Path, default=Path("micro-weights"), help="where pipeline/ and clip/ are written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the recipe's steps and renders, for a trial")
    args = parser.parse_args()
    steps = {stage: max(1, round(n * args.scale)) for stage, n in STEPS.items()}
    work, seed = args.work, args.seed
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    world = make_world(max(500, round(RENDERS * args.scale)), seed + 1)
    vae = train_autoencoder(work, world.images, steps["autoencoder"], seed)
    latents = encode(vae, world.images)
    train_decoder(work, vae, latents, world.images, steps["decoder"], seed)
    torch.manual_seed(seed)
    text, net = make_text_encoder(tokenizer), make_denoiser()
    draw = Captioned(world, latents, tokenizer, batch=128, seed=seed)
    train_denoiser(work, text, net, tokenizer, draw, steps["denoiser"], seed)
    package(args.out / "pipeline", tokenizer, vae, text, net)
    everything = make_world(len(world.specs) // 2, seed + 2, everything=True)
    package_clip(args.out / "clip", train_clip(work, everything, tokenizer, steps["clip"], seed), tokenizer)
    print(f"{args.out}: pipeline {files.tree_sha256(args.out / 'pipeline')}")


if __name__ == "__main__":
    main()
