"""A pipeline's directory before anything of it is loaded: its parts, the files that a run takes, and their hash.

What is not taken is not needed and not hashed: other variants of the weights, parts that are never asked, other files.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from bench_dfusion import micro
from bench_dfusion.errors import UsageError
from bench_dfusion.util import files, hub
from bench_dfusion.util.progress import bar

INDEX = "model_index.json"
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # never asked, and some as large as a text encoder
LORA = "pytorch_lora_weights.safetensors"  # diffusers' name of a LoRA file
WHOLE = "diffusion_pytorch_model.safetensors"  # diffusers' name of a network's own weights, beside its config.json
LORA_HEADER = "lora_adapter_metadata"  # where diffusers keeps a LoRA's configuration in such a file
SMALL = (".json", ".txt", ".model")  # configs, vocabularies and indexes of sharded weights
PICKLED = (".bin", ".ckpt", ".pt", ".pth")
HEADER_LIMIT = 100_000_000  # bytes: the longest header that safetensors itself reads
LONG = 2e9  # bytes: to hash as many takes seconds, so progress is shown

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_WITHOUT_WEIGHTS = re.compile(r"(Tokenizer|TokenizerFast|Scheduler|Processor|Extractor)$")  # classes
_SHARD = re.compile(r"-\d{5}-of-\d{5}\b")
_STEM = "(diffusion_pytorch_model|model)"  # diffusers' name of a weights file, and transformers'
_SINGLE = re.compile(rf"{_STEM}(?:\.([\w-]+))?\.safetensors")
_SHARDED = re.compile(rf"{_STEM}\.safetensors(?:\.([\w-]+))?\.index(?:\.([\w-]+))?\.json")


@dataclass(frozen=True)
class Weights:
    """The weights files of a part: of one variant (fp16, say), or None for the plain ones; `index` of sharded ones."""

    files: tuple[str, ...]
    variant: str | None = None
    index: str | None = None


@dataclass(frozen=True)
class Part:
    """A part of a pipeline as its index names it; `weights` None for what has none, a tokenizer or a scheduler."""

    library: str
    class_name: str
    folder: Path
    weights: Weights | None


@dataclass(frozen=True)
class Layout:
    """A pipeline's directory, here or in the Hub's cache.

    revision, sizes   of a Hub pipeline whose weights are not here yet: its commit, and the bytes of every file
    """

    name: str  # as the user calls it
    folder: Path
    pipeline: str  # the class
    parts: Mapping[str, Part]
    revision: str | None = None
    sizes: Mapping[str, int] | None = field(default=None, repr=False)

    def tensors(self, part: str) -> dict[str, tuple[int, ...]] | None:
        """The shapes of a part's tensors by name, by the headers of its files; None where the Hub's cannot be read."""
        own = self.parts[part]
        found: dict[str, tuple[int, ...]] = {}
        for file in own.weights.files if own.weights else ():
            if self.sizes is None:
                found |= {n: tuple(v["shape"]) for n, v in header(own.folder / file).items() if n != "__metadata__"}
            elif (there := _on_hub(self.name, self.revision, f"{part}/{file}")) is not None:
                found |= there
            else:
                return None
        return found

    def size(self, part: str) -> int:
        """The bytes of a part's weights files."""
        own = self.parts[part]
        names = own.weights.files if own.weights else ()
        if self.sizes is not None:
            return sum(self.sizes[f"{part}/{file}"] for file in names)
        return sum((own.folder / file).stat().st_size for file in names)

    def sha256(self) -> str:
        """One hash of all that is taken, weights and configuration: names and contents. Read once where nothing changes."""
        stats = ((path, (self.folder / path).stat()) for path in self._taken())
        return _sha256(self.folder, self.name, tuple((p, s.st_size, s.st_mtime_ns, s.st_ino) for p, s in stats))

    def _taken(self) -> list[str]:
        found = [INDEX]
        for name, part in self.parts.items():
            weights = part.weights.files if part.weights else ()
            index = part.weights.index if part.weights else None
            for path in part.folder.rglob("*"):
                local = path.relative_to(part.folder).as_posix()
                other = bool(_SHARDED.fullmatch(local)) and local != index
                if path.is_file() and (local in weights or (path.suffix in SMALL and not other)):
                    found.append(f"{name}/{local}")
        return sorted(found, key=Path)

    def download(self) -> Layout:
        """The layout of a Hub pipeline with its weights here. Raises UsageError where they cannot be had, or are damaged."""
        from huggingface_hub import snapshot_download

        if self.sizes is None:
            return self
        wanted = [f"{name}/{f}" for name, part in self.parts.items() if part.weights for f in part.weights.files]
        try:
            folder = Path(snapshot_download(self.name, revision=self.revision, allow_patterns=wanted))
        except Exception as error:  # of the Hub's client and the network: many kinds
            raise UsageError(f"the weights of {self.name} cannot be downloaded ({_line(error)})") from None
        return read(folder, self.name)


