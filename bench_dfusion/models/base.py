"""What the Policy asks of a family of diffusers pipelines."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from bench_dfusion.errors import UsageError
from bench_dfusion.models import schedulers, schedules, sharding
from bench_dfusion.models.options import MemorySection
from bench_dfusion.models.schedules import Levels, Schedule
from bench_dfusion.util import parallel

Conditioning = dict[str, Tensor]  # whatever the network is conditioned on, batch first
CPS_NOISE = 0.8  # FlowCPS's eta
NETWORK_FIX = "float16 overflows, set track.model.dtype=bfloat16 or float32"
VAE_FIX = "float16 overflows, set force_upcast in the vae's config.json to true, or track.model.dtype=float32"


class NotFinite(FloatingPointError):
    """A network returned values that are not finite; the message names it, its dtype and what to set."""


def finite(values: Tensor, network: nn.Module, what: str, dtype: torch.dtype, fix: str) -> Tensor:
    """`values`, which `network` computed in `dtype`; `fix` is for float16. Raises NotFinite; tensors without data pass."""
    if values.is_meta or bool(values.isfinite().all()):
        return values
    cure = fix if dtype == torch.float16 else "damaged weights, or training diverged: lower algo.learning_rate"
    raise NotFinite(f"{what} not finite ({type(network).__name__}, {str(dtype).removeprefix('torch.')}): {cure}")


class TextPart(NamedTuple):
    """A stretch of the text tokens that a network attends to: what made them, how many (padding included), where."""

    tokenizer: Any
    length: int
    start: int


class TextReader(NamedTuple):
    """A text encoder of a pipeline: the part's name and class, its tokenizer, and the tokens it is given at most."""

    name: str
    kind: str
    tokenizer: Any
    length: int


