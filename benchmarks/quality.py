"""How well does a base of the second micro world draw what prompts ask for, and how sharply?

    python benchmarks/quality.py --work DIR | --model DIR [--split validation] [--images 8] [--steps 8] [--guidance 1]

`--work` is the directory of a pre-training, which may still be running; `--model` a pipeline directory. The figures
(oracle: full, graded; by template; share of the regions it sees whose best template overlaps by IoU >= .8) are added to
those that are in `--out`, so that a training can be followed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from bench_dfusion import files
from bench_dfusion.micro.v2 import grammar, oracle, pretrain
from bench_dfusion.models.loading import load_adapter
from bench_dfusion.policy import Policy
from bench_dfusion.progress import bar
from bench_dfusion.seeds import seed_of
from bench_dfusion.track import ModelSection

SHARP = 0.8  # IoU of a region with its best template


def measure(policy: Policy, prompts: list[str], images: int) -> tuple[dict[str, object], np.ndarray]:
    """The figures and the pictures uint8 [prompts × images, 64, 64, 3]."""
    each = [p for p in prompts for _ in range(images)]
    seeds = torch.tensor([seed_of("quality", p, i) for p in prompts for i in range(images)])
    with bar("draw", len(each)) as progress:
        drawn = policy.decode(policy.sample(each, seeds, progress.advance).final).numpy()
    verdicts = [oracle.judge(image, p) for image, p in zip(drawn, each, strict=True)]
    templates = np.array([grammar.parse(p).template for p in each])
    full, graded = np.array([v.full for v in verdicts]), np.array([v.graded for v in verdicts])
    overlaps = np.array([seen.iou for v in verdicts for seen in v.seen])
    result: dict[str, object] = {"full": full.mean(), "graded": graded.mean()}
    for name, values in (("full by template", full), ("graded by template", graded)):
        result[name] = {t: round(float(values[templates == t].mean()), 4) for t in grammar.TEMPLATES}
    failed = [f for v in verdicts for f in v.failed]
    result["failed"] = {f: failed.count(f) / len(each) for f in ("count", "colour", "shape", "relation")}
    result["regions"] = len(overlaps)
    result["sharp"] = float((overlaps >= SHARP).mean()) if len(overlaps) else 0.0
    return result, drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--work", type=Path, help="directory of a pre-training")
    source.add_argument("--model", type=Path, help="pipeline directory")
    parser.add_argument("--split", choices=grammar.SPLITS, default="validation")
    parser.add_argument("--images", type=int, default=8, help="images a prompt")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--sheet", type=Path, help="also write the first image of each prompt as one PNG")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "quality.json")
    args = parser.parse_args()
    trained: dict[str, int] = {}
    networks = None
    if args.work:
        vae, text, net, trained = pretrain.checkpointed(args.work)
        networks = {"vae": vae, "text_encoder": text, "transformer": net}
    adapter, digest = load_adapter(ModelSection(id=str(args.model or "micro")), networks=networks)
    policy = Policy(adapter, steps=args.steps, eta=1.0, guidance=args.guidance)
    result, drawn = measure(policy, list(grammar.prompts(args.split)), args.images)
    setting = {"trained": trained, "model": digest, "split": args.split, "images": args.images}
    setting |= {"steps": args.steps, "guidance": args.guidance}
    known = files.read_json(args.out) if args.out.exists() else []
    files.write_json(args.out, [*known, setting | result])
    if args.sheet:
        from PIL import Image

        first = drawn[:: args.images]
        first = np.concatenate([first, np.zeros((-len(first) % 12, *first.shape[1:]), np.uint8)])
        rows = [np.concatenate(list(row), 1) for row in first.reshape(-1, 12, *first.shape[1:])]
        Image.fromarray(np.concatenate(rows)).save(args.sheet)
    for key, value in (setting | result).items():
        print(f"{key}: {value}")


if __name__ == "__main__":
    main()
