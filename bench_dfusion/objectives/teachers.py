"""LoRAs that a run learns from: hashed before any compute, and read once the network that they are of is there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from bench_dfusion.diffusion import lora
from bench_dfusion.diffusion.policy import Policy
from bench_dfusion.errors import UsageError
from bench_dfusion.results import records


def hashes(paths: Sequence[str]) -> tuple[str, ...]:
    """The hash of each LoRA's file, wherever it lies: of a run's the one in its record. Raises UsageError."""
    return tuple(lora.digest(lora.locate(Path(path).expanduser())) for path in paths)


def read_weights(policy: Policy, path: str) -> dict[str, Tensor]:
    """The LoRA of a run's directory or of a file as weights of the policy, for `Policy.holding`.

    Raises UsageError where it is of another network or shape than the policy's LoRA, or its record names another base.
    """
    place = Path(path).expanduser()
    file = lora.locate(place)
    record = place / "record.json"
    if record.is_file():
        base = records.read(record).provenance.model_sha256
        if policy.adapter.sha256 not in (base, "none"):
            raise UsageError(
                f"the teacher {path} was trained on another base, {base[:12]}… and not {policy.adapter.sha256[:12]}…: "
                "give a run on this track's model"
            )
    found = lora.read(file, policy.adapter)
    its, own = found.config, policy.lora_config
    assert own is not None  # who takes teachers refuses rank 0
    for option, (theirs, ours) in {"rank": (its.r, own.r), "alpha": (its.lora_alpha, own.lora_alpha)}.items():
        if theirs != ours:
            raise UsageError(
                f"the teacher {path} has a LoRA of {option} {theirs:g}, this track one of {ours:g}: give one of these, or set "
                f"track.lora.{option}={theirs:g}"
            )
    if its.rank_pattern or its.alpha_pattern or its.use_rslora or its.use_dora:
        raise UsageError(f"the teacher {path} is no plain LoRA of one rank and alpha: give one as runs leave it")
    if policy.device.type == "meta":  # the doctor's networks hold no data
        return policy.weights()
    before = policy.state()
    try:
        policy.load_state(found.state)
        return policy.weights()
    except ValueError as error:
        raise UsageError(
            f"the teacher {path}: {error}; give a LoRA on this track's modules (track.lora.targets)"
        ) from None
    finally:
        policy.load_state(before)
