"""CRD: what the network has come to prefer among a prompt's samples is matched to their rewards, both centred.

A = advantage among the prompt's samples G, alpha = clip(A / (2 c) + 1/2, 0, 1) with c the advantages' clip. All of G are
noised to one level, each with noise of its own; e is how far the velocity epsilon - x_0 that the network says, whatever it
predicts, is from the true one:
d = mean e^2 / max(mean |e|, 1e-5), the divisor without gradient, and R = d_old - d_theta, the implicit reward,
loss = c / beta mean over G of [beta (R - mean R) - (alpha - mean alpha)]^2 + (h + alpha (kl - h)) mean (f - f_base)^2,
f the velocity, h = min(kl, 1e-4), mean R without gradient (which changes nothing: the centred differences add up to 0).
R wants to be A / (2 c beta), up to what is the same for all of G.
At theta = old the gradient is that of mean A d, as nft's with `space` clean.

There are two averages of the weights, both brought up to date once a round: one is old, the other draws the samples.
G are all drawn samples of a prompt from vanilla, its targets and bases from dfusion. The official code centres over the
samples that go through the network together, whatever their prompts, and guides the base alone (`kl_guidance`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from bench_dfusion.algorithm import Algorithm, AlgorithmConfig, Between, Loss, Rows
from bench_dfusion.builders.contract import ConsistentSamples
from bench_dfusion.diffusion import samplers
from bench_dfusion.diffusion.policy import Policy, in_batches
from bench_dfusion.objectives.advantages import SPREADS, AdvantageConfig, Spread, advantages, prompt_groups
from bench_dfusion.objectives.averages import EMA
from bench_dfusion.objectives.denoising import Noised, all_outputs, draw_levels, mean_square, noised, self_normalised
from bench_dfusion.objectives.groups import each_member, group_rows, padded
from bench_dfusion.rewards.contract import Reward

LEAST_KL = 1e-4  # the weight of the distance to the base where alpha is 0 (official code)


class CRDConfig(AdvantageConfig):
    spread: Spread = Field("round", description=f"{SPREADS} (official: round, of all)")
    beta: Annotated[float, Between(0.1, 10.0)] = Field(
        1.0, gt=0, description="implicit rewards are matched to 1 / beta of the rewards (error units; official: 1)"
    )
    form: Literal["square", "bce"] = Field(
        "square",
        description="how they are matched: by the squared difference, or by the binary cross-entropy of their sigmoids "
        "(official: square, bce an option)",
    )
    kl: Annotated[float, Between(1e-3, 1.0)] = Field(
        0.1,
        ge=0,
        description="weight of the squared distance to the base's prediction where alpha is 1; it falls to 1e-4 where alpha "
        "is 0 (1; official: 0.1)",
    )
    kl_guidance: float | None = Field(
        None,
        ge=1,
        description="guidance scale of the base's prediction there (1; None: the sampler's, as everywhere; official: 4.5, the "
        "trained network unguided)",
    )
    space: Literal["velocity", "clean", "output"] = Field(
        "velocity",
        description="where differences are measured: the velocity (official, whose networks predict it), x_0 (as nft), or the "
        "network's own output, in which early levels of epsilon networks count less (1)",
    )
    old_start: float = Field(
        0.25, ge=0, lt=1, description="decay of the old weights at the first step (1; paper: 0.25)"
    )
    old_rate: float = Field(0.005, ge=0, description="and how much it grows with each step (1; paper: 0.005)")
    old_most: float = Field(0.999, ge=0, lt=1, description="and no further than this (1; paper: 0.999)")
    rollout_delay: int = Field(
        75, ge=0, description="steps after which the weights that draw begin to be an average (count; paper: 75)"
    )
    rollout_rate: float = Field(
        0.0075, ge=0, description="how much the decay of these grows with each step from then on (1; paper: 0.0075)"
    )
    rollout_most: float = Field(0.999, ge=0, lt=1, description="and no further than this (1; paper: 0.999)")


class CRD(Algorithm):
    name = "crd"
    summary = (
        "centred rewards matched by centred denoising errors of drawn samples (vanilla) or targets and bases (dfusion)"
    )
    paper = "Zhu et al. 2026 (Centered Reward Distillation, 2603.14128)"
    Config: ClassVar[type[AlgorithmConfig]] = CRDConfig
    config: CRDConfig

    def __init__(self, config: CRDConfig):
        super().__init__(config)
        delay = config.rollout_rate * config.rollout_delay
        self._averages = {
            "old": EMA(config.old_rate, config.old_most, config.old_start),
            "rollout": EMA(config.rollout_rate, config.rollout_most, -delay),
        }

    def setup(self, policy: Policy, reward: Reward) -> None:
        if self.config.kl_guidance is not None:
            policy.condition([""])  # while there is a text encoder

    def collecting(self, policy: Policy) -> AbstractContextManager[None]:
        for average in self._averages.values():
            average.update(policy)
        return policy.holding(self._averages["rollout"].weights(policy))

    def stepped(self, policy: Policy) -> None:
        for average in self._averages.values():
            average.steps += 1

    def prepare(self, policy: Policy, samples: ConsistentSamples, generator: torch.Generator) -> Rows:
        clip = self.config.advantage_clip
        advantage = advantages(samples.samples, samples.train, clip, self.config.spread, self.config.components)
        group = prompt_groups(samples.samples, samples.train)
        members = [(group == g).nonzero()[:, 0] for g in group.unique()]
        rows = group_rows(samples.train, members, self.config.timesteps, good=advantage / (2 * clip) + 0.5)
        self.samples_per_row = rows["member"].shape[1]
        rows["t"] = draw_levels(policy, len(rows["member"]), self.config.levels, generator)["t"]
        rows["noise"] = torch.randint(2**62, rows["member"].shape, generator=generator)
        real, flat = each_member(rows)

        def errors(*part: Tensor) -> Tensor:
            at = noised(policy, samples, *part)
            return self._error(policy, at, at.output(policy))

        with policy.holding(self._averages["old"].weights(policy)):
            rows["old"] = padded(real, in_batches(policy, errors, *flat))
        if self.config.kl:
            rows["base"] = torch.zeros(*real.shape, *policy.adapter.latent_shape)
            guidance = policy.guidance if self.config.kl_guidance is None else self.config.kl_guidance
            with policy.reference(), policy.guided_by(guidance):
                rows["base"][real] = all_outputs(policy, samples, *flat)
        return rows

    def loss(self, policy: Policy, samples: ConsistentSamples, rows: Rows) -> Loss:
        real, flat = each_member(rows)
        base = rows["base"][real] if self.config.kl else None
        at = noised(policy, samples, *flat)
        output = at.output(policy)
        real, old, good = (x.to(output.device) for x in (real, rows["old"], rows["good"]))
        gain = old - padded(real, self._error(policy, at, output))
        terms = crd_terms(gain, good, real, self.config.beta, self.config.form)
        value = self.config.advantage_clip / self.config.beta * terms
        metrics = {"gain": (gain.sum() / real.sum()).detach()}
        if base is not None:
            moved = self._view(policy, at, output) - self._view(policy, at, base.to(output.device))
            drift, least = padded(real, mean_square(moved)), min(self.config.kl, LEAST_KL)
            value = value + ((least + good * (self.config.kl - least)) * drift).sum(1) / real.sum(1)
            metrics["drift"] = (drift.sum() / real.sum()).detach()
        return Loss(value.mean(), metrics)

    def _view(self, policy: Policy, at: Noised, output: Tensor) -> Tensor:
        """What an output says in the configured space, [B, C, H, W]."""
        if self.config.space == "output":
            return output
        clean, noise = samplers.predict_clean(policy.levels, at.t, at.x_t, output)
        return clean if self.config.space == "clean" else noise - clean

    def _error(self, policy: Policy, at: Noised, output: Tensor) -> Tensor:
        """d [B] of an output."""
        return self_normalised(self._view(policy, at, output) - self._view(policy, at, at.target(policy)))

    def state(self) -> dict[str, Tensor]:
        return {f"{name}.{k}": v for name, average in self._averages.items() for k, v in average.state().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, average in self._averages.items():
            prefix = f"{name}."
            average.load_state({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})


def crd_terms(gain: Tensor, good: Tensor, real: Tensor, beta: float, form: str) -> Tensor:
    """The mean over each group's members [R] from R and alpha [R, members], 0 where `real` says that it is padded."""
    size = real.sum(1, keepdim=True)
    implicit = beta * (gain - gain.detach().sum(1, keepdim=True) / size)
    wanted = good - good.sum(1, keepdim=True) / size
    if form == "bce":
        terms = binary_cross_entropy_with_logits(implicit, wanted.sigmoid(), reduction="none")
    else:
        terms = (implicit - wanted) ** 2
    return (terms * real).sum(1) / size[:, 0]
