"""A pipeline's networks on the meta device, made from configs alone: no weights file is opened beyond its header."""

from __future__ import annotations

import importlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench_dfusion import hub
from bench_dfusion.registry import UsageError

SMALL = ("*.json", "*.txt", "*.model")  # configs, vocabularies and indexes of sharded weights
HEADER_LIMIT = 100_000_000  # bytes: the longest header that safetensors itself reads


@dataclass(frozen=True)
class Stored:
    """The safetensors files of one part of a pipeline: bytes on disk, and parameters where every header was read."""

    size: int
    parameters: int | None


def modules(folder: Path, dtype: torch.dtype) -> dict[str, nn.Module | None]:
    """The networks of a pipeline directory on the meta device, in the dtypes that loading would give them.

    None in the place of what is never loaded: a safety checker and other modules of a pipeline's own file.
    Raises UsageError where a config is missing or damaged.
    """
    found: dict[str, nn.Module | None] = {}
    for name, (library, class_name) in _parts(folder).items():
        try:
            cls = getattr(importlib.import_module(library), class_name)
        except (ImportError, AttributeError):
            found[name] = None
            continue
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            continue  # tokenizers, schedulers: loaded as they are
        if name == "safety_checker":
            found[name] = None
            continue
        path = folder / name
        if not (path / "config.json").is_file():
            raise UsageError(f"{folder} has no {name}/config.json, so {class_name} cannot be estimated")
        try:
            with torch.device("meta"):
                network = _network(cls, path)
        except Exception as error:  # of two libraries' configs: many kinds
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            raise UsageError(f"{path / 'config.json'} makes no {class_name} ({reason})") from None
        found[name] = _as_loaded(network.to("meta"), dtype)
    return found


def _parts(folder: Path) -> dict[str, tuple[str, str]]:
    """(library, class) of every part that model_index.json names."""
    index = json.loads((folder / "model_index.json").read_bytes())
    pairs = {name: value for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    return {name: (value[0], value[1]) for name, value in pairs.items() if all(isinstance(v, str) for v in value)}


def _network(cls: Any, path: Path) -> nn.Module:
    if hasattr(cls, "load_config"):  # of diffusers
        return cls.from_config(cls.load_config(path))  # type: ignore[no-any-return]
    return cls(cls.config_class.from_pretrained(path))  # type: ignore[no-any-return]


def _as_loaded(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """What a weights file holds in `dtype`, but for what its class keeps in float32 there."""
    keep = set(getattr(network, "_keep_in_fp32_modules_strict", None) or ())
    if dtype is torch.float16:
        keep |= set(getattr(network, "_keep_in_fp32_modules", None) or ())
    for name, tensor in network.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if keep & set(name.split(".")) else dtype)
    return network


def bytes_of(*networks: nn.Module | None) -> int:
    """The bytes of all parameters and buffers, each counted once."""
    tensors = {id(t): t.nbytes for m in networks if m is not None for t in [*m.parameters(), *m.buffers()]}
    return sum(tensors.values())


def header_parameters(header: Mapping[str, Any]) -> int:
    """The elements of all tensors in a safetensors header."""
    shapes = (value["shape"] for name, value in header.items() if name != "__metadata__")
    return sum(int(torch.Size(shape).numel()) for shape in shapes)


def stored(folder: Path) -> dict[str, Stored]:
    """What lies in the safetensors files of each part of a local pipeline directory, by their headers."""
    found = {}
    for name in _parts(folder):
        files = _chosen([p.name for p in (folder / name).glob("*.safetensors")])
        if files:
            paths = [folder / name / f for f in files]
            counts = [header_parameters(_header(p)) for p in paths]
            found[name] = Stored(sum(p.stat().st_size for p in paths), sum(counts))
    return found


def _header(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > HEADER_LIMIT:
                raise ValueError(f"a header of {length} bytes")
            return json.loads(file.read(length))  # type: ignore[no-any-return]
    except (OSError, ValueError, struct.error) as error:
        raise UsageError(f"{path} is no safetensors file ({error})") from None


def _chosen(names: list[str]) -> list[str]:
    """Of one part's files those that are loaded: without a variant (fp16, non_ema) in their names."""
    stems = {n: n.removesuffix(".safetensors") for n in names}
    return sorted(n for n, stem in stems.items() if "." not in stem)


def from_hub(model: str, revision: str | None) -> tuple[Path, dict[str, Stored]]:
    """A Hub pipeline's small files as a local directory, and what its weights files hold by their size.

    Raises UsageError where it cannot be reached.
    """
    from huggingface_hub import HfApi, snapshot_download

    hub.look(model)
    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=list(SMALL)))
    except Exception as error:  # of the Hub's client and the network: many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UsageError(f"no model {model!r}: neither a directory here nor reachable on the Hub ({reason})") from None
    if not (folder / "model_index.json").is_file():
        raise UsageError(f"{model} on the Hub is no diffusers pipeline: it has no model_index.json")
    try:
        listed = HfApi().list_repo_tree(model, recursive=True, revision=revision)
        sizes = {entry.path: entry.size for entry in listed if hasattr(entry, "size")}
    except Exception:  # offline, from the cache: sizes are only told, nothing is computed from them
        return folder, {}
    found = {}
    for name in _parts(folder):
        own = {p.removeprefix(f"{name}/"): s for p, s in sizes.items() if p.startswith(f"{name}/")}
        files = _chosen([p for p in own if p.endswith(".safetensors") and "/" not in p])
        if files:
            found[name] = Stored(sum(own[f] for f in files), _remote(model, revision, [f"{name}/{f}" for f in files]))
    return folder, found


def _remote(model: str, revision: str | None, files: list[str]) -> int | None:
    """The parameters in files on the Hub, by their headers alone; None where these cannot be read."""
    from huggingface_hub import HfApi

    api, total = HfApi(), 0
    try:
        for file in files:
            counts = api.parse_safetensors_file_metadata(model, file, revision=revision).parameter_count
            total += sum(counts.values())
    except Exception:
        return None
    return total
