"""What the device has and what it does in a second, measured in about one."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil
import torch
from pydantic import BaseModel, Field
from torch import nn

from bench_dfusion.doctor.trace import Work
from bench_dfusion.errors import UsageError

SECONDS = 0.3  # for each of the three measurements


class Rates(BaseModel):
    """What this device does, measured."""

    flops: float = Field(description="floating-point operations a second of a square matrix product")
    bandwidth: float = Field(description="bytes read and written a second by a copy")
    overhead: float = Field(description="time of an operation on next to nothing (s)")
    overlaps: bool = Field(description="whether the host issues operations while the device computes")

    def seconds(self, cost: Work) -> float:
        """The time of a cost: arithmetic at the product's rate, and memory at the copy's, one after the other.

        The host's overhead is added on a CPU; on a GPU it overlaps, and the longer of the two counts.
        """
        work, issue = cost.flops / self.flops + cost.moved / self.bandwidth, cost.operations * self.overhead
        return max(work, issue) if self.overlaps else work + issue


def find(name: str | None, memory_gb: float | None) -> torch.device:
    """The device that is meant. Raises UsageError where there is none such and no memory is given in its place."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UsageError(f"unknown device {name!r}: cuda, cuda:1 or cpu") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"a device is cuda or cpu here, not {device.type}")
    if device.type == "cuda" and not present(device) and memory_gb is None:
        raise UsageError(f"there is no {device} here: give --memory-gb, the memory of the GPU that is meant")
    return device


def present(device: torch.device) -> bool:
    return device.type == "cpu" or (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count())


def free(device: torch.device) -> int:
    """Bytes that a new process could have."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def own_memory() -> int:
    """The resident bytes of this process, which has imported what a run imports and loaded no weights."""
    return int(psutil.Process().memory_info().rss)


def measure(device: torch.device, dtype: torch.dtype) -> Rates:
    """Rates of a device for networks in `dtype`."""
    gpu = device.type == "cuda"
    n, size = (8192, 2**29) if gpu else (1024, 2**26)
    a = torch.randn(n, n, device=device).to(dtype)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    layer, x = nn.Linear(8, 8).to(device), torch.zeros(1, 8, device=device)
    with torch.no_grad():
        flops = 2 * n**3 / _time(lambda: a @ a, device)
        bandwidth = 2 * size / _time(lambda: target.copy_(source), device)
        overhead = _time(lambda: layer(x), device)
    return Rates(flops=flops, bandwidth=bandwidth, overhead=overhead, overlaps=gpu)


def _time(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the mean of as many as fit `SECONDS`."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    call()
    wait()
    start, done, block = time.perf_counter(), 0, 1
    while True:
        for _ in range(block):
            call()
        wait()
        done += block
        passed = time.perf_counter() - start
        if passed > SECONDS:
            return passed / done
        block = max(1, int(done * (SECONDS - passed) / max(passed, 1e-9)) // 2)
