"""How far is `bench-dfusion doctor` off? One round of a run, measured, beside what was estimated before it.

    python benchmarks/memory.py [--out benchmarks/results/memory.json] [--device cpu]

Pipelines of the real classes with random weights, large enough for weights and activations to matter. Each
configuration is a process of its own: it estimates, then runs one round (sample, decode, build, train) and notes for
each phase its time and its peak: on a CPU the resident memory's high-water mark, which Linux lets a process reset, on a
GPU torch.cuda.max_memory_allocated (and what the allocator reserved by then). Peaks are above what the process held
before it loaded anything, and estimated ones stand without the margin. What autograd keeps is measured apart, on the
first training step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from bench_dfusion import doctor
from bench_dfusion.builders.contract import Samples
from bench_dfusion.micro import pretrain
from bench_dfusion.results import records
from bench_dfusion.runs.config import Cell
from bench_dfusion.runs.trainer import Run, round_prompts
from bench_dfusion.util import files
from bench_dfusion.util.seeds import seed_of

CHECKPOINTED = "track.memory.gradient_checkpointing=true"
# glibc keeps freed blocks below a threshold, which grows to 32 MB, in a heap full of holes; this fixes it at 1 MB.
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "1000000"}
Configurations = dict[str, tuple[str, list[str], dict[str, str]]]  # the pipeline, what is set, the environment
CONFIGURATIONS: Configurations = {
    "unet, batch 4": ("unet", ["track.batch=4"], {}),
    "unet, batch 2": ("unet", ["track.batch=2"], {}),
    "unet, batch 4, checkpointing": ("unet", ["track.batch=4", CHECKPOINTED], {}),
    "unet, batch 4, no heap": ("unet", ["track.batch=4"], MAPPED),
    "unet, batch 4, checkpointing, no heap": ("unet", ["track.batch=4", CHECKPOINTED], MAPPED),
    "transformer, batch 2": ("transformer", ["track.batch=2"], {}),
    "transformer, batch 2, no heap": ("transformer", ["track.batch=2"], MAPPED),
    "transformer, batch 2, checkpointing": ("transformer", ["track.batch=2", CHECKPOINTED], {}),
}
HALF = ["track.model.dtype=bfloat16", "track.memory.offload_text=true"]
ON_GPUS: Configurations = {
    "sd15, bfloat16, batch 4": ("sd15", [*HALF, "track.batch=4"], {}),
    "sd15, bfloat16, batch 8, checkpointing": ("sd15", [*HALF, "track.batch=8", CHECKPOINTED], {}),
}
SETTINGS = [
    "track.sampler.steps=4",
    "track.sampler.guidance=3",
    "track.budget.reward_queries=12",
    "track.budget.prompts_per_round=1",
    "track.budget.samples_per_prompt=8",
    "track.model.sha256=null",
    "track.model.autocast=null",
    "track.lora.targets=null",
    'track.evaluation.judges=["jpeg-compressibility"]',
    "track.evaluation.images_per_prompt=1",
    "algo.updates=1",
    "builder.margin=0",
]


def make(kind: str, folder: Path) -> None:
    """A pipeline of 100 to 200 MB with latents of 32 × 32, or Stable Diffusion 1.5 in full size."""
    torch.manual_seed(0)
    if kind == "sd15":
        from gpu import save_sd15

        return save_sd15(folder)
    tokenizer = pretrain.make_tokenizer()
    text, scheduler = pretrain.make_text_encoder(tokenizer), pretrain.make_scheduler()
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        layers_per_block=2,
        sample_size=128,
    )
    if kind == "unet":
        unet = UNet2DConditionModel(
            sample_size=32,
            block_out_channels=(96, 192, 384),
            layers_per_block=2,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=128,
            attention_head_dim=(3, 6, 12),
        )
        StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, None, None, None, False).save_pretrained(folder)
        return
    network = PixArtTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,
        num_layers=8,
        cross_attention_dim=384,
        sample_size=32,
        patch_size=1,
        caption_channels=128,
        use_additional_conditions=False,
    )
    PixArtSigmaPipeline(tokenizer, text, vae, network, scheduler).save_pretrained(folder)


class Meter:
    """The peak and the seconds of what runs inside, and what was allocated before it (bytes)."""

    def __init__(self, device: torch.device):
        self.gpu = device.type == "cuda"
        self.found: dict[str, dict[str, float]] = {}

    def now(self) -> int:
        return torch.cuda.memory_allocated() if self.gpu else _status("VmRSS")

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from what is resident
        before, start = self.now(), time.perf_counter()
        yield
        if self.gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() if self.gpu else _status("VmHWM")
        self.found[name] = {"peak": peak, "before": before, "seconds": seconds}
        if self.gpu:
            self.found[name]["reserved"] = torch.cuda.max_memory_reserved()


def _status(key: str) -> int:
    """Bytes that Linux tells of this process."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def measure(cell: Cell, device: torch.device, folder: Path) -> dict[str, Any]:
    """Estimate, then run one round."""
    found = doctor.estimate(cell, device)
    estimated = {p.name: {"peak": p.peak, "parts": p.parts, "seconds": p.seconds} for p in found.phases}
    meter = Meter(device)
    start = meter.now()
    with meter("load"):
        run = Run(cell, folder, str(device))
    policy, builder = run.policy, run.builder
    decode, score = policy.decode, run._score
    inside: dict[str, float] = {}

    def clocked(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            begin = time.perf_counter()
            result = call(*args)
            inside[name] = inside.get(name, 0.0) + time.perf_counter() - begin
            return result

        return timed

    prompts = round_prompts(cell.track, cell.seed, 0)
    seeds = torch.tensor([seed_of("train", cell.seed, 0, p, i) for i, p in enumerate(prompts)])
    policy.condition(prompts)
    with meter("sample"):
        trajectory = policy.sample(prompts, seeds)
    with meter("decode"):
        images = decode(trajectory.final)
    drawn = Samples(trajectory, images, score(images, prompts))
    policy.decode, rescore = clocked("decode", decode), clocked("score", score)  # type: ignore[method-assign]
    with meter("build"):
        samples = builder.build(policy, drawn, rescore)
    meter.found["decode"]["seconds"] += inside.get("decode", 0.0)
    meter.found["build"]["seconds"] -= sum(inside.values())
    samples.pairs, samples.dropped = samples.triples[:, [2, 1]], 0  # every pair, as the estimate has it
    with meter("train"):
        run._improve(samples, 0)
    kept = saved(run, samples)
    rows = {}
    for name in ("sample", "decode", "build", "train"):
        own, guess = meter.found[name], estimated[name]
        grown = sum(guess["parts"].get(p, 0) for p in ("activations", "kept for the backward"))
        base = guess["parts"].get("process", 0) + guess["parts"].get("margin", 0)
        rows[name] = {
            "peak_mb": round((own["peak"] - start) / 1e6, 1),
            "estimated_peak_mb": round((guess["peak"] - base) / 1e6, 1),
            "growth_mb": round((own["peak"] - own["before"]) / 1e6, 1),
            "estimated_growth_mb": round(grown / 1e6, 1),
            "seconds": round(own["seconds"], 2),
            "estimated_seconds": round(guess["seconds"], 2),
        }
        if "reserved" in own:
            rows[name]["reserved_mb"] = round(own["reserved"] / 1e6, 1)
    return {
        "weights_mb": round(sum(t.nbytes for m in _networks(policy) for t in m.parameters()) / 1e6, 1),
        "kept_mb": round(kept / 1e6, 3),
        "estimated_kept_mb": round(estimated["train"]["parts"]["kept for the backward"] / 1e6, 3),
        "rates": found.rates.model_dump() if found.rates else None,
        "phases": rows,
    }


def _networks(policy: Any) -> list[torch.nn.Module]:
    return [part for part in policy.adapter.pipe.components.values() if isinstance(part, torch.nn.Module)]


def saved(run: Run, samples: Any) -> int:
    """The bytes that autograd keeps for one training step, each storage once, without weights."""
    policy, algorithm = run.policy, run.algorithm
    rows = algorithm.prepare(policy, samples, torch.Generator().manual_seed(0))
    piece = {k: v[: max(1, policy.batch // algorithm.samples_per_row)] for k, v in rows.items()}
    weights = {t.untyped_storage().data_ptr() for m in _networks(policy) for t in [*m.parameters(), *m.buffers()]}
    weights |= {t.untyped_storage().data_ptr() for c in policy._encoded.values() for t in c.values()}
    kept: list[weakref.ref[Any]] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = algorithm.loss(policy, samples, algorithm.batch(policy, samples, piece))  # noqa: F841  # it holds them
    alive = {s.data_ptr(): s.nbytes() for s in (ref() for ref in kept) if s is not None}
    return sum(size for place, size in alive.items() if place not in weights)


def one(pipeline: Path, settings: list[str], device: str, folder: Path) -> None:
    cell, _ = doctor.resolve(
        track_source="micro", model=str(pipeline), settings=[*SETTINGS, *settings], reward="jpeg-compressibility"
    )
    print(json.dumps(measure(cell, torch.device(device), folder)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "memory.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--one", nargs=2, metavar=("PIPELINE", "CONFIGURATION"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        if args.one:
            one(Path(args.one[0]), (CONFIGURATIONS | ON_GPUS)[args.one[1]][1], args.device, Path(work))
            return
        found = {}
        chosen = CONFIGURATIONS
        if args.device != "cpu":  # glibc's heap plays no part
            chosen = {name: c for name, c in CONFIGURATIONS.items() if not c[2]} | ON_GPUS
        for name, (kind, _, env) in chosen.items():
            if not (Path(work) / kind).exists():
                make(kind, Path(work) / kind)
            words = [sys.executable, __file__, "--device", args.device, "--one", str(Path(work) / kind), name]
            done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **env})
            if done.returncode:
                raise SystemExit(done.stderr)
            found[name] = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{name}: weights {found[name]['weights_mb']} MB, kept {found[name]['kept_mb']} MB, "
                f"estimated {found[name]['estimated_kept_mb']}"
            )
            for phase, row in found[name]["phases"].items():
                print(f"  {phase:7}", ", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
            content = {
                "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
                "hardware": records.hardware(),
                "threads": torch.get_num_threads(),
                "load": Path("/proc/loadavg").read_text().split()[:3],
                "versions": records.versions(),
                "configurations": found,
            }
            files.write_json(args.out, content)


if __name__ == "__main__":
    main()
