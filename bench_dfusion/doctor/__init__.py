"""What a run will need of a device, estimated before anything is loaded.

The networks are made on the meta device from the checkpoint's configs, with the run's own LoRA, and the run's own code
(policy, builder, algorithm) is run on them and traced (`trace.py`), at the run's batch size but for few samples and
steps. What the trace cannot see is added: weights by part, the optimiser's state, cached embeddings, on a CPU the
round's samples and the process itself, and a margin. Times are the traced operations over rates that this device
reaches (`device.py`).

Not counted: what rewards and judges take while they score, beside their weights; the time they take; what the host of
a GPU holds.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from bench_dfusion.algorithm import Algorithm
from bench_dfusion.builders.contract import Builder, Components, ConsistentSamples, Samples
from bench_dfusion.diffusion.policy import Policy, Trajectory
from bench_dfusion.doctor import configs, device
from bench_dfusion.doctor.device import Rates
from bench_dfusion.doctor.trace import Cost, tracing
from bench_dfusion.errors import UsageError
from bench_dfusion.models import sharding
from bench_dfusion.models.base import Adapter
from bench_dfusion.models.loading import dtype, find, load_adapter
from bench_dfusion.rewards.contract import Reward, RewardConfig
from bench_dfusion.runs import evaluation, text_limits
from bench_dfusion.runs.config import Cell, default_track, judges_of
from bench_dfusion.runs.config import resolve as resolve_cell
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
ORDER = ("load", "encode", "sample", "decode", "score", "build", "train", "evaluate")
RUNS = ("encode", "sample", "decode", "build", "train", "evaluate")  # the network in it
STAND_INS = 40  # prompts where the track leaves them to the user and none are given


class Phase(BaseModel):
    """A part of a run: the bytes that lie on the device while it runs, by what they are, and how long it takes."""

    name: str
    parts: dict[str, int] = Field(description="bytes at the phase's peak by what they are")
    seconds: float | None = Field(None, description="in a round (evaluation: once)")

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


class Change(BaseModel):
    """What could be set otherwise, and the peak if it were, alone."""

    settings: dict[str, Any] = Field(description="options of the track")
    peak: int = Field(description="bytes")
    saves: int = Field(description="bytes less than without it")
    note: str = Field("", description="what it costs")


class Estimate(BaseModel):
    """What `bench-dfusion doctor` says."""

    model: str
    device: str
    cell: str
    available: int = Field(description="bytes that the device has for a run")
    phases: list[Phase]
    parameters: dict[str, int] = Field(description="of each network, and of the LoRA (count)")
    on_disk: dict[str, int] = Field(description="bytes of each part's weights files")
    changes: list[Change] = Field([], description="where it does not fit, cheapest first")
    smallest: dict[str, Any] | None = Field(None, description="the smallest set of changes that fits")
    smallest_peak: int | None = None
    rates: Rates | None = None
    rounds: int
    notes: list[str]

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda p: p.peak)

    @property
    def fits(self) -> bool:
        return self.peak.peak <= self.available

    @property
    def round_seconds(self) -> float | None:
        """Seconds of a round without the reward's."""
        own = [p.seconds for p in self.phases if p.seconds is not None and p.name != "evaluate"]
        return sum(own) if own else None

    def as_json(self) -> str:
        derived = {"fits": self.fits, "peak": self.peak.peak, "peak_phase": self.peak.name}
        return json.dumps({**derived, "round_seconds": self.round_seconds, **self.model_dump(mode="json")}, indent=1)


def estimate(cell: Cell, where: torch.device, memory_gb: float | None = None) -> Estimate:
    """What a cell needs of a device, and what to change where that is more than it has.

    memory_gb   the device's memory in the place of what is free on it (1e9 bytes)
    Raises UsageError where the checkpoint's configs cannot be had or the cell cannot run.
    """
    if memory_gb is not None and not memory_gb > 0:
        raise UsageError(f"--memory-gb must be more than 0, not {memory_gb:g}")
    available = int(memory_gb * 1e9) if memory_gb is not None else device.free(where)
    try:
        doctor = _Doctor(cell, where, fresh=memory_gb is not None)
        found = doctor.phases(cell.track)
        changes: list[Change] = []
        smallest = None
        if max(p.peak for p in found) > available:
            changes = list(doctor.changes(available))
            smallest = doctor.smallest([c.settings for c in changes], available)
        rates = None
        if device.present(where):
            rates = device.measure(where, dtype(cell.track.model.dtype))
            doctor.time(found, rates)
    except UsageError:
        raise
    except ValueError as error:  # a model, builder, algorithm or prompt that does not fit
        raise UsageError(str(error)) from error
    return Estimate(
        model=cell.track.model.id,
        device=str(where),
        cell=f"{cell.algorithm.name} on {cell.builder.name} samples, reward {cell.reward.name}, track {cell.track.id}",
        available=available,
        phases=found,
        parameters=doctor.parameters(cell.track),
        on_disk={name: s.size for name, s in doctor.stored.items()},
        changes=changes,
        smallest=smallest,
        smallest_peak=doctor.peak(changed(cell.track, smallest)) if smallest else None,
        rates=rates,
        rounds=doctor.rounds,
        notes=doctor.notes,
    )


