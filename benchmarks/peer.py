"""DDPO's images per second beside TRL 0.23's own DDPOTrainer, on one thread of a CPU, or on a GPU.

    python benchmarks/peer.py [--turns 4] [--case tiny ...] [--out FILE]
    python benchmarks/peer.py --device cuda --case sd15 [--python INTERPRETER_WITH_TRL]

Both sides train the same saved Stable Diffusion (the real classes, random weights) in rounds of the same work: draw with
guidance, decode, score (the mean of the pixels), then one pass over every step of every sample, with guidance too, all in
float32 (bfloat16 on a GPU), for a LoRA of rank 4 on the attention projections, with AdamW and the same number of
optimiser steps. Both count the evaluations of their network, and this ends in an error where they differ.

TRL runs in an environment of its own, built once and kept (see `isolated.home`), which has our versions of torch,
diffusers, transformers, peft and accelerate. Its batches are the fastest of a scan; the rest is its defaults but for the
work above, and that neither side writes anything after a round. Ours has one batch for both: it runs in the one that TRL
trains in, in the one that it samples in, and in the default for a user's own model. Rounds are timed in turns without
loading, after one that is not. On a CPU the seconds of the one thread are given too, which other jobs disturb less.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import measuring
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peer_trl import synchronize

from bench_dfusion.micro import pretrain
from bench_dfusion.models.loading import quiet
from bench_dfusion.rewards import isolated
from bench_dfusion.runs import config
from bench_dfusion.runs.trainer import Run
from bench_dfusion.util.progress import bar

WORKER = Path(__file__).with_name("peer_trl.py")
TRL_VERSION = "0.23.0"
SHARED = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy")  # in the versions that we run with
PROMPTS = ["a red circle", "two blue rings", "a red square and a blue ring"]
GOAL = 1.5


@dataclass(frozen=True)
class Case:
    """A network and the work of a round."""

    network: str
    samples: int
    steps: int
    updates: int
    batches: tuple[tuple[int, int], ...]  # of sampling and training, tried for TRL
    guidance: float = 5.0  # TRL's default


CASES = {
    "tiny": Case("tiny", 16, 10, 2, ((1, 1), (2, 2), (4, 4), (8, 8), (16, 8))),
    # The samples and updates that TRL's documentation suggests: an update has 3 samples, and so has its largest batch.
    "tiny, TRL's example": Case("tiny", 24, 10, 8, ((1, 1), (3, 3), (6, 3), (12, 3), (24, 3))),
    "small": Case("small", 8, 5, 2, ((1, 1), (2, 2), (4, 4), (8, 4))),
}
ON_GPUS = {"sd15": Case("sd15", 8, 10, 2, ((4, 4), (8, 4)))}
SIDE = 16  # of the latents
NETWORKS = {
    "tiny": ((16, 32), 1, 8),
    "small": ((64, 128, 256), 2, 32),
}  # channels, layers in a block, a head's channels


def make(network: str, folder: Path) -> None:
    """A Stable Diffusion of random weights: small, with attention at every level but the lowest, or 1.5 in full size."""
    torch.manual_seed(0)
    if network == "sd15":
        from gpu import save_sd15

        return save_sd15(folder)
    channels, layers, head = NETWORKS[network]
    tokenizer = pretrain.make_tokenizer()
    levels = len(channels) - 1
    unet = UNet2DConditionModel(
        sample_size=SIDE,
        block_out_channels=channels,
        layers_per_block=layers,
        down_block_types=(*("CrossAttnDownBlock2D",) * levels, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * levels),
        cross_attention_dim=128,
        attention_head_dim=tuple(c // head for c in channels),  # the number of heads, in spite of its name
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=2 * SIDE,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    text = pretrain.make_text_encoder(tokenizer)
    StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, None, None, None, False).save_pretrained(folder)


class Ours:
    """Rounds of the run that `bench-dfusion run --model DIR --algo ddpo --builder vanilla --reward FILE:FUNCTION` makes."""

    def __init__(self, pipeline: Path, case: Case, device: str, batch: int | None = None):
        """`batch` None: the default of a user's own model."""
        settings = [
            f"track.sampler.steps={case.steps}",
            f"track.sampler.guidance={case.guidance}",
            f"track.budget.reward_queries={case.samples}",
            f"track.budget.prompts_per_round={case.samples // 4}",
            "track.budget.samples_per_prompt=4",
            f"track.prompts.train={json.dumps(PROMPTS)}",
            'track.prompts.heldout=["a cyan cross", "a green square"]',
            'track.evaluation.judges=["jpeg-compressibility"]',  # never asked
            f"algo.updates={case.updates}",
            *([f"track.batch={batch}"] if batch else []),
            *(["track.model.dtype=bfloat16"] if device == "cuda" else []),
        ]
        cell = config.resolve(
            algo="ddpo", builder="vanilla", reward=f"{WORKER}:brightness", model=str(pipeline), settings=settings
        )
        self.batch, self.number = cell.track.batch, 0
        self.clock = time.perf_counter if device == "cuda" else time.process_time
        self.run = Run(cell, pipeline / "run", device)

    def round(self) -> dict[str, float]:
        """One round: seconds on the clock, seconds of its parts (of the CPU, if on one), and the work that was done."""
        run, policy = self.run, self.run.policy
        evaluations, updates = policy.network_evaluations, run.progress.updates
        start, first = time.perf_counter(), self.clock()
        samples = run._collect(self.number)
        synchronize()
        second = self.clock()
        run._improve(samples, self.number)
        synchronize()
        end, seconds = self.clock(), time.perf_counter() - start
        torch.cuda.empty_cache()  # the other side's turn
        self.number += 1
        return {
            "seconds": seconds,
            "sampling": second - first,
            "training": end - second,
            "network_evaluations": policy.network_evaluations - evaluations,
            "updates": run.progress.updates - updates,
            "trained_parameters": sum(p.numel() for p in run.parameters),
        }