def local(model: str) -> Path | None:
    """The directory or file that a model's name is, whatever its spelling; None for a Hub id and for an embedded model."""
    if model in ("", *micro.PIPELINES):
        return None
    try:
        path = Path(model).expanduser()
        return path.resolve() if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # no such user, too long, no path at all
        return None


def read(folder: Path, name: str | None = None) -> Layout:
    """The layout of a directory, every file of it that is taken there and whole.

    Raises UsageError, which names the part, on anything else.
    """
    name = name or str(folder)
    found = _layout(folder, name, None)
    for part in found.parts.values():
        for file in part.weights.files if part.weights else ():
            header(part.folder / file)
    return found


def from_hub(model: str, revision: str | None = None) -> Layout:
    """The layout of a Hub pipeline, its small files here, its weights not. Raises UsageError where it cannot be had."""
    from huggingface_hub import HfApi, snapshot_download

    if len(model) > 200 or not _HUB_ID.fullmatch(model):
        raise UsageError(f"no model {model[:200]!r}: neither a directory here nor a Hub id (OWNER/NAME)")
    hub.look(model)
    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=[f"*{s}" for s in SMALL]))
    except Exception as error:  # of the Hub's client and the network: many kinds
        raise UsageError(
            f"no model {model!r}: neither a directory here nor reachable on the Hub ({_line(error)})"
        ) from None
    try:
        commit = folder.name  # one state of the repository, also where it changes meanwhile
        listed = HfApi().list_repo_tree(model, recursive=True, revision=commit)
        sizes = {entry.path: entry.size for entry in listed if hasattr(entry, "size")}
    except Exception:  # of the Hub's client and the network, many kinds: what the cache holds
        try:
            return read(folder, model)
        except UsageError as error:
            raise UsageError(f"{error} (in the Hub's cache, and the Hub cannot be reached)") from None
    return _layout(folder, model, sizes, commit)


def _layout(folder: Path, name: str, sizes: Mapping[str, int] | None, revision: str | None = None) -> Layout:
    if not (folder / INDEX).is_file():
        raise UsageError(f"{name} is no diffusers pipeline: it has no {INDEX}")
    index = _json(folder / INDEX)
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str):
        raise UsageError(f"{folder / INDEX} names no pipeline (_class_name)")
    parts = {}
    for part, value in index.items():
        if part in UNUSED or not isinstance(value, list) or value == [None, None]:
            continue
        if len(value) != 2 or not all(isinstance(v, str) for v in value) or "/" in part or part.startswith("."):
            raise UsageError(f"{folder / INDEX}: {part} is {value!r}, not a library and a class")
        own = folder / part
        if sizes is not None:
            names = [p.removeprefix(f"{part}/") for p in sizes if p.startswith(f"{part}/")]
        else:
            names = [p.name for p in own.iterdir() if p.is_file()] if own.is_dir() else []
        if not names:
            raise UsageError(f"{name} has no {part}: its {INDEX} names one ({value[1]}), and there is none")
        weights = None if _WITHOUT_WEIGHTS.search(value[1]) else _weights(name, own, names)
        if weights is not None and "config.json" not in names:
            raise UsageError(f"{name} has no {part}/config.json")
        if weights is not None:
            _json(own / "config.json")
        parts[part] = Part(value[0], value[1], own, weights)
    return Layout(name, folder, pipeline, parts, revision, sizes)


