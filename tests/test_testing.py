"""The conformance kit: this package's own plugins keep their contracts, and every check of it finds the fault it is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench_dfusion import registry
from bench_dfusion.algorithm import Algorithm, AlgorithmConfig, Loss, Rows
from bench_dfusion.builders.contract import ConsistentSamples
from bench_dfusion.diffusion.policy import Policy
from bench_dfusion.objectives.advantages import advantages
from bench_dfusion.objectives.denoising import LevelsConfig, at_levels, noised
from bench_dfusion.testing import ContractError, check_algorithm, fake_policy, shake
from bench_dfusion.util import files

# Options by algorithm: those of the checks, those of the bandit, and what else is known of the loss. The late steps'
# gradients are larger by 1/sigma and nearly all noise, so that with every step alike nothing is learnt of the bandit.
EARLIER: dict[str, Any] = {"buffer": 4, "min_count": 4}
BUFFER: dict[str, Any] = {"buffer": 32, "min_count": 32, "step_weight": "sigma"}
SCORE: dict[str, Any] = {"estimator": "score", "updates": 1}
GRPO: dict[str, Any] = {"clip": 0.9, "kl": 0.5}
GRPO_BANDIT: dict[str, Any] = {"clip": 0.2, "kl": 0.04, "step_weight": "sigma"}
MIXED: dict[str, Any] = {
    "loss_type": ["robust", "apo_zero"],
    "loss_weights": [0.5, 2.0],
    "label_smoothing": 0.1,
}
PAIRS: dict[str, Any] = {"beta": 0.5, "window": (0.0, 0.6), "learning_rate": 2e-2}
ALGORITHMS: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None, bool]] = {
    "dpo": ("dpo", {"beta": 5.0, "ratio_clamp": 0.0}, {"beta": 0.1, "window": (0.0, 0.6)}, False),
    "dpo mixed": ("dpo", {"beta": 5.0, "step_weight": "sigma", **MIXED}, {**PAIRS, "step_weight": "one"}, False),
    "dpo sdpo": ("dpo", {"beta": 5.0, "ratio_clamp": 0.0, "sdpo": 0.9}, PAIRS, True),
    "diffusion-dpo": ("diffusion-dpo", {"beta": 20.0}, {"beta": 2.0}, False),
    "diffusion-dpo mixed": ("diffusion-dpo", {"beta": 20.0, **MIXED}, {"beta": 2.0, "learning_rate": 2e-2}, False),
    "diffusion-dpo sdpo": (
        "diffusion-dpo",
        {"beta": 20.0, "sdpo": 0.9},
        {"beta": 2.0, "learning_rate": 2e-2},
        True,
    ),
    "ddpo": ("ddpo", {"clip": 0.9, **EARLIER}, {"clip": 0.2, **BUFFER}, False),
    "ddpo score": ("ddpo", {**EARLIER, **SCORE}, {**BUFFER, "learning_rate": 2e-2}, False),
    "dpok": ("dpok", {**EARLIER, "clip": 0.9, "kl": 0.5}, {**BUFFER, "clip": 0.2, "kl": 0.1}, False),
    "dpok score": ("dpok", {**EARLIER, **SCORE, "kl": 0.5}, {**BUFFER, "learning_rate": 2e-2, "kl": 0.1}, False),
    "grpo": ("grpo", GRPO, GRPO_BANDIT, False),
    "grpo exact": ("grpo", {**GRPO, "kl_form": "exact", "spread": "round"}, GRPO_BANDIT, False),
    "grpo guard": ("grpo", {**GRPO, "guard": True}, {**GRPO_BANDIT, "step_weight": "one"}, False),
    "grpo divergence": (
        "grpo",
        {"kl": 0.5, "divergence": 1e9},
        {**GRPO_BANDIT, "divergence": 0.02, "learning_rate": 2e-2},
        False,
    ),
    "grpo cps": (
        "grpo",
        {**GRPO, "ratio_scale": "cps"},
        {**GRPO_BANDIT, "step_weight": "one", "learning_rate": 2e-2},
        False,
    ),
    "sft": ("sft", {}, {}, False),
    "rwr": ("rwr", {"tau": 0.7}, {"tau": 1.0}, False),
    "kto": (
        "kto",
        {"beta": 3.0, "desirable": 1.5, "undesirable": 0.5},
        {"beta": 2.0, "desirable": 1.0, "undesirable": 1.0},
        False,
    ),
    "dgpo": ("dgpo", {"beta": 3.0, "clip": 0.05, "kl": 0.7}, {"beta": 2.0, "kl": 0.0}, True),
    "nft": ("nft", {"beta": 0.6, "kl": 0.7}, {"beta": 1.0, "kl": 1e-4}, True),
    "crd": ("crd", {"beta": 0.6, "kl": 0.7, "space": "output"}, {"beta": 1.0, "kl": 1e-2}, True),
    "awm": (
        "awm",
        {"clip": 0.05, "weight": "time", "kl": 0.7, "kl_ema": 0.4},
        {"clip": 1.0, "weight": "one", "kl": 1e-3, "kl_ema": 1.0},
        False,
    ),
    "fdfo": ("fdfo", {"trust": 0.5, "kl": 0.7}, {"trust": 0.3, "kl": 0.0}, False),
    "draft": ("draft", {"last_steps": 2}, {}, False),
    "opd": ("opd", {"form": "kl"}, None, False),
}


def leave_lora(folder: Path, seed: int) -> str:
    """The LoRA of a moved fake policy as a peft directory, for a teacher."""
    policy = fake_policy()
    shake(policy, 0.15, seed=seed)
    assert policy.lora_config is not None
    policy.lora_config.save_pretrained(str(folder))
    state = {f"base_model.model.{name}": value for name, value in policy.state().items()}
    files.save_tensors(folder / "adapter_model.safetensors", state)
    return str(folder)


def test_every_algorithm_has_a_case() -> None:
    assert {name for name, *_ in ALGORITHMS.values()} == set(registry.plugins("algorithms"))


@pytest.mark.parametrize("case", ALGORITHMS)
def test_our_algorithms_keep_the_contract(case: str, tmp_path: Path) -> None:
    name, options, bandit, surrogate = ALGORITHMS[case]
    if name == "opd":
        options = {**options, "teachers": [leave_lora(tmp_path / str(k), 10 + k) for k in range(2)]}
    check_algorithm(registry.load("algorithms", name), options, bandit=bandit, surrogate=surrogate)


# ---------------------------------------------------------------- algorithms with a fault


class Sound(Algorithm):
    """Imitation weighted by the exponential of the advantage: nothing is wrong with it."""

    name, summary, paper = "sound", "imitates what scores well", "none"
    Config = LevelsConfig
    config: LevelsConfig
    offline = True

    def prepare(self, policy: Policy, samples: ConsistentSamples, generator: torch.Generator) -> Rows:
        rows = at_levels(policy, samples.train, self.config, generator)
        rows["weight"] = self.weights(samples).repeat_interleave(self.config.timesteps)
        return rows

    def weights(self, samples: ConsistentSamples) -> Tensor:
        return advantages(samples.samples, samples.train, 5.0).exp()

    def errors(self, policy: Policy, samples: ConsistentSamples, rows: Rows) -> Tensor:
        at = noised(policy, samples, rows["row"], rows["t"], rows["noise"])
        return at.error(policy, at.output(policy))

    def loss(self, policy: Policy, samples: ConsistentSamples, rows: Rows) -> Loss:
        error = self.errors(policy, samples, rows)
        return Loss((rows["weight"] * error).mean(), {"error": error.detach().mean()})


class Nameless(Sound):
    summary = ""


class UndescribedConfig(LevelsConfig):
    beta: float = 1.0


class Undescribed(Sound):
    Config = UndescribedConfig


class OtherConfig(Sound):
    Config = AlgorithmConfig.__base__  # type: ignore[assignment]


class Unseeded(Sound):
    def prepare(self, policy, samples, generator):
        rows = super().prepare(policy, samples, generator)
        return {**rows, "noise": torch.randint(2**62, (len(rows["noise"]),))}


class Ragged(Sound):
    def prepare(self, policy, samples, generator):
        return {**super().prepare(policy, samples, generator), "mean": samples.samples.rewards}


class ChangesTheRewards(Sound):
    def weights(self, samples):
        samples.samples.rewards -= samples.samples.rewards.mean()
        return super().weights(samples)


class ChangesThePolicy(Sound):
    def prepare(self, policy, samples, generator):
        shake(policy, 1e-3)
        return super().prepare(policy, samples, generator)


class KeepsTheGraph(Sound):
    def prepare(self, policy, samples, generator):
        rows = super().prepare(policy, samples, generator)
        return {**rows, "old": self.errors(policy, samples, rows)}


class WrongGradient(Sound):
    def loss(self, policy, samples, rows):
        value = super().loss(policy, samples, rows).value
        return Loss(3 * value.detach() - 2 * value)


class NoGradient(Sound):
    def loss(self, policy, samples, rows):
        with torch.no_grad():
            value = super().loss(policy, samples, rows).value
        return Loss(value + 0 * sum(p.sum() for p in policy.parameters.values()))


class PerRow(Sound):
    def loss(self, policy, samples, rows):
        return Loss(rows["weight"] * self.errors(policy, samples, rows))


class TrainsTheBase(Sound):
    def loss(self, policy, samples, rows):
        policy.adapter.network.into.bias.requires_grad_(True)
        return super().loss(policy, samples, rows)


class ByPlace(Sound):
    def loss(self, policy, samples, rows):
        place = torch.arange(1, len(rows["row"]) + 1)
        return Loss((place * self.errors(policy, samples, rows)).mean())


class Sums(Sound):
    def loss(self, policy, samples, rows):
        return Loss((rows["weight"] * self.errors(policy, samples, rows)).sum())


class NormalisesInTheLoss(Sound):
    def loss(self, policy, samples, rows):
        error = self.errors(policy, samples, rows)
        return Loss((error / error.mean() * error.detach().max()).square().mean())


class LiveFigure(Sound):
    def loss(self, policy, samples, rows):
        error = self.errors(policy, samples, rows)
        return Loss((rows["weight"] * error).mean(), {"error": error.mean()})


class FigurePerRow(Sound):
    def loss(self, policy, samples, rows):
        error = self.errors(policy, samples, rows)
        return Loss((rows["weight"] * error).mean(), {"error": error.detach()})


class RatioOff(Sound):
    def loss(self, policy, samples, rows):
        error = self.errors(policy, samples, rows)
        return Loss((rows["weight"] * error).mean(), {"ratio": (rows["t"] / 1000).mean()})


class WritesIntoRows(Sound):
    def loss(self, policy, samples, rows):
        rows["weight"] /= rows["weight"].mean()
        return super().loss(policy, samples, rows)


class NeedsSamples(Sound):
    def weights(self, samples):
        return super().weights(samples) / samples.samples.rewards[samples.train].max()


class DividesByTheSpread(Sound):
    def weights(self, samples):
        own = samples.samples.rewards[samples.train]
        return ((own - own.mean()) / own.std()).exp()


class Forgets(Sound):
    def __init__(self, config):
        super().__init__(config)
        self.seen = []

    def weights(self, samples):
        self.seen.append(samples.samples.rewards[samples.train].mean().nan_to_num())
        return super().weights(samples) * (1 + torch.stack(self.seen).mean())


class SavesANumber(Sound):
    def state(self):
        return {"rounds": 3}


class LooksAtTheTrajectory(Sound):
    def weights(self, samples):
        spread = samples.samples.trajectory.latents[samples.train, 0].flatten(1).std(1)
        return super().weights(samples) * spread


class Backwards(Sound):
    def weights(self, samples):
        return (-advantages(samples.samples, samples.train, 5.0)).exp()


FAULTY_ALGORITHMS: dict[type[Algorithm], dict[str, str]] = {
    Nameless: {"declared": "summary"},
    Undescribed: {"declared": "option beta"},
    OtherConfig: {"declared": "no AlgorithmConfig"},
    Unseeded: {"prepared": "different noise"},
    Ragged: {"prepared": "several lengths"},
    ChangesTheRewards: {"prepared": "changed the samples' rewards"},
    ChangesThePolicy: {"prepared": "changed the policy's"},
    KeepsTheGraph: {"prepared": "column old has a gradient"},
    WrongGradient: {"loss_gradient": "along its gradient"},
    NoGradient: {"loss_gradient": "no gradient"},
    PerRow: {"loss_gradient": "grad can be implicitly created only for scalar"},
    TrainsTheBase: {"loss_gradient": "into.bias"},
    ByPlace: {"row_order": "another order"},
    Sums: {"accumulation": "8 rows as 3 and 5"},
    NormalisesInTheLoss: {"accumulation": "8 rows as 3 and 5"},
    LiveFigure: {"first_update": "error has a gradient"},
    FigurePerRow: {"first_update": "error has the shape"},
    RatioOff: {"first_update": "ratio is"},
    WritesIntoRows: {"first_update": "changed its rows' weight"},
    NeedsSamples: {"empty_rounds": "max()"},
    DividesByTheSpread: {"empty_rounds": "rewards all alike"},
    Forgets: {"resuming": "a round after load_state has other weight"},
    SavesANumber: {"resuming": "state rounds is a int"},
    LooksAtTheTrajectory: {"finished_pictures": "without a trajectory"},
    Backwards: {"learning": "wanted high went from"},
}


def test_nothing_is_wrong_with_a_sound_algorithm() -> None:
    check_algorithm(Sound)


@pytest.mark.parametrize("cls", FAULTY_ALGORITHMS, ids=lambda cls: cls.__name__)
def test_a_fault_of_an_algorithm_is_found_and_named(cls: type[Algorithm]) -> None:
    bandit = {} if cls is Backwards else None
    with pytest.raises(ContractError) as caught:
        check_algorithm(cls, bandit=bandit)
    for check, words in FAULTY_ALGORITHMS[cls].items():
        assert words in caught.value.failed.get(check, "nothing"), caught.value
        assert f"{check}: " in str(caught.value) and "the contract: " in str(caught.value)


def test_a_check_that_is_not_there_cannot_be_left_out() -> None:
    with pytest.raises(ValueError, match="unknown check 'learn'; did you mean learning"):
        check_algorithm(Sound, skip=["learn"])
    check_algorithm(Backwards, skip=["learning"])
