"""From a model's name to its adapter: the embedded pipeline, a local directory or the Hub."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline, pipelines
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers.utils import logging as transformers_logging

from bench_dfusion import errors, micro, registry
from bench_dfusion.errors import PluginError, UsageError
from bench_dfusion.models import layout
from bench_dfusion.models.base import Adapter
from bench_dfusion.models.layout import Layout, Part
from bench_dfusion.models.options import MemorySection, ModelSection

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise UsageError(errors.unknown("dtype", name, DTYPES))
    return DTYPES[name]


def find(model: str, revision: str | None = None) -> Layout:
    """The layout of what a model's name says; of a Hub pipeline the weights are not here yet. Raises UsageError."""
    if model in micro.PIPELINES:
        place = micro.PIPELINES[model]
        if not place.is_dir():
            raise UsageError(f"the embedded weights are not at {place}: run python -m {micro.RECIPES[model]}")
        return _supported(layout.read(place, model))
    path = layout.local(model)
    if path is not None:
        _no_file(path)
        return _supported(layout.read(path, model))
    return _supported(layout.from_hub(model, revision))


def load_adapter(
    model: ModelSection,
    device: torch.device | str = "cpu",
    memory: MemorySection | None = None,
    found: Layout | None = None,
    kind: type[Adapter] | None = None,
) -> tuple[Adapter, str]:
    """The adapter of a pipeline and the hash of its files. Raises UsageError where either is not as asked.

    device   "meta": the networks are made from their configs alone, and nothing is hashed
    found    the pipeline's layout, where it is known (see `find`)
    kind     the adapter's class; None: the one that is registered for the pipeline's
    """
    found, hollow = found or find(model.id, model.revision), torch.device(device).type == "meta"
    digest = "none"
    if not hollow:
        found = found.download()
        digest = found.sha256()
        if model.sha256 and model.sha256 != digest:
            raise UsageError(f"{model.id}: its files hash to {digest[:12]}…, the track fixes {model.sha256[:12]}…")
    cls = kind or adapters_by_pipeline()[found.pipeline]
    with quiet():
        parts = _parts(found, cls, dtype(model.dtype), hollow)
        try:
            pipe = DiffusionPipeline.from_pretrained(found.folder, **parts)
        except (ValueError, TypeError, OSError, AttributeError) as error:
            raise UsageError(f"{found.name} makes no {found.pipeline} ({_line(error)})") from None
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = cls.read_scheduler(pipe.scheduler)
    adapter = cls(pipe)
    adapter.sha256 = digest
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
    """The adapter class of every supported diffusers pipeline class. Raises PluginError where two serve one class."""
    found: dict[str, type[Adapter]] = {}
    by: dict[str, registry.Plugin] = {}
    for plugin in registry.plugins("models").values():
        cls = plugin.load()
        for pipeline in cls.pipelines:
            if pipeline in found:
                raise PluginError(
                    f"two models serve {pipeline}: {by[pipeline].name} of {by[pipeline].source} and {plugin.name} of "
                    f"{plugin.source}; uninstall one, or leave the class out of its `pipelines`"
                )
            found[pipeline], by[pipeline] = cls, plugin
    return found


def _supported(found: Layout) -> Layout:
    adapters = adapters_by_pipeline()
    if found.pipeline not in adapters:
        raise UsageError(f"{found.name} is a {found.pipeline}; supported are {', '.join(sorted(adapters))}")
    return found


def _no_file(path: Path) -> None:
    """Raise UsageError where a model's name is a file: how to make a directory of it."""
    if not path.is_file():
        return
    if path.suffix != ".safetensors":
        raise UsageError(
            f"{path} is a file, and a model is a diffusers directory or a Hub id; of single files only .safetensors can be "
            "converted, since nothing of another's is unpickled"
        )
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    shapes = {n: v["shape"] for n, v in layout.header(path).items() if n != "__metadata__"}
    try:
        kind = infer_diffusers_model_type({n: torch.empty(shape, device="meta") for n, shape in shapes.items()})
    except Exception:  # of another's guess from names and shapes
        kind = "v1"
    families = {"xl": "StableDiffusionXLPipeline", "sd3": "StableDiffusion3Pipeline", "flux": "FluxPipeline"}
    cls = next((name for start, name in families.items() if kind.startswith(start)), "StableDiffusionPipeline")
    raise UsageError(
        f"{path} is a single file, and a model is a diffusers directory: convert it, where the Hub can be reached for the "
        f"configs, by python -c \"from diffusers import {cls} as P; P.from_single_file('{path}').save_pretrained('"
        f"{path.with_suffix('')}')\""
    )


# ---------------------------------------------------------------- the parts


def _parts(found: Layout, adapter: type[Adapter], kind: torch.dtype, hollow: bool) -> dict[str, Any]:
    """Every part of the pipeline, loaded, or None for one that is never asked. Raises UsageError, which names the part."""
    pipeline = getattr(importlib.import_module("diffusers"), found.pipeline)
    wanted = {n: p for n, p in inspect.signature(pipeline.__init__).parameters.items() if n != "self"}
    parts: dict[str, Any] = {name: None for name in layout.UNUSED if name in wanted}
    left_out = adapter.left_out(found.parts)
    for name, parameter in wanted.items():
        if name in parts:
            continue
        if name in found.parts and name not in left_out:
            parts[name] = _load(found, name, adapter, kind, hollow)
        elif name in left_out:
            parts[name] = None
        elif parameter.default is parameter.empty:
            raise UsageError(f"{found.name} has no {name}: its {layout.INDEX} names none")
    return parts


