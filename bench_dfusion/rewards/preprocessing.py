"""Pictures as an image encoder takes them, in torch, so that gradients pass: one preprocessing for all rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Fit = Literal["shortest", "shortest-floor", "longest"]


def prepare(images: Tensor, size: int, mean: Sequence[float], std: Sequence[float], fit: Fit = "shortest") -> Tensor:
    """Resize (bicubic, antialiased), make square and normalise images [B, 3, H, W] in [0, 1]: [B, 3, size, size].

    fit
        shortest        the short side becomes `size`, cropped at the centre (open_clip, torchvision)
        shortest-floor  the same, an odd row or column more is cut at the end (transformers' CLIPImageProcessor)
        longest         the long side becomes `size`, padded with black, nothing clipped to [0, 1] (HPSv2)

    The libraries resize 8-bit pictures and round in between; this does not, which moves a value by about one level.
    """
    if images.shape[-2:] != (size, size):
        height, width = images.shape[-2:]
        if fit == "longest":
            scale = size / max(height, width)
            shape = [round(height * scale), round(width * scale)]
        else:
            shape = [int(size * side / min(height, width)) for side in (height, width)]
        images = functional.interpolate(images, shape, mode="bicubic", antialias=True)
        if fit == "longest":
            rest = [size - side for side in shape]
            top, left = (r // 2 for r in rest)
            images = functional.pad(images, (left, rest[1] - left, top, rest[0] - top))
        else:
            images = images.clamp(0, 1)
            cut = [side - size for side in shape]
            top, left = (c // 2 if fit == "shortest-floor" else round(c / 2) for c in cut)
            images = images[..., top : top + size, left : left + size]
    centre, spread = (torch.tensor(x, device=images.device).view(3, 1, 1) for x in (mean, std))
    return (images - centre) / spread
