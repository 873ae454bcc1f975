"""How well a picture compresses: DDPO's two rewards without a model (Black et al. 2023). No weights, no licence.

`jpeg-incompressibility` is the size of the picture as JPEG of quality 95, in kB of 1000 bytes; `jpeg-compressibility`
is minus it. A 512² photograph takes 30 to 150 kB.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench_dfusion.rewards.contract import Reward, RewardConfig

QUALITY = 95


def encode(image: np.ndarray) -> bytes:
    """The JPEG of a picture uint8 [H, W, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=QUALITY)
    return buffer.getvalue()


class JpegIncompressibility(Reward):
    name = "jpeg-incompressibility"
    summary = "size as JPEG: rich in detail, whatever the prompt (no model)"
    paper = "Black et al. 2023 (DDPO), §5"
    unit = "kB at quality 95, more than 0"
    limits: ClassVar[tuple[float | None, float | None]] = (0.0, None)
    sign: ClassVar[float] = 1.0

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([self.sign * len(encode(i)) / 1000 for i in images.numpy()], dtype=torch.float32)

    @classmethod
    def weights_bytes(cls, config: RewardConfig) -> int | None:
        return 0

    def fingerprint(self) -> str:
        """The rule, and what this machine's encoder makes of a fixed picture: another encoder scores otherwise."""
        sample = np.random.RandomState(0).randint(0, 256, (32, 32, 3)).astype(np.uint8)
        return hashlib.sha256(f"{self.sign} kB at {QUALITY} ".encode() + encode(sample)).hexdigest()


class JpegCompressibility(JpegIncompressibility):
    name = "jpeg-compressibility"
    summary = "minus the size as JPEG: smooth, whatever the prompt (no model)"
    unit = "minus kB at quality 95, less than 0"
    limits = (None, 0.0)
    sign = -1.0
