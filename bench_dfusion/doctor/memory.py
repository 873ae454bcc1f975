"""What lies on the device in each phase, and its peak."""

from __future__ import annotations

import math

import torch

from bench_dfusion.diffusion.policy import Policy
from bench_dfusion.doctor.estimates import ORDER, Phase
from bench_dfusion.doctor.traces import EMBEDDINGS, Traces
from bench_dfusion.models import sharding
from bench_dfusion.models.base import Adapter
from bench_dfusion.tracks.schema import Track

RUNS = ("encode", "sample", "decode", "build", "train", "evaluate")  # the network in it


class Memory(Traces):
    """The memory of one cell's phases, under changed options."""

    def _layout(self, settings: Track) -> dict[str, dict[str, int]]:
        """For each phase the bytes of what lies on the device while it runs, without what it allocates and frees."""
        memory, policy = settings.memory, self.policy(settings)
        weights = dict(self._lying[settings.model.dtype])
        trained = {name: weights.pop(name) for name in (self._trained, "gradients", "AdamW")}
        if self.cell.algorithm_config.ema is not None:
            trained[f"average of the {self._trained}"] = trained[self._trained]
        prompts = (
            len(settings.prompts.train)
            + len(settings.prompts.heldout)
            + any(s.guidance != 1 for s in (settings.sampler, settings.evaluation.sampler) if s is not None)
        )
        trained[EMBEDDINGS] = prompts * weights.pop(EMBEDDINGS)
        moves = not self.cpu  # to the CPU and back is nothing on a CPU
        if memory.offload_network and moves:
            weights[policy.adapter.network_name] = _streamed(policy.adapter)
        follows = self.cell.algorithm.needs_gradient  # its training runs through the decoder and the reward
        text = {name for name in weights if name.startswith("text_encoder")}
        resting = text if memory.offload_text and moves else set()
        gone = text if memory.drop_text else resting
        vae = {"vae"} if memory.offload_vae and moves and not follows else set()
        known = {name: size for name, size in self.scorers.items() if size}
        scorers = known
        if memory.offload_rewards and moves:
            scorers = {name: size for name, size in known.items() if follows and name.startswith("reward ")}
        one_more = max((size for name, size in known.items() if name not in scorers), default=0)
        everything = {"process" if self.cpu else "CUDA context": self.process, **weights, **scorers}
        drawn, built = self._host(policy, self.drawn), self._host(policy, self.drawn + self.made)
        kept = 1 if settings.evaluation.base_images_per_prompt else 2  # a checked base is not drawn again
        evaluated = self._host(policy, kept * len(settings.prompts.heldout) * settings.evaluation.images_per_prompt)
        without = {"load": resting | vae, "encode": vae, "decode": gone, "evaluate": gone}
        # Parts are put together at the end of sampling and of building: both copies are there.
        host = {"sample": 2 * drawn, "decode": 2 * drawn, "score": 2 * drawn, "build": 2 * built, "train": built}
        layout = {}
        for name in ORDER:
            lying = {n: size for n, size in everything.items() if n not in without.get(name, gone | vae)}
            lying |= {self._trained: trained[self._trained]} if name == "load" else trained
            lying["samples of the round"] = evaluated if name == "evaluate" else host.get(name, 0)
            lying["the scorer"] = one_more if name in ("score", "evaluate") else 0
            layout[name] = lying
        return layout

    def phases(self, settings: Track) -> list[Phase]:
        """The phases of a run with the memory that each takes at its peak."""
        found = []
        for name, parts in self._layout(settings).items():
            if name in RUNS:
                traced = self._trace(name, settings)
                parts["kept for the backward"] = traced.kept
                parts["activations"] = traced.peak - traced.kept
                parts["margin"] = round(self.margin * traced.peak)
            found.append(Phase(name=name, parts={part: size for part, size in parts.items() if size}))
        return found

    def peak(self, settings: Track) -> int:
        """The bytes of the largest phase, of a track that asks for no more than the cell's."""
        return self._most(settings, 0)

    def fits(self, settings: Track, available: int) -> bool:
        return self._most(settings, available) <= available

    def _most(self, settings: Track, enough: int) -> int:
        """The peak where it is above `enough`. What the cell's own track takes bounds what any change takes, so that
        phases which cannot be the peak are not traced again."""

        def size(name: str, of: Track) -> int:
            return lying[name] + (round((1 + self.margin) * self._trace(name, of).peak) if name in RUNS else 0)

        lying = {name: sum(parts.values()) for name, parts in self._layout(settings).items()}
        bounds = {name: size(name, self.cell.track) for name in ORDER}
        most = 0
        for name in sorted(ORDER, key=lambda n: -bounds[n]):
            if bounds[name] > max(most, enough):
                most = max(most, size(name, settings))
            if most > enough > 0:
                break
        return most

    def _host(self, policy: Policy, samples: int) -> int:
        """The bytes of samples' trajectories and pictures, which the host keeps: on a CPU they are the device's."""
        if not self.cpu:
            return 0
        steps, side = len(policy.schedule), policy.adapter.image_side
        return samples * ((steps + 1) * math.prod(policy.adapter.latent_shape) * 4 + 3 * side * side)


def _streamed(adapter: Adapter) -> int:
    """The bytes of an offloaded network's weights on the device: what no block holds, a block that works and the next.

    Raises ValueError where it has no blocks.
    """

    def frozen(module: torch.nn.Module) -> int:
        return sum(p.nbytes for name, p in module.named_parameters() if "lora_" not in name)

    sizes = [frozen(block) for block in sharding.blocks(adapter.network)]
    return frozen(adapter.network) - sum(sizes) + 2 * max(sizes)
