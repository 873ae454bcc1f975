"""Whole runs on tiny checkpoints of every family, saved and loaded as a user's: they train, stop and resume."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from rounds import stopped_in_round
from tiny import policy_of, tokenizers_read_once

import bench_dfusion
from bench_dfusion.results import records
from bench_dfusion.results.records import Record


def run(folder: Path, out: Path, algo: str, builder: str, *more: str) -> Record:
    """Two rounds."""
    prompts = folder.with_name("prompts.txt")
    prompts.write_text("\n".join(f"a {colour} bus" for colour in ("red", "blue", "green")))
    settings = [
        "track.budget.prompts_per_round=1",
        "track.budget.samples_per_prompt=4",
        f"track.budget.reward_queries={12 if builder == 'dfusion' else 8}",
        'track.prompts.heldout=["a purple cup", "two horses"]',
        "track.evaluation.images_per_prompt=1",
        "track.sampler.steps=3",
        "track.evaluation.sampler=null",
        "algo.inner_epochs=1",
        "track.rewards.clip.model=micro",
        "track.model.resolution=32",
    ]
    names: dict[str, Any] = {"algo": algo, "builder": builder, "reward": "clip"}
    with tokenizers_read_once():
        return bench_dfusion.run(**names, model=str(folder), prompts=prompts, settings=[*settings, *more], out=out)


def trains_and_leaves_a_lora_for_diffusers(model: Path, out: Path, record: Record) -> None:
    assert record.status == "finished" and len(record.rounds) == 2 and record.cost.updates > 0
    assert record.rounds[0].reward_sd and record.verdicts[0].gain.mean != 0
    ((path, _),) = records.find(out)
    DiffusionPipeline.from_pretrained(model).load_lora_weights(path.parent)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Record]:
    """A run of a checkpoint, algorithm and builder that nothing disturbs, the same for all tests that ask."""

    @cache
    def found(folder: Path, algo: str, builder: str, *more: str) -> Record:
        out = tmp_path_factory.mktemp("calm") / "runs"
        record = run(folder, out, algo, builder, *more)
        trains_and_leaves_a_lora_for_diffusers(folder, out, record)
        return record

    return found


@pytest.mark.parametrize(
    ("name", "algo", "builder", "more"),
    [
        pytest.param("sdxl", "dpo", "dfusion", [], marks=pytest.mark.slow),
        pytest.param("sd21", "ddpo", "vanilla", [], marks=pytest.mark.slow),
        ("sd3", "dpo", "dfusion", []),
        ("flux", "ddpo", "vanilla", ["algo.sde_window.steps=1", "algo.sde_window.every=1"]),
    ],
)
def test_a_stopped_run_resumes_to_the_same_record(
    name: str,
    algo: str,
    builder: str,
    more: list[str],
    calm: Callable[..., Record],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    folder = request.getfixturevalue(f"{name}_dir")
    expected = calm(folder, algo, builder, *more)
    with stopped_in_round(1):
        run(folder, tmp_path / "stopped", algo, builder, *more)
    record = run(folder, tmp_path / "stopped", algo, builder, *more)
    assert record.comparable() == expected.comparable()


@pytest.mark.parametrize(
    ("name", "algo", "builder"),
    [
        ("sdxl", "ddpo", "vanilla"),
        pytest.param("sd3", "ddpo", "vanilla", marks=pytest.mark.slow),  # the calm ones above are of these families
        pytest.param("flux", "dpo", "dfusion", marks=pytest.mark.slow),
    ],
)
def test_a_run_trains_and_leaves_a_lora_for_diffusers(
    name: str, algo: str, builder: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(f"{name}_dir")
    record = run(folder, tmp_path / "runs", algo, builder)
    trains_and_leaves_a_lora_for_diffusers(folder, tmp_path / "runs", record)


def test_what_saves_memory_changes_no_number(
    calm: Callable[[Path, str, str], Record], sd3_dir: Path, tmp_path: Path
) -> None:
    plain = calm(sd3_dir, "dpo", "dfusion")
    options = ("drop_text", "offload_vae", "offload_rewards", "offload_text")
    saved = run(sd3_dir, tmp_path / "saved", "dpo", "dfusion", *(f"track.memory.{o}=true" for o in options))
    assert saved.verdicts == plain.verdicts and [r.metrics for r in saved.rounds] == [r.metrics for r in plain.rounds]


def test_dropped_text_encoders_are_gone(sd3_dir: Path) -> None:
    policy = policy_of(sd3_dir)
    known = policy.condition(["a red bus"])
    policy.adapter.drop_text()
    assert policy.adapter.pipe.text_encoder_3 is policy.adapter.pipe.text_encoder is None
    assert all(torch.equal(v, known[k]) for k, v in policy.condition(["a red bus"]).items())
    with pytest.raises(ValueError, match="drop_text off"):
        policy.condition(["a blue bus"])