class Trl:
    """TRL's process."""

    def __init__(self, python: Path, pipeline: Path, case: Case, device: str):
        self.case = case
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        changed = {"HF_HUB_OFFLINE": "1"}
        if device == "cpu":
            changed |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            [python, WORKER, pipeline, device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=kept | changed,
        )

    def round(self, batches: tuple[int, int]) -> dict[str, float]:
        """One epoch in these batches, as `Ours.round`; after an unmeasured one where they are new."""
        assert self.process.stdin and self.process.stdout
        work = {k: getattr(self.case, k) for k in ("samples", "steps", "updates", "guidance")}
        wanted = {**work, "prompts": PROMPTS, "sample_batch": batches[0], "train_batch": batches[1]}
        with suppress(BrokenPipeError):  # its end is seen next
            print(json.dumps(wanted), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            self.process.wait()
            self.log.seek(0)
            raise SystemExit(f"TRL's process ended:\n{self.log.read()[-3000:]}")
        return dict(json.loads(answer))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


def scan(trl: Trl, case: Case, advance: Callable[[int], None]) -> tuple[tuple[int, int], dict[str, Any]]:
    """TRL's fastest batches, and the seconds of an epoch's parts in each (the least of two epochs)."""
    seconds: dict[str, dict[int, float]] = {"sampling": {}, "training": {}}
    for batches in case.batches:
        for _ in range(2):
            done = trl.round(batches)
            for (part, found), batch in zip(seconds.items(), batches, strict=True):
                found[batch] = round(min(found.get(batch, float("inf")), done[part]), 3)
            advance(1)
    sampling, training = seconds.values()
    pairs = [(s, t) for s in sampling for t in training if s % t == 0]  # others TRL refuses
    return min(pairs, key=lambda pair: sampling[pair[0]] + training[pair[1]]), seconds


def compare(python: Path, pipeline: Path, case: Case, turns: int, label: str, device: str) -> dict[str, Any]:
    """Rounds of both sides in turns. Raises SystemExit where their work differs."""
    trl = Trl(python, pipeline, case, device)
    try:
        with bar(label, 2 * len(case.batches) + 4 * turns) as progress:
            best, tried = scan(trl, case, progress.advance)
            trl.round(best)
            ours: dict[str, Ours] = {}
            for batch in (None, *best):
                side = Ours(pipeline, case, device, batch)
                ours.setdefault(f"ours, batch {side.batch}", side)
            for side in ours.values():
                side.round()
            sides: dict[str, Callable[[], dict[str, float]]] = {"TRL": lambda: trl.round(best)}
            sides |= {name: side.round for name, side in ours.items()}
            done: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
            for turn in range(turns):
                for name in sorted(sides, reverse=bool(turn % 2)):
                    done[name].append(sides[name]())
                    progress.advance(4 / len(sides), f"{name} {done[name][-1]['seconds']:.1f} s")
    finally:
        trl.close()
    counted = ("network_evaluations", "updates", "trained_parameters")
    work = {name: {k: rounds[0][k] for k in counted} for name, rounds in done.items()}
    if any(w != work["TRL"] for w in work.values()):
        raise SystemExit(f"the sides did not do the same work: {work}")
    clocks = {"second": {name: [r["seconds"] for r in rounds] for name, rounds in done.items()}}
    unit = "seconds"
    if device == "cpu":
        cpu = {name: [r["sampling"] + r["training"] for r in rounds] for name, rounds in done.items()}
        clocks["CPU second"], unit = cpu, "CPU seconds"
    result: dict[str, Any] = {
        "round": {**asdict(case), **work["TRL"]},
        "TRL's batches (sampling, training)": best,
        f"TRL's scan, {unit} of a round by batch": tried,
        "our default": next(iter(ours)),
    }
    for name in sides:
        parts = {part: measuring.spread([r[part] for r in done[name]]) for part in ("sampling", "training")}
        result[name] = {unit: parts}
        for of, spent in clocks.items():
            result[name][f"images per {of}"] = measuring.spread([case.samples / s for s in spent[name]])
            if name != "TRL":
                faster = measuring.spread([a / b for a, b in zip(spent["TRL"], spent[name], strict=True)])
                result[name]["times as fast, CPU" if of == "CPU second" else "times as fast"] = faster
    return result


def pins(versions: dict[str, str]) -> list[str]:
    """Requirements of exactly these versions, whatever they were built for (+cpu, +cu130)."""
    return [f"{name}=={v.partition('+')[0]}" for name, v in versions.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", choices=CASES | ON_GPUS, help="default: all that the device is for")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--python", type=Path, help="an interpreter with TRL (default: an environment is built)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    wanted = {"trl": TRL_VERSION, **{name: version(name) for name in SHARED}}
    pinned = pins(wanted)
    python = args.python or isolated.build("trl-ddpo", pinned).python
    words = [python, "-c", f"from importlib.metadata import version; print(*map(version, {list(wanted)}))"]
    answer = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    versions = dict(zip(wanted, answer, strict=True))
    if pins(versions) != pinned:
        raise SystemExit(f"{python} has {', '.join(pins(versions))}: it needs {', '.join(pinned)}")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.case or (CASES if args.device == "cpu" else ON_GPUS):
            case = (CASES | ON_GPUS)[name]
            pipeline = Path(folder) / case.network
            if not pipeline.exists():
                with quiet():
                    make(case.network, pipeline)
            found[name] = compare(python, pipeline, case, args.turns, name, args.device)
    result = {
        "threads": torch.get_num_threads(),
        "load": Path("/proc/loadavg").read_text().split()[:3],
        "TRL's environment": versions,
        "goal": GOAL,
        "cases": found,
    }
    measuring.write("peer", result, args.out)


if __name__ == "__main__":
    main()
