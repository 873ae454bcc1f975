"""The record a finished cell leaves: what ran, what it cost, what every judge said. JSON, typed, one schema."""

from __future__ import annotations

import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bench_dfusion import files
from bench_dfusion.registry import UsageError
from bench_dfusion.track import Track

SCHEMA = 1


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Gain(Part):
    mean: float = Field(description="mean over prompts of trained − base on the same noise, in the judge's unit")
    low: float = Field(description="lower end of the 95 % interval")
    high: float = Field(description="upper end of the 95 % interval")
    kind: str = Field(description="how the interval was made; of one seed it covers the prompts, not the training")


class Verdict(Part):
    """One judge's figure for base and trained on the held-out prompts."""

    judge: str = Field(description="the reward plugin that judged")
    metric: str = Field(description="what it measured")
    trained_on: bool = Field(
        description="whether this judge was the training reward: then it is a ceiling and never ranks"
    )
    base: float = Field(description="mean over held-out images of the frozen base")
    trained: float = Field(description="mean over the same noise of the trained policy")
    gain: Gain = Field(description="the paired gain")
    templates: dict[str, tuple[float, float]] = Field(description="(base, trained) for each prompt template")
    per_prompt: list[tuple[float, float]] = Field(
        description="(base, trained) for each held-out prompt, in the track's order"
    )
    fingerprint: str = Field(description="hash of the judge's weights and rules")


class Drift(Part):
    pixels: float = Field(description="root mean square pixel distance trained − base on the same noise (8-bit levels)")
    kl: float = Field(
        description="mean per-step KL(trained || base) along trained trajectories, averaged over the latent (nats)"
    )
    diversity_base: float = Field(
        description="Vendi score within a prompt, mean over prompts, of the base (effective images)"
    )
    diversity_trained: float = Field(description="the same of the trained policy (effective images)")
    diversity_space: str = Field(description="what the Vendi score's embeddings are")


class Cost(Part):
    reward_queries: int = Field(description="images the training reward scored, targets included (count)")
    network_evaluations: int = Field(
        description="forwards of one sample through one branch, evaluation included (count)"
    )
    updates: int = Field(description="optimiser steps (count)")
    seconds: dict[str, float] = Field(description="wall time of each phase (s)")
    peak_memory_mb: float = Field(description="peak memory of the device, or of the process on a CPU (MB)")
    device: str = Field(description="the device's name")


class Round(Part):
    round: int = Field(description="number of the round, from 0")
    queries: int = Field(description="reward queries spent up to its end (count)")
    reward: float | None = Field(description="mean training reward of the drawn samples, None where none are drawn")
    reward_sd: float | None = Field(description="standard deviation of the drawn samples' rewards")
    base_reward: float | None = Field(description="mean training reward of the pairs' bases, kept or not")
    winner_reward: float | None = Field(description="mean training reward of their targets (vanilla: references)")
    pairs: int = Field(description="pairs kept (count)")
    dropped: int = Field(description="pairs dropped because the winner did not score above the loser (count)")
    metrics: dict[str, float] = Field(description="means over the round of the loss and what the algorithm reports")


class Provenance(Part):
    code: str | None = Field(description="git commit of the package's source, None outside a checkout")
    dirty: bool | None = Field(description="whether that checkout had changes")
    versions: dict[str, str] = Field(description="versions of Python and the packages that matter")
    plugins: dict[str, str] = Field(description="the distribution of each plugin")
    hardware: str = Field(description="processor, cores and system")
    model_sha256: str = Field(description="hash of the base model's weights and configuration")
    reward_fingerprint: str = Field(description="hash of the training reward's weights and rules")
    lora_sha256: str = Field(description="hash of the trained LoRA file")


