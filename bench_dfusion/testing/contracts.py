"""How the checks of a contract are run and what is said where one fails."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

import torch

from bench_dfusion import errors

Case = TypeVar("Case")


class ContractError(AssertionError):
    """A plugin does not keep its contract.

    failed   what was found, by the name of the check that failed
    """

    def __init__(self, plugin: str, failed: dict[str, str], contracts: dict[str, str]):
        self.failed = failed
        lines = [f"\n  {name}: {found}\n    the contract: {contracts[name]}" for name, found in failed.items()]
        super().__init__(f"{plugin} fails {len(failed)} of {len(contracts)} checks:" + "".join(lines))


def run(plugin: str, checks: Sequence[Callable[[Case], None]], case: Case, skip: Collection[str] = ()) -> None:
    """Run every check on `case` but those named in `skip`; the first lines of a check's docstring are its contract.

    Raises ContractError, which names every check that failed, caused by the first one's own exception; ValueError where
    `skip` names no check.
    """
    named = {check.__name__: check for check in checks}
    for name in sorted(set(skip) - named.keys()):
        raise ValueError(errors.unknown("check", name, named))
    failed: dict[str, str] = {}
    cause: Exception | None = None
    kept = {name: check for name, check in named.items() if name not in skip}
    for name, check in kept.items():
        try:
            with torch.random.fork_rng(devices=[]):
                check(case)
        except Exception as error:  # of the plugin's own code: whatever it raises is its failure
            own = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            failed[name] = own.strip() or f"{type(error).__name__} without a message"
            cause = cause or error
    if failed:
        raise ContractError(plugin, failed, {name: _contract(check) for name, check in kept.items()}) from cause


def _contract(check: Callable[..., None]) -> str:
    """The first paragraph of a check's docstring, on one line."""
    return " ".join((check.__doc__ or "").split("\n\n")[0].split())


def described(cls: type, words: Sequence[str]) -> None:
    """Raise AssertionError where a plugin's class lacks one of the texts that `bench-dfusion list` shows, or an option a
    description."""
    for word in words:
        text = getattr(cls, word, None)
        assert isinstance(text, str) and text.strip(), f"{cls.__name__}.{word} is {text!r}: give one line"
        assert "\n" not in text, f"{cls.__name__}.{word} has several lines: give one"
    config = cls.Config  # type: ignore[attr-defined]
    for option, info in config.model_fields.items():
        assert info.description, (
            f"the option {option} of {config.__name__} has no description: what it is, its unit, source"
        )
    assert config.model_config.get("extra") == "forbid", f"{config.__name__} takes options that it does not know"
    assert config.model_config.get("frozen"), f"{config.__name__} is not frozen"
