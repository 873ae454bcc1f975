"""GARDO: doubt, gate and novelty by hand, what the KL holds, resets of the reference, and a run with auxiliary rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bench_dfusion.algorithms.grpo import GRPO, GRPOConfig
from bench_dfusion.algorithms.nft import NFT, NFTConfig
from processes import SETTINGS
from pydantic import ValidationError
from rounds import stopped_in_round
from torch import Tensor

import bench_dfusion
from bench_dfusion.builders.contract import Components, ConsistentSamples
from bench_dfusion.diffusion.policy import Policy
from bench_dfusion.errors import UsageError
from bench_dfusion.objectives import gardo
from bench_dfusion.objectives.gardo import Gardo, GardoConfig
from bench_dfusion.results import records
from bench_dfusion.runs import config
from bench_dfusion.testing.fakes import draw, fake_policy, shake, with_targets
from bench_dfusion.testing.rounds import PROMPTS, generator, gradient

ALGORITHMS: dict[str, Any] = {"grpo": (GRPO, GRPOConfig), "nft": (NFT, NFTConfig)}
both = pytest.mark.parametrize("name", ALGORITHMS)
PLAIN = {"diversity": "none"}


def made(name: str, options: dict[str, Any] | None = None, **others: Any) -> Any:
    cls, of = ALGORITHMS[name]
    return cls(of(gardo={**PLAIN, **(options or {})}, kl=0.5, **others))


def round_of(policy: Policy, others: Tensor | None = None) -> ConsistentSamples:
    """Drawn samples and targets; the auxiliary reward is the reward's opposite unless given."""
    samples = with_targets(policy, draw(policy, PROMPTS))
    rewards = samples.samples.rewards
    others = -rewards if others is None else others
    samples.samples.components = Components({"main": 1.0, "other": 0.0}, torch.stack([rewards, others], 1))
    return samples


# --- by hand


def test_doubt_by_hand() -> None:
    rewards, others = torch.tensor([4.0, 3, 2, 1]), torch.tensor([[1.0, 1], [2, 2], [3, 3], [4, 4]])
    assert gardo.doubt(rewards, others).tolist() == [0.75, 0.25, -0.25, -0.75]
    assert gardo.doubt(rewards, rewards[:, None]).tolist() == [0] * 4
    nan = torch.nan
    some = torch.tensor([[nan, nan], [2, nan], [3, 3], [4, 4]])  # shares beaten: of 3 by the first, of 2 by the second
    by_hand = [0, 2 / 4 - 0, 1 / 4 - (1 / 3 + 0) / 2, 0 - (2 / 3 + 1 / 2) / 2]
    assert gardo.doubt(rewards, some).tolist() == pytest.approx(by_hand)
    # any monotone map of a reward leaves it as it is
    torch.testing.assert_close(gardo.doubt(rewards.exp(), others**3), gardo.doubt(rewards, others))


def test_the_most_doubted_are_held_and_only_if_doubted() -> None:
    policy = fake_policy()
    samples = round_of(policy)
    doubts = gardo.doubt(samples.samples.rewards[samples.train], -samples.samples.rewards[samples.train, None])
    for share, count in ((0.0, 0), (0.1, 2), (0.25, 4), (1.0, int((doubts > 0).sum()))):
        held = Gardo(GardoConfig(share=share)).gate(samples)
        assert int(held.sum()) == count
        assert (
            not count or doubts[held].min() >= doubts[~held & (doubts > 0)].amax()
            if (~held & (doubts > 0)).any()
            else True
        )
    agreed = round_of(policy, others=samples.samples.rewards.clone())
    assert not Gardo(GardoConfig(share=1.0)).gate(agreed).any()


def test_the_share_grows_with_doubt_and_shrinks_within_bounds() -> None:
    kept = Gardo(GardoConfig())
    doubts = [torch.tensor([x, -1.0]) for x in (0.5, 0.6, 0.55, 0.4)]
    found = []
    for own in doubts:
        kept._follow(own)
        found.append(kept.share)
    assert found == pytest.approx([0.1, 0.11, 0.11, 0.099])  # first round; above all; between; below all
    for i in range(40):
        kept._follow(torch.tensor([0.6 + i / 100]))
    assert kept.share == pytest.approx(0.2)
    for i in range(80):
        kept._follow(torch.tensor([0.39 / (i + 1)]))
    assert kept.share == pytest.approx(0.02)
    kept._follow(torch.tensor([-0.1]))  # nothing is doubted
    assert kept.share == pytest.approx(0.02)


