"""A user's own function as a reward: `--reward path/to/file.py:function`. Its parameters say which kind it is.

`f(images, prompts) -> scores`: images uint8 [B, H, W, 3] (a torch tensor on the CPU), B prompts; B numbers as a list,
array or tensor. `f(prompts, completions, **kwargs) -> list[float | None]`: TRL's, the completions are B PIL pictures,
None says that it does not apply to a sample. Training needs a score of every sample, so None is an error that names the
prompt, but for a component of a weighted sum: there the others count.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from bench_dfusion import errors, registry
from bench_dfusion.errors import PluginError, UsageError
from bench_dfusion.rewards.contract import Reward, RewardConfig
from bench_dfusion.util import foreign

FORM = re.compile(r"(.+\.py):([^:/]+)", re.DOTALL)
KINDS = "(images, prompts) or TRL's (prompts, completions, **kwargs)"


class FunctionConfig(RewardConfig):
    source_sha256: str = Field(description="hash of the function's file")
    signature: Literal["images", "trl"] = Field(description="(images, prompts), or TRL's (prompts, completions)")


class UserFunction(Reward):
    """The classes that `load` makes have the function and its file."""

    summary = "a user's function"
    paper = "none"
    unit = "the function's own"
    Config: ClassVar[type[RewardConfig]] = FunctionConfig
    path: ClassVar[Path]
    function: ClassVar[Callable[..., Any]]
    own: ClassVar[FunctionConfig]
    config: FunctionConfig

    @classmethod
    def configured(cls, options: Mapping[str, Any]) -> FunctionConfig:
        for option in options:
            raise UsageError(f"reward {cls.name} is a function and takes no option, here {option}: set it in its file")
        return cls.own

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        scores, applies = self.score_applicable(images, prompts)
        if not applies.all():
            prompt = prompts[int((~applies).nonzero()[0])]
            raise UsageError(
                f"reward {self.name} returned None for {prompt!r}: training needs a number for every sample, or the "
                "function in a weighted sum"
            )
        return scores

    def score_applicable(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        function = type(self).function
        try:
            if self.config.signature == "images":
                found = function(images=images, prompts=list(prompts))
            else:
                pictures = [Image.fromarray(i) for i in images.cpu().numpy()]
                found = function(prompts=list(prompts), completions=pictures)
        except Exception as error:
            raise PluginError(
                f"reward {self.name} of {self.path} failed: {errors.plain(type(error).__name__)}: {errors.plain(error)}"
            ) from error
        values = found.detach().cpu().tolist() if isinstance(found, Tensor) else found
        try:
            values = list(values)
            scores = torch.tensor([0.0 if v is None else float(v) for v in values])
        except (TypeError, ValueError):
            raise UsageError(
                f"reward {self.name} returned {errors.plain(repr(found))[:80]}: one number for each image"
            ) from None
        if len(values) != len(images):
            raise UsageError(f"reward {self.name} returned {len(values)} scores for {len(images)} images")
        return scores, torch.tensor([v is not None for v in values], dtype=torch.bool)

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.name} {self.config.source_sha256}".encode()).hexdigest()


def is_one(text: str) -> bool:
    """Whether a reward's name has the form FILE.py:FUNCTION."""
    return FORM.fullmatch(text) is not None


def load(text: str) -> type[UserFunction]:
    """The reward of FILE.py:FUNCTION. Raises UsageError, and PluginError where the file cannot be imported."""
    found = FORM.fullmatch(text)
    assert found is not None, text
    path, name = Path(found[1]).expanduser(), found[2]
    if not path.is_file():
        raise UsageError(f"reward {text}: no file {path}")
    if not re.fullmatch(r"[a-z0-9][a-z0-9_]*", name):
        raise UsageError(
            f"reward {text}: a function's name becomes a directory's: lower-case letters, digits and _, no _ first"
        )
    if name in registry.plugins("rewards"):
        raise UsageError(f"reward {text}: {name} is a registered reward: give the function another name")
    source = path.read_bytes()
    digest = hashlib.sha256(source).hexdigest()
    module = _module(path.resolve(), digest)
    function = getattr(module, name, None)
    if not callable(function):
        own = [n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
        raise UsageError(f"reward {text}: {errors.unknown('function', name, own)}")
    config = FunctionConfig(source_sha256=digest, signature=_signature(text, function))
    content = {"name": name, "path": path, "function": staticmethod(function), "own": config}
    return type("UserFunctionOf", (UserFunction,), content)


@lru_cache
def _module(path: Path, digest: str) -> Any:
    """A file as a module, once for each content (`digest`)."""
    name = f"bench_dfusion_reward_{path.stem}_{hashlib.sha256(f'{path} {digest}'.encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    registry.others.add(str(path))
    try:
        with foreign.contained(f"reward file {path}"):
            spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise PluginError(
            f"reward file {path} cannot be imported: {type(error).__name__}: {errors.plain(error)}"
        ) from error
    return module


def _signature(text: str, function: Callable[..., Any]) -> Literal["images", "trl"]:
    """Which kind a function is, by its parameters. Raises UsageError for neither."""
    if inspect.iscoroutinefunction(function):
        raise UsageError(f"reward {text}: an async function; write a plain one, {KINDS}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        raise UsageError(f"reward {text}: its parameters cannot be read; write {KINDS}") from None
    kind: Literal["images", "trl"] = "images" if "images" in signature.parameters else "trl"
    names = ("images", "prompts") if kind == "images" else ("prompts", "completions")
    try:
        if names[0] not in signature.parameters and names[1] not in signature.parameters:
            raise TypeError
        signature.bind(**dict.fromkeys(names))
    except TypeError:
        raise UsageError(f"reward {text} has the parameters {signature}: write {KINDS}") from None
    return kind
