"""Weights of rewards: a local path or the Hub, refused in one line where they are not to be had; their hash."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench_dfusion.errors import UsageError
from bench_dfusion.util import hub


def missing(reward: str, what: str, option: str, error: Exception) -> UsageError:
    """The error of weights that cannot be had: what to download, and the option that takes a local path."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return UsageError(
        f"reward {reward}: {what} cannot be loaded ({reason}); where there is no network, download it elsewhere and "
        f"give its path in the option {option}"
    )


def fetch(reward: str, source: str, revision: str | None, option: str) -> Path:
    """The file of weights that `source` names: a local path, or ORG/NAME/FILE on the Hub. Raises UsageError."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)/([^/].*)", source)
    if found is None or source.startswith((".", "~")) or path.is_dir():
        raise UsageError(f"reward {reward}: no weights file {source} (option {option}: a path, or ORG/NAME/FILE)")
    from huggingface_hub import hf_hub_download

    hub.look(source)
    try:
        return Path(hf_hub_download(found[1], found[2], revision=revision))
    except Exception as error:  # of the Hub's client and the network: many kinds
        raise missing(reward, f"{found[2]} of {found[1]} on the Hub", option, error) from None


def read(reward: str, path: Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors file or a checkpoint of torch, below `state_dict` or not; nothing is unpickled
    but tensors. Raises UsageError."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
        content = content.get("state_dict", content)
        return {str(k).removeprefix("module."): v for k, v in content.items() if isinstance(v, Tensor)}
    except Exception as error:  # of pickle, zip and safetensors: many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UsageError(f"reward {reward}: {path} holds no weights that can be read ({reason})") from None


def fill(reward: str, module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load a state dict, every tensor of it and no other. Raises UsageError."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:3]]
        raise UsageError(f"reward {reward}: {path} holds weights of another network: {' '.join(lines)[:200]}") from None


def fingerprint(rules: str, *modules: nn.Module) -> str:
    """SHA-256 of what is written in `rules` and of every tensor of the modules, wherever they were loaded from."""
    total = hashlib.sha256(rules.encode())
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            total.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
