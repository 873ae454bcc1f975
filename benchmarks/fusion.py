"""Does fusion matter in a model? Targets against bases, references and controls, over fusion designs.

    python benchmarks/fusion.py --out fusion.json [--track micro-v2] [--model DIR] [--guidance 1] [--samples 16]

On the validation prompts of an embedded world, with the oracle's graded score. Every design stands beside
controls, since a redraw of a bad sample looks better by chance (regression to the mean): the same fusion
with a reference of another prompt, with another bad sample of the same prompt as reference, and with a
random mask of equal area. Writes JSON, prints a table, and draws the trade-off as `<out>.svg`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench_dfusion.builders.contract import Samples, references_and_bases
from bench_dfusion.builders.dfusion.builder import DFusion, DFusionConfig
from bench_dfusion.builders.dfusion.masks import ItemTokens, Rules
from bench_dfusion.diffusion.policy import Policy
from bench_dfusion.micro.v2 import grammar, oracle  # the second world's grammar holds all of the first's
from bench_dfusion.models.loading import load_adapter
from bench_dfusion.results import statistics
from bench_dfusion.runs.trainer import make_policy
from bench_dfusion.tracks import schema
from bench_dfusion.tracks.schema import Track
from bench_dfusion.util.progress import bar
from bench_dfusion.util.seeds import seed_of


class RandomMask(DFusion):
    """The control whose mask has the same area in random places."""

    def mask(self, maps: Tensor, tokens: ItemTokens, rules: Sequence[Rules]) -> Tensor:
        mask = super().mask(maps, tokens, rules)
        g = torch.Generator().manual_seed(0)
        return torch.stack([row[torch.randperm(len(row), generator=g)] for row in mask])


@dataclass
class Setting:
    policy: Policy
    drawn: Samples
    references: Tensor
    bases: Tensor
    others: Tensor  # a reference of another prompt for each base
    bad: Tensor  # another base of the same prompt for each base

    def scores(self, images: Tensor) -> np.ndarray:
        prompts = [self.drawn.prompts[i] for i in self.bases.tolist()]
        return np.array([oracle.judge(i, p).graded for i, p in zip(images.numpy(), prompts, strict=True)])

    def by_prompt(self, values: np.ndarray) -> np.ndarray:
        names = np.array([self.drawn.prompts[i] for i in self.bases.tolist()])
        return np.array([values[names == n].mean() for n in dict.fromkeys(names)])


def distance(a: Tensor, b: Tensor) -> np.ndarray:
    """Root mean square pixel distance of each pair, in 8-bit levels."""
    return ((a.float() - b.float()) ** 2).flatten(1).mean(1).sqrt().numpy()


def prepare(policy: Policy, prompts: list[str], samples: int) -> Setting:
    each = [p for p in prompts for _ in range(samples)]
    seeds = torch.tensor([seed_of("fusion", p, i) for p in prompts for i in range(samples)])
    with bar("draw", len(each)) as progress:
        trajectory = policy.sample(each, seeds, progress.advance)
    images = policy.decode(trajectory.final)
    graded = [oracle.judge(i, p).graded for i, p in zip(images.numpy(), each, strict=True)]
    drawn = Samples(trajectory, images, torch.tensor(graded))
    references, bases = references_and_bases(drawn)
    others = references.roll(samples // 2)
    half = samples // 2
    bad = bases.view(-1, half).roll(half // 2, 1).reshape(-1)
    return Setting(policy, drawn, references, bases, others, bad)


def measure(setting: Setting, config: DFusionConfig) -> dict[str, object]:
    policy, drawn, bases = setting.policy, setting.drawn, setting.bases
    base_images, reference_images = drawn.images[bases], drawn.images[setting.references]
    base = drawn.rewards[bases].numpy().astype(float)
    reference = drawn.rewards[setting.references].numpy().astype(float)
    runs: dict[str, tuple[Callable[..., DFusion], Tensor]] = {
        "target": (DFusion, setting.references),
        "other prompt": (DFusion, setting.others),
        "bad sample": (DFusion, setting.bad),
        "random mask": (RandomMask, setting.references),
    }
    result: dict[str, object] = {
        "config": config.model_dump(mode="json", exclude_defaults=True),
        "base": base.mean(),
        "reference": reference.mean(),
        "reference distance": float(distance(reference_images, base_images).mean()),
    }
    gains = {}
    for name, (cls, references) in runs.items():
        trajectory, masks = cls(config).targets(policy, drawn.trajectory, references, bases)
        images = policy.decode(trajectory.final)
        score = setting.scores(images)
        gains[name] = setting.by_prompt(score - base)
        interval = statistics.mean_interval(gains[name])
        result[name] = {
            "gain": interval.mean,
            "gain low": interval.low,
            "gain high": interval.high,
            "wins": float((score > base).mean()),
            "losses": float((score < base).mean()),
            "distance": float(distance(images, base_images).mean()),
        }
        if name == "target":
            result["mask area"] = float(masks.mean())
        else:
            over = statistics.mean_interval(gains["target"] - gains[name])
            result[name] |= {"over": over.mean, "over low": over.low, "over high": over.high}  # type: ignore[operator]
    gap = reference.mean() - base.mean()
    result["gap closed"] = result["target"]["gain"] / gap  # type: ignore[index]
    return result


CONTROLS = ("other prompt", "bad sample", "random mask")
COLUMNS = (
    "| layers | threshold | steps | gap closed | wins − losses | distance, share of ref.–base "
    "| gain over: other prompt | bad sample | random mask |\n|---|---|---|---|---|---|---|---|---|"
)


def table_line(r: dict) -> str:
    """A design as a row of a Markdown table; gains over controls with 95 % intervals over prompts, and their distances."""
    t, c, scale = r["target"], r["config"], r["reference distance"]
    over = [
        f"{r[n]['over']:+.3f} [{r[n]['over low']:+.3f}, {r[n]['over high']:+.3f}] at {r[n]['distance'] / scale:.2f}"
        for n in CONTROLS
    ]
    layers = c["layers"]
    cells = [
        f"{len(layers)} ({layers[0].split('.')[1]}–{layers[-1].split('.')[1]})",
        str(c.get("threshold", "otsu")),
        "{:g}–{:g}".format(*c.get("steps", DFusionConfig().steps)),
        f"{r['gap closed']:.2f}",
        f"{t['wins'] - t['losses']:+.2f}",
        f"{t['distance'] / scale:.2f}",
        *over,
    ]
    return "| " + " | ".join(cells) + " |"


def designs(layers: list[str]) -> list[DFusionConfig]:
    """Layers, thresholds and steps around the family's default."""
    everything, most, half = tuple(layers), tuple(layers[len(layers) // 3 :]), tuple(layers[len(layers) // 2 :])
    chosen = [(everything, rule, (0.0, 1.0)) for rule in ("otsu", "mean+1", "max*0.5", "max*0.25")]
    chosen += [(everything, "otsu", (0.125, 1.0)), (everything, "otsu", (0.25, 1.0)), (everything, "otsu", (0.0, 0.5))]
    chosen += [(most, "otsu", (0.0, 1.0)), (half, "otsu", (0.0, 1.0))]
    return [DFusionConfig(layers=of, threshold=rule, steps=steps) for of, rule, steps in chosen]


def draw_tradeoff(results: list[dict], path: Path) -> None:
    import altair as alt
    import pandas as pd

    rows = []
    for i, r in enumerate(results):
        for name in ("target", *CONTROLS):
            v = r[name]
            rows.append(
                {
                    "design": i,
                    "reference used": name.replace("target", "own (target)"),
                    "distance": v["distance"] / r["reference distance"],
                    "gain": v["gain"] / (r["reference"] - r["base"]),
                }
            )
    frame = pd.DataFrame(rows)
    chart = (
        alt.Chart(frame, title="What fusion gains, against how far the target moves from its base")
        .mark_point(filled=True, size=50)
        .encode(
            x=alt.X("distance", title="pixel distance target–base, share of reference–base"),
            y=alt.Y("gain", title="share of the graded gap closed"),
            color=alt.Color("reference used", title="reference"),
            shape="reference used",
        )
        .properties(width=520, height=320)
    )
    goal = alt.Chart(pd.DataFrame({"distance": [0.5], "gain": [0.3]}))
    chart = (
        chart
        + goal.mark_rule(strokeDash=[4, 4]).encode(x="distance")
        + goal.mark_rule(strokeDash=[4, 4]).encode(y="gain")
    )
    chart.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--track", default="micro", help="micro or micro-v2")
    parser.add_argument("--model", help="pipeline directory (default: the track's)")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--config", action="append", help="JSON of DFusionConfig fields instead of the grid")
    args = parser.parse_args()
    content = schema.read(args.track)
    if args.model:
        content["model"] = {**content["model"], "id": args.model, "sha256": None}
    for key in ("guidance", "steps"):
        if getattr(args, key):
            content["sampler"][key] = getattr(args, key)
    settings = Track.model_validate(content)
    adapter, _ = load_adapter(settings.model)
    policy = make_policy(settings, adapter, 0, torch.device("cpu"))
    setting = prepare(policy, list(settings.prompts.validation), args.samples)
    verdicts = [oracle.judge(i, p) for i, p in zip(setting.drawn.images.numpy(), setting.drawn.prompts, strict=True)]
    templates = [grammar.parse(p).template for p in setting.drawn.prompts]
    for t in dict.fromkeys(templates):
        own = [v for v, u in zip(verdicts, templates, strict=True) if u == t]
        print(f"base, {t}: full {np.mean([v.full for v in own]):.3f}, graded {np.mean([v.graded for v in own]):.3f}")
    print(f"base: full {np.mean([v.full for v in verdicts]):.3f}, graded {np.mean([v.graded for v in verdicts]):.3f}")
    grid = (
        [DFusionConfig(**{"layers": tuple(adapter.attentions("self")), **json.loads(c)}) for c in args.config]
        if args.config
        else designs(list(adapter.attentions("self")))
    )
    results = []
    print(COLUMNS)
    with bar("designs", len(grid)) as progress:
        for config in grid:
            results.append(measure(setting, config))
            print(table_line(results[-1]), flush=True)
            progress.advance()
    args.out.write_text(json.dumps(results, indent=1))
    draw_tradeoff(results, args.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
