"""What time grows with: samples, steps, batch, resolution, LoRA rank, on the embedded model.

    pip install vl-convert-python  # for the picture
    python benchmarks/scaling.py [--repeats 3]

Each value is timed in turns with the others and the least time is kept. `exponent` is the slope of log time over log
value between the two largest values: 1 is linear, 0 is none. Samples and steps should be linear; a batch only deals the
same samples out differently; tokens grow with the square of the resolution and attention with its fourth power; a
LoRA's rank is a small part of a training step.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import altair as alt
import measuring
import pandas as pd
import torch

from bench_dfusion.diffusion.policy import Policy
from bench_dfusion.models.loading import load_adapter
from bench_dfusion.runs.trainer import make_policy
from bench_dfusion.tracks import schema
from bench_dfusion.tracks.schema import Track

VALUES: dict[str, tuple[int, ...]] = {
    "samples": (48, 96, 192),
    "steps": (4, 8, 16),
    "batch": (12, 24, 48, 96),
    "resolution": (32, 64, 128),
    "LoRA rank": (1, 4, 16, 64),
}


def policy_of(**changes: Any) -> Policy:
    content = schema.read("micro")
    content["model"] |= {"sha256": None}
    for key, value in changes.items():
        section, _, option = key.partition("_")
        content[section][option] = value
    settings = Track.model_validate(content)
    return make_policy(settings, load_adapter(settings.model)[0], 0, torch.device("cpu"))


def job(axis: str, value: int) -> Callable[[], object]:
    """What is timed at one value of an axis; everything else is the track's, 96 samples."""
    count = value if axis == "samples" else 24 if axis == "resolution" else 96
    changes = {"steps": {"sampler_steps": value}, "resolution": {"model_resolution": value}}
    policy = policy_of(**changes.get(axis, {"lora_rank": value} if axis == "LoRA rank" else {}))
    policy.batch = value if axis == "batch" else 96
    prompts, seeds = ["a red circle"] * count, torch.arange(count)
    policy.condition(prompts[:1])
    if axis != "LoRA rank":
        return lambda: policy.sample(prompts, seeds)
    drawn = policy.sample(prompts, seeds)
    step = torch.full((count,), 2)
    return lambda: policy.log_prob(drawn.latents[:, 2], drawn.latents[:, 3], step, prompts).sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {}
    for axis, values in VALUES.items():
        jobs = {value: job(axis, value) for value in values}
        seconds = dict.fromkeys(values, math.inf)
        for _ in range(args.repeats):
            for value, run in jobs.items():
                start = time.perf_counter()
                run()
                seconds[value] = min(seconds[value], time.perf_counter() - start)
        a, b = values[-2:]
        exponent = math.log(seconds[b] / seconds[a]) / math.log(b / a)
        result[axis] = {"seconds": {str(k): round(v, 3) for k, v in seconds.items()}, "exponent": round(exponent, 2)}
        print(axis, result[axis], flush=True)
    measuring.write("scaling", result, args.out)
    draw(result, (args.out or measuring.RESULTS / "scaling.json").with_suffix(".svg"))


def draw(result: dict[str, Any], path: Path) -> None:
    rows = [
        {"axis": f"{axis} (exponent {r['exponent']})", "value": int(v), "seconds": s}
        for axis, r in result.items()
        for v, s in r["seconds"].items()
    ]
    base = alt.Chart(pd.DataFrame(rows)).encode(
        x=alt.X("value", scale=alt.Scale(type="log", base=2), title=None),
        y=alt.Y("seconds", scale=alt.Scale(type="log")),
    )
    chart = (base.mark_line() + base.mark_point()).properties(width=170, height=170)
    chart.facet(facet=alt.Facet("axis", title=None), columns=3).resolve_scale(x="independent", y="independent").save(
        path
    )


if __name__ == "__main__":
    main()
