"""GRPO on denoising steps (Flow-GRPO, DanceGRPO): advantages within a prompt's group, a clipped ratio, a KL to the base.

A = (reward - mean of the prompt's) / (their std, or the round's, + 1e-4), rho = pi_theta / pi_old at a step:
loss = max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) + kl KL(pi_theta || pi_ref).
Flow-DPPO (`divergence`) has no clip: -A rho, and 0 for a row whose D = |mu - mu_old|^2 / (2 sigma_t^2), averaged over the
latent, has reached the threshold and would grow, A (rho - 1) > 0. Such rows stay in the mean.

The papers' steps are of a flow's SDE, with std s_t sqrt(-dt); ours are DDIM's, so read sigma_t for it, and for -dt
the share of the training timesteps that the step crosses (they add up to 1), hence s_t^2 = sigma_t^2 / -dt.
It trains on `samples.train`: a prompt's group is its drawn samples under a builder without fusion, its targets and
bases under D-Fusion, and pi_old is the plain policy at the start of the round (so rho is 1 at the first update).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from bench_dfusion.algorithm import AlgorithmConfig, Between, Loss, Rows, StepwiseAlgorithm
from bench_dfusion.builders.contract import ConsistentSamples
from bench_dfusion.builders.stored_steps import all_means, stored_steps
from bench_dfusion.diffusion.policy import Policy
from bench_dfusion.diffusion.samplers import gaussian_kl
from bench_dfusion.objectives.advantages import SPREADS, ComponentsConfig, Spread, advantages
from bench_dfusion.objectives.gardo import Gardo, GardoOption
from bench_dfusion.objectives.policy_gradient import (
    PolicyGradientConfig,
    at_each_step,
    clipped_share,
    clipped_terms,
    old_log_probs,
    sample_steps,
    scaled,
    unclipped_terms,
)
from bench_dfusion.rewards.contract import Reward


class GRPOConfig(GardoOption, ComponentsConfig, PolicyGradientConfig):
    spread: Spread = Field("prompt", description=f"{SPREADS} (papers: prompt; Flow-GRPO's code also round)")
    kl: Annotated[float, Between(1e-3, 1.0)] = Field(
        0.04,
        ge=0,
        description="weight of the KL to the base (advantages per nat; Flow-GRPO: 0.04 or 0.01, DanceGRPO: 0)",
    )
    kl_form: Literal["flow", "exact"] = Field(
        "flow",
        description="exact: |mu - mu_ref|^2 / (2 sigma_t^2); flow: that times -dt, as Flow-GRPO's code divides by "
        "2 s_t^2 (its weights belong to this form)",
    )
    guard: bool = Field(
        False,
        description="GRPO-Guard: log rho gets |mu - mu_old|^2 / (2 sigma_t^2) added and is multiplied by sigma_t, and "
        "the clipped loss is divided by -dt, so that every step is clipped and weighted alike (2510.22319; a clip "
        "chosen without it is too wide)",
    )
    divergence: float | None = Field(
        None,
        gt=0,
        exclude_if=lambda value: value is None,  # cells of before this option keep their hash
        description="Flow-DPPO, in the place of the clip: a row whose mean is this far from pi_old's, |mu - mu_old|^2 / "
        "(2 sigma_t^2), learns nothing that leads further away (nats per number of the latent; 2606.11025: 1e-7 with "
        "Flow-GRPO's SDE, 1e-6 with cps, other codes 1e-5; a clip eps answers to eps^2 / 2 times the latent's numbers); "
        "None: the clip",
    )
    divergence_sign: Literal["ratio", "exact"] = Field(
        "ratio",
        exclude_if=lambda value: value == "ratio",
        description="when a row of Flow-DPPO leads further away: ratio: A (rho - 1) > 0 (its eq. 14); exact: "
        "A (log rho - D) > 0, as D itself would grow (its eq. 26)",
    )

    @model_validator(mode="after")
    def _possible(self) -> GRPOConfig:
        needing = "guard" if self.guard else "divergence" if self.divergence is not None else None
        if needing and self.old_log_prob == "behaviour":
            raise ValueError(
                f"{needing} needs the means of pi_old, and those of the fused prediction are not kept: "
                "set old_log_prob = plain"
            )
        if self.guard and self.divergence is not None:
            raise ValueError("guard is for the clip, and divergence takes its place: set one of them")
        if self.guard and self.ratio_scale != "one":
            raise ValueError("guard multiplies log rho by sigma_t itself: leave ratio_scale out, or guard")
        if self.divergence is None and self.divergence_sign != "ratio":
            raise ValueError("divergence_sign is of Flow-DPPO: set divergence too")
        return self


class GRPO(StepwiseAlgorithm):
    name = "grpo"
    summary = "group-relative policy gradient on drawn samples (vanilla) or targets and bases (dfusion); GRPO-Guard and Flow-DPPO as options"
    paper = (
        "Liu et al. 2025 (Flow-GRPO, 2505.05470); Xue et al. 2025 (DanceGRPO, 2505.07818); GRPO-Guard (2510.22319); "
        "Flow-DPPO (2606.11025); GARDO (2512.24138)"
    )
    Config: ClassVar[type[AlgorithmConfig]] = GRPOConfig
    config: GRPOConfig

    def __init__(self, config: GRPOConfig):
        super().__init__(config)
        self._gardo = None if config.gardo is None else Gardo(config.gardo)

    def setup(self, policy: Policy, reward: Reward) -> None:
        super().setup(policy, reward)
        if self._gardo is not None:
            self._gardo.setup(reward)

    def stepped(self, policy: Policy) -> None:
        if self._gardo is not None:
            self._gardo.updates += 1

    def state(self) -> dict[str, Tensor]:
        return {} if self._gardo is None else self._gardo.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        if self._gardo is None:
            super().load_state(state)
        else:
            self._gardo.load_state(state)

    def prepare(self, policy: Policy, samples: ConsistentSamples, generator: torch.Generator) -> Rows:
        rows = sample_steps(policy, samples, self.config)
        rows["old"] = old_log_probs(policy, samples, rows, self.config.old_log_prob)
        rows["size"] = policy.schedule.size.cpu()[rows["step"]]
        advantage = advantages(
            samples.samples, samples.train, self.config.advantage_clip, self.config.spread, self.config.components
        )
        if self._gardo is not None:
            advantage = self._gardo.advantages(advantage, samples)
        rows["advantage"] = at_each_step(advantage, rows)
        if self.config.guard or self.config.divergence is not None:
            rows["old_mean"] = all_means(policy, samples, rows["row"], rows["step"])
        if self.config.kl:
            with policy.reference() if self._gardo is None else self._gardo.reference(policy):
                rows["ref_mean"] = all_means(policy, samples, rows["row"], rows["step"])
        if self._gardo is not None:
            self._hold(self._gardo, policy, samples, rows)
        return rows

    def _hold(self, gardo: Gardo, policy: Policy, samples: ConsistentSamples, rows: Rows) -> None:
        """Which rows GARDO's KL holds, and to which reference."""
        rows["held"] = at_each_step(gardo.gate(samples), rows)
        now = rows["old_mean"] if "old_mean" in rows else all_means(policy, samples, rows["row"], rows["step"])
        distances = gaussian_kl(now, rows["ref_mean"], policy.schedule.std.cpu()[rows["step"]])
        if len(distances) and gardo.resets(policy, float(distances.mean())):
            rows["ref_mean"] = now

    def loss(self, policy: Policy, samples: ConsistentSamples, rows: Rows) -> Loss:
        config, at = self.config, stored_steps(policy, samples, rows["row"], rows["step"])
        rows = {key: value.to(at.mean.device) for key, value in rows.items()}
        log_ratio = at.log_prob - rows["old"]
        metrics = {"approx_kl": 0.5 * (log_ratio.detach() ** 2).mean()}
        if config.guard:
            log_ratio = (log_ratio + gaussian_kl(at.mean, rows["old_mean"], at.std)) * at.std
        plain, log_ratio = log_ratio, scaled(log_ratio, at.std, config.ratio_scale)
        if config.divergence is None:
            metrics["clipped"] = clipped_share(log_ratio, config.clip)
            terms = clipped_terms(log_ratio, rows["advantage"], config.clip)
        else:
            moved = gaussian_kl(at.mean, rows["old_mean"], at.std).detach()
            exact = config.divergence_sign == "exact"
            away = leads_away(plain, moved, rows["advantage"], config.divergence, exact)
            metrics |= {"divergence": moved.mean(), "dropped": away.float().mean()}
            terms = unclipped_terms(log_ratio, rows["advantage"]) * ~away
        if config.guard:
            terms = terms / rows["size"]
        if config.kl:
            kl = gaussian_kl(at.mean, rows["ref_mean"], at.std)
            metrics["kl"] = kl.detach().mean()
            if self._gardo is not None:
                kl, metrics["held"] = kl * rows["held"], rows["held"].float().mean()
            terms = terms + config.kl * (kl if config.kl_form == "exact" else kl * rows["size"])
        return Loss((rows["weight"] * terms).mean(), metrics)


def leads_away(log_ratio: Tensor, divergence: Tensor, advantage: Tensor, most: float, exact: bool) -> Tensor:
    """Which rows [B] are `most` or more from pi_old and would go further, from log rho, D and A [B]."""
    ahead = log_ratio - divergence if exact else log_ratio  # log rho - D is (x_s - mu) (mu - mu_old) / sigma_t^2
    return (divergence >= most) & (advantage * ahead > 0)
