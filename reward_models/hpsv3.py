"""HPSv3: a Qwen2-VL 7B trained on 1.2 million comparisons of pictures (Ma et al., ICCV 2025).

Package hpsv3 1.0.0 (MIT), which pins transformers 4.45.2: an environment of its own (gigabytes: it holds
its own torch). Weights MizzenAI/HPSv3 on the Hub, HPSv3.safetensors (about 17 GB, Apache-2.0), laid over
Qwen/Qwen2-VL-7B-Instruct (another 17 GB, Apache-2.0), which gives architecture and processor. The network predicts a mean and an
uncertainty; the score is the mean: no bounds, higher is better. It runs in bfloat16 and wants a GPU with 24 GB.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from bench_dfusion.rewards.contract import RewardConfig
from bench_dfusion.rewards.isolated import IsolatedConfig, IsolatedReward


class HPSv3Config(IsolatedConfig):
    batch: int = Field(8, ge=1, description="images in one request to the worker (count)")
    revision: str = Field("main", description="branch or commit of MizzenAI/HPSv3 (authors: main)")
    weights: str | None = Field(None, description="the file HPSv3.safetensors, not the Hub's")


class HPSv3(IsolatedReward):
    name = "hpsv3"
    summary = "Human Preference Score v3, Qwen2-VL 7B trained on comparisons (hpsv3 1.0.0)"
    paper = "Ma et al. 2025 (HPSv3)"
    unit = "preference, unbounded"
    Config: ClassVar[type[RewardConfig]] = HPSv3Config
    worker = "hpsv3_worker.py"
    located_by = frozenset({"revision", "weights"})
    requirements = (
        "hpsv3==1.0.0",
        "torch==2.5.1",
        "torchvision==0.20.1",
        "transformers==4.45.2",
        "trl==0.12.2",
        "peft==0.13.2",
        "accelerate==1.0.1",
        "diffusers==0.31.0",
        "datasets==3.1.0",
        "huggingface-hub==0.26.5",
        "deepspeed==0.15.4",
        "qwen-vl-utils==0.0.8",
        "timm==1.0.12",
        "opencv-python==4.10.0.84",
        "omegaconf==2.3.0",
        "fire==0.7.0",
        "einops==0.8.0",
        "tensorboard==2.18.0",  # imported by hpsv3, not declared
        "matplotlib==3.9.3",  # the same
        "pandas==2.2.3",
        "pyarrow==17.0.0",
        "pillow==10.4.0",
        "numpy==1.26.4",
        "setuptools==75.8.0",
    )