class Adapter(ABC):
    """A diffusers pipeline seen by the Policy. One subclass for a family of networks.

    Subclasses say which pipeline classes they serve, which module denoises, and how it is called.
    Registered under the entry point group `bench_dfusion.models`.
    """

    pipelines: ClassVar[tuple[str, ...]]  # names of the diffusers classes served
    network_name: ClassVar[str]  # the pipeline's attribute: "unet", "transformer"
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    sha256 = "none"  # of the files that it was loaded from
    distilled = False  # whether the network is told the guidance scale and needs no unconditional branch

    def __init__(self, pipe: Any):
        self.pipe = pipe
        self.network: nn.Module = getattr(pipe, self.network_name)
        self.scheduler = pipe.scheduler
        self.tokenizer = pipe.tokenizer
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        # Of the frozen weights: the LoRA's are float32, and the pipeline's own `dtype` takes the first it finds.
        self.dtype = next((p.dtype for p in self.network.parameters()), torch.float32)
        self.offload_text = self.offload_vae = self.text_dropped = self.offload_network = self.shard = False
        self.trained_whole = False  # whether a policy has trained the network's own weights
        self.encoded: dict[
            tuple[Any, ...], Conditioning
        ] = {}  # every policy's prompts, by what they were encoded under
        self._latent_side: int | None = None
        self._token_limit = token_limit(self.tokenizer, getattr(pipe, "text_encoder", None))
        vae = getattr(pipe, "vae", None)
        if vae is not None and getattr(vae.config, "force_upcast", False):
            vae.float()  # it overflows in float16, so the checkpoint says

    # the checkpoint

    @classmethod
    def left_out(cls, parts: Collection[str]) -> tuple[str, ...]:
        """The parts that the pipeline works without, of a checkpoint that has `parts`."""
        return ()

    @classmethod
    def made_with(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Options that the network's class is made with in the place of those of its config.

        Raises UsageError where it cannot be made of this config.
        """
        side = square(config.get("sample_size"))
        return {} if side is None or side == config["sample_size"] else {"sample_size": side}

    # the process

    @staticmethod
    def read_scheduler(scheduler: Any) -> Any:
        """The scheduler of a checkpoint in the class that the steps are read from. Raises UsageError."""
        return schedulers.ddim_like(scheduler)

    noise: ClassVar[float] = 1.0  # eta where none is given: DDIM's

    def schedule(self, steps: int, eta: float | None, kind: str = "native") -> Schedule:
        """The sampler's steps (see `track.SamplerSection`); `eta` None is the kind's default. Raises ValueError."""
        return schedules.ddim_schedule(self.scheduler, steps, self.eta(eta, kind), kind)

    def eta(self, eta: float | None, kind: str) -> float:
        """What is given, or else the default of a kind of sampler."""
        own = CPS_NOISE if kind == "cps" else self.noise
        return own if eta is None else eta

    def levels(self) -> Levels:
        """The noise levels of training, the cleanest first."""
        return schedules.ddpm_levels(self.scheduler)

    # latents and text

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of one latent, at the model's own resolution unless `set_resolution` gave another."""
        side = self._latent_side or self.own_latent_side
        return (self.latent_channels, side, side)

    @property
    def latent_channels(self) -> int:
        return int(cast(Any, self.network.config).in_channels)

    @property
    def own_latent_side(self) -> int:
        """The latent's side at the model's own resolution. Raises UsageError where its config has none."""
        size = cast(Any, self.network.config).sample_size
        side = square(size)
        if side is None:
            raise UsageError(
                f"{self.network_name}/config.json of this model has the sample_size {json.dumps(size)}, no side of a square: give "
                "track.model.resolution, the side of the pictures in pixels (--set track.model.resolution=512)"
            )
        return side

    @property
    def patch(self) -> int:
        """The side of the latent's patches that the network works on."""
        return int(getattr(self.network.config, "patch_size", 1))

    def set_resolution(self, pixels: int) -> None:
        """Pictures of another side. Raises ValueError where latents and patches do not divide it."""
        least = self.pipe.vae_scale_factor * self.patch
        if pixels % least:
            raise ValueError(f"resolution {pixels} is no multiple of {least}, a patch of this model in pixels")
        self._latent_side = pixels // self.pipe.vae_scale_factor

    @contextmanager
    def at_resolution(self, pixels: int | None) -> Iterator[None]:
        """Inside, pictures of this side; None: of the one they have. Raises ValueError as `set_resolution`."""
        own = self._latent_side
        try:
            if pixels is not None:
                self.set_resolution(pixels)
            yield
        finally:
            self._latent_side = own

    def set_tile(self, pixels: int) -> None:
        """Larger pictures are decoded and encoded in overlapping tiles of this side. Raises ValueError where the
        autoencoder has no tiles, or none of that side."""
        vae: Any = getattr(self.pipe, "vae", None)
        if not hasattr(vae, "tile_latent_min_size"):
            raise ValueError(f"{type(vae).__name__} has no tiles: leave model.vae_tile out")
        least = round(self.pipe.vae_scale_factor / vae.tile_overlap_factor)
        if pixels % least:
            raise ValueError(
                f"model.vae_tile {pixels} is no multiple of {least}, so that tiles overlap by whole latents"
            )
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = pixels, pixels // self.pipe.vae_scale_factor

    @property
    def text_length(self) -> int:
        """Tokens of a prompt that the network sees, special ones included."""
        if self._token_limit is None:
            raise UsageError(
                "this model's tokenizer has no model_max_length and its text encoder no max_position_embeddings: write the "
                "tokens of a prompt into tokenizer/tokenizer_config.json"
            )
        return self._token_limit

    def text_parts(self) -> tuple[TextPart, ...]:
        """The stretches of text tokens that attention sees, in order: those columns of the attention maps."""
        return (TextPart(self.tokenizer, self.text_length, 0),)

    def text_readers(self) -> tuple[TextReader, ...]:
        """The text encoders that read a prompt, in the pipeline's order; also those whose tokens no attention sees."""
        lengths = {id(part.tokenizer): part.length for part in self.text_parts()}
        found = []
        for number in ("", "_2", "_3"):
            tokenizer, name = getattr(self.pipe, f"tokenizer{number}", None), f"text_encoder{number}"
            encoder = getattr(self.pipe, name, None)
            if tokenizer is not None and encoder is not None:
                length = lengths.get(id(tokenizer)) or cast(Any, Adapter.text_length).fget(self)  # a CLIP's
                found.append(TextReader(name, type(encoder).__name__, tokenizer, length))
        return tuple(found)

    def text(self, prompt: str) -> str:
        """The prompt as the tokenizer receives it."""
        return prompt

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Text embeddings [B, L, D] and what else the network wants beside them, without gradients."""

    @abstractmethod
    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's raw output for `latents` [B, C, H, W] at training timesteps [B]."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], float32; gradients flow where they are enabled. Raises NotFinite where they are
        not."""
        scale, shift = self._latent_scale(latents)
        with self.with_vae(latents.device) as vae:
            scaled = (latents.float() / scale + shift).to(vae.dtype)
            images = vae.decode(scaled, return_dict=False)[0].float()
            if not torch.is_grad_enabled():  # clamped, infinity would be white
                finite(images, vae, "the decoder's pictures are", vae.dtype, VAE_FIX)
            return (images / 2 + 0.5).clamp(0, 1)

    def _latent_scale(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """(scale, shift) of what the network sees: scale · (the autoencoder's latent − shift)."""
        config = self.pipe.vae.config
        scale, shift = config.scaling_factor, getattr(config, "shift_factor", None) or 0.0
        mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
        if mean is None or std is None:
            return scale, shift
        mean, std = (like.new_tensor(v, dtype=torch.float32).view(1, -1, 1, 1) for v in (mean, std))
        return scale / std, mean

    @property
    def image_side(self) -> int:
        """Pixels of a picture's side."""
        return int(self.latent_shape[-1] * self.pipe.vae_scale_factor)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Latents [B, C, H, W] of pictures [B, 3, H, W] in [0, 1]: the posterior's mean where the autoencoder has one.
        Raises NotFinite."""
        with self.with_vae(images.device) as vae:
            encoded = vae.encode((images * 2 - 1).to(vae.dtype))
            latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
            finite(latents, vae, "the encoder's latents are", vae.dtype, VAE_FIX)
        scale, shift = self._latent_scale(latents)
        return (latents.float() - shift) * scale

    # memory

    def save_memory(self, options: MemorySection) -> None:
        """Less memory for more time; numbers change by rounding at most. Raises ValueError where there is no such thing."""
        network, vae = cast(Any, self.network), getattr(self.pipe, "vae", None)
        if options.gradient_checkpointing:
            if not getattr(network, "_supports_gradient_checkpointing", False):
                raise ValueError(f"{type(network).__name__} has no gradient checkpointing: leave it off")
            network.enable_gradient_checkpointing()
            if getattr(vae, "_supports_gradient_checkpointing", False):
                cast(Any, vae).enable_gradient_checkpointing()
        if options.vae_slicing:
            if not hasattr(vae, "enable_slicing"):
                raise ValueError(f"{type(vae).__name__} has no slicing: leave memory.vae_slicing off")
            cast(Any, vae).enable_slicing()
        self.offload_text, self.offload_vae = options.offload_text, options.offload_vae
        self.offload_network, self.shard = options.offload_network, options.shard and parallel.size() > 1
        if self.spreads:
            sharding.blocks(network)

    @property
    def spreads(self) -> bool:
        """Whether the network's frozen weights are sharded or offloaded."""
        return self.offload_network or self.shard

    def to(self, device: torch.device | str) -> None:
        """Move every part to `device`, but those that are offloaded to the CPU, or are to be sharded from there."""
        for name, part in self.pipe.components.items():
            if isinstance(part, nn.Module):
                resting = (self.offload_text and _is_text(name)) or (self.offload_vae and name == "vae")
                resting |= self.spreads and name == self.network_name
                part.to("cpu" if resting else device)

    def place(self, trained: Iterable[nn.Parameter], device: torch.device) -> None:
        """Move the network and its LoRA, the parameters `trained`, to where they work."""
        if self.spreads:
            sharding.spread(self.network, trained, device, self.shard, self.offload_network)
        else:
            self.network.to(device)

    @contextmanager
    def encoding(self, device: torch.device) -> Iterator[None]:
        """Inside, the text encoders are on `device`, also where they are offloaded. Raises ValueError where dropped."""
        if self.text_dropped:
            raise ValueError("a new prompt, and the text encoders are dropped: leave memory.drop_text off")
        parts = self.pipe.components.items() if self.offload_text else ()
        encoders = [part for name, part in parts if _is_text(name) and isinstance(part, nn.Module)]
        try:
            for encoder in encoders:
                encoder.to(device)
            yield
        finally:
            for encoder in encoders:
                encoder.to("cpu")

    def drop_text(self) -> None:
        """Free the text encoders: no new prompt can be encoded."""
        self.text_dropped = True
        for name in [name for name in self.pipe.components if _is_text(name)]:
            setattr(self.pipe, name, None)

    @contextmanager
    def with_vae(self, device: torch.device) -> Iterator[Any]:
        """Inside, the autoencoder is on `device`, also where it is offloaded.

        Where gradients flow through it, it stays there: the backward pass needs its weights.
        """
        vae = self.pipe.vae
        if self.offload_vae:
            vae.to(device)
        try:
            yield vae
        finally:
            if self.offload_vae and not torch.is_grad_enabled():
                vae.to("cpu")

    def tune_for_cuda(self) -> None:
        """What a GPU needs to be right, or fast: nothing, but for some families."""

    def tune_for_cpu(self) -> None:
        """What makes a CPU fast and changes results by rounding only.

        On the embedded model's 64 positions explicit attention matrices halve the time of a training step, since the
        backward of scaled_dot_product_attention is slow there; from 256 positions on it is the faster one, up to twice
        for a layer of 1024 (benchmarks/peer.py's networks). Channels last make decoding 1.6 times faster.
        """
        from diffusers.models.attention_processor import AttnProcessor

        if math.prod(self.latent_shape[1:]) <= 64:
            cast(Any, self.network).set_attn_processor(AttnProcessor())
        cast(Any, self.pipe.vae).to(memory_format=torch.channels_last)

    # attention, for D-Fusion

    def attentions(self, kind: str) -> dict[str, nn.Module]:
        """The attention modules of a kind, "self" or "cross", by name in the network's order."""
        suffix = {"self": ".attn1", "cross": ".attn2"}[kind]
        return {name: module for name, module in self.network.named_modules() if name.endswith(suffix)}

    def attention_map(
        self, attn: Any, picture: Tensor, text: Tensor | None, mask: Tensor | None = None, rotary: Any = None
    ) -> Tensor:
        """How a layer of kind "cross" attends from the picture to the text: [B, positions, tokens], float32.

        The probabilities of diffusers' `Attention` averaged over heads, for `picture` [B, positions, D] as queries and
        `text` [B, tokens, D'] as keys; `mask` is added to the scores as the layer's own processor would.
        """
        assert text is not None
        if attn.norm_cross:
            text = attn.norm_encoder_hidden_states(text)
        query = attn.to_q(picture).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        key = attn.to_k(text).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        scores = (query.float() @ key.float().transpose(-1, -2)) * attn.scale
        if mask is not None:
            scores = scores + mask.float().view(len(picture), 1, 1, -1)
        return scores.softmax(-1).mean(1)

    def text_rows(self, rows: int) -> int:
        """How many of a fused layer's `rows` of keys are the text's, which come first and are never fused."""
        return 0

    @abstractmethod
    def map_sides(self) -> tuple[int, ...]:
        """The sides of the square maps that the cross-attention layers work at."""

    def map_side(self) -> int:
        """The side of the maps that D-Fusion's mask is made from by default: what there is nearest to 16 of SD's 64."""
        side = self.latent_shape[-1]
        return min(self.map_sides(), key=lambda s: abs(s - (side if side <= 16 else side / 4)))

    @abstractmethod
    def fused_layers(self) -> tuple[str, ...]:
        """The self-attention modules that D-Fusion fuses by default, in the network's order."""

    @abstractmethod
    def save_lora(self, folder: Path, layers: Mapping[str, Tensor], scale: Mapping[str, Any]) -> None:
        """Write `pytorch_lora_weights.safetensors` in the format of diffusers, with `lora.scale` where it is not empty."""

    def lora_layers(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The layers of such a file, and the alphas it gives by module: both with peft's names after the part's,
        as in `unet.<module>.lora_A.weight`."""
        return dict(tensors), {}


def square(size: Any) -> int | None:
    """The side that a config's sample_size gives, a number or two equal ones; None for anything else."""
    if isinstance(size, list | tuple) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    return size if isinstance(size, int) and not isinstance(size, bool) and size > 0 else None


def token_limit(tokenizer: Any, encoder: Any) -> int | None:
    """The longest text in tokens that both take: a tokenizer's file may lack its own (it is then 10^30); None where
    neither says."""
    config = getattr(encoder, "config", None)
    known = (getattr(tokenizer, "model_max_length", None), getattr(config, "max_position_embeddings", None))
    return min((n for n in known if isinstance(n, int) and 0 < n < 10**6), default=None)


def token_ids(tokenizer: Any, prompts: Sequence[str], length: int, encoder: Any) -> Tensor:
    """Token numbers [B, length] of prompts, padded and cut, on the text encoder's device."""
    tokens = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    ids: Tensor = tokens.input_ids.to(encoder.device)
    return ids


def _is_text(name: str) -> bool:
    """Whether a part of a pipeline is a text encoder."""
    return name.startswith("text_encoder")


def guided(adapter: Adapter, latents: Tensor, timestep: Tensor, conditioning: Conditioning, scale: float) -> Tensor:
    """The guided output u + w (c - u) (Ho & Salimans 2022) in float32; one branch where w is 1.

    With guidance, `conditioning` holds the unconditional half first: its batch is twice the latents'.
    """
    latents = latents.to(adapter.dtype)
    if scale == 1:
        return adapter.predict(latents, timestep, conditioning).float()
    both = adapter.predict(torch.cat([latents] * 2), torch.cat([timestep] * 2), conditioning)
    unconditional, conditional = both.float().chunk(2)
    return unconditional + scale * (conditional - unconditional)
