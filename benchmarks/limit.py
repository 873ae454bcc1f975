"""How near is a round to the network calls it cannot avoid?

    python benchmarks/limit.py [--algo dpo] [--builder dfusion] [--rounds 3] [--set SECTION.OPTION=VALUE ...]

Rounds of a run are made as the command makes them. Every call of the denoiser, the decoder and the reward is noted,
and made again with the same input right after the round, and nothing else is: forwards alone, or forward and backward
where the round had gradients. `ratio` is the round's time over the time of these bare calls, phase by phase, from
first to last in one process; the least of some rounds is the least disturbed one.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import measuring
import torch
from torch import Tensor

from bench_dfusion.runs import config
from bench_dfusion.runs.trainer import Run

PARTS = {"sample": "sampling", "build": "building", "prepare": "training", "train": "training", "score": "scoring"}


class Watch:
    """Seconds of each phase without those inside it, and the calls that were made in it."""

    def __init__(self, run: Run):
        self.run, self.stack, self.mark = run, ["other"], time.perf_counter()
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: list[tuple[str, Callable[[], Tensor], bool]] = []
        policy, adapter = run.policy, run.policy.adapter
        predict, decode, score = adapter.predict, adapter.decode, run.reward.score

        def noted_predict(latents: Tensor, timestep: Tensor, conditioning: Any) -> Tensor:
            x, t = latents.detach().clone(), timestep.clone()

            def again() -> Tensor:
                with torch.autocast(policy.device.type, policy.autocast, enabled=policy.autocast is not None):
                    return predict(x, t, conditioning)

            self.note(again)
            return predict(latents, timestep, conditioning)

        def noted_decode(latents: Tensor) -> Tensor:
            x = latents.detach().clone()
            self.note(lambda: decode(x))
            return decode(latents)

        def noted_score(images: Tensor, prompts: Any) -> Tensor:
            self.note(lambda: score(images, prompts))
            return score(images, prompts)

        for owner, name, noted in (
            (adapter, "predict", noted_predict),
            (adapter, "decode", noted_decode),
            (run.reward, "score", noted_score),
        ):
            setattr(owner, name, noted)
        run.progress.phase = self.phase  # type: ignore[method-assign]

    def note(self, again: Callable[[], Tensor]) -> None:
        self.calls.append((self.stack[-1], again, torch.is_grad_enabled()))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._pass()
        self.stack.append(PARTS.get(name, name))
        try:
            yield
        finally:
            self._pass()
            self.stack.pop()

    def _pass(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self.stack[-1]] += now - self.mark
        self.mark = now

    def again(self) -> dict[str, float]:
        """Make the calls of the round again; seconds by phase."""
        seconds: dict[str, float] = defaultdict(float)
        for phase, call, gradient in self.calls:
            start = time.perf_counter()
            with torch.set_grad_enabled(gradient):
                output = call()
            if output.requires_grad:
                output.sum().backward()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[phase] += time.perf_counter() - start
        self.run.optimizer.zero_grad(set_to_none=True)
        return seconds

    def start(self) -> None:
        self.seconds.clear()
        self.calls.clear()
        self.mark = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--algo", default="dpo")
    parser.add_argument("--builder", default="dfusion")
    parser.add_argument("--reward", default="clip")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", action="append", dest="settings")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cell = config.resolve(
        track_source="micro", algo=args.algo, builder=args.builder, reward=args.reward, settings=args.settings
    )
    with tempfile.TemporaryDirectory() as folder:
        run = Run(cell, Path(folder))
        watch = Watch(run)
        ratios: dict[str, list[float]] = defaultdict(list)
        shares: dict[str, list[float]] = defaultdict(list)
        for number in range(args.rounds):
            watch.start()
            samples = run._collect(number)
            run._improve(samples, number)
            watch._pass()
            taken, bare = dict(watch.seconds), watch.again()
            for phase in bare:
                ratios[phase].append(taken[phase] / bare[phase])
                shares[phase].append(bare[phase])
            ratios["whole round"].append(sum(taken.values()) / sum(bare.values()))
            shares["whole round"].append(sum(bare.values()))
            print({k: round(v[-1], 3) for k, v in ratios.items()}, flush=True)
    result = {
        phase: {"ratio": measuring.spread(ratios[phase]), "bare seconds": measuring.spread(shares[phase])}
        for phase in ratios
    }
    measuring.write(
        "limit",
        {"cell": f"{args.algo}/{args.builder}/{args.reward}", "rounds": args.rounds, "phases": result},
        args.out,
    )


if __name__ == "__main__":
    main()