def _load(found: Layout, name: str, adapter: type[Adapter], kind: torch.dtype, hollow: bool) -> Any:
    part = found.parts[name]
    cls = _class(part)
    network = isinstance(cls, type) and issubclass(cls, nn.Module)
    if cls is None or network != (part.weights is not None):
        raise UsageError(
            f"{found.name}: its {layout.INDEX} says that the {name} is a {part.class_name} of {part.library}, which is no "
            f"{'network' if part.weights else 'part'} of these versions of diffusers and transformers"
        )
    try:
        if not network:
            loaded = cls.from_pretrained(part.folder)
            if getattr(loaded, "pad_token", "") is None:
                raise UsageError(
                    f"{found.name}: its {name} has no pad_token: write one into {name}/tokenizer_config.json"
                )
            return loaded
        values, options = _config(cls, part, adapter, name)
        if hollow:
            loaded = _hollow(cls, part.folder, kind, options)
            tensors = found.tensors(name)
            info = _misfits(cls, part, loaded, tensors) if tensors is not None else {}
        else:
            loaded, info = _filled(cls, part, kind, options)
    except (UsageError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of two libraries' readers and other people's configs: many kinds
        raise UsageError(
            f"{found.name}: its {name} cannot be loaded as a {part.class_name} ({type(error).__name__}: {_line(error)})"
        ) from None
    _whole(found, name, info)
    if not hollow:
        _finite(found, name, loaded)
    if values:
        loaded.register_to_config(**values)
    return loaded


def _class(part: Part) -> Any:
    """The class that a pipeline's index names, of diffusers or transformers; None where there is none such."""
    if part.library in ("diffusers", "transformers"):
        module: Any = importlib.import_module(part.library)
    else:
        module = getattr(pipelines, part.library, None)
    try:
        return getattr(module, part.class_name, None)
    except (ImportError, RuntimeError):  # a class whose own requirements are not installed
        return None


def _config(cls: Any, part: Part, adapter: type[Adapter], name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the network's own config is told again once it is made, and what it is made with in the place of that."""
    if name != adapter.network_name or not hasattr(cls, "load_config"):
        return {}, {}
    own = cls.load_config(part.folder)
    options = adapter.made_with(own)
    return {key: own[key] for key in options}, options


def _filled(cls: Any, part: Part, kind: torch.dtype, options: dict[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    """A network with its weights, and what its library says of them."""
    assert part.weights is not None
    own: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True}
    if part.weights.variant is not None:
        own["variant"] = part.weights.variant
    if hasattr(cls, "load_config"):  # of diffusers
        return cls.from_pretrained(part.folder, torch_dtype=kind, **own, **options)  # type: ignore[no-any-return]
    # Sizes that do not fit are told below, in one line.
    return cls.from_pretrained(part.folder, dtype=kind, ignore_mismatched_sizes=True, **own)  # type: ignore[no-any-return]


def _hollow(cls: Any, path: Path, kind: torch.dtype, options: dict[str, Any]) -> nn.Module:
    """A network on the meta device, made from its config, in the dtypes that loading would give it."""
    with torch.device("meta"):
        if hasattr(cls, "load_config"):
            network = cls.from_config(cls.load_config(path), **options)
        else:
            network = cls(cls.config_class.from_pretrained(path))
    network.to("meta")
    keep = set(getattr(network, "_keep_in_fp32_modules_strict", None) or ())
    if kind is torch.float16:
        keep |= set(getattr(network, "_keep_in_fp32_modules", None) or ())
    for name, tensor in network.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if keep & set(name.split(".")) else kind)
    return network  # type: ignore[no-any-return]


def _misfits(cls: Any, part: Part, network: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any]:
    """What a network's library would say of its weights, by their names and shapes alone."""
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    if not hasattr(cls, "load_config"):  # transformers renames and ties: asked of itself
        own = cls.config_class.from_pretrained(part.folder)
        options = {"device_map": "meta", "ignore_mismatched_sizes": True, "output_loading_info": True}
        return cls.from_pretrained(None, config=own, state_dict=tensors, **options)[1]  # type: ignore[no-any-return]
    if part.weights is not None and part.weights.index is None:
        cast(Any, network)._fix_state_dict_keys_on_load(tensors)  # names of older versions
    wanted = {name: tensor.shape for name, tensor in network.state_dict().items()}
    both = wanted.keys() & tensors.keys()
    return {
        "missing_keys": wanted.keys() - tensors.keys(),
        "mismatched_keys": [(n, tensors[n].shape, wanted[n]) for n in both if tensors[n].shape != wanted[n]],
    }


def _whole(found: Layout, name: str, info: Mapping[str, Any]) -> None:
    """Raise UsageError where a network's weights are not all there, in its shapes: the rest would be random numbers."""
    missing, other = sorted(info.get("missing_keys", ())), sorted(info.get("mismatched_keys", ()))
    if other:
        tensor, has, wanted = other[0]
        raise UsageError(
            f"{found.name}: {len(other)} tensors of its {name} are not of the shape that {name}/config.json says, {tensor} "
            f"for one: {list(has)}, not {list(wanted)}"
        )
    if missing:
        raise UsageError(
            f"{found.name}: its {name} lacks {len(missing)} tensors that {name}/config.json asks for, {missing[0]} for one"
        )


def _finite(found: Layout, name: str, network: nn.Module) -> None:
    """Raise UsageError where a weight is not finite. One pass at the memory's speed: a fifteenth of the hash's time."""
    for tensor, values in network.state_dict().items():
        if values.is_floating_point() and values.numel() and not torch.stack(values.aminmax()).isfinite().all():
            half = f" in {values.dtype}".replace("torch.", "") if values.dtype != torch.float32 else ""
            raise UsageError(f"{found.name}: the weights of its {name} are not finite{half}, {tensor} for one")


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
