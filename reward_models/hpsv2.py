"""HPSv2.1: a CLIP ViT-H-14 fine-tuned on people's choices between pictures of one prompt (Wu et al. 2023).

Weights: `HPS_v2.1_compressed.pt` of the Hub repository xswu/HPSv2, branch main (Apache-2.0, 986 M parameters, 3.9 GB
in memory). The score is the cosine of the two embeddings, as `hpsv2.score` returns it: no logit scale (the published
tables show 100 times it). Pictures that diffusion models draw score 0.2 to 0.35.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from bench_dfusion.reward_models.clip import Clip, image_size, open_clip_model
from pydantic import Field
from torch import Tensor

from bench_dfusion.rewards import weights
from bench_dfusion.rewards.contract import Reward, RewardConfig
from bench_dfusion.rewards.preprocessing import prepare


class HPSv2Config(RewardConfig):
    weights: str = Field(
        "xswu/HPSv2/HPS_v2.1_compressed.pt", description="a file, or ORG/NAME/FILE on the Hub (HPSv2's repository)"
    )
    revision: str | None = Field(None, description="Hub revision (commit or tag); None: the default branch")
    model: str = Field("ViT-H-14", description="open_clip architecture of the weights (HPSv2: ViT-H-14)")
    batch: int = Field(32, ge=1, description="images in one forward (count)")


class HPSv2(Clip):
    name = "hpsv2"
    summary = "HPSv2.1: what people prefer, given the prompt (Apache-2.0, 986 M parameters)"
    paper = "Wu et al. 2023 (HPSv2)"
    unit = "cosine, in [-1, 1], mostly 0.2 to 0.35"
    limits = (-1.0, 1.0)
    Config: ClassVar[type[RewardConfig]] = HPSv2Config
    config: HPSv2Config  # type: ignore[assignment]  # Clip asks it for `batch` alone

    def __init__(self, config: HPSv2Config, device: torch.device | str = "cpu"):
        import open_clip

        Reward.__init__(self, config, device)
        path = weights.fetch(self.name, config.weights, config.revision, "weights")
        self.model, self.preprocess = open_clip_model(self.name, config.model, None, self.device, empty=True)
        weights.fill(self.name, self.model, weights.read(self.name, path), path)
        self.tokenizer = open_clip.get_tokenizer(config.model)

    def _prepare(self, images: Tensor) -> Tensor:
        cfg = self.preprocess
        return prepare(images, image_size(cfg), cfg.mean, cfg.std, fit="longest")

    def fingerprint(self) -> str:
        if not hasattr(self, "_hash"):
            self._hash = weights.fingerprint(f"hpsv2 cosine longest {self.config.model} {self.preprocess}", self.model)
        return self._hash
