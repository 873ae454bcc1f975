"""A network larger than its device: the frozen weights in pieces, each block whole only while it works.

torch's `fully_shard` (FSDP2) is put around the blocks that diffusers names as indivisible. The LoRA is left out of it:
every process holds all of it, and `parallel.add_gradients` adds its gradients as it does without.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from bench_dfusion.util import parallel


def blocks(network: nn.Module) -> list[nn.Module]:
    """The outermost modules of the classes that diffusers does not split. Raises ValueError where it names none."""
    names = set(getattr(network, "_no_split_modules", None) or ())

    def outermost(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            if type(child).__name__ in names:
                yield child
            else:
                yield from outermost(child)

    found = list(outermost(network))
    if not found:
        raise ValueError(f"{type(network).__name__} names no blocks: leave memory.shard and memory.offload_network off")
    return found


def spread(
    network: nn.Module, trained: Iterable[nn.Parameter], device: torch.device, shard: bool, offload: bool
) -> None:
    """Deal the weights out to the run's processes (`shard`, of several), keep them in the host's memory (`offload`), or both.

    network   on the CPU; `trained` are its parameters that stay whole, and go to `device`
    Raises ValueError where the network has no blocks.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    mesh = parallel.mesh(device, alone=not shard)
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    own = set(trained)
    for parameter in own:
        parameter.data = parameter.data.to(device)
    for module in (*blocks(network), network):
        fully_shard(module, mesh=mesh, ignored_params=own, offload_policy=policy)
    if shard:
        parallel.keep_step()
    # No network here changes what a block returned in place: predictions and gradients are tested to be the same.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
