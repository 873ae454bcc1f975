"""The one loop: sample, score, build, loss, step; then evaluate, and leave a record."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from bench_dfusion.algorithm import Algorithm
from bench_dfusion.builders.contract import Builder, Components, ConsistentSamples, Samples
from bench_dfusion.diffusion.policy import Policy
from bench_dfusion.errors import PluginError, UsageError
from bench_dfusion.models.base import Adapter, NotFinite
from bench_dfusion.models.loading import dtype
from bench_dfusion.objectives.averages import WarmedUpEMA
from bench_dfusion.results import checked_base, records
from bench_dfusion.results.records import Record, Round, Rung
from bench_dfusion.rewards.contract import fault, scored_in_shards
from bench_dfusion.rewards.sums import WeightedSum, scored_apart
from bench_dfusion.runs import (
    base_drawing,
    baseline,
    evaluation,
    model_card,
    pairs,
    pictures,
    status,
    text_limits,
    trackers,
)
from bench_dfusion.runs.baseline import Baseline
from bench_dfusion.runs.config import Cell
from bench_dfusion.runs.loaded import Loaded
from bench_dfusion.tracks.schema import Track, check_rung
from bench_dfusion.util import files, parallel
from bench_dfusion.util.progress import bar
from bench_dfusion.util.seeds import passes, seed_of

if TYPE_CHECKING:
    from peft import LoraConfig

CHECKPOINT = "checkpoint.safetensors"


class Collapse(RuntimeError):
    """The run's reward collapsed or is no number; the message is the evidence."""


@dataclass
class Progress:
    """What a checkpoint holds beside weights and optimiser."""

    round: int = 0
    queries: int = 0
    updates: int = 0
    network_evaluations: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    rungs: list[dict[str, Any]] = field(default_factory=list)  # what was found at each rung, from the first

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def run_cell(
    cell: Cell,
    out: Path,
    device: str | None = None,
    keep_pairs: pairs.Keep | None = None,
    loaded: Loaded | None = None,
    rung: int = 1,
    tracked_by: Sequence[str] = (),
) -> Record:
    """Train and evaluate one cell in `out / cell.folder`, or go on where it was stopped; returns its record.

    `keep_pairs`: of which rounds the pairs stay in `pairs/` (None: by the pictures' size); no number depends on it.
    `loaded`: what earlier cells of this process have loaded, and this one leaves to the next; nor does any on that.
    `rung`: of the track's ladder of budgets the one to end at, from 1.
    `tracked_by`: experiment trackers (`trackers.PACKAGES`) that are shown the run; no number depends on them.

    Raises UsageError on anything that can be known before compute. A cell that has reached the rung, or failed, is only
    read.
    """
    check_rung(rung, cell.track.budget.ladder, cell.track.id)
    names = trackers.check(tracked_by)
    folder = out / cell.folder
    record_path = folder / "record.json"
    if record_path.exists():
        record = records.read(record_path)
        if record.reached(rung):
            return record
        if not (folder / CHECKPOINT).exists():
            raise UsageError(
                f"{folder / CHECKPOINT} is missing, from which the run would go on to rung {rung}: copy it there, or remove "
                f"{folder} to start this cell over"
            )
    try:
        run = Run(cell, folder, device, keep_pairs, loaded)
    except PluginError:
        raise
    except ValueError as error:  # a model, builder, reward or prompt that does not fit
        raise UsageError(str(error)) from error
    folder.mkdir(parents=True, exist_ok=True)
    with parallel.writing(files.locked(folder / ".lock", f"another process is running {folder}")):
        if parallel.first():
            files.write_json(folder / "cell.json", cell.description)
        run.restore()
        run.track(names)
        run.say("base", run.ends[rung - 1])
        run.base = base_drawing.ensure(cell.track, folder.parent, run.policy, run.judges, run.model_sha256)
        return run.climb(rung)


