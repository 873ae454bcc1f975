"""LAION's improved aesthetic predictor V2: how much people like a picture, whatever the prompt (Schuhmann 2022).

An MLP (768-1024-128-64-16-1, no activations) on the normalised image embedding of OpenAI's CLIP ViT-L/14. Weights:
`sac+logos+ava1-l14-linearMSE.pth` of the GitHub repository christophschuhmann/improved-aesthetic-predictor
(Apache-2.0, 0.9 M parameters, 3.7 MB), by default from its copy on the Hub; CLIP's by open_clip (MIT, 428 M parameters,
1.7 GB in memory). Scores are ratings from 1 to 10, of what diffusion models draw mostly 4 to 7; they are not clipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from bench_dfusion.reward_models.clip import image_size, open_clip_bytes, open_clip_model
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from bench_dfusion.errors import UsageError
from bench_dfusion.rewards import weights
from bench_dfusion.rewards.contract import Reward, RewardConfig
from bench_dfusion.rewards.preprocessing import prepare

WIDTHS = (768, 1024, 128, 64, 16, 1)
PLACES = (0, 2, 4, 6, 7)  # upstream's numbers of the layers in `layers`: dropout stands between


class AestheticConfig(RewardConfig):
    weights: str = Field(
        "camenduru/improved-aesthetic-predictor/sac+logos+ava1-l14-linearMSE.pth",
        description="the MLP's: a file, or ORG/NAME/FILE on the Hub",
    )
    revision: str | None = Field(None, description="Hub revision (commit or tag) of them; None: the default branch")
    model: str = Field("ViT-L-14-quickgelu", description="open_clip architecture of the encoder (upstream: ViT-L/14)")
    pretrained: str = Field("openai", description="the encoder's weights: open_clip checkpoint tag or file")
    batch: int = Field(64, ge=1, description="images in one forward (count)")


class Aesthetic(Reward):
    name = "aesthetic"
    summary = "LAION's aesthetic predictor V2: liked pictures, whatever the prompt (Apache-2.0, 428 M parameters)"
    paper = "Schuhmann 2022 (improved-aesthetic-predictor); Black et al. 2023 (DDPO) train on it"
    unit = "rating, 1 to 10"
    Config: ClassVar[type[RewardConfig]] = AestheticConfig
    by_batch = True
    differentiable = True
    config: AestheticConfig

    def __init__(self, config: AestheticConfig, device: torch.device | str = "cpu"):
        super().__init__(config, device)
        path = weights.fetch(self.name, config.weights, config.revision, "weights")
        self.head = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(WIDTHS)))
        state = weights.read(self.name, path)
        names = {f"layers.{place}": str(i) for i, place in enumerate(PLACES)}
        renamed = {f"{names.get(k.rpartition('.')[0], '?')}.{k.rpartition('.')[2]}": v for k, v in state.items()}
        weights.fill(self.name, self.head, renamed, path)
        self.head.eval().requires_grad_(False).to(self.device)
        model, self.preprocess = open_clip_model(self.name, config.model, config.pretrained, self.device)
        self.encoder = model.visual  # the text tower scores nothing
        width = getattr(self.encoder, "output_dim", WIDTHS[0])
        if width != WIDTHS[0]:
            raise UsageError(
                f"reward aesthetic: {config.model} embeds in {width} dimensions, the MLP takes {WIDTHS[0]}"
            )

    @classmethod
    def weights_bytes(cls, config: RewardConfig) -> int | None:
        name: str = config.model  # type: ignore[attr-defined]
        head = 4 * sum(a * b + b for a, b in pairwise(WIDTHS))
        return None if name.startswith("hf-hub:") else head + open_clip_bytes(cls.name, name, visual=True)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        parts = []
        with torch.no_grad():
            for part in images.split(self.config.batch):
                parts.append(self.score_tensors(part.permute(0, 3, 1, 2).float().div(255), ()).cpu())
        return torch.cat(parts)

    def score_tensors(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.head(self.embed(images)).squeeze(-1)

    def embed(self, images: Tensor) -> Tensor:
        """Normalised image embeddings [B, 768] of images [B, 3, H, W] in [0, 1]."""
        cfg = self.preprocess
        prepared = prepare(images.to(self.device), image_size(cfg), cfg.mean, cfg.std)
        return functional.normalize(self.encoder(prepared), dim=-1)

    def fingerprint(self) -> str:
        if not hasattr(self, "_hash"):
            rules = f"aesthetic {self.config.model} {self.preprocess}"
            self._hash = weights.fingerprint(rules, self.encoder, self.head)
        return self._hash