def resolve(
    *,
    track_source: str | None = None,
    model: str | None = None,
    prompts: Path | None = None,
    settings: list[str] | None = None,
    config: Path | None = None,
    algo: str = "dpo",
    builder: str | None = None,
    reward: str | None = None,
    teachers: Sequence[str] | None = None,
) -> tuple[Cell, list[str]]:
    """The cell as `run` would have it, and remarks; prompts stand in where the track leaves them to the user."""
    source = track_source or default_track(model)
    settings, notes = list(settings or []), []
    content = schema.read(source)
    given = schema.read_toml(config).get("track", {}) if config else {}
    if prompts is None and not any("prompts" in c for c in (content, given)) and ".prompts." not in "".join(settings):
        words = [f"a photo of a cat and a dog, number {i}" for i in range(STAND_INS + 10)]
        settings += [f"track.prompts.train={json.dumps(words[:STAND_INS])}"]
        settings += [f"track.prompts.heldout={json.dumps(words[STAND_INS:])}"]
        notes.append(
            f"{STAND_INS} prompts stand in for those of --prompts: their number moves the cached embeddings alone"
        )
    cell = resolve_cell(
        track_source=source,
        model=model,
        prompts=prompts,
        settings=settings,
        config=config,
        algo=algo,
        builder=builder,
        reward=reward or "clip",
        teachers=teachers,
    )
    if not cell.builder.draws:
        raise UsageError(f"builder {cell.builder.name} is of offline pairs: the doctor estimates builders that draw")
    return cell, notes


def changed(settings: Track, changes: dict[str, Any]) -> Track:
    """A track with options changed: `batch`, `model.dtype`, `memory.OPTION`."""
    content = settings.model_dump()
    for name, value in changes.items():
        section, _, option = name.rpartition(".")
        (content[section] if section else content)[option] = value
    return Track.model_validate(content)