class Run:
    """One cell while it runs."""

    def __init__(
        self,
        cell: Cell,
        folder: Path,
        device: str | None = None,
        keep_pairs: pairs.Keep | None = None,
        loaded: Loaded | None = None,
    ):
        self.cell, self.folder, self.keep_pairs = cell, folder, keep_pairs
        self.device = parallel.join(device) or torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        track = cell.track
        prompts = [*track.prompts.train, *track.prompts.heldout]
        loaded = loaded or Loaded()
        loaded.begin(cell, self.device)
        self.reward = loaded.reward(cell.reward, cell.reward_config, self.device, prompts if cell.builder.draws else ())
        if track.memory.offload_rewards and not cell.algorithm.needs_gradient:
            self.reward.offload()
        self.judges = evaluation.load_judges(track, self.device, loaded.reward)
        self.base: checked_base.CheckedBase | None = None
        adapter, self.model_sha256 = loaded.pipeline(track.model, self.device, track.memory)
        self.policy = make_policy(track, adapter, cell.seed, self.device)
        self.builder: Builder = cell.builder(cell.builder_config)
        with evaluation.sampling(self.policy, track):  # whether the model has such a sampler
            if track.memory.drop_text:
                self.policy.condition(prompts)
        text_limits.check(adapter, self.builder.trained_on(track.prompts), track.prompts)
        self.algorithm: Algorithm = cell.algorithm(cell.algorithm_config)
        self.algorithm.setup(self.policy, self.reward)
        drawn = self.drawn = track.budget.prompts_per_round * track.budget.samples_per_prompt
        # Offline pairs cost no query: as many rounds as samples without a builder's own would have.
        a_round = self.builder.queries(drawn) + self.algorithm.queries(drawn) or drawn
        self.ends = rounds_of(track, a_round)
        self._check_builder(prompts)
        if track.memory.drop_text:
            if not cell.builder.draws:
                raise UsageError("offline pairs bring prompts as they come: leave track.memory.drop_text off")
            self.policy.condition(prompts)
            adapter.drop_text()
        config = cell.algorithm_config
        self.parameters = list(self.policy.parameters.values())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, betas=(0.9, 0.999), weight_decay=config.weight_decay
        )
        self.average = WarmedUpEMA(config.ema) if config.ema is not None else None
        if self.average is not None:
            self.average.weights(self.policy)  # it begins with the weights before the first update
        self.progress = Progress()
        self.baseline = Baseline()
        self._scored: list[tuple[Tensor, Tensor]] = []  # of a sum: rewards and components, as the round scored them
        self.failure: str | None = None
        self.checkpoint = folder / CHECKPOINT
        self.status = status.Reporter(folder)
        self.trackers: trackers.Trackers | None = None

    def _check_builder(self, prompts: Sequence[str]) -> None:
        """Raise ValueError where the builder cannot work with a prompt, or with the noise of one of the rounds."""
        of_rounds = (self.algorithm.noisy_steps(self.policy, self.cell.seed, n) for n in range(self.ends[-1]))
        for steps in {None if s is None else tuple(s.tolist()): s for s in of_rounds}.values():
            with self.policy.noisy_at(steps):
                self.builder.check(self.policy, prompts)

    def say(self, stage: Literal["base", "train", "evaluate", "done"], end: int) -> None:
        """Leave in the run's directory what it does now, on its way to `end` rounds."""
        rounds = self.progress.rounds
        last = rounds[-1].get("reward") if rounds else None
        rises = [r["rise"] for r in rounds if r.get("rise") is not None]
        self.status.say(stage, self.progress.round, end, last, rises)

    def track(self, names: Sequence[str]) -> None:
        """Show the run to trackers, from the round that they were told last."""
        if names and parallel.first():
            self.trackers = trackers.Trackers(names, self.folder, self.folder.name, self.cell.resolved)

    def climb(self, rung: int) -> Record:
        """Train up to a rung of the ladder, and at each on the way evaluate and leave a record."""
        record: Record | None = None
        for number in range(len(self.progress.rungs) + 1, rung + 1):
            self.train(self.ends[number - 1])
            self.say("evaluate", self.ends[rung - 1])
            self.evaluate(number)
            record = parallel.once(self._record)
            if record.status == "failed":
                break
        self.say("done", self.ends[rung - 1])
        if self.trackers is not None:
            self.trackers.close()
        return record or parallel.once(self._record)

    def train(self, end: int) -> None:
        """Rounds up to `end` of them, a checkpoint after each."""
        label = f"{self.cell.algorithm.name}/{self.cell.builder.name}/{self.cell.reward.name}"
        with bar(f"train {label}", end, self.progress.round) as progress:
            while self.progress.round < end:
                self.say("train", end)
                number = self.progress.round
                before = self.policy.network_evaluations
                try:
                    with self.policy.noisy_at(self.algorithm.noisy_steps(self.policy, self.cell.seed, number)):
                        samples = self._collect(number)
                        metrics = self._improve(samples, number)
                    self._note(samples, metrics, number)
                except (Collapse, NotFinite) as error:
                    self.failure = f"round {number}: {error}"
                    break
                self.progress.network_evaluations += parallel.total(self.policy.network_evaluations - before)
                self.progress.round += 1
                if parallel.first():
                    self._leave(samples, number)
                now = f"loss {metrics.get('loss', 0):.3g}"
                if samples.drawn:
                    last = self.progress.rounds[-1]
                    now = f"reward {last['reward']:.3f}, {last['rise']:+.3f} to the base on the same prompts"
                progress.advance(1, now)
        if self.failure is not None and parallel.first():
            files.write_json(self.folder / "failure.json", {"round": self.progress.round, "evidence": self.failure})

    def _collect(self, number: int) -> ConsistentSamples:
        """Sample, decode, score, build; or offline pairs."""
        if not self.builder.draws:
            with self.progress.phase("load"):
                return self.builder.offline(self.policy, self.cell.seed, number, self.drawn)
        prompts = round_prompts(self.cell.track, self.cell.seed, number)
        seeds = torch.tensor([seed_of("train", self.cell.seed, number, p, i) for i, p in enumerate(prompts)])
        with self.progress.phase("base"):
            self._measure_base(prompts)
        with self.algorithm.collecting(self.policy):
            with self.progress.phase("sample"):
                trajectory = self.policy.sample(prompts, seeds)
                images = self.policy.decode(trajectory.final)
            self._scored = []
            drawn = Samples(trajectory, images, self._score(images, prompts))
            with self.progress.phase("build"):
                samples = self.builder.build(self.policy, drawn, self._score)
            samples.samples.components = self._components(samples.samples)
            return samples

    def _measure_base(self, prompts: Sequence[str]) -> None:
        """Draw and score the base on the prompts of a round that are new: see `baseline`."""
        k = baseline.pictures_per_prompt(self.cell.track, self.ends[0])
        new = [p for p in self.baseline.missing(prompts) for _ in range(k)]
        if not new:
            return
        seeds = torch.tensor([seed_of("base", p, i % k) for i, p in enumerate(new)])
        before = self.policy.network_evaluations
        with self.policy.reference():
            trajectory = self.policy.sample(new, seeds)
        self.baseline.take(new, self._scores(self.policy.decode(trajectory.final), new)[0])
        self.baseline.network_evaluations += parallel.total(self.policy.network_evaluations - before)
        self.policy.network_evaluations = before

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        with self.progress.phase("score"):
            rewards, apart = self._scores(images, prompts)
        if apart is not None:
            self._scored.append((rewards, apart))
        self.progress.queries += len(images)
        return rewards

    def _components(self, samples: Samples) -> Components | None:
        """What each reward of a sum said of the round's samples; None of a single reward.

        Raises PluginError where an algorithm needs it and the builder did not keep the order of scoring.
        """
        if not isinstance(self.reward, WeightedSum):
            return None
        rewards, scores = (torch.cat(parts) for parts in zip(*self._scored, strict=True))
        if torch.equal(rewards, samples.rewards):
            return Components(self.reward.weights(), scores)
        if self.cell.algorithm_config.needs_components:
            raise PluginError(
                f"builder {self.builder.name} returns other samples than it had scored, or in another order: "
                "leave algo.components out"
            )
        return None

    def _scores(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """The training rewards, and of a sum each of its rewards."""
        apart: Tensor | None = None
        with self.reward.scoring():
            if isinstance(self.reward, WeightedSum):
                rewards, apart = scored_apart(self.reward, images, prompts)
            else:
                rewards = scored_in_shards(self.reward, images, prompts)
        if wrong := fault(rewards, prompts):
            raise Collapse(f"reward {self.reward.name} {wrong}")
        return rewards, apart

    def _improve(self, samples: ConsistentSamples, number: int) -> dict[str, float]:
        """The optimiser's steps of a round; returns the means of the metrics."""
        generator = torch.Generator().manual_seed(seed_of("rows", self.cell.seed, number))
        config = self.cell.algorithm_config
        sums: dict[str, float] = {}
        count = 0

        def loss_of(piece: Tensor) -> tuple[Tensor, dict[str, float]]:
            loss = self.algorithm.loss(self.policy, samples, {k: v[piece] for k, v in batch.items()})
            said = {k: float(v.detach()) * len(piece) for k, v in {"loss": loss.value, **loss.metrics}.items()}
            return loss.value * (len(piece) / len(part)), said

        with self.progress.phase("prepare"):
            rows = self.algorithm.prepare(self.policy, samples, generator)
        total = len(next(iter(rows.values())))
        at_once = max(1, self.policy.batch // self.algorithm.samples_per_row)
        with self.progress.phase("train"):
            for _ in range(config.inner_epochs if total else 0):
                order = torch.randperm(total, generator=generator)
                for part in order.tensor_split(min(config.updates, total)):
                    self.optimizer.zero_grad(set_to_none=True)
                    batch = self.algorithm.batch(self.policy, samples, {k: v[part] for k, v in rows.items()})
                    for said in parallel.add_gradients(
                        self.parameters, torch.arange(len(part)).split(at_once), loss_of
                    ):
                        sums |= {name: sums.get(name, 0.0) + value for name, value in said.items()}
                    count += len(part)
                    gradient = torch.nn.utils.clip_grad_norm_(self.parameters, config.grad_norm)
                    norm = float(self.policy.finite(gradient, "the gradient is"))
                    sums["grad_norm"] = sums.get("grad_norm", 0.0) + norm * len(part)
                    self.optimizer.step()
                    self.algorithm.stepped(self.policy)
                    self.progress.updates += 1
                    if self.average is not None:
                        self.average.steps += 1
                        self.average.update(self.policy)
        self.progress.queries += self.algorithm.queries(samples.drawn)
        return {name: value / count for name, value in sums.items()}

    def _note(self, samples: ConsistentSamples, metrics: dict[str, float], number: int) -> None:
        rewards = samples.samples.rewards
        drawn, prompts = rewards[: samples.drawn], samples.samples.prompts[: samples.drawn]
        base = self.baseline.mean(prompts) if samples.drawn else None
        components = samples.samples.components
        if metrics and components is not None and self.cell.algorithm_config.needs_components:
            apart = zip(components.weights, components.scores[: samples.drawn].T, strict=True)
            metrics |= {f"reward_{name}": float(own.nanmean()) for name, own in apart if not own.isnan().all()}
        entry = Round(
            round=number,
            queries=self.progress.queries,
            reward=float(drawn.mean()) if samples.drawn else None,
            reward_sd=float(drawn.std()) if samples.drawn else None,
            base_reward=float(rewards[samples.triples[:, 1]].mean()) if len(samples.triples) else None,
            winner_reward=float(rewards[samples.triples[:, 2]].mean()) if len(samples.triples) else None,
            pairs=len(samples.pairs),
            dropped=samples.dropped,
            metrics=metrics,
            base_on_prompts=base,
            rise=None if base is None else float(drawn.mean()) - base,
        )
        if any(not math.isfinite(v) for v in metrics.values()):
            raise Collapse(f"the metrics are not finite: {metrics}")
        self.progress.rounds.append(entry.model_dump())
        evidence = self.baseline.collapsed(prompts, drawn) if samples.drawn else None
        if evidence is not None:
            raise Collapse(evidence)

    def _leave(self, samples: ConsistentSamples, number: int) -> None:
        """Write what a finished round leaves."""
        with self.progress.phase("pairs"):
            pairs.keep(self.folder / "pairs", samples, self.cell.reward.name, number, self.keep_pairs)
        if self.progress.round in self.ends:
            pictures.triples(self.folder / "triples.png", samples)
        self._save()
        if self.trackers is not None:
            picture = self.trackers.folder / "triples.png"
            pictures.triples(picture, samples)
            self.trackers.rounds(self.progress.rounds, self.progress.seconds, picture)

    def _save(self) -> None:
        tensors: dict[str, Tensor] = {f"lora.{k}": v for k, v in self.policy.parameters.items()}
        tensors |= files.optimizer_tensors(self.optimizer)
        tensors |= {f"algorithm.{k}": v for k, v in self.algorithm.state().items()}
        if self.average is not None:
            tensors |= {f"ema.{k}": v for k, v in self.average.state().items()}
        state = {"cell": self.cell.hash, "progress": vars(self.progress), "base": vars(self.baseline)}
        files.save_tensors(self.checkpoint, tensors, state)

    def restore(self) -> None:
        """Go on from the checkpoint, if there is one. Raises UsageError where it is damaged or another cell's."""
        if not self.checkpoint.exists():
            return
        try:
            tensors, meta = files.load_tensors(self.checkpoint)
        except Exception as error:
            raise UsageError(f"{self.checkpoint} is damaged ({error}); remove it to start this cell over") from None
        if meta.get("cell") != self.cell.hash:
            raise UsageError(
                f"{self.checkpoint} belongs to another configuration; remove {self.folder} or use another --out"
            )
        with torch.no_grad():
            for name, parameter in self.policy.parameters.items():
                parameter.copy_(tensors[f"lora.{name}"])
        if self.average is not None:
            self.average.load_state({k.removeprefix("ema."): v for k, v in tensors.items() if k.startswith("ema.")})
        files.restore_optimizer(self.optimizer, tensors)
        prefix = "algorithm."
        self.algorithm.load_state({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        self.progress = Progress(**meta["progress"])
        self.baseline = Baseline(**meta.get("base", {}))

    def evaluate(self, rung: int) -> None:
        """Judge what a rung's rounds have led to (unless the run failed); the first process writes what is beside a record.

        With `ema` that is the average of the weights; training goes on with the weights themselves.
        """
        if self.failure is not None:
            return
        average = self.average
        with nullcontext() if average is None else self.policy.holding(average.weights(self.policy)):
            self._judge(rung)
        if self.failure is None and parallel.first():
            self._save()

    def _judge(self, rung: int) -> None:
        before = self.policy.network_evaluations
        done: evaluation.Evaluation | None = None
        rewards: Tensor | None = None
        try:
            with self.progress.phase("evaluate"):
                done = evaluation.evaluate(
                    self.policy, self.cell.track, self.judges, self.reward.fingerprints(), self.base
                )
                rewards = self._rewards_of(done)
        except NotFinite as error:
            self.failure = f"evaluation: {error}"
        self.progress.network_evaluations += parallel.total(self.policy.network_evaluations - before)
        if done is not None:
            found = parallel.once(lambda: self._found(rung, done, rewards))
            self.progress.rungs.append(found)
            if self.trackers is not None:
                last = self.progress.round - 1
                self.trackers.rung(rung, last, done.verdicts, done.drift, self.folder / "base_trained.png")

    def _rewards_of(self, done: evaluation.Evaluation) -> Tensor | None:
        """The training reward's scores [P, K] of the pictures judged; None for offline pairs, whose reward scores none."""
        if not self.cell.builder.draws:
            return None
        own = self.reward.fingerprint()
        same = next((name for name, judge in self.judges.items() if judge.fingerprint() == own), None)
        if same is not None:
            return done.scores[same]
        k = self.cell.track.evaluation.images_per_prompt
        return evaluation.judged(self.reward, self.reward.name, done.drawn, k, "reward")

    def _found(self, rung: int, done: evaluation.Evaluation, rewards: Tensor | None) -> dict[str, Any]:
        """Write LoRA, pictures and scores, of a rung that is not the last also into a directory that later ones leave
        alone; returns its `Rung`, dumped. `rewards`: the training reward's scores [P, K] of the pictures judged."""
        track, picture = self.cell.track, self.folder / "base_trained.png"
        self.policy.save(self.folder)
        pictures.base_and_trained(picture, done.base, done.trained, track.prompts.heldout)
        scores = self.folder / checked_base.SCORES
        if self.base is not None:
            own = done.scores | ({} if rewards is None else {checked_base.REWARD: rewards})
            checked_base.write_scores(scores, track.prompts.heldout, {name: s.numpy() for name, s in own.items()})
        if rung < len(self.ends):
            for path in (self.folder / self.policy.file, picture, *([scores] if self.base is not None else [])):
                files.write_atomic(records.rung_folder(self.folder, rung) / path.name, path.read_bytes())
        return Rung(
            rung=rung,
            rounds=len(self.progress.rounds),
            verdicts=done.verdicts,
            drift=done.drift,
            cost=self._cost(),
            agreement=None if rewards is None else evaluation.agreement(rewards, done.scores),
            lora_sha256=files.sha256(self.folder / self.policy.file),
            scores_sha256=None if self.base is None else files.sha256(scores),
        ).model_dump(mode="json")

    def _cost(self) -> records.Cost:
        progress, draws = self.progress, self.cell.builder.draws
        peak = max([records.peak_memory_mb(self.device), *(r["cost"]["peak_memory_mb"] for r in progress.rungs)])
        return records.Cost(
            reward_queries=progress.queries,
            network_evaluations=progress.network_evaluations,
            updates=progress.updates,
            seconds={k: round(v, 2) for k, v in progress.seconds.items()},
            peak_memory_mb=round(peak, 1),
            device=(f"{parallel.size()} × " if parallel.size() > 1 else "")
            + (torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"),
            base_queries=self.baseline.queries if draws else None,
            base_network_evaluations=self.baseline.network_evaluations if draws else None,
        )

    def _record(self) -> Record:
        """Write the record of the rung reached and its card, or of the run that failed and its LoRA."""
        track, cell = self.cell.track, self.cell
        rungs = [Rung(**r) for r in self.progress.rungs]
        last = rungs.pop() if self.failure is None else None
        if last is None:
            self.policy.save(self.folder)
        code, dirty = records.code_state()
        rounds = [Round(**r) for r in self.progress.rounds]
        trained, untrained = records.training(rounds, self.progress.updates)
        record = Record(
            status="finished" if self.failure is None else "failed",
            evidence=self.failure,
            track=track.id,
            track_hash=track.hash,
            cell_hash=cell.hash,
            algorithm=cell.algorithm.name,
            builder=cell.builder.name,
            reward=cell.reward.name,
            seed=cell.seed,
            given=cell.given,
            resolved=cell.resolved,
            tuning=track.tuning,
            verdicts=last.verdicts if last else [],
            drift=last.drift if last else None,
            rounds=rounds,
            trained=trained,
            untrained=untrained,
            agreement=last.agreement if last else None,
            cost=last.cost if last else self._cost(),
            provenance=records.Provenance(
                code=code,
                dirty=dirty,
                versions=records.versions([self.reward, *self.judges.values()]),
                plugins=cell.sources,
                hardware=records.hardware(),
                model_sha256=self.model_sha256,
                reward_fingerprint=self.reward.fingerprint(),
                reward_components=self.reward.fingerprints() if isinstance(self.reward, WeightedSum) else {},
                lora_sha256=last.lora_sha256 if last else files.sha256(self.folder / self.policy.file),
                scores_sha256=last.scores_sha256 if last else None,
                base_sha256=self.base.sha256 if self.base and (last or rungs) else None,
                prompts_seen=records.prompts_seen(track),
            ),
            rung=len(rungs) + 1 if track.budget.rungs else None,
            rungs=rungs if track.budget.rungs else None,
        )
        if record.status == "finished":
            model_card.write(self.folder, record)
        records.write(self.folder / "record.json", record)
        return record


def rounds_of(track: Track, a_round: int) -> list[int]:
    """The rounds of `a_round` reward queries after which each rung of a track's ladder ends (count). Raises UsageError
    where one rung has no round beyond the one before it."""
    ladder = track.budget.ladder
    ends = [budget // a_round for budget in ladder]
    if not ends[0]:
        name = "the first rung of track.budget.rungs" if len(ladder) > 1 else "track.budget.reward_queries"
        raise UsageError(
            f"the budget of {ladder[0]} reward queries is less than one round of {a_round}: raise {name} or lower prompts_per_round"
        )
    for n, (a, b) in enumerate(pairwise(ends), 1):
        if a == b:
            raise UsageError(
                f"rungs {n} and {n + 1} of {track.id}, {ladder[n - 1]} and {ladder[n]} reward queries, are less than one round "
                f"of {a_round} apart: change track.budget.rungs or lower prompts_per_round"
            )
    return ends


def make_policy(
    track: Track,
    adapter: Adapter,
    seed: int,
    device: torch.device,
    config: LoraConfig | None = None,
    kind: type[Policy] = Policy,
) -> Policy:
    """The policy of a track, of class `kind`, with a LoRA of the track's shape, or of `config`."""
    lora = track.lora
    return kind(
        adapter,
        steps=track.sampler.steps,
        eta=track.sampler.eta,
        kind=track.sampler.kind,
        guidance=track.sampler.guidance,
        rank=lora.rank,
        alpha=lora.alpha,
        targets=lora.targets,
        init=lora.init,
        config=config,
        batch=track.batch,
        autocast=dtype(track.model.autocast) if track.model.autocast else None,
        device=device,
        seed=seed_of("lora", seed) % 2**31,
    )


def round_prompts(track: Track, seed: int, number: int) -> list[str]:
    """The prompts of a round, each `samples_per_prompt` times: a shuffled pass over the train prompts, then the next."""
    train, n = track.prompts.train, track.budget.prompts_per_round
    chosen = passes(len(train), number * n, n, "prompts", seed)
    return [train[i] for i in chosen for _ in range(track.budget.samples_per_prompt)]
