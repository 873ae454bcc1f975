"""The conformance kit for rewards, builders and adapters: our own pass, and each check finds what it is there for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field
from torch import Tensor

from bench_dfusion import registry
from bench_dfusion.builders.contract import BuilderConfig, ConsistentSamples, Samples, Score
from bench_dfusion.builders.vanilla import Vanilla
from bench_dfusion.diffusion.policy import Policy
from bench_dfusion.errors import PluginError
from bench_dfusion.models.base import Conditioning
from bench_dfusion.models.loading import adapters_by_pipeline
from bench_dfusion.models.unet import UNetAdapter
from bench_dfusion.rewards.contract import Reward, RewardConfig
from bench_dfusion.testing import ContractError, check_adapter, check_builder, check_reward
from bench_dfusion.tracks import schema

# ---------------------------------------------------------------- rewards


@pytest.mark.parametrize("name", ["clip", "oracle", "jpeg-compressibility", "jpeg-incompressibility"])
def test_our_rewards_keep_the_contract(name: str) -> None:
    check_reward(registry.load("rewards", name), schema.read("micro")["rewards"].get(name))


class Red(Reward):
    """How red a picture is."""

    name = "red-share"
    summary = "how red a picture is"
    paper = "none"
    unit = "share of red, in [0, 1]"
    limits: ClassVar[tuple[float | None, float | None]] = (0.0, 1.0)
    differentiable = True

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.score_tensors(images.permute(0, 3, 1, 2).float() / 255, prompts)

    def score_tensors(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images[:, 0].flatten(1).mean(1)

    def fingerprint(self) -> str:
        return "red-share 1"


def test_a_small_reward_keeps_the_contract() -> None:
    check_reward(Red)


def faulty(base: type, **changes: Any) -> type:
    return type(f"Faulty{base.__name__}", (base,), changes)


def score(function: Callable[..., Any]) -> dict[str, Any]:
    """A `score` in the place of `Red`'s, which calls that."""
    return {"score": lambda self, images, prompts: function(self, Red.score(self, images, prompts), images, prompts)}


class Loose(RewardConfig):
    scale: float = Field(1.0)


def write_into(self: Reward, found: Tensor, images: Tensor, prompts: list[str]) -> Tensor:
    images.zero_()
    return found


def set_threads(self: Reward, found: Tensor, images: Tensor, prompts: list[str]) -> Tensor:
    torch.set_grad_enabled(not torch.is_grad_enabled())
    return found


def plainly(self: Reward, images: Tensor, prompts: list[str]) -> Tensor:
    return Red.score_tensors(self, images.permute(0, 3, 1, 2).float() / 255, prompts)  # type: ignore[arg-type]


REWARDS: list[tuple[str, dict[str, Any]]] = [
    ("declared", {"unit": ""}),
    ("declared", {"Config": Loose}),
    ("scores", score(lambda self, found, *_: found.double())),
    ("scores", score(lambda self, found, *_: found[:, None])),
    ("scores", score(lambda self, found, *_: found.tolist())),
    ("scores", score(lambda self, found, *_: found / 0)),
    ("scores", score(lambda self, found, *_: found + 1)),
    ("each_alone", score(lambda self, found, *_: found - found.mean() + 0.5)),
    ("each_alone", score(lambda self, found, *_: found.sort().values)),
    ("repeatable", score(lambda self, found, *_: found * torch.rand(()))),
    (
        "repeatable",
        {
            "made": 0.0,
            "__init__": lambda self, *a: (Reward.__init__(self, *a), count(self))[0],
            **score(lambda self, found, *_: found * 0.9**self.number),
        },
    ),
    ("leaves_alone", score(write_into)),
    ("leaves_alone", score(set_threads)),
    ("leaves_alone", score(lambda self, found, images, prompts: (prompts.clear(), found)[1])),
    ("fingerprinted", {"fingerprint": lambda self: f"{next(NUMBERS)}________"}),
    ("fingerprinted", {"fingerprint": lambda self: ""}),
    ("applicable", {"score_applicable": lambda self, i, p: (self.score(i, p), torch.ones(len(i)))}),
    ("differentiable", {"score_tensors": lambda self, i, p: Red.score_tensors(self, i.detach(), p)}),
    ("differentiable", {"score": plainly, "score_tensors": lambda self, i, p: Red.score_tensors(self, i, p).square()}),
    (
        "differentiable",
        {"score_tensors": lambda self, i, p: (lambda x: x + (x - x.detach()))(Red.score_tensors(self, i, p))},
    ),
    ("differentiable", {"differentiable": False}),
]
NUMBERS = iter(range(1000))


def count(self: Any) -> None:
    self.number = next(NUMBERS)


@pytest.mark.parametrize(("check", "changes"), REWARDS, ids=[f"{c}-{n}" for n, (c, _) in enumerate(REWARDS)])
def test_a_faulty_reward_is_told_which_check_it_fails(check: str, changes: dict[str, Any]) -> None:
    with torch.enable_grad(), pytest.raises(ContractError) as found:
        check_reward(faulty(Red, **changes))
    assert check in found.value.failed, found.value
    torch.set_grad_enabled(True)


# ---------------------------------------------------------------- builders