def test_novelty_by_hand() -> None:
    vectors = torch.tensor([[1.0, 0], [2, 0], [0, 1], [1, 0]])
    assert gardo.novelty(vectors, torch.tensor([0, 0, 0, 1]), False).tolist() == pytest.approx([0, 0, 1, 1])
    assert gardo.novelty(vectors, torch.tensor([0, 0, 0, 1]), True).tolist() == pytest.approx([0, 0, 3, 1])
    assert gardo.novelty(vectors[:2], torch.tensor([0, 0]), True).tolist() == [
        1,
        1,
    ]  # all are one: nothing is told apart


class Embeds:
    """The first numbers of a picture."""

    name = "embeds"

    def embed(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :6]

    def scoring(self) -> Any:
        return torch.no_grad()


def test_a_copy_gains_nothing_and_what_is_bad_stays_as_bad() -> None:
    samples = round_of(fake_policy())
    samples.samples.images = torch.randint(0, 256, samples.samples.images.shape, generator=generator()).byte()
    samples.samples.images[1] = samples.samples.images[0]
    kept = Gardo(GardoConfig())
    kept._embed = Embeds()  # type: ignore[assignment]
    rows = samples.train.tolist()
    for sign in (1.0, -1.0):
        found = kept.advantages(torch.full((len(rows),), sign), samples)
        copies = found[[rows.index(0), rows.index(1)]]
        assert copies.tolist() == pytest.approx([0, 0] if sign > 0 else [-1, -1], abs=1e-6)
        assert (found == -1).all() if sign < 0 else (found > 0).sum() == len(rows) - 2
    assert torch.equal(Gardo(GardoConfig(diversity="none")).advantages(torch.ones(3), samples), torch.ones(3))


# --- in the losses


@both
def test_the_kl_holds_the_gated_rows_alone(name: str) -> None:
    policy = fake_policy()
    samples = round_of(policy)
    shake(policy, 0.1)
    algorithm = made(name, {"share": 0.25, "reset_kl": None})
    rows = algorithm.prepare(policy, samples, generator())
    assert int(rows["held"].sum()) == len(rows["held"]) // 4
    shake(policy, 0.1, seed=3)
    without = {**rows, "held": torch.zeros_like(rows["held"])}
    every = {**rows, "held": torch.ones_like(rows["held"])}
    own, none, all_ = (float(algorithm.loss(policy, samples, r).value.detach()) for r in (rows, without, every))
    plain = ALGORITHMS[name][0](ALGORITHMS[name][1](kl=0.5))
    assert all_ == pytest.approx(float(plain.loss(policy, samples, rows).value.detach()))
    kl = [
        float(algorithm.loss(policy, samples, {k: v[i : i + 1] for k, v in every.items()}).value.detach())
        for i in range(4)
    ]
    gone = [
        float(algorithm.loss(policy, samples, {k: v[i : i + 1] for k, v in without.items()}).value.detach())
        for i in range(4)
    ]
    assert all(a > b for a, b in zip(kl, gone, strict=True))
    assert none < own < all_  # averaged over all rows, whether held or not


@both
def test_after_a_reset_nothing_holds_and_the_reference_stays_behind(name: str) -> None:
    policy = fake_policy()
    algorithm = made(name, {"share": 1.0, "reset_kl": 1e-6, "reset_updates": None})
    first = algorithm.prepare(policy, round_of(policy), generator())
    assert algorithm._gardo._reference is None  # the policy is the base: no distance
    shake(policy, 0.1)
    rows = algorithm.prepare(policy, round_of(policy), generator())
    kept = {k: v.clone() for k, v in algorithm._gardo._reference.items()}
    assert all(torch.equal(v, policy.weights()[k]) for k, v in kept.items())
    key = "ref_mean" if name == "grpo" else "ref"
    assert first[key].shape == rows[key].shape
    samples = round_of(policy)
    held = {**rows, "held": torch.ones_like(rows["held"])}
    metrics = algorithm.loss(policy, samples, held).metrics
    assert float(metrics["kl" if name == "grpo" else "drift"]) == pytest.approx(0, abs=1e-9)
    gradient_free = {**rows, "held": torch.zeros_like(rows["held"])}
    found = []
    for own in (held, gradient_free):
        algorithm.loss(policy, samples, own).value.backward()
        found.append(gradient(policy))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    shake(policy, 1e-5, seed=4)  # not far enough
    algorithm.prepare(policy, round_of(policy), generator())
    assert all(torch.equal(v, kept[k]) for k, v in algorithm._gardo._reference.items())


