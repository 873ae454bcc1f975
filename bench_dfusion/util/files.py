"""Files that are either whole or absent, and the optimiser's state in safetensors (nothing is pickled)."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from bench_dfusion.errors import UsageError

if TYPE_CHECKING:  # torch takes seconds to import, and tables of records need none
    import torch


def cache() -> Path:
    """The directory of what is made once on a machine and used by every run."""
    return Path(os.environ.get("BENCH_DFUSION_HOME") or "~/.cache/bench-dfusion").expanduser()


class Busy(UsageError):
    """Another process holds a lock: what was asked may be done later, or is being done."""


@contextmanager
def locked(path: Path, busy: str | None = None) -> Iterator[None]:
    """Hold the lock of a directory, or of a file that is made where there is none, while the block runs.

    Raises Busy(busy) where another process holds it; with None waits for it.
    """
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            raise Busy(str(busy)) from None
        yield
    finally:
        os.close(handle)


def held(path: Path) -> bool:
    """Whether another process holds the lock in a file."""
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` at the block's end: a reader, or a kill at any moment, sees the old
    content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file as `replacing` does."""
    with replacing(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def json_text(value: Any) -> str:
    return json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json_text(value))


def read_json(path: Path) -> Any:
    return json.loads(path.read_bytes())


def save_tensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    meta: Mapping[str, Any] | None = None,
    header: Mapping[str, str] | None = None,
) -> None:
    """Write tensors, a JSON-able `meta` and further words of the file's header as one safetensors file, atomically.

    With a `meta` the file carries the hash of its content, which safetensors itself does not.
    """
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        contiguous = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        words = {"meta": json.dumps(dict(meta or {})), **(header or {})}
        if meta is not None:
            words["sha256"] = _content_sha256(contiguous, words["meta"])
        save_file(contiguous, temporary, metadata=words)
        order_words(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def order_words(path: Path) -> None:
    """Put the words of a safetensors file's header in the order of their names, in place: the library writes them in another
    one each time, and equal content should be an equal file."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        words = header.get("__metadata__", {})
        if len(words) > 1:
            ordered = header | {"__metadata__": dict(sorted(words.items()))}
            written = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
            if len(written) <= length:  # as long but for the library's padding; else leave it as it is
                file.seek(8)
                file.write(written.ljust(length))


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote: the tensors (on the CPU) and `meta`. Raises ValueError where a byte is another."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        words = file.metadata() or {}
    meta = words.get("meta", "{}")
    if "sha256" in words and words["sha256"] != _content_sha256(tensors, meta):
        raise ValueError("its content is not what was written")
    return tensors, json.loads(meta)


def _content_sha256(tensors: Mapping[str, torch.Tensor], meta: str) -> str:
    import torch

    total = hashlib.sha256(meta.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """An optimiser's state as flat tensors `optimizer.<parameter>.<name>`."""
    import torch

    state = optimizer.state_dict()["state"]
    return {f"optimizer.{i}.{k}": torch.as_tensor(v) for i, entry in state.items() for k, v in entry.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Undo `optimizer_tensors`; the parameter groups (learning rate and so on) stay the optimiser's own."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_sha256(folder: Path, suffixes: tuple[str, ...] = (".safetensors", ".json", ".txt")) -> str:
    """One hash of a directory's weights and configuration: names and contents, in sorted order."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in suffixes):
        total.update(f"{path.relative_to(folder).as_posix()} {sha256(path)}\n".encode())
    return total.hexdigest()
