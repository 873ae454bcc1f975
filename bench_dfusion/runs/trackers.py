"""Experiment trackers, through accelerate's own: a run's curves and pictures in TensorBoard, W&B, trackio or MLflow.

They see what the loop has done, after its checkpoint: no number depends on them, and one that fails in the middle is left
out with a warning. Which rounds have been logged is kept beside the run, so a resumed run goes on with the next one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench_dfusion import errors
from bench_dfusion.errors import UsageError
from bench_dfusion.results.records import Drift, Round, Verdict
from bench_dfusion.util import files, foreign

PROJECT = "bench-dfusion"
FOLDER = "tracking"  # in a run's directory: what trackers write, and what they have been told
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}  # by tracker


def check(names: Sequence[str]) -> list[str]:
    """The trackers asked for, each once; a name may hold several with commas between.

    Raises UsageError for one that there is not, or whose package is missing, before any compute.
    """
    found = list(dict.fromkeys(name.strip() for text in names for name in text.split(",")))
    if not found:
        return []
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    for name in found:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UsageError(errors.unknown("tracker", name, PACKAGES))
        package = PACKAGES.get(name)
        if package is not None and find_spec(package) is None:
            raise UsageError(f"--tracker {name} needs a package that is not installed: pip install {package}")
    return found


class Trackers:
    """The trackers of one run, in its first process."""

    def __init__(self, names: Sequence[str], folder: Path, cell: str, resolved: Mapping[str, Any]):
        """
        names     as `check` gives them
        cell      the run's name there, its directory's
        resolved  its configuration, which becomes the hyper-parameters
        """
        self.folder = folder / FOLDER
        self.state = self.folder / "logged.json"
        self.logged: dict[
            str, dict[str, Any]
        ] = {}  # by tracker: the rounds and rungs it was told, and its own run's id
        if self.state.is_file():
            self.logged = dict(files.read_json(self.state))
        self._trackers: dict[str, Any] = {}
        for name in names:
            with _Attempt(self, name):
                self._trackers[name] = self._start(name, cell, resolved)

    def _start(self, name: str, cell: str, resolved: Mapping[str, Any]) -> Any:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # whose place in a run of several processes accelerate's loggers ask for
        known = self.logged.get(name)
        cls: Any = LOGGER_TYPE_TO_CLASS[name]
        options: dict[str, Any] = {}
        if name == "wandb":
            options = {"name": cell, "id": cell, "resume": "allow", "dir": str(self.folder)}
        elif name == "trackio":
            options = {"name": cell, "resume": "allow"}
        elif name == "mlflow":
            options = {"run_name": cell, "run_id": (known or {}).get("run")}
        self.folder.mkdir(parents=True, exist_ok=True)
        if name == "mlflow":
            tracker = cls(PROJECT, **options)
        elif cls.requires_logging_directory:
            tracker = cls(cell, str(self.folder / name), **options)
        else:
            tracker = cls(PROJECT, **options)
        tracker.main_process_only = False  # it is only here in the first process
        tracker.start()
        if known is None:
            tracker.store_init_configuration(dict(_flat(resolved)))
            run = getattr(getattr(tracker.tracker, "info", None), "run_id", None)
            self.logged[name] = {"rounds": 0, "rungs": 0, "run": run}
        return tracker

    def rounds(self, rounds: Sequence[Mapping[str, Any]], seconds: Mapping[str, float], picture: Path | None) -> None:
        """Log the curves of the rounds that each tracker was not yet told; `seconds` by phase, so far; and a picture of the
        last round."""
        for name in list(self._trackers):
            with _Attempt(self, name):
                told = self.logged[name]["rounds"]
                for content in rounds[told:]:
                    self._trackers[name].log(_curves(Round(**content)), step=content["round"])
                if len(rounds) > told:
                    step = rounds[-1]["round"]
                    self._trackers[name].log({f"seconds/{phase}": value for phase, value in seconds.items()}, step=step)
                    self._picture(name, "triples", picture, step)
                self.logged[name]["rounds"] = len(rounds)
        self._keep()

    def rung(self, number: int, step: int, verdicts: Sequence[Verdict], drift: Drift | None, picture: Path) -> None:
        """Log what a rung's evaluation found, after round `step`."""
        values = {f"{v.judge}/{part}": value for v in verdicts for part, value in _verdict(v)}
        if drift is not None:
            values |= {"drift/kl": drift.kl, "drift/pixels": drift.pixels, "diversity/trained": drift.diversity_trained}
        for name in list(self._trackers):
            with _Attempt(self, name):
                if self.logged[name]["rungs"] < number:
                    self._trackers[name].log(values, step=step)
                    self._picture(name, "base_trained", picture, step)
                    self.logged[name]["rungs"] = number
        self._keep()

    def close(self) -> None:
        for name in list(self._trackers):
            with _Attempt(self, name):
                self._trackers.pop(name).finish()

    def _picture(self, name: str, what: str, path: Path | None, step: int) -> None:
        """Where a tracker takes pictures, each in the form that it takes."""
        if path is None or not path.is_file():
            return
        tracker = self._trackers[name]
        if name == "mlflow":
            tracker.log_artifact(str(path), f"{what}/{step:04d}")
        elif hasattr(tracker, "log_images"):
            picture = np.asarray(Image.open(path).convert("RGB"))
            if name == "tensorboard":
                tracker.log_images({what: picture[None]}, step=step, dataformats="NHWC")
            else:
                tracker.log_images({what: [picture]}, step=step)

    def _keep(self) -> None:
        if self._trackers:
            try:
                files.write_json(self.state, self.logged)
            except OSError as error:
                _warn("trackers", error)


class _Attempt:
    """Around a call of a tracker: what it changes for all of torch is put back, and where it fails it is left out."""

    def __init__(self, trackers: Trackers, name: str):
        self.trackers, self.name = trackers, name

    def __enter__(self) -> None:
        self.contained = foreign.contained(f"tracker {self.name}")
        self.contained.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        self.contained.__exit__(None, None, None)
        if not isinstance(error, Exception):
            return False
        self.trackers._trackers.pop(self.name, None)
        _warn(self.name, error)
        return True


def _warn(name: str, error: Exception) -> None:
    line = (str(error).strip().splitlines() or [""])[0]
    text = f"tracker {name} failed and is left out of the rest of this run ({type(error).__name__}: {line})"
    print(errors.plain(text), file=sys.stderr, flush=True)


def _curves(r: Round) -> dict[str, float]:
    """What a round's curves are called in a tracker."""
    own = (
        "queries",
        "reward",
        "reward_sd",
        "base_on_prompts",
        "rise",
        "base_reward",
        "winner_reward",
        "pairs",
        "dropped",
    )
    values = {f"round/{name}": getattr(r, name) for name in own} | {f"train/{k}": v for k, v in r.metrics.items()}
    return {name: float(value) for name, value in values.items() if value is not None}


def _verdict(v: Verdict) -> Iterator[tuple[str, float]]:
    yield from (("base", v.base), ("trained", v.trained), ("gain", v.gain.mean))


def _flat(content: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, str | float | int | bool]]:
    """Options by dotted names; lists of prompts as their number."""
    for key, value in content.items():
        full = f"{name}.{key}" if name else str(key)
        if isinstance(value, Mapping):
            yield from _flat(value, full)
        elif isinstance(value, list | tuple) and len(value) > 8:
            yield f"{full}.count", len(value)
        elif value is not None:
            yield full, value if isinstance(value, str | float | int | bool) else str(value)
