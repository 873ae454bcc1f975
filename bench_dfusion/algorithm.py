"""What a training backend is: what it takes from the consistent samples, and a loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from bench_dfusion.builders.contract import ConsistentSamples, Share
from bench_dfusion.builders.stored_steps import stored_steps
from bench_dfusion.diffusion.policy import Policy, in_batches
from bench_dfusion.rewards.contract import Reward
from bench_dfusion.tracks.schema import Track
from bench_dfusion.util.seeds import seed_of

Rows = dict[str, Tensor]  # equal first dimensions: one row is one term of the loss


@dataclass
class Loss:
    """A loss to minimise (scalar, mean over the rows) and detached figures worth a curve."""

    value: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Between:
    """Where tuning looks for an option: from `low` to `high`, evenly in the logarithm. `Annotated[float, Between(...)]`."""

    low: float
    high: float


@dataclass(frozen=True, init=False)
class Among:
    """The values of an option that tuning tries. `Annotated[..., Among(...)]`."""

    values: tuple[Any, ...]

    def __init__(self, *values: Any):
        object.__setattr__(self, "values", values)


def search_space(config: type[BaseModel]) -> dict[str, Between | Among]:
    """The options of an algorithm that are worth tuning, by name, and where to look; the others are as published."""
    return {
        name: where
        for name, info in config.model_fields.items()
        for where in info.metadata
        if isinstance(where, Between | Among)
    }


class AlgorithmConfig(BaseModel):
    """Options of every algorithm: the optimiser's, which the loop reads."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    learning_rate: Annotated[float, Between(1e-5, 1e-2)] = Field(
        1e-3, gt=0, description="AdamW's learning rate (1; D-Fusion on SD 2.1: 1e-4)"
    )
    updates: int = Field(2, ge=1, description="optimiser steps in one pass over a round's rows (count)")
    inner_epochs: int = Field(1, ge=1, description="passes over a round's rows (count; D-Fusion: 2)")
    weight_decay: float = Field(1e-4, ge=0, description="AdamW's weight decay (1; ddpo-pytorch: 1e-4)")
    grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm (1; ddpo-pytorch: 1)")
    ema: float | None = Field(
        None,
        ge=0,
        lt=1,
        exclude_if=lambda value: value is None,  # cells of before this option keep their hash
        description="decay of an exponential average of the trained weights, which is then what is judged and saved; after "
        "update n it is min((1 + n) / (10 + n), this) (1; flow_grpo and DiffusionNFT: 0.9, AWM: 0.99; under some 30 updates "
        "an average lags); None: the weights themselves",
    )

    @property
    def needs_components(self) -> bool:
        """Whether it takes the rewards of a weighted sum apart: `Samples.components`."""
        return False

    @property
    def needs_auxiliary(self) -> bool:
        """Whether it takes auxiliary rewards, those of a sum that have the weight 0."""
        return False

    @property
    def needs_embedding(self) -> bool:
        """Whether one of the sum's rewards must embed pictures."""
        return False


