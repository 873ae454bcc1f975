"""What cells of one process share: each ends as it would alone, and is given what it would have loaded."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_dfusion.reward_models.clip import Clip
from bench_dfusion.reward_models.oracle import Oracle
from processes import SETTINGS
from rounds import stopped_in_round
from tiny import policy_of

from bench_dfusion.diffusion.policy import remove_lora
from bench_dfusion.results import records
from bench_dfusion.runs import config
from bench_dfusion.runs.config import Cell
from bench_dfusion.runs.loaded import Loaded
from bench_dfusion.runs.trainer import Run, run_cell

CPU = torch.device("cpu")
SHORT = [*SETTINGS, "track.budget.reward_queries=16", "track.model.autocast=bfloat16"]


def cell_of(folder: Path, *settings: str, **options: Any) -> Cell:
    given = {"algo": "dpo", "builder": "vanilla", "reward": "clip", **options}
    return config.resolve(track_source="micro", model=str(folder), settings=[*SHORT, *settings], **given)


def left(folder: Path, cell: Cell) -> tuple[dict[str, Any], dict[str, bytes]]:
    """A record and the files of the LoRA."""
    files = ("pytorch_lora_weights.safetensors", "peft/adapter_model.safetensors", "base_trained.png")
    own = folder / cell.folder
    return records.read(own / "record.json").comparable(), {name: (own / name).read_bytes() for name in files}


def test_cells_one_after_another_end_as_each_alone(pixart_dir: Path, tmp_path: Path) -> None:
    cells = [
        cell_of(pixart_dir, algo="kto", builder="dfusion"),
        cell_of(pixart_dir, algo="draft", seed=1),  # gradients through the decoder and the reward
        # a second set of weights, in the algorithm's state
        cell_of(pixart_dir, "track.lora.rank=2", algo="nft", reward="clip:0.7,oracle:0.3", seed=2),
    ]
    with stopped_in_round(1):  # the last one goes on from its first round
        run_cell(cells[-1], tmp_path / "one process", "cpu")
    loaded = Loaded()
    for cell in cells:
        run_cell(cell, tmp_path / "one process", "cpu", loaded=loaded)
    for cell in cells:
        run_cell(cell, tmp_path / "alone", "cpu")
        assert left(tmp_path / "one process", cell) == left(tmp_path / "alone", cell), cell.folder


def test_what_is_equal_is_kept_and_what_is_not_is_freed(pixart_dir: Path, tmp_path: Path) -> None:
    loaded, kept = Loaded(), []

    def begin(*settings: str, **options: Any) -> tuple[Any, ...]:
        run = Run(cell_of(pixart_dir, *settings, **options), tmp_path, "cpu", loaded=loaded)
        parts = (run.policy.adapter, run.reward, *run.judges.values())
        assert len({id(part) for part in parts}) == len(parts), "none serves twice"
        kept.append([weakref.ref(part) for part in parts])
        return parts

    judges = 'track.evaluation.judges=["oracle","clip"]'
    first = [id(part) for part in begin(judges)]
    second = [id(part) for part in begin(judges, algo="ddpo", builder="dfusion", seed=3)]
    assert sorted(first) == sorted(second)
    other = begin(judges, "reward.batch=64")
    assert id(other[0]) == first[0] and id(other[1]) not in first and isinstance(other[1], Clip)
    del other
    begin('track.evaluation.judges=["oracle"]', reward="oracle")
    gc.collect()
    assert [ref() is None for ref in kept[2]] == [False, True, False, True], "both clips are freed, the oracle stays"
    begin(judges, "track.memory.vae_slicing=false", "track.memory.gradient_checkpointing=true")
    gc.collect()
    assert kept[0][0]() is None, "another pipeline"


def test_code_of_others_and_what_a_run_takes_apart_is_made_anew(pixart_dir: Path, tmp_path: Path) -> None:
    class Own(Oracle):
        """Of a plugin."""

    mine = tmp_path / "mine.py"
    mine.write_text("def level(images, prompts):\n    return images.float().mean((1, 2, 3)) / 255\n")
    loaded, plain = Loaded(), cell_of(pixart_dir, reward="oracle")
    for cell in (
        replace(plain, reward=Own),
        cell_of(pixart_dir, reward=f"{mine}:level"),
        cell_of(pixart_dir, reward=f"oracle:1,{mine}:level:2"),
    ):
        found = []
        for _ in range(2):
            loaded.begin(cell, CPU)
            found.append(loaded.reward(cell.reward, cell.reward_config, CPU))
        assert found[0] is not found[1], cell.reward.name
    dropped = cell_of(pixart_dir, "track.memory.drop_text=true")
    first, second = (Run(dropped, tmp_path, "cpu", loaded=loaded) for _ in range(2))
    assert first.policy.adapter is not second.policy.adapter
    assert second.policy.adapter.pipe.text_encoder is None


def test_a_reward_that_rested_is_where_the_next_cell_wants_it(pixart_dir: Path, tmp_path: Path) -> None:
    offload, loaded = "track.memory.offload_rewards=true", Loaded()
    assert Run(cell_of(pixart_dir, offload), tmp_path, "cpu", loaded=loaded).reward.offloaded
    assert not Run(cell_of(pixart_dir, offload, algo="draft"), tmp_path, "cpu", loaded=loaded).reward.offloaded
    assert Run(cell_of(pixart_dir, offload), tmp_path, "cpu", loaded=loaded).reward.offloaded


def test_random_numbers_and_settings_are_where_loading_leaves_them(pixart_dir: Path, tmp_path: Path) -> None:
    cell, shared, found = cell_of(pixart_dir), Loaded(), []
    own, start = torch.backends.mkldnn.matmul.fp32_precision, torch.get_rng_state()
    for loaded in (shared, shared, Loaded()):
        Run(cell, tmp_path, "cpu", loaded=loaded)
        found.append((torch.rand(3).tolist(), torch.backends.mkldnn.matmul.fp32_precision))
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # what a cell leaves
        if len(found) == 2:  # then alone, as in a new process
            torch.set_rng_state(start)
            torch.backends.mkldnn.matmul.fp32_precision = own
    torch.backends.mkldnn.matmul.fp32_precision = own
    assert found[0] == found[1] == found[2] and found[0][1] == own


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "pixart"])
def test_a_network_without_its_lora_is_as_it_was(name: str, request: pytest.FixtureRequest) -> None:
    policy = policy_of(request.getfixturevalue(f"{name}_dir"), lora=0.0, resolution=32 if name == "flux" else None)
    network = policy.adapter.network
    first, names = policy.weights(), [n for n, _ in network.named_modules()]
    remove_lora(network)
    bare = [n for n, _ in network.named_modules()]
    assert not any("lora" in n or "base_layer" in n for n in bare) and not hasattr(network, "peft_config")
    assert all(not p.requires_grad for p in network.parameters())
    again = type(policy)(policy.adapter, steps=4)
    assert [n for n, _ in network.named_modules()] == names
    assert again.weights().keys() == first.keys()
    assert all(torch.equal(value, first[n]) for n, value in again.weights().items())


def test_peak_memory_is_of_what_came_since() -> None:
    held = torch.ones(60_000_000)
    high = records.peak_memory_mb(CPU)
    del held
    records.restart_peak_memory(CPU)
    low = records.peak_memory_mb(CPU)
    assert low < high - 200, "240 MB less"
    torch.ones(60_000_000)
    assert records.peak_memory_mb(CPU) > low + 200