@both
def test_after_so_many_updates_the_reference_follows(name: str) -> None:
    policy = fake_policy()
    algorithm = made(name, {"reset_kl": None, "reset_updates": 2})
    for updates, reset in ((1, False), (1, True), (1, False)):
        for _ in range(updates):
            shake(policy, 0.01)
            algorithm.stepped(policy)
        before = algorithm._gardo._reference
        algorithm.prepare(policy, round_of(policy), generator())
        assert (algorithm._gardo._reference is not before) == reset


@both
def test_its_state_goes_on_after_a_checkpoint(name: str) -> None:
    policy = fake_policy()
    first, again = (made(name, {"reset_kl": 1e-6}) for _ in range(2))
    for seed in range(3):
        shake(policy, 0.1, seed=seed)
        with first.collecting(policy):
            samples = round_of(policy)
        first.prepare(policy, samples, generator())
        first.stepped(policy)
    state = first.state()
    again.load_state(state)
    assert again.state().keys() == state.keys() and all(torch.equal(v, again.state()[k]) for k, v in state.items())
    rows = [a.prepare(policy, samples, generator()) for a in (first, again)]
    assert all(torch.equal(v, rows[1][k]) for k, v in rows[0].items())


@both
def test_without_it_an_algorithm_is_what_it_was(name: str) -> None:
    cls, of = ALGORITHMS[name]
    assert "gardo" not in of().model_dump() and not of().needs_auxiliary and not of().needs_components
    algorithm = cls(of())
    assert not any(key.startswith("gardo") for key in algorithm.state())


# --- in a run


@pytest.mark.parametrize(
    ("reward", "settings", "said"),
    [
        ("clip", ["algo.gardo.share=0.1"], "clip has none: give --reward NAME:1,OTHER:0"),
        ("clip:0.7,oracle:0.3", ["algo.gardo.share=0.1"], "has none: give --reward NAME:1,OTHER:0"),
        (
            "clip:1,oracle:0",
            [],
            "the weight of oracle must be a number other than 0: .* grpo with these options takes none",
        ),
        ("clip:0,oracle:0", ["algo.gardo.share=0.1"], "one of the weights must be a number other than 0"),
        ("oracle:1,jpeg-compressibility:0", ["algo.gardo.share=0.1"], "none of oracle, jpeg-compressibility has one"),
        ("clip:1,oracle:0", ["algo.gardo.share=0.1", "algo.kl=0"], "set kl too"),
        ("clip:1,oracle:0", ["algo.gardo.share=2"], "less than or equal to 1"),
    ],
)
def test_what_does_not_go_together_is_one_line(reward: str, settings: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        config.resolve(algo="grpo", builder="vanilla", reward=reward, settings=[*SETTINGS, *settings])


@pytest.mark.parametrize(
    "option", [{"share": -1}, {"reset_kl": 0}, {"reset_updates": 0}, {"diversity": "most"}, {"k": 1}]
)
def test_what_is_wrong_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        GRPOConfig(gardo=option)


def test_a_run_with_an_auxiliary_reward_resumes_and_no_reward_of_it_ranks(tmp_path: Path) -> None:
    settings = [*SETTINGS, "track.budget.reward_queries=24", "algo.gardo.reset_kl=1e-9", "algo.learning_rate=0.01"]

    def run(out: str) -> Any:
        given: dict[str, Any] = {"algo": "grpo", "builder": "vanilla", "reward": "clip:1,oracle:0"}
        return bench_dfusion.run(**given, settings=settings, out=tmp_path / out)

    calm = run("calm")
    assert calm.status == "finished" and calm.reward == "clip-1+oracle-0" and len(calm.rounds) == 3
    assert list(records.check(calm)) == []
    assert {"held", "reward_clip", "reward_oracle"} <= calm.rounds[-1].metrics.keys()
    trained_on = {v.judge for v in calm.verdicts if v.trained_on}
    assert {"clip", "oracle"} <= trained_on  # what was looked at while training tells nothing
    with stopped_in_round(2):
        run("stopped")
    assert run("stopped").comparable() == calm.comparable()
