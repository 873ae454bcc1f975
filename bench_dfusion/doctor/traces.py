"""A cell's own code (policy, builder, algorithm) run on the meta device, once for each phase and each change that matters."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench_dfusion.algorithm import Algorithm
from bench_dfusion.builders.contract import Builder, Components, ConsistentSamples, Samples
from bench_dfusion.diffusion.policy import Policy, Trajectory
from bench_dfusion.doctor import configs, device
from bench_dfusion.doctor.stand_ins import StandIn, StandInAfter, shortened, without_decoding
from bench_dfusion.doctor.trace import Work, tracing
from bench_dfusion.errors import UsageError
from bench_dfusion.models.base import Adapter
from bench_dfusion.models.loading import find, load_adapter
from bench_dfusion.runs import evaluation, text_limits
from bench_dfusion.runs.config import Cell, judges_of
from bench_dfusion.runs.trainer import make_policy, round_prompts
from bench_dfusion.tracks import schema
from bench_dfusion.tracks.schema import Track
from bench_dfusion.util.progress import console

# Shares added to what is allocated and freed again. Of a GPU it is assumed, for a caching allocator's gaps and kernels'
# workspaces. On a CPU glibc keeps freed blocks of up to 32 MB in a heap full of holes: this is the most it took without
# checkpointing (benchmarks/memory.py), and with a fixed threshold it takes next to nothing.
MARGIN, HEAP, THRESHOLD = 0.1, 1.3, "MALLOC_MMAP_THRESHOLD_"
CONTEXT = 600_000_000  # bytes: a CUDA context with its libraries' kernels; assumed, where no GPU is here to ask
FEW = 4  # steps that a builder is traced for; what it costs at all of them is scaled up
EMBEDDINGS = "cached embeddings"


@dataclass(frozen=True)
class Traced:
    """What running a phase once showed: bytes above what was there, those autograd kept, and its cost for a round."""

    peak: int
    kept: int
    cost: Work


class Traces:
    """The phases of one cell, run on the meta device under changed options; what was traced once is kept."""

    def __init__(self, cell: Cell, where: torch.device, fresh: bool):
        self.cell, self.where = cell, where
        self.cpu = where.type == "cpu"
        self.notes: list[str] = []
        heap = self.cpu and sys.platform == "linux" and THRESHOLD not in os.environ
        self.margin = HEAP if heap else MARGIN
        if heap:
            self.notes.append(
                f"the margin is for glibc's heap, which can take more still with gradient_checkpointing; {THRESHOLD}=1000000 "
                "in the environment does without it, in doctor and run, and is slower"
            )
        self._traced: dict[tuple[Any, ...], Traced] = {}
        self._built: ConsistentSamples | None = None
        self._policies: dict[str, Policy] = {}
        self._lying: dict[str, dict[str, int]] = {}  # by dtype
        self.process = device.own_memory() if self.cpu else CONTEXT if fresh else 0
        model = cell.track.model
        self.layout = find(model.id, model.revision)
        self.stored = configs.stored(self.layout)
        self._scorers()
        settings = cell.track
        self.drawn = settings.budget.prompts_per_round * settings.budget.samples_per_prompt
        builder, algorithm = cell.builder(cell.builder_config), cell.algorithm(cell.algorithm_config)
        self.made = builder.queries(self.drawn) - self.drawn
        a_round = builder.queries(self.drawn) + algorithm.queries(self.drawn)
        ladder = settings.budget.ladder
        self.rounds = ladder[0] // a_round
        if len(ladder) > 1:
            self.notes.append(f"the time is that to the first of {len(ladder)} rungs, {ladder[0]:,} reward queries")
        prompts = settings.prompts
        cut = text_limits.cut(self.policy(settings).adapter, [*prompts.train, *prompts.heldout])
        self.notes += [cut] if cut else []
        if settings.model.autocast:
            self.notes.append("autocast is not traced: the network computes in its own dtype here")
        for part, files in self.stored.items():
            own = getattr(self.policy(settings).adapter.pipe, part, None)
            count = 0
            if own is not None:
                stored = own.state_dict().keys() & dict(own.named_buffers()).keys()
                count = sum(p.numel() for n, p in own.named_parameters() if "lora_" not in n)
                count += sum(b.numel() for n, b in own.named_buffers() if n in stored)
            if own is not None and files.parameters is not None and abs(count - files.parameters) > 0.001 * count:
                self.notes.append(f"{part}: its files hold {files.parameters:,} numbers, its config makes {count:,}")

    # the pieces

    def _scorers(self) -> None:
        """The weights of the reward and of each judge; both are loaded where they are the same model, too."""
        cell = self.cell
        scorers = {f"reward {cell.reward.name}": (cell.reward, cell.reward_config)}
        scorers |= {f"judge {name}": value for name, value in judges_of(cell.track).items()}
        self.scorers = {name: cls.weights_bytes(options) for name, (cls, options) in scorers.items()}
        unknown = [name for name, size in self.scorers.items() if size is None]
        if unknown:
            self.notes.append(
                f"not counted, since their size is not known before they are loaded: {', '.join(unknown)}"
            )

    def policy(self, settings: Track) -> Policy:
        """The policy on the meta device, in the dtype of a track."""
        kind = settings.model.dtype
        if kind not in self._policies:
            adapter, _ = load_adapter(settings.model, "meta", found=self.layout)
            if self.cpu:
                adapter.tune_for_cpu()
            policy = self._policies[kind] = make_policy(settings, adapter, 0, torch.device("meta"))
            self._traced["encode", kind] = self._encode(policy)
            lora = sum(p.nbytes for p in policy.parameters.values())
            weights = {name: configs.bytes_of(part) for name, part in _networks(adapter).items()}
            if policy.lora_config is not None:  # else a copy of the weights before training stays: as much again
                weights[adapter.network_name] -= lora
            one = sum(t.nbytes for encoded in policy._encoded.values() for t in encoded.values())
            self._lying[kind] = {**weights, self._trained: lora, "gradients": lora, "AdamW": 2 * lora, EMBEDDINGS: one}
        return self._policies[kind]

    def _set_up(self, settings: Track) -> Policy:
        """The policy with the batch and the ways to save activations of a track."""
        policy = self.policy(settings)
        policy.batch = settings.batch
        network, vae = policy.adapter.network, getattr(policy.adapter.pipe, "vae", None)
        for part, switch in ((network, "gradient_checkpointing"), (vae, "gradient_checkpointing"), (vae, "slicing")):
            getattr(part, f"disable_{switch}", lambda: None)()
        wanted = {"gradient_checkpointing", "vae_slicing"}
        policy.adapter.save_memory(schema.MemorySection(**settings.memory.model_dump(include=wanted)))
        return policy

    def parameters(self, settings: Track) -> dict[str, int]:
        policy = self.policy(settings)
        lora = sum(p.numel() for p in policy.parameters.values())
        found = {name: sum(p.numel() for p in part.parameters()) for name, part in _networks(policy.adapter).items()}
        if policy.lora_config is not None:
            found[policy.adapter.network_name] -= lora
        return {**found, self._trained: lora}

    @property
    def _trained(self) -> str:
        return "LoRA" if self.cell.track.lora.rank else "trained weights"

    # traces

    def _trace(self, name: str, settings: Track) -> Traced:
        if name == "encode":
            self.policy(settings)
            return self._traced["encode", settings.model.dtype]
        if name == "evaluate":
            return max((self._trace(n, settings) for n in ("judge", "show")), key=lambda t: t.peak)
        if settings.evaluation.sampler is None:
            name = {"judge": "sample", "show": "decode"}.get(name, name)
        memory = settings.memory
        depends = {
            "train": [memory.gradient_checkpointing],
            "decode": [memory.vae_slicing],
            "show": [memory.vae_slicing],
        }
        if self.cell.algorithm.needs_gradient:
            depends["train"].append(memory.vae_slicing)
        key = (name, settings.batch, settings.model.dtype, *depends.get(name, []))
        if name == "train" and self._built is None:
            self._trace("build", self.cell.track)
        if key not in self._traced:
            run: Callable[[Policy], Traced] = getattr(self, f"_{name}")
            with console.status(f"tracing {name}, batch {settings.batch}, {settings.model.dtype}"):
                self._traced[key] = run(self._set_up(settings))
        return self._traced[key]

    def _some(self, policy: Policy) -> tuple[list[str], Tensor]:
        """Prompts and seeds of as many samples as fill a batch of what a builder makes of them, four and four; the first
        time of whole prompts, since groups are trained on."""
        settings = self.cell.track
        each = 4 if self._built is not None else settings.budget.samples_per_prompt
        wanted = min(self.drawn, each * math.ceil(2 * policy.batch / each))
        return round_prompts(settings, 0, 0)[:wanted], torch.arange(wanted)

    def _encode(self, policy: Policy) -> Traced:
        with tracing() as trace:
            for prompt in self.cell.track.prompts.train[:1]:
                encoded = policy.adapter.encode([prompt])
                policy._encoded[prompt] = {k: v[0] for k, v in encoded.items()}
        return Traced(trace.peak, 0, trace.cost)

    def _sample(self, policy: Policy) -> Traced:
        prompts, seeds = self._some(policy)
        prompts, seeds = prompts[: policy.batch], seeds[: policy.batch]
        self._condition(policy, prompts)
        short = shortened(policy, 1)
        with tracing() as trace, self._algorithm(policy).collecting(policy):
            short.sample(prompts, seeds)
        steps = len(policy.schedule)
        cost = trace.cost * (1 / len(short.schedule))
        whole = cost.in_batches(self.drawn * steps, policy.batch, len(prompts))
        return Traced(trace.peak + self._latents(policy, short, len(prompts)), 0, whole)

    def _judge(self, policy: Policy) -> Traced:
        """As many samples as a round draws, by the sampler of the evaluation."""
        with evaluation.sampling(policy, self.cell.track):
            return self._sample(policy)

    def _show(self, policy: Policy) -> Traced:
        """As many pictures as a round decodes, of the evaluation's side."""
        with evaluation.sampling(policy, self.cell.track):
            return self._decode(policy)

    def _decode(self, policy: Policy) -> Traced:
        rows = min(policy.batch, self.drawn)
        latents = torch.zeros((), device="meta").expand(rows, *policy.adapter.latent_shape)
        with tracing() as trace:
            policy.decode(latents)
        return Traced(trace.peak, 0, trace.cost.in_batches(self.drawn + self.made, policy.batch, rows))

    def _build(self, policy: Policy) -> Traced:
        short = shortened(policy, FEW)
        drawn = self._drawn(short)
        self._condition(policy, drawn.prompts)
        with tracing() as trace:
            built = self._builder().build(without_decoding(short), drawn, StandInAfter(len(drawn)).score)
        if self._built is None:
            self._built = built
        scale = len(policy.schedule) / len(short.schedule)
        cost = trace.cost.in_batches(self.drawn * scale, len(drawn), len(drawn))
        rows = min(policy.batch, len(drawn))
        return Traced(trace.peak + self._latents(policy, short, rows), 0, cost)

    def _train(self, policy: Policy) -> Traced:
        algorithm, config = self._algorithm(policy), self.cell.algorithm_config
        with tracing():
            steps = algorithm.noisy_steps(policy, 0, 0)
        if steps is not None:  # a round trains on these alone: a sampler of as many is as much work
            policy = shortened(policy, len(steps))
            algorithm.config = config.model_copy(update={"window": (0.0, 1.0)})
        samples = self._consistent(policy)
        every = copy.copy(policy)
        every.batch, every.network_evaluations = 10**9, 0  # one forward, whose memory nobody asks for
        with tracing() as before:
            rows = algorithm.prepare(every, samples, torch.Generator().manual_seed(0))
        total = len(next(iter(rows.values())))
        if not total:
            raise UsageError(f"{algorithm.name} finds nothing to train on in what {self.cell.builder.name} builds")
        scale = self.drawn / samples.drawn
        at_once = max(1, policy.batch // algorithm.samples_per_row)
        piece = min(at_once, total, max(1, math.ceil(total * scale / config.updates)))
        for p in policy.parameters.values():
            p.grad = torch.empty_like(p)  # as in every step but the first of a part: a part of the table of its own
        try:
            with tracing() as trace, torch.autograd.graph.saved_tensors_hooks(trace.keep, lambda t: t):
                batch = algorithm.batch(policy, samples, {k: v[:piece] for k, v in rows.items()})
                loss = algorithm.loss(policy, samples, batch).value
                kept = trace.kept
                loss.backward()
        finally:
            for p in policy.parameters.values():
                p.grad = None
        cost = trace.cost.in_batches(total * scale * config.inner_epochs, piece, piece)
        if done := every.network_evaluations:
            branches = 1 if policy.guidance == 1 else 2
            cost += before.cost.in_batches(done * scale, branches * policy.batch, done)
        return Traced(trace.peak, kept, cost)

    def _algorithm(self, policy: Policy) -> Algorithm:
        algorithm: Algorithm = self.cell.algorithm(self.cell.algorithm_config)
        with tracing():
            algorithm.setup(policy, StandIn())
        return algorithm

    def _builder(self) -> Builder:
        return self.cell.builder(self.cell.builder_config)

    def _drawn(self, policy: Policy) -> Samples:
        """Drawn samples with nothing in them."""
        prompts, seeds = self._some(policy)
        steps, rows = len(policy.schedule), len(prompts)
        latents = torch.zeros(()).expand(rows, steps + 1, *policy.adapter.latent_shape)
        trajectory = Trajectory(latents, torch.zeros(rows, steps), seeds, prompts)
        return Samples(trajectory, torch.zeros(rows, 1, 1, 3, dtype=torch.uint8), torch.arange(rows).float())

    def _consistent(self, policy: Policy) -> ConsistentSamples:
        """What the builder made when it was traced, at all the steps."""
        built = self._built
        assert built is not None
        old, steps = built.samples.trajectory, len(policy.schedule)
        self._condition(policy, old.prompts)
        latents = torch.zeros(()).expand(len(old), steps + 1, *old.latents.shape[2:])
        whole = Trajectory(latents, torch.zeros(len(old), steps), old.seeds, old.prompts)
        apart = built.samples.rewards[:, None].expand(-1, 2)
        components = (
            Components({"one": 1.0, "two": 0.0}, apart) if self.cell.algorithm_config.needs_components else None
        )
        return dataclasses.replace(
            built, samples=dataclasses.replace(built.samples, trajectory=whole, components=components)
        )

    def _condition(self, policy: Policy, prompts: Sequence[str]) -> None:
        with tracing():
            policy.condition(prompts)

    def _latents(self, policy: Policy, short: Policy, rows: int) -> int:
        """The noise and the latents, on the device, of the steps that were not traced."""
        steps = len(policy.schedule) - len(short.schedule)
        return 2 * steps * rows * math.prod(policy.adapter.latent_shape) * 4


def _networks(adapter: Adapter) -> dict[str, torch.nn.Module]:
    return {n: p for n, p in adapter.pipe.components.items() if isinstance(p, torch.nn.Module)}