def _weights(model: str, folder: Path, names: Iterable[str]) -> Weights:
    """The files that are loaded of a part's: the plain ones, else those of its only variant."""
    names, part = set(names), folder.name
    singles: dict[str | None, str] = {}
    indexes: dict[str | None, str] = {}
    for file in sorted(names):
        if found := _SHARDED.fullmatch(file):
            indexes[found[2] or found[3]] = file
        elif (found := _SINGLE.fullmatch(file)) and not _SHARD.search(file):
            singles[found[2]] = file
    variants = {*singles, *indexes}
    if not variants:
        pickled = sorted(n for n in names if n.endswith(PICKLED))
        shards = sorted(n for n in names if _SHARD.search(n) and n.endswith(".safetensors"))
        if shards:
            raise UsageError(f"{model}: the {part} has {len(shards)} shards and no index (*.safetensors.index.json)")
        if pickled:
            raise UsageError(
                f"{model}: the {part} has only {pickled[0]}, and weights must be safetensors, since nothing of another's is "
                "unpickled: get those, or save the pipeline anew with save_pretrained where you trust it"
            )
        raise UsageError(f"{model}: the {part} has no weights: no *.safetensors in {part}/ under diffusers' name")
    if None not in variants and len(variants) > 1:
        several = ", ".join(sorted(map(str, variants)))
        raise UsageError(
            f"{model}: the {part} has the variants {several} and no plain weights: keep the one that is meant"
        )
    variant = None if None in variants else next(iter(variants))
    index = indexes.get(variant)
    if index is None or (variant in singles and index.startswith("model.")):  # transformers takes the single file first
        return Weights((singles[variant],), variant)
    placed = _json(folder / index).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(f, str) for f in placed.values()):
        raise UsageError(f"{folder / index} is no index of weights: it has no weight_map")
    shards = sorted(set(placed.values()))
    missing = [f for f in shards if f not in names]
    if missing:
        raise UsageError(
            f"{model}: the {part} lacks {missing[0]}, of {len(shards)} files that its {index} names; download it again"
        )
    return Weights(tuple(shards), variant, index)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(f"no file {path}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no JSON ({_pointer(path) or _line(error)})") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no JSON object")
    return content


def header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file. Raises UsageError where it has none, or the file is not as long as it says."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > HEADER_LIMIT:
                raise ValueError(f"a header of {length} bytes")
            content = json.loads(file.read(length))
        ends = [value["data_offsets"][1] for name, value in content.items() if name != "__metadata__"]
        whole = 8 + length + max(ends, default=0)
        if not all(isinstance(s, int) for name, v in content.items() if name != "__metadata__" for s in v["shape"]):
            raise ValueError("shapes that are no numbers")
    except (
        OSError,
        ValueError,
        struct.error,
        KeyError,
        TypeError,
        IndexError,
        AttributeError,
        RecursionError,
    ) as error:
        reason = "it is empty" if path.is_file() and not path.stat().st_size else _pointer(path) or _line(error)
        raise UsageError(f"{path} is no safetensors file ({reason})") from None
    if size != whole:
        raise UsageError(f"{path} is damaged: {size:,} bytes, and its header says {whole:,}; get it again")
    return content  # type: ignore[no-any-return]


def _pointer(path: Path) -> str | None:
    """Why a file has another content than its name says, where Git LFS has left its pointer."""
    try:
        with path.open("rb") as file:
            found = file.read(40).startswith(b"version https://git-lfs")
    except OSError:
        return None
    return "a pointer of Git LFS: run git lfs pull" if found else None


@lru_cache(maxsize=64)
def _on_hub(model: str, revision: str | None, file: str) -> dict[str, tuple[int, ...]] | None:
    """The shapes in a file on the Hub, by its header alone."""
    from huggingface_hub import HfApi

    try:
        tensors = HfApi().parse_safetensors_file_metadata(model, file, revision=revision).tensors
    except Exception:  # of the Hub's client and the network: many kinds
        return None
    return {name: tuple(info.shape) for name, info in tensors.items()}


@lru_cache(maxsize=16)
def _sha256(folder: Path, name: str, state: tuple[tuple[str, int, int, int], ...]) -> str:
    """`state` of the files is what tells one reading from the next."""
    total, size = hashlib.sha256(), sum(s[1] for s in state)
    if size < LONG:
        for path, *_ in state:
            total.update(f"{path} {files.sha256(folder / path)}\n".encode())
        return total.hexdigest()
    with bar(f"hash {name}", size / 1e6) as progress:
        for path, length, *_ in state:
            total.update(f"{path} {files.sha256(folder / path)}\n".encode())
            progress.advance(length / 1e6, "MB")
    return total.hexdigest()


def _line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0][:160]
    return text or type(error).__name__
