"""Code of others: what it changes for the whole process is put back, what it writes into is a copy."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench_dfusion import plugin_files, registry
from bench_dfusion.errors import PluginError
from bench_dfusion.rewards import contract, sums, user_function
from bench_dfusion.rewards.contract import RewardConfig
from bench_dfusion.testing.fakes import RED, Red
from bench_dfusion.util import foreign

CHANGES = [
    lambda: torch.set_grad_enabled(False),
    lambda: torch.set_default_dtype(torch.float64),
    lambda: torch.set_default_device("meta"),
    lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    lambda: torch.autograd.set_detect_anomaly(True),
    lambda: torch.set_autocast_enabled("cpu", True),
    lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    lambda: setattr(torch.backends.cudnn, "benchmark", True),
    lambda: torch.set_float32_matmul_precision("medium"),
    lambda: torch.backends.cuda.enable_flash_sdp(False),
    lambda: torch.manual_seed(1),
    lambda: np.random.seed(1),
    lambda: random.seed(1),
    lambda: np.seterr(all="raise"),
    lambda: os.chdir("/"),
]


def state() -> list[Any]:
    random_numbers = [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]
    return [read() for read, _ in foreign.SETTINGS] + random_numbers


@pytest.mark.parametrize("number", range(len(CHANGES)))
@pytest.mark.parametrize("ending", ["returns", "raises"])
def test_what_is_changed_for_the_process_is_put_back(number: int, ending: str) -> None:
    before = state()
    try:
        with foreign.contained("x"):
            CHANGES[number]()
            changed = state()
            if ending == "raises":
                raise KeyError
    except KeyError:
        pass
    assert changed != before and state() == before
    assert torch.zeros(1).device.type == "cpu"


def test_what_cannot_be_put_back_names_who_did_it() -> None:
    guard = torch.inference_mode()
    with (
        pytest.raises(PluginError, match="reward hidden leaves torch's inference mode on"),
        foreign.contained("reward hidden"),
    ):
        guard.__enter__()
    guard.__exit__(None, None, None)


def test_a_file_that_changes_torch_when_it_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_from_files", {})
    path, source = tmp_path / "mine.py", "import torch\ntorch.set_grad_enabled(False)\ntorch.manual_seed(0)\n"
    before = state()
    path.write_text(source + "def score(images, prompts):\n    return [0.0] * len(images)\n")
    user_function.load(f"{path}:score")
    assert state() == before
    path.write_text(source + "from bench_dfusion.testing.fakes import Red\nclass Mine(Red):\n    name = 'mine'\n")
    plugin_files.load_file(path)
    assert state() == before


class Blank(Red):
    """Scores like red, then blanks what it was given; its scores are one tensor, filled anew each time."""

    name = "blank"

    def __init__(self, config: RewardConfig):
        super().__init__(config)
        self.buffer = torch.zeros(2)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.buffer.copy_(super().score(images, prompts))
        images.zero_()
        return self.buffer

    def score_tensors(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        scores = super().score_tensors(images, prompts)
        images.mul_(0)
        return scores

    def embed(self, images: Tensor) -> Tensor:
        return images.zero_().flatten(1) + 1


def pictures(value: int = 51) -> Tensor:
    return torch.full((2, 4, 4, 3), value, dtype=torch.uint8)


def test_pictures_and_scores_are_copies() -> None:
    blank, images, prompts = Blank(RewardConfig()), pictures(), ["a", "b"]
    first = contract.scored_in_shards(blank, images, prompts)
    assert first.tolist() == pytest.approx([0.2, 0.2]) and torch.equal(images, pictures())
    contract.scored_in_shards(blank, pictures(255), prompts)
    assert first.tolist() == pytest.approx([0.2, 0.2])
    scores, applies = contract.scored_where_applicable(blank, images, prompts)
    assert applies.all() and torch.equal(images, pictures()) and scores.tolist() == pytest.approx([0.2, 0.2])
    contract.embedded(blank, images)
    assert torch.equal(images, pictures())


def test_no_component_of_a_sum_sees_what_another_wrote() -> None:
    kind = sums.of([("blank", Blank, 1.0), ("red", Red, 1.0)])
    total = object.__new__(kind)
    total.config = sums.SumConfig(
        components={n: sums.ComponentConfig(weight=1.0, options=RewardConfig()) for n in ("blank", "red")}
    )
    total.components = {"blank": Blank(RewardConfig()), "red": RED}
    assert total.score(pictures(), ["a", "b"]).tolist() == pytest.approx([0.4, 0.4])
    images = torch.full((2, 3, 4, 4), 0.2, requires_grad=True)
    scores = contract.scored_with_gradient(total, images.sigmoid(), ["a", "b"])
    assert scores.tolist() == pytest.approx((2 * torch.tensor([0.2, 0.2]).sigmoid()).tolist())
    scores.sum().backward()
    assert images.grad is not None and (images.grad[:, 0] > 0).all()


def test_what_is_no_score_is_named() -> None:
    class Words(Red):
        name = "words"

        def score(self, images: Tensor, prompts: Sequence[str]) -> Any:
            return ["good"] * len(images)

        def score_tensors(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return super().score_tensors(images.detach(), prompts)

        def embed(self, images: Tensor) -> Tensor:
            return images.flatten(1) / 0

    words = Words(RewardConfig())
    with pytest.raises(PluginError, match="reward words returned list, not a tensor of numbers"):
        contract.scored_in_shards(words, pictures(), ["a", "b"])
    with pytest.raises(PluginError, match="reward words says it is differentiable"):
        contract.scored_with_gradient(words, torch.zeros(2, 3, 4, 4, requires_grad=True), ["a", "b"])
    with pytest.raises(PluginError, match="reward words: its image embedding is not finite"):
        contract.embedded(words, pictures())
