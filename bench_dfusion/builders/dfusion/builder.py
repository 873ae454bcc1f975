"""The consistent sample builder of D-Fusion (Hu, Zhang, Kuang, ICML 2025, §4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from bench_dfusion.builders.contract import (
    Builder,
    BuilderConfig,
    ConsistentSamples,
    PairConfig,
    Samples,
    Score,
    Share,
    references_and_bases,
    winning_pairs,
)
from bench_dfusion.builders.dfusion import by_hand
from bench_dfusion.builders.dfusion.attention import AttentionHooks
from bench_dfusion.builders.dfusion.masks import ItemTokens, Rules, item_mask, threshold
from bench_dfusion.diffusion import samplers
from bench_dfusion.diffusion.policy import Policy, Trajectory
from bench_dfusion.errors import UsageError
from bench_dfusion.tracks.items import item_tokens
from bench_dfusion.tracks.schema import PromptsSection
from bench_dfusion.util import parallel


class DFusionConfig(PairConfig):
    steps: Share = Field(
        (0.1, 1.0),
        description="share of the steps that fuse, [from, to) in sampling order, 0 the noisiest "
        "(official: all but the two noisiest of 20)",
    )
    layers: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="self-attention modules to fuse; None: the family's default (official: mid and up blocks)",
    )
    threshold: str | float = Field(
        "otsu", description="mask threshold: a probability (official: 0 to 0.03 by hand), 'mean+K', 'max*K' or 'otsu'"
    )
    attributes: bool = Field(False, description="count an item's attributes among its tokens (official: nouns only)")
    items: dict[str, tuple[int | str, ...]] | None = Field(
        None, description="items by hand, for each prompt the words, or their numbers from 0; else head nouns are found"
    )
    items_file: str | None = Field(
        None,
        exclude=True,  # its content is in `items`
        description="JSON or TOML file of `items` (the official repository's item files as they are)",
    )
    thresholds: dict[str, tuple[float | str, ...]] | None = Field(
        None,
        exclude_if=lambda value: value is None,  # cells of before this option keep their hash
        description="thresholds by hand, for each prompt one for each item in order; else `threshold`",
    )
    thresholds_file: str | None = Field(
        None,
        exclude=True,
        description="JSON or TOML file of `thresholds` (the official repository's mask files as they are)",
    )
    map_side: int | None = Field(
        None,
        ge=1,
        description="side of the cross-attention maps the mask is made from; None: the nearest there is to a quarter "
        "of the latent's side (official 16 of 64), to the latent's own for latents of 16 or less",
    )

    @field_validator("threshold")
    @classmethod
    def _known(cls, rule: str | float) -> str | float:
        if not threshold(torch.rand(1, 4), rule).isfinite().all():
            raise ValueError(f"threshold {rule!r} is not finite")
        return rule

    @field_validator("items", mode="before")
    @classmethod
    def _items(cls, content: object) -> by_hand.Items | None:
        return None if content is None else by_hand.items(content)

    @field_validator("thresholds", mode="before")
    @classmethod
    def _thresholds(cls, content: object) -> by_hand.Thresholds | None:
        return None if content is None else by_hand.thresholds(content)


class DFusion(Builder):
    """Targets start from a base's noise and take a reference's content by mask-guided self-attention fusion."""

    name = "dfusion"
    summary = "winners denoised from the loser's own noise with mask-guided self-attention fusion"
    paper = "Hu, Zhang, Kuang 2025 (D-Fusion, ICML)"
    Config: ClassVar[type[BuilderConfig]] = DFusionConfig
    config: DFusionConfig

    @classmethod
    def pinned(cls, config: BuilderConfig, prompts: PromptsSection) -> BuilderConfig:
        """The config with the items and thresholds that its files give the track's prompts."""
        assert isinstance(config, DFusionConfig)
        known = [*prompts.train, *prompts.validation, *prompts.heldout]
        items = by_hand.given(by_hand.items, "items", config.items, config.items_file, known)
        thresholds = by_hand.given(by_hand.thresholds, "thresholds", config.thresholds, config.thresholds_file, known)
        try:
            by_hand.check_counts(items, thresholds)
        except ValueError as error:
            raise UsageError(f"{config.thresholds_file or 'builder.thresholds'}: {error}") from None
        return config.model_copy(update={"items": items, "thresholds": thresholds})

    def __init__(self, config: DFusionConfig):
        super().__init__(config)
        for option in ("items", "thresholds"):
            if getattr(config, f"{option}_file") and getattr(config, option) is None:
                raise ValueError(f"builder.{option}_file has not been read: DFusion.pinned(config, prompts) reads it")

    def queries(self, drawn: int) -> int:
        return drawn + drawn // 2

    def check(self, policy: Policy, prompts: Sequence[str]) -> None:
        self._taps(policy)
        for prompt in prompts:
            self._tokens(policy, prompt)

    def build(self, policy: Policy, drawn: Samples, score: Score) -> ConsistentSamples:
        references, bases = references_and_bases(drawn)
        trajectory, masks = self.targets(policy, drawn.trajectory, references, bases)
        images = policy.decode(trajectory.final)
        targets = Samples(trajectory, images, score(images, trajectory.prompts))
        samples = Samples.cat([drawn, targets])
        rows = torch.arange(len(drawn), len(samples))
        pairs, dropped = winning_pairs(samples, rows, bases, self.config.margin)
        return ConsistentSamples(
            samples,
            drawn=len(drawn),
            pairs=pairs,
            train=torch.cat([rows, bases]),
            triples=torch.stack([references, bases, rows], 1),
            masks=masks,
            dropped=dropped,
        )

    @torch.no_grad()
    def targets(
        self, policy: Policy, drawn: Trajectory, references: Tensor, bases: Tensor
    ) -> tuple[Trajectory, Tensor]:
        """Denoise a target for each (reference, base) row of `drawn`, both [M].

        Returns the targets' trajectories, whose log-probs are those under the fused prediction that drew
        them, and the masks averaged over the fused steps [M, side, side]. A reference that serves several
        bases goes through the network once a step.
        """
        taps = self._taps(policy)
        order = references.argsort(stable=True)  # bases of one reference side by side, in one batch

        def denoise(rows: Tensor) -> tuple[Trajectory, Tensor]:
            return self._targets(policy, taps, drawn, references[rows], bases[rows])

        parts, masks = zip(*parallel.each(denoise, order.split(policy.batch)), strict=True)
        back = order.argsort()
        return Trajectory.cat(parts)[back], torch.cat(masks)[back]

    def _targets(
        self, policy: Policy, taps: AttentionHooks, drawn: Trajectory, references: Tensor, bases: Tensor
    ) -> tuple[Trajectory, Tensor]:
        schedule, device = policy.schedule, policy.device
        unique, which = references.unique(return_inverse=True)
        which = which.to(device)
        reference_prompts = [drawn.prompts[i] for i in unique.tolist()]
        prompts = [drawn.prompts[i] for i in bases.tolist()]
        tokens = [self._tokens(policy, p) for p in reference_prompts]
        rules = [(self.config.thresholds or {}).get(p, self.config.threshold) for p in reference_prompts]
        noise = samplers.sample_noise(drawn.seeds[bases], len(schedule), tuple(drawn.latents.shape[2:])).to(device)
        first, last = (round(share * len(schedule)) for share in self.config.steps)
        total = torch.zeros(len(bases), taps.positions, device=device)

        def fused_mean(i: int, x_t: Tensor, step: Tensor) -> Tensor:
            nonlocal total
            if not first <= i < last:
                return policy.mean(x_t, step, prompts)
            with taps.recording():
                policy.mean(drawn.latents[unique, i].to(device), step[: len(unique)], reference_prompts)
            conditional = taps.maps[-len(unique) :]  # the second half of both branches, or all of one
            mask = self.mask(conditional, tokens, rules)[which]
            total += mask
            both = torch.cat([which + b * len(unique) for b in range(policy.branches)])
            keys_values = {name: (k[both], v[both]) for name, (k, v) in taps.keys_values.items()}
            with taps.fusing(keys_values, mask.repeat(policy.branches, 1)):
                return policy.mean(x_t, step, prompts)

        latents, log_probs = policy.denoise(noise[:, 0], noise[:, 1:], prompts, fused_mean)
        side = int(taps.positions**0.5)
        trajectory = Trajectory(latents.cpu(), log_probs.cpu(), drawn.seeds[bases].clone(), prompts)
        return trajectory, (total / max(1, last - first)).view(-1, side, side).cpu()

    def mask(self, maps: Tensor, tokens: ItemTokens, rules: Sequence[Rules]) -> Tensor:
        """The mask [R, positions] of references from their cross-attention maps [R, positions, tokens]."""
        return item_mask(maps, tokens, rules)

    def _taps(self, policy: Policy) -> AttentionHooks:
        layers = self.config.layers or policy.adapter.fused_layers()
        sides = policy.adapter.map_sides()
        if self.config.map_side and self.config.map_side not in sides:
            raise ValueError(
                f"no cross-attention layer has maps of side {self.config.map_side}; there are {sorted(sides)}"
            )
        return AttentionHooks(policy.adapter, layers, self.config.map_side or policy.adapter.map_side())

    def _tokens(self, policy: Policy, prompt: str) -> list[list[int]]:
        """For each item the columns of the attention maps that name it, in every stretch of the text."""
        words = (self.config.items or {}).get(prompt)
        adapter = policy.adapter
        parts = [
            [
                [part.start + i for i in tokens]
                for tokens in item_tokens(
                    adapter.text(prompt),
                    part.tokenizer,
                    items=words,
                    attributes=self.config.attributes,
                    max_length=part.length,
                )
            ]
            for part in adapter.text_parts()
        ]
        return [[i for places in item for i in places] for item in zip(*parts, strict=True)]
