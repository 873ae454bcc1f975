"""ImageReward: a BLIP trained on people's rankings of pictures (Xu et al., NeurIPS 2023).

Package image-reward 1.5, which fails on transformers ≥ 5: an environment of its own (gigabytes: it holds
its own torch). Weights THUDM/ImageReward on the Hub, ImageReward.pt (1.8 GB) with med_config.json, and the tokenizer of
bert-base-uncased; code and weights Apache-2.0. Scores are standardised over the authors' pictures: no bounds, mostly
from -2.3 to 2, higher is better. Prompts are cut at 35 tokens, pictures are resized and cropped to 224 px.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from bench_dfusion.rewards.contract import RewardConfig
from bench_dfusion.rewards.isolated import IsolatedConfig, IsolatedReward


class ImageRewardConfig(IsolatedConfig):
    batch: int = Field(32, ge=1, description="images in one request to the worker (count)")
    revision: str = Field("main", description="branch or commit of THUDM/ImageReward (authors: main)")
    weights: str | None = Field(None, description="a directory with ImageReward.pt and med_config.json, not the Hub")


class ImageReward(IsolatedReward):
    name = "imagereward"
    summary = "ImageReward, BLIP trained on people's rankings (image-reward 1.5)"
    paper = "Xu et al. 2023 (ImageReward)"
    unit = "standardised preference, unbounded"
    Config: ClassVar[type[RewardConfig]] = ImageRewardConfig
    worker = "imagereward_worker.py"
    located_by = frozenset({"revision", "weights"})
    requirements = (
        "image-reward==1.5",
        "openai-clip==1.0.1",
        "torch==2.4.1",
        "torchvision==0.19.1",
        "transformers==4.38.2",
        "diffusers==0.30.0",
        "accelerate==0.34.2",
        "datasets==2.18.0",
        "huggingface-hub==0.25.2",
        "timm==0.6.13",
        "pandas==2.2.3",
        "pyarrow==17.0.0",
        "pillow==10.4.0",
        "numpy==1.26.4",
        "setuptools==75.8.0",  # fairscale and clip import pkg_resources
    )
