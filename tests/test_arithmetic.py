"""bfloat16 by way of float32 gives what autocast gives, to the last place, and its gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench_dfusion.diffusion.arithmetic import RoundedProducts, products

PLACE = 2.0**-7  # of a bfloat16 number: neighbours differ by this share of it at most


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


A, B, WEIGHT, BIAS = numbers(2, 5, 8), numbers(2, 8, 6, seed=1), numbers(4, 8, seed=2), numbers(4, seed=3)
CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: F.linear(x, WEIGHT, BIAS),
    "matmul": lambda x: x @ B,
    "bmm": lambda x: torch.bmm(x, B),
    "baddbmm": lambda x: torch.baddbmm(torch.empty(2, 5, 6), x, B, beta=0, alpha=0.5),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None])[0],
    "conv2d": lambda x: F.conv2d(x[:, None], numbers(3, 1, 2, 2, seed=4)),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_product_is_autocasts(name: str) -> None:
    found = []
    for rounded in (False, True):
        x = A.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            if rounded:
                with RoundedProducts():
                    out = CALLS[name](x)
            else:
                out = CALLS[name](x)
        out.float().square().sum().backward()
        assert out.dtype == torch.bfloat16 and x.grad is not None
        found.append((out.detach().float(), x.grad))
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=4 * PLACE, atol=4 * PLACE * float(plain.abs().max()))


def test_outside_autocast_and_in_other_operations_nothing_changes() -> None:
    plain = F.linear(A, WEIGHT, BIAS)
    with RoundedProducts():
        assert torch.equal(F.linear(A, WEIGHT, BIAS), plain)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(F.gelu(A), F.gelu(A.clone())) and F.gelu(A).dtype == torch.float32


def test_it_is_for_bfloat16_on_cpus_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for native in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda native=native: native)
        assert isinstance(products(torch.device("cpu"), torch.bfloat16), RoundedProducts) == (not native)
        for device, dtype in (
            ("cpu", None),
            ("cpu", torch.float16),
            ("cuda", torch.bfloat16),
            ("meta", torch.bfloat16),
        ):
            assert not isinstance(products(torch.device(device), dtype), RoundedProducts)
