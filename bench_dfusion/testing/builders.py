"""The contract of a builder, as checks on samples of a policy of a few parameters, or of one that is given."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench_dfusion.builders.contract import Builder, BuilderConfig, ConsistentSamples, Samples
from bench_dfusion.diffusion.policy import Policy
from bench_dfusion.testing import contracts
from bench_dfusion.testing.fakes import fake_policy, shake

PROMPTS = ["a red ring"] * 8 + ["two blue rings"] * 8
SEEDS = torch.arange(len(PROMPTS))
ROUNDING: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4}  # what the size of a batch may change


@dataclass
class Case:
    """A builder's class with its options, a policy, and what was asked of the reward."""

    cls: type[Builder]
    options: Mapping[str, Any]
    policy: Callable[[], Policy]
    asked: list[str] = field(default_factory=list)

    def made(self) -> Builder:
        return self.cls(self.cls.Config(**self.options))

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.asked += prompts
        return images.flatten(1).float().mean(1)

    def built(self, batch: int = 16) -> tuple[Builder, Samples, ConsistentSamples]:
        policy = self.policy()
        shake(policy)
        policy.batch = batch
        trajectory = policy.sample(PROMPTS, SEEDS)
        images = policy.decode(trajectory.final)
        drawn = Samples(trajectory, images, images.flatten(1).float().mean(1))
        self.asked.clear()
        builder = self.made()
        builder.check(policy, list(dict.fromkeys(PROMPTS)))
        return builder, drawn, builder.build(policy, drawn, self.score)


def check_builder(
    cls: type[Builder],
    options: Mapping[str, Any] | None = None,
    *,
    policy: Callable[[], Policy] = fake_policy,
    skip: Collection[str] = (),
) -> None:
    """Check that a builder of drawn samples keeps its contract. Raises ContractError, which names every check that fails
    and why.

    options  the builder's, by name
    policy   makes the policy that it builds with; each call must give the same one
    skip     names of checks that are left out
    """
    contracts.run(f"builder {getattr(cls, 'name', cls.__name__)}", CHECKS, Case(cls, options or {}, policy), skip)


def declared(case: Case) -> None:
    """A builder has name, summary and paper, a Config below BuilderConfig, and a description of every option."""
    assert issubclass(case.cls.Config, BuilderConfig), f"{case.cls.__name__}.Config is no BuilderConfig"
    assert case.cls.draws, "it draws nothing: `offline` is its part, which these checks do not see"
    contracts.described(case.cls, ("name", "summary", "paper"))


def counted(case: Case) -> None:
    """`queries` is the number of pictures that a round has scored, the drawn ones included."""
    builder, drawn, _ = case.built()
    expected = len(drawn) + len(case.asked)
    said = builder.queries(len(drawn))
    assert said == expected, f"queries says {said}, and {len(drawn)} drawn and {len(case.asked)} more were scored"


def ordered(case: Case) -> None:
    """The samples are those that were drawn, first and unchanged, then those that the builder had scored, in that order."""
    _, drawn, built = case.built()
    samples = built.samples
    assert built.drawn == len(drawn), f"drawn is {built.drawn}, and {len(drawn)} were drawn"
    assert len(samples) == len(drawn) + len(case.asked), (
        f"{len(samples)} samples of {len(drawn)} and {len(case.asked)} scored"
    )
    for name in ("images", "rewards"):
        assert torch.equal(getattr(samples, name)[: len(drawn)], getattr(drawn, name)), f"the drawn {name} changed"
    assert torch.equal(samples.trajectory.latents[: len(drawn)], drawn.trajectory.latents), "the drawn latents changed"
    assert samples.prompts[len(drawn) :] == case.asked, "the prompts of what was built are not those it had scored"
    means = samples.images.flatten(1).float().mean(1)
    torch.testing.assert_close(
        samples.rewards, means, **ROUNDING, msg=lambda m: "rewards that are not those of the pictures"
    )


def paired(case: Case) -> None:
    """Pairs are (winner, loser) rows of one prompt, the winner scoring above the loser; rows to train on are rows."""
    _, _, built = case.built()
    samples, n = built.samples, len(built.samples)
    assert built.pairs.dtype == torch.int64 and built.pairs.ndim == 2, (
        f"pairs are {built.pairs.dtype} {tuple(built.pairs.shape)}"
    )
    for winner, loser in built.pairs.tolist():
        assert 0 <= winner < n and 0 <= loser < n, f"the pair ({winner}, {loser}) is not of the {n} samples"
        own, other = samples.prompts[winner], samples.prompts[loser]
        assert own == other, f"the pair ({winner}, {loser}) is of two prompts, {own!r} and {other!r}"
        a, b = float(samples.rewards[winner]), float(samples.rewards[loser])
        assert a > b, f"the winner of ({winner}, {loser}) scores {a:.4g} and the loser {b:.4g}"
    assert len(built.train), "there is nothing to train on"
    assert built.train.min() >= 0 and built.train.max() < n, f"rows to train on beyond the {n} samples"


def repeatable(case: Case) -> None:
    """The same samples and policy make the same round, whatever torch's own generator is at."""
    _, _, first = case.built()
    torch.manual_seed(5)
    _, _, second = case.built()
    for name in ("pairs", "train", "triples"):
        assert torch.equal(getattr(first, name), getattr(second, name)), f"{name} differ from one time to the next"
    assert torch.equal(first.samples.trajectory.latents, second.samples.trajectory.latents), "the latents differ"


def independent_of_the_batch(case: Case) -> None:
    """What is built does not depend on how many samples go through the network at a time."""
    _, _, first = case.built(16)
    _, _, second = case.built(3)
    latents = first.samples.trajectory.latents, second.samples.trajectory.latents
    torch.testing.assert_close(*latents, **ROUNDING, msg=lambda m: f"with batches of 16 and of 3: {m.splitlines()[0]}")


CHECKS = (declared, counted, ordered, paired, repeatable, independent_of_the_batch)
