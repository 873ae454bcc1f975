"""The doctor's estimates against what loading and running really take; what it says, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import command

from bench_dfusion import doctor
from bench_dfusion.models.loading import load_adapter
from bench_dfusion.policy import Policy
from bench_dfusion.registry import UsageError
from bench_dfusion.track import MemorySection, ModelSection

CPU = torch.device("cpu")
SMALL = [
    "track.rewards.clip.model=micro",
    "track.budget.prompts_per_round=2",
    "track.budget.samples_per_prompt=4",
    "track.sampler.steps=4",
    "track.batch=4",
    "track.model.resolution=32",
]


def estimate(folder: Path, *settings: str, memory_gb: float | None = None, **names: str) -> doctor.Estimate:
    cell, _ = doctor.resolve(model=str(folder), settings=[*SMALL, *settings], **names)
    return doctor.estimate(cell, CPU, memory_gb)


def phase(found: doctor.Estimate, name: str) -> dict[str, int]:
    return next(p.parts for p in found.phases if p.name == name)


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_weights_and_what_is_trained_are_exact(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(f"{name}_dir")
    found = estimate(folder, algo="ddpo", builder="vanilla")
    adapter, _ = load_adapter(ModelSection(id=str(folder), resolution=32))
    policy = Policy(adapter, steps=4)
    loaded = {n: p for n, p in adapter.pipe.components.items() if isinstance(p, torch.nn.Module)}
    lora = sum(p.numel() for p in policy.parameters.values())
    for part, network in loaded.items():
        own = sum(p.numel() for n, p in network.named_parameters() if "lora_" not in n)
        assert found.parameters[part] == own
        assert phase(found, "train")[part] == 4 * own + sum(b.nbytes for b in network.buffers())
    assert found.parameters["LoRA"] == lora
    optimizer = torch.optim.AdamW(policy.parameters.values())
    step, x = torch.tensor([1]), torch.randn(1, *adapter.latent_shape)
    policy.log_prob(x, x, step, ["a cat"]).sum().backward()
    optimizer.step()
    state = sum(v.nbytes for s in optimizer.state.values() for k, v in s.items() if k != "step")
    assert phase(found, "train")["AdamW"] == state == 8 * lora and phase(found, "train")["LoRA"] == 4 * lora
    assert not [n for n in found.notes if "its files hold" in n]


def kept_bytes(policy: Policy, batch: int) -> int:
    """What autograd keeps of a training step's forward, each storage once, weights left out."""
    own = {p.untyped_storage().data_ptr() for p in policy.adapter.network.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    x, step = torch.randn(batch, *policy.adapter.latent_shape), torch.ones(batch, dtype=torch.long)
    policy.condition(["a cat"])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        policy.log_prob(x, x, step, ["a cat"] * batch).sum()
    return sum(s.nbytes() for s in kept.values())


@pytest.mark.parametrize(("name", "checkpointing"), [("sd", False), ("flux", True)])
def test_what_autograd_keeps_is_what_it_keeps(name: str, checkpointing: bool, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(f"{name}_dir")
    found = estimate(
        folder, f"track.memory.gradient_checkpointing={str(checkpointing).lower()}", algo="ddpo", builder="vanilla"
    )
    adapter, _ = load_adapter(
        ModelSection(id=str(folder), resolution=32), memory=MemorySection(gradient_checkpointing=checkpointing)
    )
    policy = Policy(adapter, steps=4, guidance=5.0)
    measured = kept_bytes(policy, 4)
    assert phase(found, "train")["kept for the backward"] == pytest.approx(measured, rel=0.1)


def test_checkpointing_and_a_smaller_batch_keep_less(sd_dir: Path) -> None:
    def kept(*settings: str) -> int:
        return phase(estimate(sd_dir, *settings, algo="ddpo", builder="vanilla"), "train")["kept for the backward"]

    whole = kept()
    assert kept("track.memory.gradient_checkpointing=true") < 0.5 * whole
    assert kept("track.batch=2") == pytest.approx(whole / 2, rel=0.1)


@pytest.mark.slow
def test_what_it_suggests_fits(sd_dir: Path) -> None:
    whole = estimate(sd_dir)
    assert whole.fits
    needed = whole.peak.peak / 1e9
    tight = estimate(sd_dir, memory_gb=needed - 0.3 * (needed - whole.phases[0].peak / 1e9))
    assert not tight.fits and tight.changes and tight.smallest
    again = estimate(sd_dir, *(f"track.{k}={json.dumps(v)}" for k, v in tight.smallest.items()))
    grown = (
        phase(again, "load")["process"] - phase(tight, "load")["process"]
    )  # this process, by the estimates themselves
    assert again.peak.peak - grown == tight.smallest_peak <= tight.available
    hopeless = estimate(sd_dir, memory_gb=0.01)
    assert not hopeless.fits and not hopeless.smallest


def test_the_command_opens_no_weights(sd_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(sd_dir, tmp_path / "sd")
    for file in (tmp_path / "sd").rglob("*.safetensors"):
        size = int.from_bytes(file.read_bytes()[:8], "little")
        file.write_bytes(file.read_bytes()[: 8 + size])  # the header alone
    words = ("doctor", "--model", "sd", "--device", "cpu", *(f"--set={s}" for s in SMALL))
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "fits:" in done.stdout and "peak:" in done.stdout and "stand in" in done.stdout


@pytest.mark.slow
def test_the_command_says_what_does_not_fit(sd_dir: Path, tmp_path: Path) -> None:
    words = ("doctor", "--model", str(sd_dir), "--device", "cpu", *(f"--set={s}" for s in SMALL))
    done = command(*words, "--memory-gb=0.5", "--json", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    said = json.loads(done.stdout)
    assert not said["fits"] and said["peak"] > 5e8


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "nowhere/at-all"}, "nowhere/at-all"),
        ({"algo": "dpq"}, "did you mean dpo"),
        ({"settings": ["track.batch=0"]}, "track.batch"),
    ],
)
def test_a_mistake_is_one_line(
    options: dict[str, Any], said: str, sd_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=said):
        cell, _ = doctor.resolve(**{"model": str(sd_dir), **options})
        doctor.estimate(cell, CPU)


def test_a_part_without_a_config_is_named(sd_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(sd_dir, tmp_path / "sd")
    (tmp_path / "sd" / "unet" / "config.json").unlink()
    with pytest.raises(UsageError, match=r"unet/config\.json"):
        estimate(tmp_path / "sd")
    with pytest.raises(UsageError, match="memory-gb"):
        estimate(sd_dir, memory_gb=-1.0)
