"""The micro world's oracle as a reward: exact, but a ceiling, since it is also the judge."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from bench_dfusion.micro import oracle, scenes
from bench_dfusion.reward import Reward, RewardConfig


class OracleConfig(RewardConfig):
    score: Literal["graded", "full"] = Field("graded", description="graded in [0, 1], or full: 0 or 1 (share)")


class Oracle(Reward):
    name = "oracle"
    summary = "exact reading of the micro world's pictures (embedded world only)"
    paper = "this project, docs/micro.md"
    unit = "share of what the prompt asks for, in [0, 1]"
    Config: ClassVar[type[RewardConfig]] = OracleConfig
    one_judge = True
    config: OracleConfig

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        verdicts = (oracle.judge(i, p) for i, p in zip(images.numpy(), prompts, strict=True))
        return torch.tensor([getattr(v, self.config.score) for v in verdicts], dtype=torch.float32)

    @classmethod
    def weights_bytes(cls, config: RewardConfig) -> int | None:
        return 0

    def fingerprint(self) -> str:
        source = inspect.getsource(oracle) + inspect.getsource(scenes) + self.config.score
        return hashlib.sha256(source.encode()).hexdigest()

    def check(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            scenes.parse(prompt)