class SDEWindow(BaseModel):
    """Of a round's denoising steps those that are drawn with noise and trained on; the others are the ODE's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(4, ge=1, description="steps with noise (count; MixGRPO: 4 of 25, Flow-GRPO-Fast: 2 or 3 of 10)")
    place: Literal["sliding", "random", "scattered", "frozen"] = Field(
        "sliding",
        description="where they are among the steps that `window` leaves: from the noisiest on and moving to the cleanest, "
        "where they stay (MixGRPO); side by side at a place drawn each round (Flow-GRPO-Fast, with window [0, 0.5]); each "
        "drawn on its own (Flow-DPPO: 3, with window [0, 0.5]); or always the noisiest (MixGRPO-Flash*)",
    )
    stride: int = Field(1, ge=1, description="steps that a sliding window moves at a time (count; MixGRPO: 1)")
    every: int = Field(25, ge=1, description="rounds after which a sliding window moves (count; MixGRPO: 25)")

    def of(self, steps: Tensor, seed: int, number: int) -> Tensor:
        """Of step indices `steps` [S], S >= `steps` of them, those with noise in round `number` of a run with `seed`, [W]."""
        last = len(steps) - self.steps
        if self.place == "scattered" or self.place == "random":
            generator = torch.Generator().manual_seed(seed_of("sde-window", seed, number))
            if self.place == "scattered":
                return steps[torch.randperm(len(steps), generator=generator)[: self.steps].sort().values]
            first = int(torch.randint(last + 1, (), generator=generator))
        else:
            first = min(self.stride * (number // self.every), last) if self.place == "sliding" else 0
        return steps[first : first + self.steps]


class StepwiseConfig(AlgorithmConfig):
    """Options of the algorithms whose loss is a sum over denoising steps."""

    step_weight: Annotated[Literal["one", "sigma"], Among("one", "sigma")] = Field(
        "one",
        description="weight of a step's loss: 1, or sigma_t scaled to mean 1 (late steps have gradients much "
        "larger and little signal: docs/micro.md)",
    )
    window: Annotated[Share, Among((0.0, 1.0), (0.0, 0.5), (0.5, 1.0))] = Field(
        (0.0, 1.0),
        description="share of the steps trained on, [from, to) within 0 and 1, in sampling order, 0 the noisiest "
        "(D-Fusion: all)",
    )
    sde_window: SDEWindow | None = Field(
        None,
        exclude_if=lambda value: value is None,  # cells of before this option keep their hash
        description="draw a round's samples with noise at some steps only, the others by the ODE, and train on those alone: "
        "sde_window.steps (4), .place (sliding, random, scattered, frozen), .stride (1), .every (25 rounds) (MixGRPO, "
        "2507.21802; Flow-GRPO-Fast); None: every step has the sampler's noise",
    )


class Algorithm(ABC):
    """A training backend. One file under `algorithms/`, registered under `bench_dfusion.algorithms`.

    The loop calls `prepare` once a round, shuffles its rows and deals them to the optimiser's steps; for each step it
    calls `batch` on all its rows, then `loss` on as many at a time as fit. It owns the optimiser, accumulation,
    clipping, checkpoints and the budget.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    Config: ClassVar[type[AlgorithmConfig]] = AlgorithmConfig
    needs_pairs: ClassVar[bool] = False
    needs_density: ClassVar[bool] = False  # of denoising steps: only where the sampler has noise
    needs_gradient: ClassVar[bool] = False  # follows the reward's own gradient: only with a differentiable reward
    takes_teachers: ClassVar[bool] = False  # learns from other runs' LoRAs (`--teacher`, the option `teachers`)
    offline: ClassVar[bool] = False  # learns from finished pictures that the policy did not draw (`--pairs`)
    samples_per_row: int = 1  # samples that one row sends through the network together

    def __init__(self, config: AlgorithmConfig):
        self.config = config

    @classmethod
    def pinned(cls, config: AlgorithmConfig, track: Track) -> AlgorithmConfig:
        """The config with what it names outside (files) fixed by a hash. Raises UsageError where that cannot be used."""
        return config

    def setup(self, policy: Policy, reward: Reward) -> None:
        """Called once, before any compute. Raise ValueError where policy or reward cannot serve."""

    def queries(self, drawn: int) -> int:
        """Reward queries that the algorithm itself makes in a round of `drawn` samples."""
        return 0

    def noisy_steps(self, policy: Policy, seed: int, number: int) -> Tensor | None:
        """The indices [W] of the sampler's steps that have noise in round `number` of a run with `seed`; None: all that can.

        It holds from the round's first sample to its last update; judging has the sampler's own noise."""
        return None

    def collecting(self, policy: Policy) -> AbstractContextManager[None]:
        """Inside, the policy is the one that samples are drawn from: by default itself."""
        return nullcontext()

    def stepped(self, policy: Policy) -> None:
        """Called after each step of the optimiser (for averages of the weights, say)."""

    @abstractmethod
    def prepare(self, policy: Policy, samples: ConsistentSamples, generator: torch.Generator) -> Rows:
        """The rows of a round, on the CPU; what stays fixed in the round (references, advantages) is computed here.

        Randomness comes from `generator` alone, so that a resumed round is the same round.
        """

    def batch(self, policy: Policy, samples: ConsistentSamples, rows: Rows) -> Rows:
        """All the rows of one optimiser step, with what depends on them together (a mean over the batch, say) added as
        columns: only so it does not depend on how many go through the network at once."""
        return rows

    @abstractmethod
    def loss(self, policy: Policy, samples: ConsistentSamples, rows: Rows) -> Loss:
        """The mean loss over `rows` with gradients to the policy's parameters."""

    def state(self) -> dict[str, Tensor]:
        """What must survive a kill between rounds (reward statistics, say)."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        if state:
            raise ValueError(f"{self.name} keeps no state, but the checkpoint holds {sorted(state)}")


class StepwiseAlgorithm(Algorithm):
    """A training backend whose loss is a sum over denoising steps' log-probs."""

    needs_density = True
    config: StepwiseConfig

    def setup(self, policy: Policy, reward: Reward) -> None:
        steps, wanted = window_steps(policy, self.config.window), self.config.sde_window
        if wanted is not None and wanted.steps > len(steps):
            raise ValueError(
                f"algo.sde_window.steps is {wanted.steps}, and window {list(self.config.window)} holds {len(steps)} steps with "
                f"noise of the sampler's {len(policy.schedule)}: take at most as many"
            )

    def noisy_steps(self, policy: Policy, seed: int, number: int) -> Tensor | None:
        wanted = self.config.sde_window
        return None if wanted is None else wanted.of(window_steps(policy, self.config.window), seed, number)


def window_steps(policy: Policy, window: tuple[float, float], density: bool = True) -> Tensor:
    """Indices of the steps in a window [W], with `density` of those alone that have one; raises ValueError if there is none."""
    total = len(policy.schedule)
    first, last = (round(share * total) for share in window)
    steps = torch.arange(first, last)
    steps = steps[policy.schedule.stochastic.cpu()[steps]] if density else steps
    if not len(steps):
        raise ValueError(f"window {window} holds none of the {total} {'stochastic ' * density}steps")
    return steps


def step_weights(policy: Policy, steps: Tensor, kind: str) -> Tensor:
    """The weight of each of `steps` [W]: 1, or sigma_t over its mean."""
    if kind == "one":
        return torch.ones(len(steps))
    std = policy.schedule.std.cpu()[steps]
    return std / std.mean()


def every_step(rows: Tensor, steps: Tensor, weights: Tensor) -> Rows:
    """The product of sample (or pair) rows and steps: row numbers, step numbers and weights, [R·W]."""
    return {
        "row": rows.repeat_interleave(len(steps)),
        "step": steps.repeat(len(rows)),
        "weight": weights.repeat(len(rows)),
    }


def step_log_prob(policy: Policy, samples: ConsistentSamples, rows: Tensor, steps: Tensor) -> Tensor:
    """log p of the stored steps (rows [B] of the samples, step numbers [B]) under the policy as it is now, [B]."""
    return stored_steps(policy, samples, rows, steps).log_prob


def all_log_probs(policy: Policy, samples: ConsistentSamples, rows: Tensor, steps: Tensor) -> Tensor:
    """`step_log_prob` over many rows without gradients, in the policy's batches: [R] on the CPU."""
    return in_batches(policy, lambda *part: step_log_prob(policy, samples, *part), rows, steps)
