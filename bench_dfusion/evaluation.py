"""Base and trained on the same held-out noise, before every judge: `evaluate` is the end of a run and all of an eval."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bench_dfusion import parallel, samplers, statistics
from bench_dfusion.config import judges_of
from bench_dfusion.policy import Policy, Trajectory
from bench_dfusion.progress import bar
from bench_dfusion.records import Drift, Gain, Verdict
from bench_dfusion.registry import PluginError
from bench_dfusion.reward import Reward, dealt_out, embedded, made
from bench_dfusion.seeds import seed_of
from bench_dfusion.track import Track


@dataclass
class Drawn:
    """Evaluation images of one policy: uint8 [P·K, H, W, 3], prompt by prompt, and their trajectories."""

    images: Tensor
    trajectory: Trajectory


@dataclass
class Evaluation:
    """What every judge said of base and trained, how far apart the two are, and the images of both."""

    verdicts: list[Verdict]
    drift: Drift
    base: Drawn
    trained: Drawn


def evaluate(policy: Policy, track: Track, judges: Mapping[str, Reward], trained_on: Mapping[str, str]) -> Evaluation:
    """Draw the policy and its reference on the track's held-out prompts and let every judge score both.

    `trained_on`: the fingerprints of the rewards that the policy was trained with, by name: of a weighted sum its
    components; empty where that is not known.
    """
    prompts, k = track.prompts.heldout, track.evaluation.images_per_prompt
    with bar("evaluate", 2 * k * len(prompts)) as progress:
        trained = draw(policy, prompts, k, progress.advance)
        with policy.reference():
            base = draw(policy, prompts, k, progress.advance)
    verdicts = judge(judges, base, trained, track, trained_on)
    embed = next((j for j in judges.values() if hasattr(j, "embed")), None)
    return Evaluation(verdicts, drift(policy, base, trained, k, embed), base, trained)


def load_judges(track: Track, device: torch.device, make: Callable[..., Reward] = made) -> dict[str, Reward]:
    """The track's judges by name, as `make` gives them. Raises UsageError or ValueError where one is unknown, cannot be loaded or cannot
    score a held-out prompt.
    """
    judges = {}
    for text, (cls, options) in judges_of(track).items():
        loaded = judges[text] = make(cls, options, device, track.prompts.heldout)
        if track.memory.offload_rewards:
            loaded.rest()
    return judges


def draw(policy: Policy, prompts: Sequence[str], per_prompt: int, advance: Callable[[int], None]) -> Drawn:
    """Sample with noise that depends on (prompt, image index) alone. Raises NotFinite."""
    each = [p for p in prompts for _ in range(per_prompt)]
    seeds = torch.tensor([seed_of("evaluation", p, i) for p in prompts for i in range(per_prompt)])
    trajectory = policy.sample(each, seeds, advance)
    return Drawn(policy.decode(trajectory.final), trajectory)


def judge(
    judges: Mapping[str, Reward],
    base: Drawn,
    trained: Drawn,
    track: Track,
    trained_on: Mapping[str, str],
) -> list[Verdict]:
    """Every judge's verdict, in the track's order: the first ranks. `trained_on`: see `evaluate`."""
    prompts, k = list(track.prompts.heldout), track.evaluation.images_per_prompt
    templates = track.prompts.templates or {}
    by_template: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_template.setdefault(templates.get(prompt, "all"), []).append(i)
    verdicts = []
    for name, judge_reward in judges.items():
        with judge_reward.scoring():
            scores = [_judged(judge_reward, name, d).view(-1, k).mean(1).numpy() for d in (base, trained)]
        gains = (scores[1] - scores[0]).astype(float)
        interval = statistics.paired_gain(gains[None])
        fingerprint = judge_reward.fingerprint()
        verdicts.append(
            Verdict(
                judge=name,
                metric=judge_reward.unit,
                trained_on=fingerprint in trained_on.values()
                or (judge_reward.one_judge and judge_reward.name in trained_on),
                base=float(scores[0].mean()),
                trained=float(scores[1].mean()),
                gain=Gain(mean=interval.mean, low=interval.low, high=interval.high, kind=interval.kind),
                templates={
                    t: (float(scores[0][rows].mean()), float(scores[1][rows].mean())) for t, rows in by_template.items()
                },
                per_prompt=[(float(b), float(a)) for b, a in zip(*scores, strict=True)],
                fingerprint=fingerprint,
            )
        )
    return verdicts


def _judged(judge: Reward, name: str, drawn: Drawn) -> Tensor:
    """A judge's scores float32 [P·K]. Raises PluginError where they are no numbers: the fault is the judge's."""
    prompts = drawn.trajectory.prompts
    scores = dealt_out(judge, drawn.images, prompts)
    if scores.shape != (len(prompts),):
        raise PluginError(f"judge {name} returned the shape {tuple(scores.shape)} for {len(prompts)} images")
    if not scores.isfinite().all():
        bad = int((~scores.isfinite()).nonzero()[0])
        raise PluginError(
            f"judge {name} returned {scores[bad].item()} for {prompts[bad]!r}: mend it, and the same command goes on"
        )
    return scores


def drift(policy: Policy, base: Drawn, trained: Drawn, per_prompt: int, embed: Reward | None) -> Drift:
    """Distance, KL and diversity of the trained policy beside the base.

    Diversity is measured in the image embedding of `embed` where it has one, else in pixels.
    """
    difference = trained.images.float() - base.images.float()
    steps = policy.schedule.stochastic.nonzero()[:, 0].tolist()
    trajectory = trained.trajectory

    @torch.no_grad()
    def kl_of(rows: Tensor) -> Tensor:
        prompts, found = [trajectory.prompts[i] for i in rows.tolist()], []
        for i in steps:
            x_t = trajectory.latents[rows, i].to(policy.device)
            step = torch.full((len(rows),), i, device=policy.device)
            mean = policy.mean(x_t, step, prompts)
            with policy.reference():
                other = policy.mean(x_t, step, prompts)
            found.append(samplers.gaussian_kl(mean, other, policy.schedule.std[step]).cpu())
        return torch.cat(found)

    rows = torch.arange(0, len(trajectory), per_prompt)  # one image of each prompt
    kl = policy.finite(torch.cat(parallel.each(kl_of, rows.split(policy.batch))))
    spaces, space = [], "pixels"
    for drawn in (base, trained):
        if embed is not None and hasattr(embed, "embed"):
            space = f"{embed.name} image embedding"
            with embed.scoring():
                spaces.append(torch.cat([embedded(embed, part) for part in drawn.images.split(128)]))
        else:
            spaces.append(1 + drawn.images.float().flatten(1))  # a black picture has a direction, too
    diversity = [
        float(np.mean([statistics.vendi(group.numpy()) for group in e.view(-1, per_prompt, e.shape[-1])]))
        for e in spaces
    ]
    return Drift(
        pixels=float(difference.square().flatten(1).mean(1).sqrt().mean()),
        kl=float(kl.mean()),
        diversity_base=diversity[0],
        diversity_trained=diversity[1],
        diversity_space=space,
    )
