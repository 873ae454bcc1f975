"""How well does a base of the second micro world draw what prompts ask for, and how sharply?

    python benchmarks/quality.py --work DIR | --model DIR [--split validation] [--images 8] [--steps 8] [--eta 1] [--guidance 1]

`--work` is the directory of a pre-training, which may still be running; `--model` a pipeline directory. Two figures of
each set of pictures: the oracle's verdicts (full, graded; by template), and sharpness, the share of the regions it sees
whose best template overlaps by IoU >= .8. Beside the base's own samples stand the autoencoder's reconstructions of clean
renders, which no base of it can excel. A line is added to those that are in `--out`, so that a training can be followed.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

import numpy as np
import torch

from bench_dfusion.diffusion.policy import Policy
from bench_dfusion.micro import pretrain as first
from bench_dfusion.micro.v2 import grammar, oracle, pretrain, scenes
from bench_dfusion.models.loading import load_adapter
from bench_dfusion.tracks.schema import ModelSection
from bench_dfusion.util import files
from bench_dfusion.util.progress import bar
from bench_dfusion.util.seeds import seed_of

SHARP = 0.8  # IoU of a region with its best template


def verdicts(pictures: np.ndarray, prompts: list[str]) -> dict[str, object]:
    """The oracle's figures of pictures uint8 [N, 64, 64, 3]."""
    seen = [oracle.judge(image, p) for image, p in zip(pictures, prompts, strict=True)]
    templates = np.array([grammar.parse(p).template for p in prompts])
    full, graded = np.array([v.full for v in seen]), np.array([v.graded for v in seen])
    overlaps = np.array([region.iou for v in seen for region in v.seen])
    failed = [f for v in seen for f in v.failed]

    def by_template(values: np.ndarray) -> dict[str, float]:
        return {t: float(values[templates == t].mean()) for t in grammar.TEMPLATES if (templates == t).any()}

    return {
        "full": float(full.mean()),
        "graded": float(graded.mean()),
        "full by template": by_template(full),
        "graded by template": by_template(graded),
        "failed": {f: failed.count(f) / len(prompts) for f in ("count", "colour", "shape", "relation")},
        "regions": len(overlaps),
        "sharp": float((overlaps >= SHARP).mean()) if len(overlaps) else 0.0,
    }


def draw(policy: Policy, prompts: list[str], images: int) -> np.ndarray:
    """`images` samples of each prompt: uint8 [prompts × images, 64, 64, 3]."""
    each = [p for p in prompts for _ in range(images)]
    seeds = torch.tensor([seed_of("quality", p, i) for p in prompts for i in range(images)])
    with bar("draw", len(each)) as progress:
        return policy.decode(policy.sample(each, seeds, progress.advance).final).numpy()


def reconstructions(policy: Policy, prompts: list[str], noise: float) -> dict[str, object]:
    """The figures of decoded latents of one clean render a prompt, with `noise` (standard deviation) on the latents."""
    rng = random.Random(0)
    clean = np.stack([scenes.render(scenes.sample_scene(grammar.parse(p), rng)) for p in prompts])
    latents = policy.encode(torch.from_numpy(clean))
    latents += noise * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    again = policy.decode(latents).numpy()
    psnr = -10 * np.log10(((again.astype(float) - clean) ** 2).mean() / 255**2)
    return {"noise": noise, "psnr": float(psnr)} | verdicts(again, prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--work", type=Path, help="directory of a pre-training")
    source.add_argument("--model", type=Path, help="pipeline directory")
    parser.add_argument("--split", choices=grammar.SPLITS, default="validation")
    parser.add_argument("--images", type=int, default=8, help="images a prompt")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--eta", type=float, default=1.0)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--sheet", type=Path, help="also write the first image of each prompt as one PNG")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "quality.json")
    args = parser.parse_args()
    trained: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as made:
        if args.work:
            vae, text, net, trained = pretrain.checkpointed(args.work)
            first.package(Path(made) / "pipeline", first.make_tokenizer(), vae, text, net)
        adapter, digest = load_adapter(ModelSection(id=str(args.model or Path(made) / "pipeline")))
    policy = Policy(adapter, steps=args.steps, eta=args.eta, guidance=args.guidance)
    prompts = list(grammar.prompts(args.split))
    result: dict[str, object] = {"trained": trained, "model": digest, "split": args.split}
    result["reconstructions"] = [reconstructions(policy, prompts * 4, noise) for noise in (0.0, 0.2)]
    if args.model or "denoiser" in trained:
        drawn = draw(policy, prompts, args.images)
        result |= {"images": args.images, "steps": args.steps, "eta": args.eta, "guidance": args.guidance}
        result |= verdicts(drawn, [p for p in prompts for _ in range(args.images)])
    known = files.read_json(args.out) if args.out.exists() else []
    files.write_json(args.out, [*known, result])
    if args.sheet and "images" in result:
        from PIL import Image

        shown = drawn[:: args.images]
        shown = np.concatenate([shown, np.zeros((-len(shown) % 12, *shown.shape[1:]), np.uint8)])
        rows = [np.concatenate(list(row), 1) for row in shown.reshape(-1, 12, *shown.shape[1:])]
        Image.fromarray(np.concatenate(rows)).save(args.sheet)
    for key, value in result.items():
        print(f"{key}: {value}")


if __name__ == "__main__":
    main()
