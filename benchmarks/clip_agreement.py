"""How far the embedded CLIP agrees with the oracle on generated pictures: `python benchmarks/clip_agreement.py [--track micro-v2] [--out F]`.

Pairwise accuracy within a prompt (which of two samples of one prompt is better, ties of the oracle left out)
on the base model's samples of the validation prompts, and on clean renders whether the CLIP prefers a
picture's own caption to one with an attribute, a number or a relation changed.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from bench_dfusion import registry
from bench_dfusion.micro import scenes
from bench_dfusion.micro.v2 import grammar, oracle
from bench_dfusion.micro.v2 import scenes as second
from bench_dfusion.models.loading import load_adapter
from bench_dfusion.results import statistics
from bench_dfusion.runs.trainer import make_policy
from bench_dfusion.tracks import schema
from bench_dfusion.util.seeds import seed_of


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, help="write what was measured as JSON")
    parser.add_argument("--track", choices=("micro", "micro-v2"), default="micro")
    args = parser.parse_args()
    out = args.out
    settings = schema.validate(schema.Track, schema.read(args.track), "track")
    world = (scenes, scenes) if args.track == "micro" else (grammar, second)  # of prompts, of pictures
    adapter, _ = load_adapter(settings.model)
    policy = make_policy(settings, adapter, 0, torch.device("cpu"))
    cls = registry.load("rewards", "clip")
    clip = cls(cls.Config(model=args.track))
    k = 16
    prompts = [p for p in settings.prompts.validation for _ in range(k)]
    seeds = torch.tensor([seed_of("agreement", p, i) for i, p in enumerate(prompts)])
    images = policy.decode(policy.sample(prompts, seeds).final)
    scores = clip.score(images, prompts).view(-1, k).numpy()
    truth = np.array([oracle.judge(i, p).graded for i, p in zip(images.numpy(), prompts, strict=True)]).reshape(-1, k)
    each = [statistics.pairwise_accuracy(s, t) for s, t in zip(scores, truth, strict=True)]
    interval = statistics.mean_interval(np.array([e for e in each if np.isfinite(e)]))
    print(
        f"pairwise accuracy within a prompt: {interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}] over prompts"
    )

    ranks = float(stats.spearmanr(scores.ravel(), truth.ravel()).statistic)
    print(f"rank correlation over all pictures: {ranks:.3f}")
    found = {
        "pictures": scores.size,
        "pairwise accuracy within a prompt": {"mean": interval.mean, "low": interval.low, "high": interval.high},
        "by prompt": dict(zip(settings.prompts.validation, [None if np.isnan(e) else e for e in each], strict=True)),
        "rank correlation": ranks,
        "own caption over one with a word changed": {},
    }

    rng = random.Random(0)
    for template in world[0].TEMPLATES:
        pictures, own, other = [], [], []
        while len(own) < 200:
            spec, change = world[0].random_spec(template, rng), world[0].random_spec(template, rng)
            if spec != change and len(set(spec.prompt.split()) - set(change.prompt.split())) == 1:  # one word changed
                pictures.append(torch.from_numpy(world[1].render(world[1].sample_scene(spec, rng))))
                own.append(spec.prompt)
                other.append(change.prompt)
        batch = torch.stack(pictures)
        share = float((clip.score(batch, own) > clip.score(batch, other)).float().mean())
        print(f"{template}: own caption over one with a word changed: {share:.3f}")
        found["own caption over one with a word changed"][template] = share
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
