"""From a model's name to its adapter: the embedded pipeline, a local directory or the Hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from bench_dfusion import files, hub, micro, registry
from bench_dfusion.models.base import Adapter
from bench_dfusion.registry import UsageError
from bench_dfusion.track import MemorySection, ModelSection

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise UsageError(registry.unknown("dtype", name, DTYPES))
    return DTYPES[name]


def load_adapter(
    model: ModelSection,
    device: torch.device | str = "cpu",
    memory: MemorySection | None = None,
    networks: Mapping[str, Any] | None = None,
) -> tuple[Adapter, str]:
    """The adapter of a pipeline and the hash of its files. Raises UsageError where either is not as asked.

    networks   parts of the pipeline to take in the place of its directory's; nothing is then hashed
    """
    folder = micro.PIPELINE if model.id == "micro" else Path(model.id)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise UsageError(f"{folder} is no diffusers pipeline directory: it has no model_index.json")
        digest = files.tree_sha256(folder) if networks is None else "none"
    elif model.id == "micro":
        raise UsageError(f"the embedded weights are not at {folder}: run python -m bench_dfusion.micro.pretrain")
    else:
        digest = ""
    adapters = adapters_by_pipeline()
    try:
        config = DiffusionPipeline.load_config(hub.look(str(folder) if digest else model.id), revision=model.revision)
    except Exception as error:
        raise UsageError(
            f"no model {model.id!r}: neither a directory here nor reachable on the Hub ({_line(error)})"
        ) from None
    name = config["_class_name"]
    if name not in adapters:
        raise UsageError(f"{model.id} is a {name}; supported are {', '.join(sorted(adapters))}")
    safe: Any = {"use_safetensors": True}  # nothing of another's is unpickled
    source: Any = folder if digest else DiffusionPipeline.download(model.id, revision=model.revision, **safe)
    digest = digest or files.tree_sha256(Path(source))
    if networks is None and model.sha256 and model.sha256 != digest:
        raise UsageError(f"{model.id}: its files hash to {digest[:12]}…, the track fixes {model.sha256[:12]}…")
    with quiet():
        try:
            pipe = DiffusionPipeline.from_pretrained(source, torch_dtype=dtype(model.dtype), **safe, **(networks or {}))
        except OSError as error:
            raise UsageError(
                f"{model.id} cannot be loaded ({_line(error)}); weights must be safetensors, as save_pretrained writes them"
            ) from None
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = adapters[name].read_scheduler(pipe.scheduler)
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None  # never asked, and as large as a text encoder
    adapter = adapters[name](pipe)
    if model.resolution is not None:
        adapter.set_resolution(model.resolution)
    if model.vae_tile is not None:
        adapter.set_tile(model.vae_tile)
    if torch.device(device).type == "cpu":
        adapter.tune_for_cpu()
    elif torch.device(device).type == "cuda":
        adapter.tune_for_cuda()
    if memory is not None:
        adapter.save_memory(memory)
    adapter.to(device)
    return adapter, digest


def adapters_by_pipeline() -> dict[str, type[Adapter]]:
    """The adapter class of every supported diffusers pipeline class."""
    return {
        pipeline: cls
        for plugin in registry.plugins("models").values()
        for cls in (plugin.load(),)
        for pipeline in cls.pipelines
    }


@contextmanager
def quiet() -> Iterator[None]:
    """Without diffusers' and transformers' remarks on loading, which a user can do nothing about."""
    verbosity = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(verbosity[0])
        transformers_logging.set_verbosity(verbosity[1])
        diffusers_logging.enable_progress_bar()
        transformers_logging.enable_progress_bar()


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
