"""What a preference says about a pair's log-ratios r_w and r_l: TRL's loss types, and Diffusion-SDPO's safeguard."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from bench_dfusion import errors
from bench_dfusion.algorithm import AlgorithmConfig, Rows
from bench_dfusion.util import parallel

DISCOPOP_TAU = 0.05  # Lu et al. 2024, §4


def _robust(x: Tensor, flipped: float) -> Tensor:
    return ((flipped - 1) * F.logsigmoid(x) + flipped * F.logsigmoid(-x)) / (1 - 2 * flipped)


def _exo(x: Tensor, smoothing: float) -> Tensor:
    """KL of (sigmoid(x), sigmoid(-x)) from the smoothed label (1 - smoothing, smoothing)."""
    kept = x.sigmoid() * (F.logsigmoid(x) - math.log1p(-smoothing))
    return kept + (-x).sigmoid() * (F.logsigmoid(-x) - math.log(smoothing))


def _nca(reward_w: Tensor, reward_l: Tensor) -> Tensor:
    return -F.logsigmoid(reward_w) - 0.5 * F.logsigmoid(-reward_w) - 0.5 * F.logsigmoid(-reward_l)


def _discopop(x: Tensor) -> Tensor:
    """(1 - m) (-log sigmoid(x)) + m e^-x with m = sigmoid(x / tau); m e^-x as one exponential, which cannot overflow."""
    return -(-x / DISCOPOP_TAU).sigmoid() * F.logsigmoid(x) + (F.logsigmoid(x / DISCOPOP_TAU) - x).exp()


# (r_w, r_l, beta, label_smoothing) to the loss of each pair, with the formulas of TRL 1.16's DPOTrainer
LOSSES: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "sigmoid": lambda w, x, b, s: -F.logsigmoid(b * (w - x)),  # Rafailov et al. 2023, eq. 7
    "hinge": lambda w, x, b, s: (1 - b * (w - x)).relu(),  # Zhao et al. 2023 (SLiC)
    "ipo": lambda w, x, b, s: (w - x - 1 / (2 * b)) ** 2,  # Azar et al. 2023, eq. 17
    "robust": lambda w, x, b, s: _robust(b * (w - x), s),  # Chowdhury et al. 2024
    "exo_pair": lambda w, x, b, s: _exo(b * (w - x), s),  # Ji et al. 2024, eq. 16
    "nca_pair": lambda w, x, b, s: _nca(b * w, b * x),  # Chen et al. 2024
    "sppo_hard": lambda w, x, b, s: (w - 1 / (2 * b)) ** 2 + (x + 1 / (2 * b)) ** 2,  # Wu et al. 2024, eq. 4.7
    "apo_zero": lambda w, x, b, s: (-b * w).sigmoid() + (b * x).sigmoid(),  # D'Oosterlinck et al. 2024, eq. 7
    "apo_down": lambda w, x, b, s: (b * w).sigmoid() + (-b * (w - x)).sigmoid(),  # the same, eq. 8
    "discopop": lambda w, x, b, s: _discopop(b * (w - x)),  # Lu et al. 2024, eq. 5
}
SMOOTHED = ("robust", "exo_pair")
REFUSED = {
    "bco_pair": "its reward shift is a running mean over the whole training, which the loss of a batch does not know",
    "aot": "it sorts the batch, so its value would depend on how rows are cut into batches and mix unlike steps",
    "aot_unpaired": "it sorts the batch, so its value would depend on how rows are cut into batches and mix unlike steps",
    "sft": "it has no reference and no loser: that is the algorithm sft",
    "sigmoid_norm": "it divides by the completion's length, and log-probs here are means over the latent: use sigmoid",
    "kto_pair": "it is the unpaired loss of the algorithm kto",
    "simpo": "it has no reference, and without one a denoising log-prob says how hard a step is, not how good",
}


def _names(loss_type: str | tuple[str, ...]) -> tuple[str, ...]:
    return (loss_type,) if isinstance(loss_type, str) else loss_type


class PreferenceConfig(AlgorithmConfig):
    """Options of the algorithms that compare the log-ratios of a winner and a loser."""

    loss_type: str | tuple[str, ...] = Field(
        "sigmoid",
        description=f"the loss of a pair, or a list of them that are added up: {', '.join(LOSSES)} (names and "
        "formulas: TRL 1.16; ipo and sppo_hard aim at margins of 1/(2 beta) and 1/beta; discopop pushes margins "
        "between -0.12/beta and 0.08/beta down and a fresh LoRA starts at 0, so it wants another loss beside it)",
    )
    loss_weights: tuple[float, ...] | None = Field(
        None, description="a weight > 0 for each loss type (1; TRL: 1 for each)"
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="probability that winner and loser were mistaken, for robust and exo_pair alone (1; TRL: 0; "
        "robust's paper: 0.1, exo_pair's: 1e-3 and never 0)",
    )
    sdpo: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Diffusion-SDPO's mu: the loser's gradient is scaled by one lambda in each step of the optimiser, so "
        "that to first order the winners' mean error falls by at least mu of what it would without losers (1; None: off; "
        "paper: 0.9). One more forward of each row",
    )

    @field_validator("loss_type")
    @classmethod
    def _known(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        names = _names(value)
        for name in names:
            if name in REFUSED:
                raise ValueError(f"TRL's loss type {name!r} does not carry over: {REFUSED[name]}")
            if name not in LOSSES:
                raise ValueError(errors.unknown("loss type", name, LOSSES))
        if not names or len(set(names)) < len(names):
            raise ValueError("a list names at least one loss type, and none twice")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> PreferenceConfig:
        names, weights = _names(self.loss_type), self.loss_weights
        if weights is not None and (len(weights) != len(names) or min(weights) <= 0):
            raise ValueError(f"loss_weights are {len(names)} numbers > 0, one for each loss type, not {list(weights)}")
        if "exo_pair" in names and not self.label_smoothing:
            raise ValueError("exo_pair needs label_smoothing > 0 (its paper: 1e-3): at 0 it is infinite")
        if self.label_smoothing and not set(names) & set(SMOOTHED):
            raise ValueError(f"label_smoothing acts on {' and '.join(SMOOTHED)} alone, not on {', '.join(names)}")
        return self

    @property
    def losses(self) -> dict[str, float]:
        """The weight of each loss type."""
        names = _names(self.loss_type)
        return dict(zip(names, self.loss_weights or (1.0,) * len(names), strict=True))


def preference_terms(
    ratio_w: Tensor, ratio_l: Tensor, beta: float, losses: Mapping[str, float], smoothing: float
) -> Tensor:
    """The loss of each pair [B] from its log-ratios [B]."""
    terms = [weight * LOSSES[name](ratio_w, ratio_l, beta, smoothing) for name, weight in losses.items()]
    return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]


def loser_scale(scores: Callable[[Rows], tuple[Tensor, Tensor]], rows: Rows, batch: int, mu: float) -> Tensor:
    """Diffusion-SDPO's lambda = clip((1 - mu) |g_w|^2 / (g_l . g_w), 0, 1), and 1 where g_l . g_w <= 0: a scalar.

    `scores` gives for some of the rows the winners' and losers' errors [2B] (winners first; the sign does not matter)
    and the network's output [2B, ...] that they are of; g are the gradients of their sums in it, over all the rows,
    of which `batch` at a time go through the network.
    """

    def products(part: Tensor) -> tuple[Tensor, Tensor]:
        value, output = scores({name: column[part] for name, column in rows.items()})
        g_w, g_l = torch.autograd.grad(value.sum(), output)[0].chunk(2)
        return (g_l * g_w).sum().cpu(), (1 - mu) * (g_w**2).sum().cpu()

    along = limit = torch.zeros(())
    for a, b in parallel.each(products, torch.arange(len(next(iter(rows.values())))).split(batch)):
        along, limit = along + a, limit + b
    return torch.where(along > 0, (limit / along).clamp(max=1), torch.ones(()))


def scale_gradient(value: Tensor, scale: Tensor) -> Tensor:
    """The same value with `scale` times its gradient."""
    return value.detach() + scale * (value - value.detach())
