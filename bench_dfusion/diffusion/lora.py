"""A LoRA's files, whoever trained it: what diffusers, peft and kohya's scripts write, read as one thing."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from bench_dfusion.errors import UsageError
from bench_dfusion.models.layout import LORA as FILE
from bench_dfusion.models.layout import LORA_HEADER as HEADER
from bench_dfusion.models.layout import WHOLE as WHOLE
from bench_dfusion.util import files

if TYPE_CHECKING:
    from peft import LoraConfig

    from bench_dfusion.models.base import Adapter

# What trainers and other programs write before a module's own name.
PREFIXES = ("base_model.model.", "diffusion_model.", "model.diffusion_model.", "transformer.", "unet.", "module.")
_NAME = re.compile(
    r"(.+?)\.(alpha|lora_magnitude_vector(?:\.default)?(?:\.weight)?|lora_(?:A|B|down|up)(?:\.default)?\.(?:weight|bias))"
)
PEFT_CONFIG, PEFT_FILE = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Lora:
    """A LoRA of one network: its shape, and its weights by peft's names."""

    config: LoraConfig
    state: dict[str, Tensor]


def scale(config: LoraConfig) -> dict[str, Any]:
    """What a reader must be told of a LoRA beside its weights: nothing where every alpha is the rank."""
    if config.lora_alpha == config.r and config.rank_pattern == config.alpha_pattern and not config.use_rslora:
        return {}
    keys = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
    return {"target_modules": sorted(config.target_modules or ())} | {key: getattr(config, key) for key in keys}


def locate(path: Path) -> Path:
    """The file of the weights: `path` itself, or the one in a directory. Raises UsageError where there is none."""
    if path.is_dir():
        peft = (path / PEFT_CONFIG).is_file()
        file = path / (PEFT_FILE if peft else FILE)
        if not file.is_file():
            wanted = PEFT_FILE if peft else f"{FILE} and no {PEFT_CONFIG}"
            raise UsageError(f"{path} holds no LoRA: it has no {wanted}")
        return file
    if not path.is_file():
        raise UsageError(f"no LoRA at {path}: give a .safetensors file or the directory of one")
    if path.suffix != ".safetensors":
        raise UsageError(f"{path} is no .safetensors file, and no other kind of LoRA file is opened")
    return path


def digest(file: Path) -> str:
    """The hash of a LoRA's file (see `locate`), and of the configuration that peft keeps beside it."""
    beside = file.with_name(PEFT_CONFIG)
    if file.name == PEFT_FILE and beside.is_file():
        return hashlib.sha256(f"{files.sha256(file)} {files.sha256(beside)}".encode()).hexdigest()
    return files.sha256(file)