class Record(Part):
    """One cell's result."""

    schema_version: Literal[1] = Field(1, description="version of this schema")
    status: Literal["finished", "failed"] = Field(
        description="failed: reward collapsed or turned non-finite; ranks as a miss"
    )
    evidence: str | None = Field(None, description="why the run failed")
    track: str = Field(description="the track's name and version")
    track_hash: str = Field(description="hash of everything the track fixes")
    cell_hash: str = Field(description="hash of the resolved configuration")
    algorithm: str = Field(description="the training backend")
    builder: str = Field(description="the builder of the consistent samples")
    reward: str = Field(description="the training reward")
    seed: int = Field(description="the training seed")
    given: dict[str, Any] = Field(description="the configuration as it was given")
    resolved: dict[str, Any] = Field(description="every option's value")
    tuning: str = Field("", description="how the track's suggestions for options were chosen, where it has any")
    verdicts: list[Verdict] = Field(description="what every judge said; the first ranks; empty where the run failed")
    drift: Drift | None = Field(None, description="how far the trained policy is from the base")
    rounds: list[Round] = Field(description="the training curve")
    cost: Cost = Field(description="what the run cost")
    provenance: Provenance = Field(description="what the numbers come from")

    @property
    def name(self) -> str:
        return f"{self.algorithm}/{self.builder}/{self.reward}/seed {self.seed}"

    def comparable(self) -> dict[str, Any]:
        """The record without what differs from run to run: timings, memory, hardware and code state."""
        content = self.model_dump(mode="json")
        for key in ("seconds", "peak_memory_mb", "device"):
            del content["cost"][key]
        for key in ("code", "dirty", "hardware", "versions"):
            del content["provenance"][key]
        return content


def read(path: Path) -> Record:
    """Read a record. Raises UsageError naming the file and the first thing wrong with it."""
    try:
        return Record.model_validate_json(path.read_bytes())
    except (ValidationError, OSError) as error:
        text = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            text = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise UsageError(f"{path} is no record of schema {SCHEMA}: {text}") from None


def write(path: Path, record: Record) -> None:
    files.write_json(path, record.model_dump(mode="json"))


def find(folder: Path) -> list[tuple[Path, Record]]:
    """Every record below a folder, by path."""
    return [(path, read(path)) for path in sorted(folder.rglob("record.json"))]


@dataclass(frozen=True)
class Unfinished:
    """A cell that was registered (cell.json) and has no record, with the error its last try ended in (error.json)."""

    folder: Path
    track: str
    track_hash: str
    cell_hash: str
    algorithm: str
    builder: str
    reward: str
    seed: int
    resolved: dict[str, Any]
    error: str | None


def find_unfinished(folder: Path) -> list[Unfinished]:
    """Every registered cell below a folder without a record, by path. Raises UsageError for a damaged file."""
    found = []
    for path in sorted(folder.rglob("cell.json")):
        if path.with_name("record.json").exists():
            continue
        try:
            content = files.read_json(path)
            resolved = content["resolved"]
            track = Track.model_validate(resolved["track"])
            error = path.with_name("error.json")
            found.append(
                Unfinished(
                    folder=path.parent,
                    track=track.id,
                    track_hash=track.hash,
                    cell_hash=content["hash"],
                    algorithm=resolved["algorithm"]["name"],
                    builder=resolved["builder"]["name"],
                    reward=resolved["reward"]["name"],
                    seed=resolved["seed"],
                    resolved=resolved,
                    error=files.read_json(error)["error"] if error.exists() else None,
                )
            )
        except (ValueError, KeyError, TypeError, OSError) as problem:
            raise UsageError(f"{path} describes no cell ({problem}); remove it, or run its cell again") from None
    return found


def code_state() -> tuple[str | None, bool | None]:
    """(commit, dirty) of the checkout this package runs from."""
    here = Path(__file__).parent.parent
    if not (here / ".git").exists():
        return None, None
    try:
        commit = _git(here, "rev-parse", "HEAD")
        return commit, bool(_git(here, "status", "--porcelain"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()


def versions() -> dict[str, str]:
    names = ("bench-dfusion", "torch", "diffusers", "transformers", "peft", "open_clip_torch", "numpy", "scipy")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def hardware() -> str:
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            model = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{model}, {torch.get_num_threads()} threads, {platform.system()} {platform.release()}"


def peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)