@pytest.mark.parametrize("name", ["vanilla", "same-noise", "branch"])
def test_our_builders_keep_the_contract(name: str) -> None:
    check_builder(registry.load("builders", name))


def test_dfusion_keeps_the_contract_on_a_network_with_cross_attention(pixart_dir: Path) -> None:
    from tiny import policy_of

    check_builder(registry.load("builders", "dfusion"), policy=lambda: policy_of(pixart_dir, lora=0))


def build(change: Callable[[ConsistentSamples], None]) -> dict[str, Any]:
    def built(self: Any, policy: Policy, drawn: Samples, score: Score) -> ConsistentSamples:
        made = Vanilla.build(self, policy, drawn, score)
        change(made)
        return made

    return {"build": built}


def swapped(made: ConsistentSamples) -> None:
    made.pairs = made.pairs.flip(1)


def crossed(made: ConsistentSamples) -> None:
    made.pairs = torch.tensor([[int(made.samples.rewards[:8].argmax()), int(made.samples.rewards[8:].argmin()) + 8]])


def shuffled(made: ConsistentSamples) -> None:
    made.pairs = made.pairs[torch.randperm(len(made.pairs))]


def rewarded(made: ConsistentSamples) -> None:
    made.samples.rewards += 1


def untrained(made: ConsistentSamples) -> None:
    made.train = made.train[:0]


def scored_in_secret(self: Any, policy: Policy, drawn: Samples, score: Score) -> ConsistentSamples:
    score(drawn.images[:2], drawn.prompts[:2])
    return Vanilla.build(self, policy, drawn, score)


def by_batch(self: Any, policy: Policy, drawn: Samples, score: Score) -> ConsistentSamples:
    made = Vanilla.build(self, policy, drawn, score)
    made.samples.trajectory.latents[:, 1:] += policy.batch
    return made


class LooseBuilder(BuilderConfig):
    strength: float = 1.0


BUILDERS: list[tuple[str, dict[str, Any]]] = [
    ("declared", {"summary": "two\nlines"}),
    ("declared", {"Config": LooseBuilder, "__init__": lambda self, config: Vanilla.__init__(self, Vanilla.Config())}),
    ("counted", {"queries": lambda self, drawn: drawn + 1}),
    ("counted", {"build": scored_in_secret}),
    ("ordered", build(rewarded)),
    ("paired", build(swapped)),
    ("paired", build(crossed)),
    ("paired", build(untrained)),
    ("repeatable", build(shuffled)),
    ("independent_of_the_batch", {"build": by_batch}),
]


@pytest.mark.parametrize(("check", "changes"), BUILDERS, ids=[f"{c}-{n}" for n, (c, _) in enumerate(BUILDERS)])
def test_a_faulty_builder_is_told_which_check_it_fails(check: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ContractError) as found:
        check_builder(faulty(Vanilla, **changes))
    assert check in found.value.failed, found.value


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux", "pixart"])
def test_our_adapters_keep_the_contract(family: str, request: pytest.FixtureRequest) -> None:
    names = {"sd": "unet"}
    check_adapter(registry.load("models", names.get(family, family)), request.getfixturevalue(f"{family}_dir"))


class Mixing(UNetAdapter):
    """Each row sees the others."""

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        output = super().predict(latents, timestep, conditioning)
        return output - output.mean(0, keepdim=True) * (len(output) > 1)


class Deaf(UNetAdapter):
    """The prompt does not matter."""

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        return super().predict(latents, timestep, {name: torch.zeros_like(v) for name, v in conditioning.items()})


class Nameless(UNetAdapter):
    lora_targets = ("to_nowhere",)


class Rough(UNetAdapter):
    """Pictures without gradients, beyond [0, 1]."""

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents.detach()) * 3


class Wide(UNetAdapter):
    """An encoding that depends on the prompts beside it."""

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return {name: value + len(prompts) for name, value in super().encode(prompts).items()}


class Forgetful(UNetAdapter):
    """Half of a LoRA is saved."""

    def save_lora(self, folder: Path, layers: Any, scale: Any) -> None:
        super().save_lora(folder, {name: v for name, v in layers.items() if "to_q" in name}, scale)


ADAPTERS = [
    ("declared", Nameless),
    ("encodes", Wide),
    ("predicts", Mixing),
    ("predicts", Deaf),
    ("decodes", Rough),
    ("samples", Mixing),
    ("saves", Forgetful),
]


@pytest.mark.parametrize(("check", "cls"), ADAPTERS)
def test_a_faulty_adapter_is_told_which_check_it_fails(check: str, cls: type[UNetAdapter], sd_dir: Path) -> None:
    others = {name for name, _ in ADAPTERS} | {"schedules", "trains"}
    with pytest.raises(ContractError) as found:
        check_adapter(cls, sd_dir, skip=others - {check})
    assert check in found.value.failed, found.value


def test_two_models_that_serve_one_pipeline_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_from_files", {})
    registry.register(registry.Plugin("models", "mine", "mine.py", value=Deaf))
    with pytest.raises(
        PluginError, match=r"two models serve StableDiffusionPipeline: mine of mine.py and unet of bench"
    ):
        adapters_by_pipeline()
