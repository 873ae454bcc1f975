"""Base and trained on the same held-out noise, before every judge: `evaluate` is the end of a run and all of an eval.

The base is the track's checked base where it has one (`checked_base`), else drawn beside the trained policy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from bench_dfusion.diffusion import samplers
from bench_dfusion.diffusion.policy import Policy, Trajectory
from bench_dfusion.errors import PluginError
from bench_dfusion.results import checked_base, statistics
from bench_dfusion.results.checked_base import CheckedBase
from bench_dfusion.results.records import Drift, Gain, Verdict
from bench_dfusion.rewards.contract import Reward, embedded, fault, made, scored_in_shards
from bench_dfusion.runs.config import judges_of
from bench_dfusion.tracks.schema import Track
from bench_dfusion.util import parallel
from bench_dfusion.util.progress import bar
from bench_dfusion.util.seeds import seed_of


@dataclass
class Drawn:
    """Evaluation images of one policy: uint8 [P·K, H, W, 3], prompt by prompt, and their trajectories."""

    images: Tensor
    trajectory: Trajectory


@dataclass
class Evaluation:
    """What every judge said of base and trained, how far apart the two are, and what was drawn.

    base, trained   the first picture of each held-out prompt on the same noise, uint8 [P, H, W, 3]
    drawn           every picture of the trained policy
    scores          every judge's scores of them, float32 [P, K]
    """

    verdicts: list[Verdict]
    drift: Drift
    base: Tensor
    trained: Tensor
    drawn: Drawn
    scores: dict[str, Tensor]


def evaluate(
    policy: Policy,
    track: Track,
    judges: Mapping[str, Reward],
    trained_on: Mapping[str, str],
    base: CheckedBase | None = None,
) -> Evaluation:
    """Draw the policy on the track's held-out prompts, and its reference where there is no checked base, and let every
    judge score both.

    `trained_on`: the fingerprints of the rewards that the policy was trained with, by name: of a weighted sum its
    components; empty where that is not known. `base`: what `checked_base.ensure` gave for the track.
    """
    prompts, k = track.prompts.heldout, track.evaluation.images_per_prompt
    embed = embedder(judges)
    with sampling(policy, track), bar("evaluate", (1 if base else 2) * k * len(prompts)) as progress:
        trained = draw(policy, prompts, k, progress.advance)
        if base is None:
            with policy.reference():
                reference = draw(policy, prompts, k, progress.advance)
        moved = kl(policy, trained.trajectory, k)
    scores = {name: judged(judge, name, trained, k) for name, judge in judges.items()}
    if base is None:
        of_base = {name: judged(judge, name, reference, k) for name, judge in judges.items()}
        first, (spread, space) = reference.images, diversity(reference.images, k, embed)
    else:
        of_base = {name: torch.from_numpy(values) for name, values in base.scores.items()}
        first, spread, space = torch.from_numpy(base.pictures), base.diversity, base.space
    verdicts = [
        verdict(judge, name, of_base[name], scores[name], track, trained_on, base is not None)
        for name, judge in judges.items()
    ]
    distance = trained.images if base is None else trained.images[::k]
    found = Drift(
        pixels=float((distance.float() - first.float()).square().flatten(1).mean(1).sqrt().mean()),
        kl=moved,
        diversity_base=float(spread.mean()),
        diversity_trained=float(diversity(trained.images, k, embed)[0].mean()),
        diversity_space=space,
    )
    return Evaluation(verdicts, found, first if base else first[::k], trained.images[::k], trained, scores)


def sampling(policy: Policy, track: Track) -> AbstractContextManager[None]:
    """Inside, the policy samples what is judged: with the track's `evaluation.sampler` where it has one.

    Raises ValueError where the model has no such sampler.
    """
    other = track.evaluation.sampler
    if other is None:
        return nullcontext()
    return policy.sampling(other.steps, other.eta, other.kind, other.guidance, other.resolution)


def load_judges(track: Track, device: torch.device, make: Callable[..., Reward] = made) -> dict[str, Reward]:
    """The track's judges by name, as `make` gives them. Raises UsageError or ValueError where one is unknown, cannot be loaded or cannot
    score a held-out prompt.
    """
    judges = {}
    for text, (cls, options) in judges_of(track).items():
        loaded = judges[text] = make(cls, options, device, track.prompts.heldout)
        if track.memory.offload_rewards:
            loaded.offload()
    return judges


def draw(policy: Policy, prompts: Sequence[str], per_prompt: int, advance: Callable[[int], None]) -> Drawn:
    """Sample with noise that depends on (prompt, image index) alone. Raises NotFinite."""
    each = [p for p in prompts for _ in range(per_prompt)]
    seeds = torch.tensor([seed_of("evaluation", p, i) for p in prompts for i in range(per_prompt)])
    trajectory = policy.sample(each, seeds, advance)
    return Drawn(policy.decode(trajectory.final), trajectory)


def judged(judge: Reward, name: str, drawn: Drawn, per_prompt: int, what: str = "judge") -> Tensor:
    """A judge's scores float32 [P, K]. Raises PluginError where they are no numbers: the fault is the judge's."""
    prompts = drawn.trajectory.prompts
    with judge.scoring():
        scores = scored_in_shards(judge, drawn.images, prompts)
    if wrong := fault(scores, prompts):
        raise PluginError(f"{what} {name} {wrong}: mend it, and the same command goes on")
    return scores.view(-1, per_prompt)


def verdict(
    judge: Reward, name: str, base: Tensor, trained: Tensor, track: Track, trained_on: Mapping[str, str], checked: bool
) -> Verdict:
    """A judge's verdict from its scores of base [P, K₀] and trained [P, K]. `trained_on`: see `evaluate`; `checked`:
    whether the base is a checked one, of which the gain is freed of the luck of its first K pictures."""
    means = [scores.mean(1).numpy() for scores in (base, trained)]
    gains, adjusted = (means[1] - means[0]).astype(float), None
    if checked:
        means = [checked_base.means(scores.numpy()) for scores in (base, trained)]
        adjusted = statistics.adjusted_gains(base.numpy(), trained.numpy()[None], track.prompts.labels)
        gains = adjusted.table[0]
    interval = statistics.paired_gain(gains[None], clusters=track.prompts.labels)
    templates = track.prompts.templates or {}
    by_template: dict[str, list[int]] = {}
    for i, prompt in enumerate(track.prompts.heldout):
        by_template.setdefault(templates.get(prompt, "all"), []).append(i)
    fingerprint = judge.fingerprint()
    return Verdict(
        judge=name,
        metric=judge.unit,
        trained_on=fingerprint in trained_on.values() or (judge.one_judge and judge.name in trained_on),
        base=float(means[0].mean()),
        trained=float(means[1].mean()),
        gain=Gain(mean=interval.mean, low=interval.low, high=interval.high, kind=interval.kind),
        templates={t: (float(means[0][rows].mean()), float(means[1][rows].mean())) for t, rows in by_template.items()},
        per_prompt=[(float(b), float(a)) for b, a in zip(*means, strict=True)],
        fingerprint=fingerprint,
        adjusted=None if adjusted is None else gains.tolist(),
        slope=None if adjusted is None else adjusted.slope,
    )


def agreement(reward: Tensor, scores: Mapping[str, Tensor]) -> dict[str, float]:
    """Spearman's rank correlation of the training reward [P, K] and each judge on the same pictures, over all of them; a
    judge is left out where one of the two gives every picture the same score."""
    return {
        name: float(stats.spearmanr(reward.flatten(), own.flatten()).statistic)
        for name, own in scores.items()
        if reward.unique().numel() > 1 and own.unique().numel() > 1
    }


@torch.no_grad()
def kl(policy: Policy, trajectory: Trajectory, per_prompt: int) -> float:
    """Mean per-step KL of the policy from its reference along its own trajectories, one of each prompt (nats).

    Steps of the ODE have no density: there it is what it would be with the noise of the family's own sampler.
    """
    schedule = policy.schedule
    if not schedule.stochastic.any():
        schedule = policy.adapter.schedule(len(schedule), None).to(policy.device)
    steps = schedule.stochastic.nonzero()[:, 0].tolist()

    def mean_of(x_t: Tensor, step: Tensor, prompts: list[str]) -> Tensor:
        output = policy.predict(x_t, schedule.timesteps[step], prompts)
        return samplers.step_mean(schedule, step, x_t, output)

    def kl_of(rows: Tensor) -> Tensor:
        prompts, found = [trajectory.prompts[i] for i in rows.tolist()], []
        for i in steps:
            x_t = trajectory.latents[rows, i].to(policy.device)
            step = torch.full((len(rows),), i, device=policy.device)
            mean = mean_of(x_t, step, prompts)
            with policy.reference():
                other = mean_of(x_t, step, prompts)
            found.append(samplers.gaussian_kl(mean, other, schedule.std[step]).cpu())
        return torch.cat(found)

    rows = torch.arange(0, len(trajectory), per_prompt)
    return float(policy.finite(torch.cat(parallel.each(kl_of, rows.split(policy.batch)))).mean())


def embedder(judges: Mapping[str, Reward]) -> Reward | None:
    """The judge in whose image embedding diversity is measured; None where none has one."""
    return next((judge for judge in judges.values() if hasattr(judge, "embed")), None)


def diversity(images: Tensor, per_prompt: int, embed: Reward | None) -> tuple[np.ndarray, str]:
    """Vendi score of each prompt's pictures, uint8 [P·K, H, W, 3] to [P] (effective images), and the space it is measured
    in: the image embedding of `embed` where it has one, else pixels."""
    if embed is not None and hasattr(embed, "embed"):
        space = f"{embed.name} image embedding"
        with embed.scoring():
            e = torch.cat([embedded(embed, part) for part in images.split(128)])
    else:
        space, e = "pixels", 1 + images.float().flatten(1)  # a black picture has a direction, too
    return np.array([statistics.vendi(group.numpy()) for group in e.view(-1, per_prompt, e.shape[-1])]), space
