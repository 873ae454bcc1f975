"""PickScore: a CLIP ViT-H-14 fine-tuned on the choices of Pick-a-Pic's users (Kirstain et al. 2023).

Weights: the Hub repository yuvalkirstain/PickScore_v1, branch main (MIT, 986 M parameters, 3.9 GB); tokenizer and
preprocessing: laion/CLIP-ViT-H-14-laion2B-s32B-b79K (MIT). The score is the logit scale (about 100) times the cosine,
as on the model's card: mostly 17 to 24.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from bench_dfusion.reward_models.clip import open_clip_bytes
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from bench_dfusion.rewards import weights
from bench_dfusion.rewards.contract import Reward, RewardConfig
from bench_dfusion.rewards.preprocessing import prepare
from bench_dfusion.util import hub


class PickScoreConfig(RewardConfig):
    model: str = Field("yuvalkirstain/PickScore_v1", description="CLIP weights: a directory or a Hub id")
    revision: str | None = Field(None, description="Hub revision (commit or tag) of them; None: the default branch")
    processor: str = Field(
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", description="tokenizer and preprocessing: a directory or a Hub id"
    )
    batch: int = Field(32, ge=1, description="images in one forward (count)")


class PickScore(Reward):
    name = "pickscore"
    summary = "PickScore: what users of a picture generator pick, given the prompt (MIT, 986 M parameters)"
    paper = "Kirstain et al. 2023 (Pick-a-Pic)"
    unit = "logit scale × cosine, mostly 17 to 24"
    Config: ClassVar[type[RewardConfig]] = PickScoreConfig
    by_batch = True
    differentiable = True
    config: PickScoreConfig

    def __init__(self, config: PickScoreConfig, device: torch.device | str = "cpu"):
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        super().__init__(config, device)
        try:
            images = CLIPImageProcessor.from_pretrained(hub.look(config.processor))
            self.tokenizer = AutoTokenizer.from_pretrained(config.processor)
        except Exception as error:  # of transformers, the Hub's client, tokenizers: many kinds
            raise weights.missing(self.name, f"tokenizer of {config.processor}", "processor", error) from None
        try:
            model = CLIPModel.from_pretrained(hub.look(config.model), revision=config.revision, dtype=torch.float32)
        except Exception as error:
            raise weights.missing(self.name, config.model, "model", error) from None
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.preprocess = (images.crop_size["height"], tuple(images.image_mean), tuple(images.image_std))

    @classmethod
    def weights_bytes(cls, config: RewardConfig) -> int | None:
        own = config.model == cls.Config.model_fields["model"].default  # type: ignore[attr-defined]
        return open_clip_bytes(cls.name, "ViT-H-14") if own else None

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        size, parts = self.config.batch, []
        with torch.no_grad():
            for i in range(0, len(images), size):
                part = images[i : i + size].permute(0, 3, 1, 2).float().div(255)
                parts.append(self.score_tensors(part, prompts[i : i + size]).cpu())
        return torch.cat(parts)

    def score_tensors(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.model.logit_scale.exp() * (self.embed(images) * self._texts(prompts)).sum(-1)

    def embed(self, images: Tensor) -> Tensor:
        """Normalised image embeddings [B, D] of images [B, 3, H, W] in [0, 1]."""
        size, mean, std = self.preprocess
        pixels = prepare(images.to(self.device), size, mean, std, fit="shortest-floor")
        return functional.normalize(self.model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)

    def _texts(self, prompts: Sequence[str]) -> Tensor:
        unique = list(dict.fromkeys(prompts))
        tokens = self.tokenizer(unique, padding=True, truncation=True, max_length=77, return_tensors="pt")
        with torch.no_grad():
            features = self.model.get_text_features(**tokens.to(self.device)).pooler_output
        at = {p: i for i, p in enumerate(unique)}
        return functional.normalize(features, dim=-1)[[at[p] for p in prompts]]

    def fingerprint(self) -> str:
        if not hasattr(self, "_hash"):
            rules = f"pickscore {self.preprocess} {sorted(self.tokenizer.get_vocab().items())}"
            self._hash = weights.fingerprint(rules, self.model)
        return self._hash
