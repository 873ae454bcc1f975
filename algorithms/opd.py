"""OPD: several LoRAs distilled into one, on the trajectories that the student draws itself.

At each stored x_t of a drawn sample mu_S is the mean of the next latent under the student, mu_T that under the sample's
teacher, another LoRA on the same base, without gradient:
loss = mean (mu_S - mu_T)^2 / 2, of an ODE's steps (`track.sampler.eta` 0) the paper's own form, or
loss = mean (mu_S - mu_T)^2 / (2 sigma_t^2), the KL of the two Gaussians (`form` kl): dpok's KL, to a teacher instead of
the base.
The prompts of a round go to the teachers in turn: the n-th prompt to teacher n modulo their number, from 0.

It learns nothing from the reward, whose scores only say in the record how the student fares: give the one that the teachers
were trained with, so that it does not rank the student. It trains on drawn samples alone: a fused target is not on the
student's own trajectory.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from bench_dfusion.algorithm import Algorithm, AlgorithmConfig, Loss, Rows, every_step, window_steps
from bench_dfusion.builders.contract import ConsistentSamples, Share
from bench_dfusion.builders.stored_steps import all_means, stored_steps
from bench_dfusion.diffusion.policy import Policy
from bench_dfusion.diffusion.samplers import gaussian_kl
from bench_dfusion.errors import UsageError
from bench_dfusion.objectives import teachers
from bench_dfusion.objectives.advantages import prompt_groups
from bench_dfusion.objectives.denoising import mean_square
from bench_dfusion.rewards.contract import Reward
from bench_dfusion.tracks.schema import Track


class OPDConfig(AlgorithmConfig):
    teachers: tuple[str, ...] = Field(
        (),
        exclude=True,  # the hashes say what was learnt from, wherever it lay
        description="directories of runs, or LoRA files, on the track's model and of its LoRA's shape (paths); run --teacher "
        "sets it",
    )
    sha256: tuple[str, ...] | None = Field(
        None, description="hashes of the teachers' LoRA files, in their order (hex; None: as found, put in the record)"
    )
    guidance: tuple[float, ...] | None = Field(
        None,
        description="guidance scale of each teacher's predictions, in their order (1; None: the sampler's; official: 4.5, 4.5 "
        "and 1 under a student of 4.5)",
    )
    form: Literal["mean", "kl"] = Field(
        "mean",
        description="half the squared distance of the means (paper: eq. 12, the default), or the KL of the steps, which needs "
        "a sampler with noise",
    )
    window: Share = Field(
        (0.0, 1.0),
        description="share of the steps trained on, [from, to) within 0 and 1, in sampling order, 0 the noisiest (1; "
        "official: all but the last)",
    )


class OPD(Algorithm):
    name = "opd"
    summary = "distils the LoRAs of several runs (--teacher) into one, step by step; trains on drawn samples, no reward"
    paper = "DiffusionOPD 2026 (2605.15055), eq. 12"
    Config: ClassVar[type[AlgorithmConfig]] = OPDConfig
    takes_teachers = True
    config: OPDConfig

    @classmethod
    def pinned(cls, config: AlgorithmConfig, track: Track) -> AlgorithmConfig:
        assert isinstance(config, OPDConfig)
        count, prompts = len(config.teachers), track.budget.prompts_per_round
        if not count:
            raise UsageError(
                "opd distils the LoRAs of other runs: give --teacher RUN_OR_LORA, once for each; in a sweep --set algo.teachers"
            )
        if not track.lora.rank:
            raise UsageError("opd's teachers are LoRAs as the student is one: give track.lora.rank as of theirs, not 0")
        if count > prompts:
            raise UsageError(
                f"{count} teachers and {prompts} prompts a round: each teaches one at least, so raise prompts_per_round"
            )
        if config.guidance is not None and len(config.guidance) != count:
            raise UsageError(f"algo.guidance is one number for each teacher: {count}, not {len(config.guidance)}")
        found = teachers.hashes(config.teachers)
        if config.sha256 not in (None, found):
            raise UsageError(f"the teachers' files hash to {', '.join(found)}, not to the algo.sha256 that is asked")
        return config.model_copy(update={"sha256": found})

    def setup(self, policy: Policy, reward: Reward) -> None:
        self._steps(policy)
        self._teachers = [teachers.read_weights(policy, path) for path in self.config.teachers]
        if self.config.guidance is not None:
            policy.condition([""])  # while there is a text encoder

    def _steps(self, policy: Policy) -> Tensor:
        return window_steps(policy, self.config.window, density=self.config.form == "kl")

    def prepare(self, policy: Policy, samples: ConsistentSamples, generator: torch.Generator) -> Rows:
        drawn, steps = torch.arange(samples.drawn), self._steps(policy)
        rows = every_step(drawn, steps, torch.ones(len(steps)))
        teacher = (prompt_groups(samples.samples, drawn) % len(self._teachers)).repeat_interleave(len(steps))
        rows["teacher_mean"] = torch.zeros(len(teacher), *policy.adapter.latent_shape)
        for number, weights in enumerate(self._teachers):
            own = teacher == number
            guidance = policy.guidance if self.config.guidance is None else self.config.guidance[number]
            with policy.holding(weights), policy.guided_by(guidance):
                rows["teacher_mean"][own] = all_means(policy, samples, rows["row"][own], rows["step"][own])
        return rows

    def loss(self, policy: Policy, samples: ConsistentSamples, rows: Rows) -> Loss:
        at = stored_steps(policy, samples, rows["row"], rows["step"])
        teacher = rows["teacher_mean"].to(at.mean.device)
        kl = self.config.form == "kl"
        terms = gaussian_kl(at.mean, teacher, at.std) if kl else mean_square(at.mean - teacher) / 2
        return Loss(terms.mean())
