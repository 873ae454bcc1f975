"""How well the embedded base fulfils prompts, by guidance and steps: `python benchmarks/samplers.py [--out FILE]`.

The 32 validation prompts × IMAGES pictures, judged by the oracle: the table of docs/micro.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from bench_dfusion.micro import oracle, scenes
from bench_dfusion.models.loading import load_adapter
from bench_dfusion.runs.trainer import make_policy
from bench_dfusion.tracks import schema
from bench_dfusion.util.progress import bar
from bench_dfusion.util.seeds import seed_of

IMAGES = 8  # of each validation prompt
SAMPLERS = [(1.0, 8), (1.0, 12), (1.5, 5), (1.5, 6), (1.5, 8), (2.0, 8), (4.0, 8)]  # guidance, steps


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, help="write what was measured as JSON")
    out = parser.parse_args().out
    content = schema.read("micro")
    lines = []
    prompts = [p for p in content["prompts"]["validation"] for _ in range(IMAGES)]
    seeds = torch.tensor([seed_of("samplers", p, i) for i, p in enumerate(prompts)])
    templates = np.array([scenes.parse(p).template for p in prompts])
    with bar("samplers", len(SAMPLERS)) as progress:
        for guidance, steps in SAMPLERS:
            settings = schema.Track.model_validate(
                schema.deep_merge(content, {"sampler": {"guidance": guidance, "steps": steps}})
            )
            adapter, _ = load_adapter(settings.model)
            policy = make_policy(settings, adapter, 0, torch.device("cpu"))
            images = policy.decode(policy.sample(prompts, seeds).final)
            verdicts = [oracle.judge(i, p) for i, p in zip(images.numpy(), prompts, strict=True)]
            full = np.array([v.full for v in verdicts])
            lines.append(
                {
                    "guidance": guidance,
                    "steps": steps,
                    "full": float(full.mean()),
                    "graded": float(np.mean([v.graded for v in verdicts])),
                    **{t: float(full[templates == t].mean()) for t in scenes.TEMPLATES},
                    "forwards": steps * (1 if guidance == 1 else 2),  # of the network for a picture
                }
            )
            progress.advance(1)
    for line in lines:
        print(" | ".join(f"{k} {v:.3g}" for k, v in line.items()))
    if out is not None:
        found = {"images": IMAGES, "threads": torch.get_num_threads(), "samplers": lines}
        out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
