"""`lora.rank = 0`: the network's own weights are trained, the base stays as the reference, and what is saved is a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from processes import SETTINGS
from rounds import stopped_in_round
from tiny import policy_of
from torch import nn

import bench_dfusion
from bench_dfusion import doctor
from bench_dfusion.diffusion import lora
from bench_dfusion.diffusion.policy import Policy
from bench_dfusion.doctor.memory import Memory
from bench_dfusion.errors import UsageError
from bench_dfusion.models.loading import load_adapter
from bench_dfusion.publish import model
from bench_dfusion.results import companions, records
from bench_dfusion.results.records import Record
from bench_dfusion.runs import config, rescore, trainer
from bench_dfusion.runs.loaded import Loaded
from bench_dfusion.testing.fakes import shake

FAMILIES = ("sd", "sdxl", "pixart", "sd3", "flux")
WHOLE = [*SETTINGS, "track.budget.reward_queries=16", "track.sampler.steps=4", "track.lora.rank=0"]


def whole_of(request: pytest.FixtureRequest, name: str, **options: Any) -> Policy:
    options |= {"resolution": 32} if name == "flux" else {}
    return policy_of(request.getfixturevalue(f"{name}_dir"), lora=0, steps=3, batch=2, rank=0, **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_familys_own_weights_train_beside_the_base_and_go_to_diffusers(name, request, tmp_path: Path) -> None:
    policy = whole_of(request, name)
    network = policy.adapter.network
    assert set(policy.parameters) == {n for n, _ in network.named_parameters()}
    assert not any("lora_" in n for n in policy.parameters)
    with_lora = policy_of(
        request.getfixturevalue(f"{name}_dir"),
        lora=0,
        steps=3,
        batch=2,
        **({"resolution": 32} if name == "flux" else {}),
    )
    prompts, seeds = ["a red circle", "two blue rings"], torch.tensor([1, 2])
    drawn = policy.sample(prompts, seeds)
    torch.testing.assert_close(drawn.latents, with_lora.sample(prompts, seeds).latents)
    shake(policy, 0.02)
    moved = policy.sample(prompts, seeds)
    assert not torch.allclose(moved.latents, drawn.latents, atol=1e-4)
    with policy.reference():
        assert torch.equal(policy.sample(prompts, seeds).latents, drawn.latents)
    assert torch.equal(policy.sample(prompts, seeds).latents, moved.latents)
    step = torch.zeros(2, dtype=torch.long)
    policy.log_prob(moved.latents[:, 0], moved.latents[:, 1], step, prompts).sum().backward()
    assert sum(p.grad is not None for p in policy.parameters.values()) > len(policy.parameters) / 2
    policy.save(tmp_path)
    assert policy.file == "diffusion_pytorch_model.safetensors" == companions.WHOLE == lora.WHOLE
    loaded: nn.Module = getattr(diffusers, type(network).__name__).from_pretrained(tmp_path)
    own = network.state_dict()
    assert own.keys() == loaded.state_dict().keys()
    assert all(torch.equal(v, own[n]) for n, v in loaded.state_dict().items())
    assert str(request.getfixturevalue(f"{name}_dir")) not in (tmp_path / "config.json").read_text()
    again = whole_of(request, name)
    again.load(tmp_path / policy.file)
    assert torch.equal(again.sample(prompts, seeds).latents, moved.latents)


def test_targets_choose_the_modules(sd_dir: Path) -> None:
    policy = policy_of(sd_dir, lora=0, rank=0, targets=["attn2.to_k"])
    assert policy.parameters and all(".attn2.to_k." in n for n in policy.parameters)
    assert {n for n, p in policy.adapter.network.named_parameters() if p.requires_grad} == set(policy.parameters)
    with pytest.raises(ValueError, match=r"lora.targets to_x: no module of UNet2DConditionModel ends so"):
        policy_of(sd_dir, lora=0, rank=0, targets=["to_x"])


def test_weights_of_another_shape_are_refused(sd_dir: Path, tmp_path: Path) -> None:
    policy_of(sd_dir, lora=0, rank=2).save(tmp_path)
    policy = policy_of(sd_dir, lora=0, rank=0)
    with pytest.raises(ValueError, match="not the network's own weights: .* is missing"):
        policy.load(tmp_path / lora.FILE)
    (tmp_path / lora.WHOLE).write_text("no tensors")
    with pytest.raises(UsageError, match="cannot be read as a network's weights"):
        policy.load(tmp_path / lora.WHOLE)


def test_what_a_track_has_for_a_lora_means_nothing() -> None:
    given = {"algo": "ddpo", "builder": "vanilla", "reward": "oracle"}
    plain = config.resolve(**given, settings=WHOLE)
    more = ["track.lora.alpha=4", "track.lora.init=gaussian"]
    assert config.resolve(**given, settings=[*WHOLE, *more]).track.hash == plain.track.hash


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["track.model.dtype=bfloat16"], "set model.dtype to float32, and model.autocast to bfloat16"),
        (["track.memory.shard=true"], "leave memory.shard and memory.offload_network off"),
        (["track.memory.offload_network=true"], "leave memory.shard and memory.offload_network off"),
        (["track.lora.rank=-1"], "greater than or equal to 0"),
    ],
)
def test_what_does_not_go_with_it_is_one_line(settings: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config.resolve(algo="ddpo", builder="vanilla", reward="oracle", settings=[*WHOLE, *settings])


def run(out: Path, model: Path, loaded: Loaded | None = None, seed: int = 0, *more: str) -> tuple[Path, Record]:
    cell = config.resolve(
        algo="nft",
        builder="vanilla",
        reward="oracle",
        model=str(model),
        track_source="micro",
        seed=seed,
        settings=[*WHOLE, "algo.learning_rate=1e-4", "track.budget.prompts_per_round=1", "algo.kl=0.1", *more],
    )
    return out / cell.folder, trainer.run_cell(cell, out, "cpu", loaded=loaded)


def test_a_run_is_judged_again_resumed_and_leaves_nothing_to_the_next(pixart_dir: Path, tmp_path: Path) -> None:
    folder, calm = run(tmp_path / "calm", pixart_dir)
    assert calm.status == "finished" and calm.cost.updates > 0 and calm.drift is not None and calm.drift.kl > 0
    assert list(records.check(calm)) == []
    files = {p.name for p in folder.iterdir()}
    assert {"diffusion_pytorch_model.safetensors", "config.json", "README.md"} <= files and lora.FILE not in files
    assert companions.beside(folder / "record.json", calm).keys() == {lora.WHOLE}
    again = rescore.run(folder)
    assert again.status == "matches" and again.exact
    card = (folder / "README.md").read_text()
    assert "PixArtTransformer2DModel.from_pretrained(" in card and "A LoRA" not in card and "- lora" not in card
    assert {p.name for p in model._pushed(folder)} >= {lora.WHOLE, "config.json", "record.json"}
    with stopped_in_round(1):
        run(tmp_path / "stopped", pixart_dir)
    loaded = Loaded()
    run(tmp_path / "stopped", pixart_dir, loaded, 1)  # another seed trains the pipeline that is kept
    _, resumed = run(tmp_path / "stopped", pixart_dir, loaded)
    assert resumed.comparable() == calm.comparable()


def test_doctor_counts_the_weights_twice_and_what_the_optimiser_keeps(pixart_dir: Path) -> None:
    settings = [*WHOLE, 'track.evaluation.judges=["jpeg-compressibility"]']
    cell, _ = doctor.resolve(
        model=str(pixart_dir), settings=settings, algo="ddpo", builder="vanilla", reward="jpeg-compressibility"
    )
    doctored = Memory(cell, torch.device("cuda"), fresh=True)
    found, counted = doctored._layout(cell.track)["train"], doctored.parameters(cell.track)
    adapter, _ = load_adapter(cell.track.model)
    own = sum(p.nbytes for p in adapter.network.parameters())
    buffers = sum(b.nbytes for b in adapter.network.buffers())
    wanted = {"transformer": own + buffers, "trained weights": own, "gradients": own, "AdamW": 2 * own}
    assert {name: found[name] for name in wanted} == wanted and "LoRA" not in found
    assert counted["trained weights"] == counted["transformer"] == own // 4


def test_a_public_run_takes_it_too(tmp_path: Path) -> None:
    settings = [*WHOLE, "algo.learning_rate=1e-5", "track.budget.reward_queries=8"]
    record = bench_dfusion.run(algo="sft", builder="vanilla", reward="oracle", settings=settings, out=tmp_path)
    assert record.status == "finished" and json.loads(next(tmp_path.rglob("config.json")).read_text())["_class_name"]