def read(file: Path, adapter: Adapter) -> Lora:
    """The LoRA of a file (see `locate`) for an adapter's network; rank, alpha and modules are the file's own.

    Raises UsageError for what is no LoRA, one of another network, or one that would be loaded in part only.
    """
    try:
        with safe_open(file, "pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            header = json.loads((opened.metadata() or {}).get(HEADER, "{}"))
        beside = file.with_name(PEFT_CONFIG)
        given: dict[str, Any] = {}
        if file.name == PEFT_FILE and beside.is_file():
            given = json.loads(beside.read_bytes())
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read as a LoRA: {error}") from None
    part = f"{adapter.network_name}."
    alphas: dict[str, float] = {}
    _check_finite(tensors, file)
    named = _by_module(tensors, part, {name for name, _ in adapter.network.named_modules()})
    if given:
        _check_peft(given, beside)
    if named is not None:
        state, alphas = named
    elif given:
        state = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
    else:
        state, alphas = _of_network(tensors, adapter, file)
    given = given or {key.removeprefix(part): value for key, value in header.items()}
    ranks = {
        key.removesuffix(".lora_B.weight"): v.shape[1] for key, v in state.items() if key.endswith(".lora_B.weight")
    }
    if not ranks:
        raise UsageError(f"{file} holds no LoRA: none of its {len(tensors)} tensors is a lora_B")
    modules = dict(adapter.network.named_modules())
    strange = sorted(ranks.keys() - modules.keys())
    if strange:
        raise UsageError(
            f"{file} is a LoRA of another model: {len(strange)} of its {len(ranks)} modules, {strange[0]} for one, "
            f"are not in this {adapter.network_name}"
        )
    try:
        return Lora(_config(ranks, alphas, given, state), state)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{file}: its configuration is no LoRA's: {error}") from None


def read_whole(file: Path) -> dict[str, Tensor]:
    """The tensors of a network's own weights. Raises UsageError for what cannot be read or is not finite."""
    try:
        with safe_open(file, "pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{file} cannot be read as a network's weights: {error}") from None
    _check_finite(tensors, file)
    return tensors


def _by_module(
    tensors: Mapping[str, Tensor], part: str, modules: Collection[str]
) -> tuple[dict[str, Tensor], dict[str, float]] | None:
    """The layers and alphas of a file whose names are the network's own modules after one prefix, whatever it is.

    None where they are not: then it is in another format, or another model's.
    """
    found = {key: _NAME.fullmatch(key) for key in tensors}
    if not found or not all(found.values()):
        return None
    split = {key: (match[1], match[2]) for key, match in found.items() if match}
    for prefix in (part, *PREFIXES, f"{PREFIXES[0]}{part}", f"{part}{PREFIXES[0]}", ""):
        if all(m.startswith(prefix) and m.removeprefix(prefix) in modules for m, _ in split.values()):
            break
    else:
        return None
    state, alphas = {}, {}
    for key, (module, rest) in split.items():
        module = module.removeprefix(prefix)
        if rest == "alpha":
            alphas[module] = float(tensors[key])
        else:
            rest = rest.replace(".default", "").replace("lora_down", "lora_A").replace("lora_up", "lora_B")
            state[f"{module}.{rest}"] = tensors[key]
    return state, alphas


def _check_finite(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Raise UsageError where a weight is not finite, as after a training whose loss became NaN."""
    for name, values in tensors.items():
        if values.is_floating_point() and not values.isfinite().all():
            raise UsageError(f"{file}: its weights are not finite, {name} for one")


def _of_network(
    tensors: Mapping[str, Tensor], adapter: Adapter, file: Path
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The network's layers of a diffusers or kohya file, and their alphas. Raises UsageError if there are others."""
    if any("dora_scale" in key for key in tensors):  # diffusers would leave it out and load the rest
        raise UsageError(f"{file} is a DoRA in kohya's format, which diffusers cannot load")
    part = f"{adapter.network_name}."
    try:
        layers, alphas = adapter.lora_layers(tensors)
    except (ValueError, KeyError, IndexError) as error:
        raise UsageError(f"{file} is in no LoRA format that diffusers knows: {error}") from None
    others = sorted({key.partition(".")[0] for key in layers if not key.startswith(part)})
    if others and not any(key.startswith(part) for key in layers):
        raise UsageError(
            f"{file} is a LoRA of another model: of {', '.join(others[:3])}, and this one has a {part[:-1]}"
        )
    if others:
        raise UsageError(
            f"{file} holds {', '.join(others[:3])} beside {part[:-1]}, which would be left out: give one without"
        )
    return {k.removeprefix(part): v for k, v in layers.items()}, {k.removeprefix(part): v for k, v in alphas.items()}


def _check_peft(given: Mapping[str, Any], path: Path) -> None:
    if given.get("peft_type") != "LORA":
        raise UsageError(f"{path}: peft_type is {given.get('peft_type')!r}, not 'LORA'")
    if given.get("init_lora_weights", True) not in (True, False, None, "gaussian"):
        raise UsageError(
            f"{path}: init_lora_weights={given['init_lora_weights']!r} changed the base's weights as well; convert the "
            "adapter to a plain LoRA with peft first"
        )


def _config(
    ranks: Mapping[str, int], alphas: Mapping[str, float], given: Mapping[str, Any], state: Mapping[str, Tensor]
) -> LoraConfig:
    """A LoRA on just these modules. Ranks are the weights' own; an alpha that is given nowhere is its rank."""
    from peft import LoraConfig
    from peft.utils.other import get_pattern_key

    patterns = given.get("alpha_pattern") or {}
    common = given.get("lora_alpha")
    found: dict[str, float] = {}
    for module, rank in ranks.items():
        pattern = get_pattern_key(patterns.keys(), module)
        found[module] = float(alphas.get(module, patterns.get(pattern, rank if common is None else common)))
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(found.values()).most_common(1)[0][0]
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft divides it: a fraction serves
        target_modules=sorted(ranks),
        rank_pattern={f"^{re.escape(m)}": r for m, r in ranks.items() if r != rank},
        alpha_pattern={f"^{re.escape(m)}": a for m, a in found.items() if a != alpha},
        use_rslora=bool(given.get("use_rslora")),
        use_dora=any("lora_magnitude_vector" in key for key in state),
        lora_bias=any(key.endswith(".lora_B.bias") for key in state),
        lora_dropout=0.0,
    )
