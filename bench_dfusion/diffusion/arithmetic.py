"""bfloat16 on CPUs that have none (x86 without AVX-512), where oneDNN multiplies matrices about seven times slower in it
than in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

PRODUCTS = frozenset(
    {
        F.linear,
        F.conv2d,
        F.scaled_dot_product_attention,
        torch.matmul,
        torch.bmm,
        torch.baddbmm,
        torch.addmm,
        Tensor.matmul,
        Tensor.__matmul__,
        Tensor.bmm,
    }
)


class RoundedProducts(TorchFunctionMode):
    """Inside, what autocast would compute in bfloat16 on the CPU is computed in float32 from operands rounded to bfloat16,
    and rounded after: the same number but for the order of its sum. Gradients too, wherever backward is called."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in PRODUCTS or not torch.is_autocast_enabled("cpu"):
            return func(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            args, kwargs = tree_map(_rounded, (args, kwargs or {}))
            return func(*args, **kwargs).bfloat16()


def _rounded(value: Any) -> Any:
    return value.bfloat16().float() if isinstance(value, Tensor) and value.is_floating_point() else value


def products(device: torch.device, autocast: torch.dtype | None) -> AbstractContextManager[Any]:
    """The context for calls of a network under `autocast`: `RoundedProducts` where that is the faster way, else nothing."""
    if device.type != "cpu" or autocast != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return nullcontext()
    return nullcontext() if torch.ops.mkldnn._is_mkldnn_bf16_supported() else RoundedProducts()
