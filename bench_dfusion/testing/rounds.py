"""Rounds of training small enough for a test: losses with their gradients, finite differences, and a bandit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench_dfusion.algorithm import Algorithm, Rows
from bench_dfusion.builders.contract import ConsistentSamples, PairConfig
from bench_dfusion.builders.vanilla import Vanilla
from bench_dfusion.diffusion.policy import Policy
from bench_dfusion.rewards.contract import Reward, RewardConfig
from bench_dfusion.testing.fakes import draw, fake_policy, shake, with_targets

PROMPTS = ["one"] * 4 + ["two"] * 4


def values(*numbers: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, requires_grad=True)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def round_of(algorithm: Algorithm, policy: Policy | None = None) -> tuple[Policy, ConsistentSamples, Algorithm, Rows]:
    """A round of 8 drawn samples and a target for each, prepared; the LoRA has moved since."""
    policy = policy or fake_policy()
    samples = with_targets(policy, draw(policy, PROMPTS))
    rows = algorithm.prepare(policy, samples, generator())
    shake(policy)
    return policy, samples, algorithm, rows


def gradient(policy: Policy) -> Tensor:
    """The gradient of all parameters, flat, 0 where a loss has none; they have none afterwards."""
    flat = torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in policy.parameters.values()]
    )
    for p in policy.parameters.values():
        p.grad = None
    return flat


def loss_and_gradient(
    policy: Policy,
    samples: ConsistentSamples,
    algorithm: Algorithm,
    rows: Rows,
    weight: float = 1.0,
    part: bool = False,
) -> tuple[Tensor, Tensor]:
    """Of rows as one step of the optimiser, or, if `part`, as a part of one whose `batch` was called."""
    rows = rows if part else algorithm.batch(policy, samples, rows)
    value = algorithm.loss(policy, samples, rows).value
    (weight * value).backward()
    return value.detach(), gradient(policy)


def slope(policy: Policy, direction: Tensor, value: Callable[[], float], h: float = 5e-3) -> float:
    """The slope of `value()` along a unit direction of the parameters, by finite differences of the fourth order."""
    parameters = list(policy.parameters.values())
    parts = direction.split([p.numel() for p in parameters])

    def at(offset: float) -> float:
        with torch.no_grad():
            for p, d in zip(parameters, parts, strict=True):
                p.add_(offset * d.view_as(p))
            found = value()
            for p, d in zip(parameters, parts, strict=True):
                p.sub_(offset * d.view_as(p))
        return found

    return (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)


def slope_along_the_gradient(
    policy: Policy, samples: ConsistentSamples, algorithm: Algorithm, rows: Rows
) -> tuple[float, float]:
    """The loss's slope along its gradient by finite differences, and the gradient's norm: equal, if it is the gradient."""
    _, along = loss_and_gradient(policy, samples, algorithm, rows)

    def value() -> float:
        with torch.no_grad():
            return float(algorithm.loss(policy, samples, rows).value)

    return slope(policy, along / along.norm(), value), float(along.norm())


# --- a bandit: one number, two prompts that want it high and low

OPTIMUM = {"high": 1.0, "low": -1.0}


class Near(Reward):
    """The bandit's reward: minus the squared distance of x_0 to what the prompt wants."""

    name, summary, paper, unit = (
        "near",
        "minus the squared distance to the prompt's number",
        "none",
        "squares, at most 0",
    )
    limits = (None, 0.0)
    differentiable = True

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.score_tensors(images.permute(0, 3, 1, 2).float() / 255, prompts)

    def score_tensors(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        number = images[:, 0].flatten(1).mean(1).logit(1e-3)  # the fake decoder is a sigmoid
        return -((number - torch.tensor([OPTIMUM[p] for p in prompts])) ** 2)

    def fingerprint(self) -> str:
        return "near"


def bandit(algorithm: Algorithm, rounds: int = 30) -> tuple[Tensor, Tensor]:
    """Train as the loop does; the mean of x_0 of both prompts in each round [rounds, 2], and the mean rewards [rounds]."""
    policy = fake_policy(shape=(1, 1, 1), steps=5, scale=0.1, batch=1024)
    prompts = ["high"] * 32 + ["low"] * 32
    wanted = torch.tensor([OPTIMUM[p] for p in prompts])
    optimizer = torch.optim.AdamW(policy.parameters.values(), lr=algorithm.config.learning_rate)
    order, means, rewards = generator(), [], []
    algorithm.setup(policy, Near(RewardConfig()))
    for number in range(rounds):
        with algorithm.collecting(policy):
            drawn = draw(policy, prompts, first=1000 * number)
            drawn.rewards = -((drawn.trajectory.final.flatten() - wanted) ** 2)
            rewards.append(float(drawn.rewards.mean()))
            means.append(drawn.trajectory.final.view(2, 32).mean(1))
            samples = Vanilla(PairConfig()).build(policy, drawn, lambda images, p: torch.zeros(len(images)))
        rows = algorithm.prepare(policy, samples, order)
        shuffled = torch.randperm(len(next(iter(rows.values()))), generator=order)
        for part in shuffled.tensor_split(algorithm.config.updates):
            optimizer.zero_grad()
            batch = algorithm.batch(policy, samples, {k: v[part] for k, v in rows.items()})
            algorithm.loss(policy, samples, batch).value.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters.values(), algorithm.config.grad_norm)
            optimizer.step()
            algorithm.stepped(policy)
    return torch.stack(means), torch.tensor(rewards)
