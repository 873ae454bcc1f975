"""The embedded worlds' oracle as a reward: exact, but a ceiling, since it is also the judge.

What it decides is a stated version of its rules, guarded by the verdicts in tests/data/oracle-v1.npz: a change of code
that changes none of them keeps the version, one that changes any needs a new one, with a fingerprint of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from bench_dfusion.micro.v2 import grammar, oracle  # the second world's grammar holds all of the first's
from bench_dfusion.rewards.contract import Reward, RewardConfig

RULES = 1  # version of what the oracle decides
# By version and score. Version 1's are hashes of the source it had when the first records were made.
FINGERPRINTS = {
    1: {
        "graded": "a1bf9292d104171e4d8dcc3ea3cc3cb3fbc26aa464f337bc59387f80127840cf",
        "full": "1adfe50f16a0a5cef05473c836b16ba95fc41ade10459da4529ac973e81a58e4",
    }
}
ROUNDING = 1e-6  # of a mean of scores in float32


class OracleConfig(RewardConfig):
    score: Literal["graded", "full"] = Field("graded", description="graded in [0, 1], or full: 0 or 1 (share)")


class Oracle(Reward):
    name = "oracle"
    summary = "exact reading of the micro world's pictures (embedded worlds only)"
    paper = "this project, docs/micro.md"
    unit = "share of what the prompt asks for, in [0, 1]"
    limits = (0.0, 1.0)
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
        return FINGERPRINTS[RULES][self.config.score]

    @classmethod
    def impossible(cls, means: Sequence[tuple[RewardConfig, float]], prompt: str, pictures: int) -> str | None:
        """Full scores are 0 or 1, and a picture is full where its graded score is 1: else the graded score is at most
        that of one attribute wrong, or of a relation that does not hold."""
        found = {config.score: mean for config, mean in means}  # type: ignore[attr-defined]
        full, graded = found.get("full"), found.get("graded")
        if full is not None and abs(full * pictures - round(full * pictures)) > ROUNDING * pictures:
            return f"{full:.6g} is no share of {pictures} pictures that are right or not"
        if full is not None and graded is not None:
            spec = grammar.parse(prompt)
            points = 2 * len(spec.objects)
            most = 0.75 if spec.relation else (points - 1) / points
            if not full - ROUNDING <= graded <= full + (1 - full) * most + ROUNDING:
                return (
                    f"graded {graded:.6g} does not go with full {full:.6g}: then it lies between {full:.6g} and "
                    f"{full + (1 - full) * most:.6g}"
                )
        return None

    def check(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            grammar.parse(prompt)
