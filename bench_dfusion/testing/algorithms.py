"""The contract of an algorithm, as checks on a policy of a few parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from bench_dfusion.algorithm import Algorithm, AlgorithmConfig, Rows
from bench_dfusion.builders.contract import ConsistentSamples, PairConfig, Samples
from bench_dfusion.builders.vanilla import Vanilla
from bench_dfusion.diffusion.policy import Policy, Trajectory
from bench_dfusion.testing import contracts
from bench_dfusion.testing.fakes import RED, draw, fake_policy, shake, with_targets
from bench_dfusion.testing.rounds import PROMPTS, bandit, generator, gradient, loss_and_gradient, slope
from bench_dfusion.util import files

REWARDS = [0.0, 1.0, 1.0, 4.0, 2.0, 2.5, 7.0, 3.0]
STEPS = (5e-3, 2e-3, 1e-3)  # of finite differences: a large one may cross a kink, a small one drowns in rounding
SLOPE = 0.03  # by how much, relative, finite differences in float32 may miss a gradient
PARTS = {"rtol": 1e-3, "atol": 1e-5}  # what the order of sums in float32 changes
AT_FIRST = {"ratio": 1.0, "approx_kl": 0.0, "clipped": 0.0}  # figures that are known before the first update
LEARNT = 0.35  # by how much the bandit's numbers and its reward have to move; seeds move them by some 0.1


@dataclass(frozen=True)
class Case:
    """An algorithm with its options, and what is known of its loss (see `check_algorithm`)."""

    cls: type[Algorithm]
    options: Mapping[str, Any]
    surrogate: bool
    bandit: Mapping[str, Any] | None

    def made(self, policy: Policy, **more: Any) -> Algorithm:
        algorithm = self.cls(self.cls.Config(**{**self.options, **more}))
        algorithm.setup(policy, RED)
        return algorithm

    @contextmanager
    def round(self, moved: bool = True) -> Iterator[Round]:
        """A round of 8 drawn samples and a target for each, prepared by a policy whose LoRA is off zero; `moved`: it has
        been trained on since."""
        policy = fake_policy()
        shake(policy)
        algorithm = self.made(policy)
        with policy.noisy_at(algorithm.noisy_steps(policy, 0, 0)):
            samples = self.samples(policy, algorithm)
            rows = algorithm.prepare(policy, samples, generator())
            if moved:
                shake(policy, 0.05, seed=2)
            yield Round(policy, samples, algorithm, rows)

    def samples(self, policy: Policy, algorithm: Algorithm) -> ConsistentSamples:
        with algorithm.collecting(policy):
            return with_targets(policy, draw(policy, PROMPTS, REWARDS))


@dataclass(frozen=True)
class Round:
    policy: Policy
    samples: ConsistentSamples
    algorithm: Algorithm
    rows: Rows


def check_algorithm(
    cls: type[Algorithm],
    options: Mapping[str, Any] | None = None,
    *,
    bandit: Mapping[str, Any] | None = {},
    surrogate: bool = False,
    skip: Collection[str] = (),
) -> None:
    """Check that an algorithm keeps its contract. Raises ContractError, which names every check that fails and why.

    options    the algorithm's, by name, for every check. Choose such as give the loss no kink near a ratio of 1 (a clip
               of 1e-4 is one): finite differences would step over it
    bandit     options in the place of those in which it learns a bandit: one number, that one prompt wants high and
               another low; None: it is not asked to (it imitates its own samples, say)
    surrogate  the loss holds parts of its value fixed (a weight, a divisor), so that finite differences of the value are
               not its gradient; then the gradient only has to be there and finite
    skip       names of checks that are left out
    """
    case = Case(cls, options or {}, surrogate, bandit)
    contracts.run(f"algorithm {getattr(cls, 'name', cls.__name__)}", CHECKS, case, skip)


# ---------------------------------------------------------------- the checks


def declared(case: Case) -> None:
    """An algorithm has name, summary and paper, a Config below AlgorithmConfig, and a description of every option."""
    assert issubclass(case.cls.Config, AlgorithmConfig), f"{case.cls.__name__}.Config is no AlgorithmConfig"
    contracts.described(case.cls, ("name", "summary", "paper"))


def prepared(case: Case) -> None:
    """`prepare` returns rows of one length, on the CPU and without gradients; its randomness is the generator's alone, so
    that a resumed round is the same round; it changes neither the policy nor the samples."""
    policy = fake_policy()
    shake(policy)
    algorithm = case.made(policy)
    with policy.noisy_at(algorithm.noisy_steps(policy, 0, 0)):
        samples = case.samples(policy, algorithm)
        weights, content = policy.weights(), _content(samples)
        first = algorithm.prepare(policy, samples, generator())
        torch.manual_seed(1)  # of torch's own generator, which must not matter
        second = case.made(policy).prepare(policy, samples, generator())
    assert first, "prepare returned no columns at all"
    lengths = {name: len(column) for name, column in first.items()}
    assert len(set(lengths.values())) == 1, f"columns of several lengths: {lengths}"
    for name, column in first.items():
        assert column.device.type == "cpu", f"column {name} is on {column.device}"
        assert not column.requires_grad, f"column {name} has a gradient: detach it"
    _same(first, second, "two calls of prepare with one generator's state gave different")
    for name, now in policy.weights().items():
        assert torch.equal(now, weights[name]), f"prepare changed the policy's {name}"
    still = [name for name, p in policy.parameters.items() if not p.requires_grad]
    assert not still, f"after prepare {still[0]} is trained no more (requires_grad)"
    for name, now in _content(samples).items():
        assert torch.equal(now, content[name]), f"prepare changed the samples' {name}"


def loss_gradient(case: Case) -> None:
    """The gradient of the loss is there, finite, on the policy's parameters alone, and that which finite differences of the
    value find."""
    with case.round() as r:
        rows = r.algorithm.batch(r.policy, r.samples, r.rows)
        value, along = loss_and_gradient(r.policy, r.samples, r.algorithm, rows, part=True)
        others = [n for n, p in r.policy.adapter.network.named_parameters() if p.grad is not None]
        assert value.ndim == 0, f"the loss has the shape {tuple(value.shape)}: return the mean over the rows"
        assert value.isfinite() and along.isfinite().all(), (
            f"the loss is {float(value)}, its gradient's norm {along.norm()}"
        )
        assert along.norm() > 0, "the loss has no gradient once the policy has moved"
        assert not others, f"the loss leaves a gradient on {others[0]}, which is not trained"
        if case.surrogate:
            return

        def now() -> float:
            with torch.no_grad():
                return float(r.algorithm.loss(r.policy, r.samples, rows).value)

        norm = float(along.norm())
        found = []
        for h in STEPS:
            found.append(slope(r.policy, along / norm, now, h))
            if abs(found[-1] - norm) <= SLOPE * norm:
                return
        raise AssertionError(
            f"along its gradient, of norm {norm:.4g}, the loss rises by {', '.join(f'{f:.4g}' for f in found)} (steps "
            f"{', '.join(f'{h:g}' for h in STEPS)}); if it holds parts fixed on purpose, say surrogate=True"
        )


def row_order(case: Case) -> None:
    """The loss is a mean over its rows: their order changes neither its value nor its gradient."""
    with case.round() as r:
        order = torch.randperm(_length(r.rows), generator=generator(3))
        expected = loss_and_gradient(r.policy, r.samples, r.algorithm, r.rows)
        found = loss_and_gradient(r.policy, r.samples, r.algorithm, _part(r.rows, order))
        _close(found, expected, "the rows in another order")


def accumulation(case: Case) -> None:
    """One step of the optimiser is the same however many rows go through the network at once: what rows owe each other is
    made by `batch` on all of them, and `loss` is a mean."""
    with case.round() as r:
        count = _length(r.rows)
        order = torch.randperm(count, generator=generator(3))[:8]
        own = _part(r.rows, order)
        batch = r.algorithm.batch(r.policy, r.samples, own)
        expected = loss_and_gradient(r.policy, r.samples, r.algorithm, batch, part=True)
        cut, total = len(order) * 3 // 8, len(order)
        value, whole = torch.zeros(()), torch.zeros_like(expected[1])
        for part in (slice(0, cut), slice(cut, total)):
            rows = _part(batch, part)
            share = _length(rows) / total
            one, along = loss_and_gradient(r.policy, r.samples, r.algorithm, rows, share, part=True)
            value, whole = value + share * one, whole + along
        _close((value, whole), expected, f"{total} rows as {cut} and {total - cut}")


def first_update(case: Case) -> None:
    """Before the first update the loss is finite, its figures are single finite numbers without gradient, ratios to the
    policy that drew are 1, and `loss` does not change its rows."""
    with case.round(moved=False) as r:
        rows = r.algorithm.batch(r.policy, r.samples, r.rows)
        before = {name: column.clone() for name, column in rows.items()}
        loss = r.algorithm.loss(r.policy, r.samples, rows)
        assert loss.value.isfinite(), f"the loss is {float(loss.value)}"
        for name, figure in loss.metrics.items():
            assert figure.numel() == 1, (
                f"the figure {name} has the shape {tuple(figure.shape)}: it is one point of a curve"
            )
            assert not figure.requires_grad, f"the figure {name} has a gradient: detach it"
            assert figure.isfinite(), f"the figure {name} is {float(figure)}"
            if name in AT_FIRST:
                wanted = AT_FIRST[name]
                assert abs(float(figure) - wanted) < 1e-3, f"{name} is {float(figure):.4g} at first, not {wanted:g}"
        _same(rows, before, "loss changed its rows'")


def empty_rounds(case: Case) -> None:
    """A round of nothing to train on has columns of no rows, which the loop skips; one whose rewards are all alike has
    none either, or a finite loss and gradient."""
    policy = fake_policy()
    shake(policy)
    algorithm = case.made(policy)
    none = torch.zeros(0, dtype=torch.int64)
    with policy.noisy_at(algorithm.noisy_steps(policy, 0, 0)):
        drawn = draw(policy, PROMPTS, [1.0] * len(PROMPTS))
        nothing = ConsistentSamples(drawn, 0, none.view(0, 2), none, none.view(0, 3))
        rows = algorithm.prepare(policy, nothing, generator())
        assert rows and not _length(rows), f"{_length(rows) if rows else 'no'} columns of a round of nothing"
        alike = Vanilla(PairConfig()).build(policy, drawn, lambda images, prompts: torch.zeros(len(images)))
        rows = algorithm.prepare(policy, alike, generator())
        if _length(rows):
            batch = algorithm.batch(policy, alike, rows)
            value = algorithm.loss(policy, alike, batch).value
            value.backward()
            found = gradient(policy)
            assert value.isfinite() and found.isfinite().all(), f"rewards all alike: the loss is {float(value)}"


def resuming(case: Case) -> None:
    """After `load_state` of what `state` returned, a new object goes on exactly as the old one would have."""
    policy = fake_policy()
    algorithm, rest = case.made(policy), case.made(policy)
    for seed in range(2):
        samples = case.samples(policy, algorithm)
        samples.samples.rewards += seed
        algorithm.prepare(policy, samples, generator(seed))
        shake(policy, seed=seed)
        algorithm.stepped(policy)
    state = algorithm.state()
    for name, value in state.items():
        assert isinstance(value, Tensor), f"state {name} is a {type(value).__name__}, not a tensor: it cannot be saved"
    with TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        files.save_tensors(path, state)
        rest.load_state(files.load_tensors(path)[0])
    _same(rest.state(), state, "after load_state, state() has other")
    drawn = [case.samples(policy, one) for one in (algorithm, rest)]
    assert torch.equal(drawn[0].samples.trajectory.latents, drawn[1].samples.trajectory.latents), (
        "after load_state, collecting() draws from another policy"
    )
    first, second = (one.prepare(policy, own, generator(5)) for one, own in zip((algorithm, rest), drawn, strict=True))
    _same(second, first, "a round after load_state has other")
    for one in (algorithm, rest):
        one.stepped(policy)
    _same(rest.state(), algorithm.state(), "a step after load_state leaves other")


def finished_pictures(case: Case) -> None:
    """An algorithm that says `offline` looks at the final latents alone: finished pictures have no trajectory."""
    if not case.cls.offline:
        return
    losses = []
    for bare in (False, True):
        policy = fake_policy()
        algorithm = case.made(policy)
        samples = with_targets(policy, draw(policy, PROMPTS, REWARDS))
        if bare:
            own = samples.samples
            short = Trajectory(
                own.trajectory.latents[:, -1:], torch.zeros(len(own), 0), own.trajectory.seeds, own.prompts
            )
            samples = ConsistentSamples(
                Samples(short, own.images, own.rewards), 0, samples.pairs, samples.train, samples.triples[:0]
            )
        rows = algorithm.prepare(policy, samples, generator())
        shake(policy, 0.05, seed=2)
        losses.append(loss_and_gradient(policy, samples, algorithm, rows))
    _close(losses[1], losses[0], "samples without a trajectory")


def learning(case: Case) -> None:
    """Trained as the loop does, the algorithm makes what is rewarded more likely: it learns a bandit of two prompts."""
    if case.bandit is None or case.cls.takes_teachers:  # what follows teachers is no judge of a reward
        return
    algorithm = case.cls(case.cls.Config(**{"learning_rate": 1e-2, **case.options, **case.bandit}))
    means, rewards = bandit(algorithm)
    start, end = means[:3].mean(0), means[-3:].mean(0)
    gain = float(rewards[-3:].mean() - rewards[:3].mean())
    if not (end[0] > start[0] + LEARNT and end[1] < start[1] - LEARNT and gain > LEARNT):
        raise AssertionError(
            f"in 30 rounds the number that is wanted high went from {start[0]:+.2f} to {end[0]:+.2f}, the one that is wanted "
            f"low from {start[1]:+.2f} to {end[1]:+.2f}, the reward by {gain:+.2f}; each has to move {LEARNT} the right way. "
            "Where a sign is right, give options under which it learns: bandit={...}"
        )


CHECKS = (
    declared,
    prepared,
    loss_gradient,
    row_order,
    accumulation,
    first_update,
    empty_rounds,
    resuming,
    finished_pictures,
    learning,
)


# ---------------------------------------------------------------- what they share


def _length(rows: Rows) -> int:
    return len(next(iter(rows.values())))


def _part(rows: Rows, which: Tensor | slice) -> Rows:
    return {name: column[which] for name, column in rows.items()}


def _content(samples: ConsistentSamples) -> dict[str, Tensor]:
    own = samples.samples
    return {
        "latents": own.trajectory.latents.clone(),
        "log_probs": own.trajectory.log_probs.clone(),
        "images": own.images.clone(),
        "rewards": own.rewards.clone(),
        "pairs": samples.pairs.clone(),
        "train": samples.train.clone(),
    }


def _same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    assert found.keys() == expected.keys(), f"{what} columns: {sorted(found)} and {sorted(expected)}"
    for name in expected:
        assert torch.equal(found[name], expected[name]), f"{what} {name}"


def _close(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], what: str) -> None:
    """Raise AssertionError where a loss and its gradient differ by more than rounding."""
    for name, one, other in zip(("loss", "gradient"), found, expected, strict=True):
        size = float(other.norm())
        apart = float((one - other).norm())
        assert apart <= PARTS["atol"] + PARTS["rtol"] * size, f"{what}: the {name} differs by {apart:.3g} of {size:.3g}"
