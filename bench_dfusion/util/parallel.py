"""One run in several processes: its batches are sharded, and every process goes on with all that came of them.

A batch is what one process makes of it, and gradients are added in the order of their pieces, so a run ends the same
whatever the number of processes. All of them hold the same LoRA and optimiser; only the first writes files. Joined by
`accelerate launch`, torchrun or `bench-dfusion run --processes N`, which set the environment that accelerate reads.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # torch takes seconds to import, and the command's other verbs need none
    import torch
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
Result = TypeVar("Result")
PATIENCE = timedelta(hours=12)  # a reward may score for long while the others wait
_objects: Any = None  # the process group that carries results through the CPU's memory
_in_step = False  # whether every process makes the same calls of the network, since its weights are sharded
_spare = False  # inside what is computed for that alone


def size() -> int:
    """The number of processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first() -> bool:
    """Whether this process is the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def join(device: str | None = None) -> torch.device | None:
    """Meet the other processes and return this one's device; None where there are no others."""
    global _objects
    if size() == 1:
        return None
    import torch.distributed
    from accelerate import PartialState

    cpu = device == "cpu" or not torch.cuda.is_available()
    state = PartialState(cpu=cpu, timeout=PATIENCE)
    if _objects is None:
        _objects = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    return state.device


def each(function: Callable[[T], Result], parts: Sequence[T]) -> list[Result]:
    """`function` of every part, in order; each is computed by one process and given to all. A FloatingPointError of one
    is raised in all of them."""
    if size() == 1:
        return [function(part) for part in parts]
    mine = parts[_rank() :: size()]
    own: list[Result] = []
    failed: FloatingPointError | None = None
    for part in mine:
        try:
            own.append(function(part))
        except FloatingPointError as error:
            failed = failed or error
    if _in_step and parts and len(mine) < -(-len(parts) // size()):
        with _sparing(), suppress(FloatingPointError):
            function(parts[-1])
    columns: list[Any] = _gather(failed or own)
    for column in columns:
        if isinstance(column, FloatingPointError):
            raise column
    return [columns[i % size()][i // size()] for i in range(len(parts))]


def once(function: Callable[[], Result]) -> Result:
    """What the first process computes, for all."""
    if size() == 1:
        return function()
    found: list[Result] = _gather(function() if first() else None)
    return found[0]


def total(value: int) -> int:
    """The sum over the processes."""
    return value if size() == 1 else sum(_gather(value))


def add_gradients(
    parameters: Sequence[torch.nn.Parameter],
    pieces: Sequence[T],
    loss: Callable[[T], tuple[torch.Tensor, Result]],
) -> list[Result]:
    """Add the gradients of the losses of all `pieces` to the parameters', in their order; returns what `loss` said of each."""
    if size() == 1:
        found = []
        for piece in pieces:
            value, said = loss(piece)
            value.backward()
            found.append(said)
        return found
    found = []
    for start in range(0, len(pieces), size()):
        before = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        own: Any = None
        if start + _rank() < len(pieces):
            value, said = loss(pieces[start + _rank()])
            value.backward()
            own = [None if p.grad is None else p.grad.cpu() for p in parameters], said
        elif _in_step:
            with _sparing():
                loss(pieces[-1])[0].backward()
        for p, gradient in zip(parameters, before, strict=True):
            p.grad = gradient
        for theirs in _gather(own)[: len(pieces) - start]:
            for p, gradient in zip(parameters, theirs[0], strict=True):
                if gradient is not None:
                    gradient = gradient.to(p.device)
                    p.grad = gradient if p.grad is None else p.grad + gradient
            found.append(theirs[1])
    return found


def keep_step() -> None:
    """From here on a process without a part of its own makes the calls of another's too, whose result is dropped: gathering
    the network's weights takes all processes. Parts must make the same calls of the network."""
    global _in_step
    _in_step = True


def spare() -> bool:
    """Whether what is computed now is dropped, and counts for nothing."""
    return _spare


@contextmanager
def _sparing() -> Iterator[None]:
    global _spare
    _spare = True
    try:
        yield
    finally:
        _spare = False


def mesh(device: torch.device, alone: bool) -> DeviceMesh:
    """The devices of all processes, or this one's `alone`."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    if size() == 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if size() == 1 or not alone:
        return init_device_mesh(device.type, (size(),))
    own, _ = dist.new_subgroups(group_size=1)
    return DeviceMesh.from_group(own, device.type)


def writing(context: AbstractContextManager[Any]) -> AbstractContextManager[Any]:
    """`context` in the first process, nothing in the others."""
    return context if first() else nullcontext()


def _rank() -> int:
    return int(os.environ["RANK"])


def _gather(value: Any) -> list[Any]:
    import torch.distributed

    found: list[Any] = [None] * size()
    torch.distributed.all_gather_object(found, value, group=_objects)
    return found


# --- launching


def launch(processes: int, words: Sequence[str]) -> int:
    """Run the command with `words` in so many processes on this machine; returns its exit status.

    The first process speaks; what another says is shown if that one fails. One that fails ends all.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
    command = [sys.executable, "-m", "bench_dfusion.cli", *words]
    children, logs = [], [tempfile.TemporaryFile() for _ in range(processes - 1)]  # noqa: SIM115
    for rank in range(processes):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": logs[rank - 1]} if rank else {}
        own = {**threads, **os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        children.append(subprocess.Popen(command, env=own, **quiet))  # type: ignore[call-overload]
    try:
        while all(child.poll() is None for child in children):
            time.sleep(0.1)
        failed = next((i for i, child in enumerate(children) if child.poll()), None)
        if failed is None:
            return max(abs(child.wait()) for child in children)
        time.sleep(0.5)  # for the first process, which may have failed by the same mistake, to say it
    except KeyboardInterrupt:
        failed = 0
        for child in children:  # a terminal has told them all, a plain kill only this process
            child.send_signal(signal.SIGINT)
        return children[0].wait() or 130
    finally:
        for child in children:
            if child.poll() is None:
                child.terminate()
        for child in children:
            child.wait()
    if failed and children[0].returncode in (0, -signal.SIGTERM, 130):
        logs[failed - 1].seek(0)
        print(f"process {failed} failed:\n{logs[failed - 1].read().decode(errors='replace')[-2000:]}", file=sys.stderr)
        return children[failed].returncode
    return children[0].returncode
