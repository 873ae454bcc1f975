"""D-Fusion's mask: where in the picture the prompt's items are, read from cross-attention (Hu et al. 2025, §4.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ItemTokens = Sequence[Sequence[Sequence[int]]]  # [sample][item][token index]
Rule = str | float  # see `threshold`
Rules = Rule | Sequence[Rule]  # of a sample: one for all its items, or one for each


def item_maps(maps: Tensor, tokens: ItemTokens) -> list[Tensor]:
    """One attention map for each item: maps [B, positions, tokens] to B tensors [items, positions].

    An item of several tokens takes their mean.
    """
    return [
        torch.stack([sample[:, list(indices)].mean(-1) for indices in items])
        for sample, items in zip(maps, tokens, strict=True)
    ]


def threshold(values: Tensor, rule: Rules) -> Tensor:
    """The thresholds [items] of item maps [items, positions] by a rule, or by each item's own.

    a number         that probability for every item (the official repository: 0 to 0.03, by hand)
    "mean+K"         mean plus K standard deviations over the positions
    "max*K"          K times the item's largest value
    "otsu"           the split that maximises the variance between the two sides (Otsu 1979)
    """
    if not isinstance(rule, int | float | str):
        return torch.cat([threshold(row[None], own) for row, own in zip(values, rule, strict=True)])
    if isinstance(rule, int | float):
        return torch.full((len(values),), float(rule), device=values.device)
    try:
        if rule == "otsu":
            return torch.stack([_otsu(row) for row in values])
        if rule.startswith("mean+"):
            return values.mean(1) + float(rule[5:]) * values.std(1, correction=0)
        if rule.startswith("max*"):
            return float(rule[4:]) * values.amax(1)
        return torch.full((len(values),), float(rule), device=values.device)
    except ValueError:
        raise ValueError(f"unknown threshold {rule!r}: a number, 'mean+1', 'max*0.5' or 'otsu'") from None


def _otsu(values: Tensor) -> Tensor:
    ordered = values.sort().values
    n = len(ordered)
    below = torch.arange(1, n, device=values.device)
    sums = ordered.cumsum(0)
    low, high = sums[:-1] / below, (sums[-1] - sums[:-1]) / (n - below)
    between = below * (n - below) * (high - low) ** 2
    return ordered[1 + int(between.argmax())]


def item_mask(maps: Tensor, tokens: ItemTokens, rules: Sequence[Rules]) -> Tensor:
    """The union over items of map >= threshold: [B, positions], 0 or 1, float32. `rules` are B."""
    masks = []
    for values, rule in zip(item_maps(maps, tokens), rules, strict=True):
        masks.append((values >= threshold(values, rule)[:, None]).any(0))
    return torch.stack(masks).float()
