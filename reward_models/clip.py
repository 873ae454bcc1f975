"""CLIP score: the cosine of open_clip's image and text embeddings (Radford et al. 2021; D-Fusion's reward).

On the embedded track the model is the small CLIP shipped with it; elsewhere any open_clip architecture and
checkpoint, by default the paper's ViT-H-14 of laion2b_s32b_b79k (MIT licence, 986 M parameters, 3.9 GB).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from bench_dfusion import micro
from bench_dfusion.errors import UsageError, unknown
from bench_dfusion.rewards import weights
from bench_dfusion.rewards.contract import Reward, RewardConfig
from bench_dfusion.rewards.preprocessing import prepare
from bench_dfusion.util import files, hub


def open_clip_model(
    reward: str, name: str, pretrained: str | None, device: torch.device, empty: bool = False
) -> tuple[Any, Any]:
    """An open_clip model in float32, frozen, and its `PreprocessCfg`; `empty`: with fresh weights. Raises UsageError."""
    import open_clip
    from open_clip.transform import PreprocessCfg

    known = open_clip.list_models()
    if not name.startswith(("local-dir:", "hf-hub:")) and name not in known:
        raise UsageError(unknown("open_clip model", name, known))
    before = logging.root.manager.disable
    if not empty and not name.startswith("local-dir:"):
        hub.look(pretrained or name)
    try:
        logging.disable(logging.WARNING if empty else before)  # it would warn of the fresh weights
        model = open_clip.create_model(
            name, pretrained=pretrained, load_weights=not empty, precision="fp32", device=device
        )
    except (FileNotFoundError, RuntimeError, OSError) as error:
        option = "model as local-dir:PATH" if name.startswith("hf-hub:") else "pretrained"
        raise weights.missing(reward, f"{name} ({pretrained}) of open_clip", option, error) from error
    finally:
        logging.disable(before)
    model.eval().requires_grad_(False)
    return model, PreprocessCfg(**open_clip.get_model_preprocess_cfg(model))


def open_clip_bytes(reward: str, name: str, visual: bool = False) -> int:
    """The bytes of an architecture's weights in float32, of its image tower alone if `visual`; nothing is loaded."""
    with torch.device("meta"):
        model, _ = open_clip_model(reward, name, None, torch.device("meta"), empty=True)
    part = model.visual if visual else model
    return sum(t.nbytes for t in [*part.parameters(), *part.buffers()])


def image_size(preprocess: Any) -> int:
    """The side of the square that a `PreprocessCfg` asks for (px)."""
    size = preprocess.size
    return size if isinstance(size, int) else size[0]


def _source(model: str) -> str:
    """What open_clip calls a model. Raises UsageError where an embedded one is not there."""
    if model not in micro.CLIPS:
        return model
    if not micro.CLIPS[model].is_dir():
        raise UsageError(f"the embedded CLIP is not at {micro.CLIPS[model]}: run python -m {micro.RECIPES[model]}")
    return f"local-dir:{micro.CLIPS[model]}"


class ClipConfig(RewardConfig):
    model: str = Field(
        "ViT-H-14",
        description="open_clip architecture, 'hf-hub:ORG/NAME', 'local-dir:PATH', or 'micro' and 'micro-v2' for the "
        "embedded ones (D-Fusion: ViT-H-14)",
    )
    pretrained: str | None = Field(
        "laion2b_s32b_b79k",
        description="open_clip checkpoint tag or file; unused for hf-hub, local-dir and the embedded",
    )
    batch: int = Field(128, ge=1, description="images in one forward (count)")


class Clip(Reward):
    name = "clip"
    summary = "cosine similarity of CLIP's image and text embeddings (any open_clip model)"
    paper = "Radford et al. 2021 (CLIP); Hu et al. 2025 train on it"
    unit = "cosine, in [-1, 1]"
    limits = (-1.0, 1.0)
    Config: ClassVar[type[RewardConfig]] = ClipConfig
    differentiable = True
    config: ClipConfig

    def __init__(self, config: ClipConfig, device: torch.device | str = "cpu"):
        import open_clip

        super().__init__(config, device)
        self._source = _source(config.model)
        local = self._source.startswith(("local-dir:", "hf-hub:"))
        self.model, self.preprocess = open_clip_model(
            self.name, self._source, None if local else config.pretrained, self.device
        )
        self.tokenizer = open_clip.get_tokenizer(self._source)

    @classmethod
    def weights_bytes(cls, config: RewardConfig) -> int | None:
        name: str = config.model  # type: ignore[attr-defined]
        if name.startswith("hf-hub:"):
            return None
        return open_clip_bytes(cls.name, _source(name))

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        text = self._texts(prompts)
        parts = []
        with torch.no_grad():
            for i in range(0, len(images), self.config.batch):
                part = images[i : i + self.config.batch].permute(0, 3, 1, 2).float().div(255)
                parts.append((self.embed(part) * text[i : i + self.config.batch]).sum(-1).cpu())
        return torch.cat(parts)

    def score_tensors(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The same score with gradients: images [B, 3, H, W] in [0, 1] to [B] on the reward's device."""
        return (self.embed(images) * self._texts(prompts)).sum(-1)

    def embed(self, images: Tensor) -> Tensor:
        """Normalised image embeddings [B, D] of images [B, 3, H, W] in [0, 1]."""
        return functional.normalize(self.model.encode_image(self._prepare(images.to(self.device))), dim=-1)

    def _prepare(self, images: Tensor) -> Tensor:
        cfg = self.preprocess
        return prepare(images, image_size(cfg), cfg.mean, cfg.std)

    def _texts(self, prompts: Sequence[str]) -> Tensor:
        unique = list(dict.fromkeys(prompts))
        with torch.no_grad():
            tokens = self.tokenizer(unique).to(self.device)
            embedded = functional.normalize(self.model.encode_text(tokens), dim=-1)
        at = {p: i for i, p in enumerate(unique)}
        return embedded[[at[p] for p in prompts]]

    def fingerprint(self) -> str:
        if self._source.startswith("local-dir:"):
            return files.tree_sha256(Path(self._source.removeprefix("local-dir:")))
        return weights.fingerprint(f"{self._source} {self.config.pretrained} {self.preprocess}", self.model)
