"""TRL's side of `peer.py`: epochs of its DDPOTrainer, in the environment that has TRL 0.23.

Started with the pipeline's directory and the device. Every line on stdin is a JSON request {samples, steps, updates,
guidance, prompts, sample_batch, train_batch}, for one epoch; the answer is a JSON line: its seconds on the clock, the
seconds of sampling (with decoding) and of the rest (of the CPU, if on one), and the work that was done. Where a request
differs from the one before, a trainer is made anew and makes one epoch unmeasured first.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The reward of both sides: the mean of all pixels of each picture [B]."""
    return images.float().flatten(1).mean(1)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Epochs:
    """A trainer with its settings, and what is counted while it runs."""

    def __init__(self, pipeline: str, device: str, wanted: dict[str, Any]):
        from accelerate import PartialState
        from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

        PartialState()  # or the pipeline's own warning fails
        config = DDPOConfig(
            # The default is fp16, which needs a GPU, and whose loss scaler leaves out updates.
            mixed_precision="bf16" if device == "cuda" else "no",
            save_freq=10**9,  # the default writes a checkpoint after every epoch; neither side does here
            sample_num_steps=wanted["steps"],
            sample_guidance_scale=wanted["guidance"],
            sample_batch_size=wanted["sample_batch"],
            sample_num_batches_per_epoch=wanted["samples"] // wanted["sample_batch"],
            train_batch_size=wanted["train_batch"],
            train_gradient_accumulation_steps=wanted["samples"] // wanted["updates"] // wanted["train_batch"],
        )
        prompts = itertools.cycle(wanted["prompts"])
        self.trainer = DDPOTrainer(
            config,
            lambda images, texts, _: (brightness(images, texts), {}),
            lambda: (next(prompts), {}),
            DefaultDDPOStableDiffusionPipeline(pipeline),
        )
        self.count = {"network_evaluations": 0, "updates": 0}
        self.sampling, self.epoch = 0.0, 0
        self.clock = time.perf_counter if device == "cuda" else time.process_time
        unet, optimizer = self.trainer.sd_pipeline.unet, self.trainer.optimizer.optimizer
        unet.register_forward_pre_hook(lambda _, inputs: self._add("network_evaluations", len(inputs[0])))
        optimizer.register_step_post_hook(lambda *_: self._add("updates", 1))
        self.generate, self.trainer._generate_samples = self.trainer._generate_samples, self._sample

    def _add(self, name: str, n: int) -> None:
        self.count[name] += n

    def _sample(self, *args: Any, **named: Any) -> Any:
        start = self.clock()
        result = self.generate(*args, **named)
        synchronize()
        self.sampling = self.clock() - start
        return result

    def run(self) -> dict[str, Any]:
        self.count.update(network_evaluations=0, updates=0)
        start, first = time.perf_counter(), self.clock()
        self.trainer.step(self.epoch, 0)
        synchronize()
        seconds, own = time.perf_counter() - start, self.clock() - first
        torch.cuda.empty_cache()  # the other side's turn
        self.epoch += 1
        trained = sum(p.numel() for p in self.trainer.trainable_layers)
        parts = {"sampling": self.sampling, "training": own - self.sampling}
        return {"seconds": seconds, **parts, **self.count, "trained_parameters": trained}


def main() -> None:
    pipeline, device = sys.argv[1:]
    if device == "cpu":
        torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed goes to stderr
    before, epochs = None, None
    for line in sys.stdin:
        wanted = json.loads(line)
        if epochs is None or wanted != before:
            before, epochs = wanted, None  # the one before leaves memory first
            epochs = Epochs(pipeline, device, wanted)
            epochs.run()
        print(json.dumps(epochs.run()), file=answers, flush=True)


if __name__ == "__main__":
    main()
