"""Offline pairs: a dataset of prompts with chosen and rejected pictures in the place of drawn samples.

Nothing is drawn and nothing is scored: reward queries are 0. A round takes as many pairs as one of `vanilla` with
the track's sizes, in shuffled passes over the dataset, so that a run has as many rounds and as many pairs as an online
one. Pictures are resized and cropped to the model's side and encoded once a round they are in (the mean of the
autoencoder's posterior where it has one). Scores are the dataset's columns `chosen_score` and `rejected_score`, or 1
and 0. Pairs with equal scores are left out; the round in which a pass begins counts those of the pass as dropped. There
are no trajectories, so only algorithms that learn from finished pictures take these samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field

from bench_dfusion.builders import preference_data
from bench_dfusion.builders.contract import Builder, BuilderConfig, ConsistentSamples, Samples, Score
from bench_dfusion.diffusion.policy import Policy, Trajectory
from bench_dfusion.errors import UsageError
from bench_dfusion.tracks.prompts import shared
from bench_dfusion.tracks.schema import PromptsSection
from bench_dfusion.util.seeds import passes


class OfflineConfig(BuilderConfig):
    pairs: str = Field(
        "",
        exclude=True,  # the hash says what was trained on, wherever it lay
        description="directory, Parquet file or Hub id of a dataset of prompt, chosen, rejected; run --pairs sets it",
    )
    sha256: str | None = Field(None, description="hash of the pairs; None: whatever is found there, put in the record")
    pairs_per_round: int | None = Field(
        None, ge=1, description="pairs in a round (count; None: as many as vanilla has with the track's sizes)"
    )


class Offline(Builder):
    name = "offline"
    summary = "no samples are drawn: the pairs of a dataset (run --pairs), 0 reward queries"
    paper = "Wallace et al. 2023 (Diffusion-DPO), §5.1"
    Config: ClassVar[type[BuilderConfig]] = OfflineConfig
    draws = False
    config: OfflineConfig

    def __init__(self, config: OfflineConfig):
        super().__init__(config)
        self._pairs = preference_data.read(config.pairs)

    @classmethod
    def pinned(cls, config: BuilderConfig, prompts: PromptsSection) -> BuilderConfig:
        assert isinstance(config, OfflineConfig)
        if not config.pairs:
            raise UsageError("the builder offline needs a dataset: give --pairs PATH_OR_HUB_ID")
        found = preference_data.read(config.pairs)
        held = shared(found.prompts, prompts.heldout)
        if held:
            raise UsageError(
                f"{config.pairs} has {len(held)} pairs of prompts that the track holds out, {held[0]} for one: leave "
                "them out of the dataset"
            )
        digest = found.sha256
        if config.sha256 not in (None, digest):
            raise UsageError(f"{config.pairs} hashes to {digest[:12]}…, not to the {config.sha256[:12]}… that is asked")
        return config.model_copy(update={"sha256": digest})

    def queries(self, drawn: int) -> int:
        return 0

    def trained_on(self, prompts: PromptsSection) -> Sequence[str]:
        return self._pairs.prompts

    def offline(self, policy: Policy, seed: int, number: int, drawn: int) -> ConsistentSamples:
        count = self.config.pairs_per_round or drawn // 2
        total = len(self._pairs)
        rows = passes(total, number * count, count, "offline", seed)
        begun = sum(position % total == 0 for position in range(number * count, (number + 1) * count))
        images = torch.cat(self._pairs.pictures(rows, policy.adapter.image_side))
        prompts = [str(p) for p in self._pairs.table.select_columns(["prompt"])[rows]["prompt"]]
        latents = policy.encode(images)
        trajectory = Trajectory(latents[:, None], torch.zeros(2 * count, 0), torch.tensor(rows * 2), prompts * 2)
        winner = torch.arange(count)
        return ConsistentSamples(
            Samples(trajectory, images, torch.cat(self._pairs.scores(rows))),
            drawn=0,
            pairs=torch.stack([winner, count + winner], 1),
            train=torch.arange(2 * count),
            triples=torch.zeros(0, 3, dtype=torch.int64),
            dropped=begun * self._pairs.ties,
        )

    def build(self, policy: Policy, drawn: Samples, score: Score) -> ConsistentSamples:
        raise NotImplementedError("offline pairs are not built from drawn samples")