class StandIn(Reward):
    """The reward of a trace: later pictures score higher, so that every pair is kept; what it does is not counted."""

    name, summary, paper, unit = "stand-in", "none", "none", "1"
    differentiable = True

    def __init__(self) -> None:
        super().__init__(RewardConfig())
        self._scored = 0

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        first, self._scored = self._scored, self._scored + len(images)
        return torch.arange(first, self._scored, dtype=torch.float32)

    def score_tensors(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.flatten(1).mean(1)

    def fingerprint(self) -> str:
        return "none"


@dataclass(frozen=True)
class Traced:
    """What running a phase once showed: bytes above what was there, those autograd kept, and its cost for a round."""

    peak: int
    kept: int
    cost: Cost


class _Doctor:
    """One cell's estimates under changed options; what was traced once is kept."""

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
            built = self._builder().build(_without_decoding(short), drawn, StandInAfter(len(drawn)).score)
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

    # what lies on the device

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

    # what to change

    def changes(self, available: int) -> Iterator[Change]:
        """Each change alone, those that cost least first."""
        settings = self.cell.track
        now = self.peak(settings)
        costs = {
            "memory.drop_text": "",
            "memory.offload_text": "moves between new prompts",
            "memory.offload_vae": "moves twice a round",
            "memory.offload_rewards": "moves twice a round",
            "memory.vae_slicing": "slower decoding",
            "memory.gradient_checkpointing": "a second forward in each training step",
            "memory.offload_network": "moves in every call of the network",
        }
        for option, note in costs.items():
            if getattr(settings.memory, option.partition(".")[2]):
                continue
            try:
                peak = self.peak(changed(settings, {option: True}))
            except ValueError:  # the model has no such thing
                continue
            yield Change(settings={option: True}, peak=peak, saves=now - peak, note=note)
        if settings.batch > 1:
            batch = self._batch(settings, {}, available) or 1
            peak = self.peak(changed(settings, {"batch": batch}))
            yield Change(settings={"batch": batch}, peak=peak, saves=now - peak, note="more calls of the network")
        if settings.model.dtype == "float32":
            half = {"model.dtype": "bfloat16"}
            peak = self.peak(changed(settings, half))
            yield Change(settings=half, peak=peak, saves=now - peak, note="other numbers: another track")

    def _batch(self, settings: Track, others: dict[str, Any], available: int) -> int | None:
        """The largest of the batch's halves that fits beside other changes; None where 1 does not."""
        halves = [settings.batch // 2**n for n in range(1, settings.batch.bit_length())]
        if not self.fits(changed(settings, {**others, "batch": 1}), available):
            return None
        return next(b for b in halves if self.fits(changed(settings, {**others, "batch": b}), available))

    def smallest(self, useful: list[dict[str, Any]], available: int) -> dict[str, Any] | None:
        """The fewest changes with which it fits, the cheapest of those; None where all together do not suffice."""
        settings = self.cell.track
        everything = {name: value for change in useful for name, value in change.items()}
        if "batch" in everything:
            everything["batch"] = 1
        if not self.fits(changed(settings, everything), available):
            return None
        for size in range(1, len(useful) + 1):
            for some in itertools.combinations(useful, size):
                chosen = {name: value for change in some for name, value in change.items()}
                if "batch" in chosen:
                    others = {name: value for name, value in chosen.items() if name != "batch"}
                    batch = self._batch(settings, others, available)
                    if batch is None:
                        continue
                    chosen["batch"] = batch
                if self.fits(changed(settings, chosen), available):
                    return chosen
        return None

    # time

    def time(self, phases: list[Phase], rates: Rates) -> None:
        """Fill in the seconds of each phase in a round, and of the evaluation at the end."""
        settings = self.cell.track
        costs = {name: self._trace(name, settings).cost for name in ("sample", "decode", "build", "train")}
        by_name = {p.name: p for p in phases}
        for name, cost in costs.items():
            by_name[name].seconds = rates.seconds(cost)
        # Base (where it is not a checked one) and trained are drawn, and one image of each prompt goes through both again
        # at each step.
        each = (1 if settings.evaluation.base_images_per_prompt else 2) * settings.evaluation.images_per_prompt
        evaluated = len(settings.prompts.heldout) * (each + 2) / self.drawn
        pictures = len(settings.prompts.heldout) * each / (self.drawn + self.made)
        by_name["evaluate"].seconds = rates.seconds(
            self._trace("judge", settings).cost * evaluated + self._trace("show", settings).cost * pictures
        )


class StandInAfter(StandIn):
    """Scores above all of the first samples."""

    def __init__(self, first: int):
        super().__init__()
        self._scored = first


def shortened(policy: Policy, steps: int) -> Policy:
    """The same policy with fewer steps of its schedule."""
    short, total = copy.copy(policy), len(policy.schedule)
    keep = torch.linspace(0, total - 1, min(steps, total)).round().long()
    fields = {f.name: getattr(policy.schedule, f.name) for f in dataclasses.fields(policy.schedule)}
    kept: dict[str, Any] = {n: v[keep] for n, v in fields.items() if isinstance(v, Tensor) and v.shape[:1] == (total,)}
    short.schedule = dataclasses.replace(policy.schedule, **kept)
    return short


def _without_decoding(policy: Policy) -> Policy:
    """The same policy that makes no pictures: decoding is a phase of its own."""
    blank = copy.copy(policy)
    blank.decode = lambda latents: torch.zeros(len(latents), 1, 1, 3, dtype=torch.uint8)  # type: ignore[method-assign]
    return blank


def _streamed(adapter: Adapter) -> int:
    """The bytes of an offloaded network's weights on the device: what no block holds, a block that works and the next.

    Raises ValueError where it has no blocks.
    """

    def frozen(module: torch.nn.Module) -> int:
        return sum(p.nbytes for name, p in module.named_parameters() if "lora_" not in name)

    sizes = [frozen(block) for block in sharding.blocks(adapter.network)]
    return frozen(adapter.network) - sum(sizes) + 2 * max(sizes)


def _networks(adapter: Adapter) -> dict[str, torch.nn.Module]:
    return {n: p for n, p in adapter.pipe.components.items() if isinstance(p, torch.nn.Module)}
