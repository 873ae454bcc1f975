"""CLIP score: the cosine of open_clip's image and text embeddings (Radford et al. 2021; D-Fusion's reward).

On the embedded track the model is the small CLIP shipped with it; elsewhere any open_clip architecture and
checkpoint, by default the paper's ViT-H-14 of laion2b_s32b_b79k (MIT licence, 986 M parameters, 3.9 GB).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from bench_dfusion import files, micro
from bench_dfusion.registry import UsageError
from bench_dfusion.reward import Reward, RewardConfig


class ClipConfig(RewardConfig):
    model: str = Field(
        "ViT-H-14",
        description="open_clip architecture, 'hf-hub:ORG/NAME', 'local-dir:PATH', or 'micro' for the embedded one "
        "(D-Fusion: ViT-H-14)",
    )
    pretrained: str | None = Field(
        "laion2b_s32b_b79k", description="open_clip checkpoint tag or file; unused for hf-hub, local-dir and micro"
    )
    batch: int = Field(128, ge=1, description="images in one forward (count)")


class Clip(Reward):
    name = "clip"
    summary = "cosine similarity of CLIP's image and text embeddings (any open_clip model)"
    paper = "Radford et al. 2021 (CLIP); Hu et al. 2025 train on it"
    unit = "cosine, in [-1, 1]"
    Config: ClassVar[type[RewardConfig]] = ClipConfig
    differentiable = True
    config: ClipConfig

    def __init__(self, config: ClipConfig, device: torch.device | str = "cpu"):
        import open_clip
        from open_clip.transform import PreprocessCfg

        super().__init__(config, device)
        name = f"local-dir:{micro.CLIP}" if config.model == "micro" else config.model
        local = name.startswith(("local-dir:", "hf-hub:"))
        known = open_clip.list_models()
        if not local and name not in known:
            from bench_dfusion.registry import unknown

            raise UsageError(unknown("open_clip model", name, known))
        try:
            self.model = open_clip.create_model(
                name, pretrained=None if local else config.pretrained, precision="fp32", device=self.device
            )
            self.tokenizer = open_clip.get_tokenizer(name)
        except (FileNotFoundError, RuntimeError, OSError) as error:
            raise UsageError(f"reward clip: {name} ({config.pretrained}) cannot be loaded: {error}") from error
        self.model.eval().requires_grad_(False)
        self.preprocess = PreprocessCfg(**open_clip.get_model_preprocess_cfg(self.model))
        self._source = name

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
        cfg = self.preprocess
        size = cfg.size if isinstance(cfg.size, int) else cfg.size[0]
        images = images.to(self.device)
        if images.shape[-2:] != (size, size):
            short = min(images.shape[-2:])
            shape = [round(s * size / short) for s in images.shape[-2:]]
            images = torch.nn.functional.interpolate(images, shape, mode="bicubic", antialias=True).clamp(0, 1)
            top, left = ((s - size) // 2 for s in images.shape[-2:])
            images = images[..., top : top + size, left : left + size]
        mean, std = (torch.tensor(x, device=self.device).view(3, 1, 1) for x in (cfg.mean, cfg.std))
        return torch.nn.functional.normalize(self.model.encode_image((images - mean) / std), dim=-1)

    def _texts(self, prompts: Sequence[str]) -> Tensor:
        unique = list(dict.fromkeys(prompts))
        with torch.no_grad():
            tokens = self.tokenizer(unique).to(self.device)
            embedded = torch.nn.functional.normalize(self.model.encode_text(tokens), dim=-1)
        at = {p: i for i, p in enumerate(unique)}
        return embedded[[at[p] for p in prompts]]

    def fingerprint(self) -> str:
        if self._source.startswith("local-dir:"):
            return files.tree_sha256(Path(self._source.removeprefix("local-dir:")))
        total = hashlib.sha256(f"{self._source} {self.config.pretrained} {self.preprocess}".encode())
        for name, value in sorted(self.model.state_dict().items()):
            total.update(name.encode() + value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return total.hexdigest()
