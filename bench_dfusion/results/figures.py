"""The figures of a row beside its gains, each described once: what it is, its unit, how it is made and how it is shown.

A new figure is one entry of `FIGURES`: CSV, Markdown, the published dataset and the page show it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bench_dfusion.results.leaderboard import Row

OVER, COST = "Over-optimisation", "Cost of a run"  # headings on the page


def mean(values: Iterable[float]) -> float:
    """The mean, the same in whatever order the values come; nan of none."""
    ordered = sorted(values)
    return float(np.mean(ordered)) if ordered else float("nan")


def signed(value: float) -> str:
    """A difference with its sign (a true minus) and three digits; a dash where there is none, −∞ for a miss."""
    if np.isnan(value):
        return "–"
    if np.isinf(value):
        return "−∞" if value < 0 else "∞"
    return f"{value:+.3f}".replace("-", "−")


def number(value: float, form: str) -> str:
    """A number in a format, a dash where there is none."""
    return "–" if np.isnan(value) else format(value, form)


@dataclass(frozen=True)
class Figure:
    """A number of a row.

    name      as CSV calls it; in the dataset with _ for spaces
    kind      its type there
    head      above its column in printed tables and on the page, which gathers those of one `group`
    meaning   with the unit and when there is none
    of        from a row; nan where it has none
    form      its format on the page, `signed` for differences
    short     its format in Markdown; None: not shown there
    """

    name: str
    kind: Literal["int64", "float64"]
    head: str
    group: str
    meaning: str
    of: Callable[[Row], float]
    form: str
    short: str | None

    @property
    def column(self) -> str:
        return self.name.replace(" ", "_")

    def text(self, row: Row, value: float, form: str) -> str:
        """The value as a reader sees it."""
        if self.name == "queries" and row.offline:
            return "offline"
        if self.kind == "int64" and not row.records:
            return "–"
        return signed(value) if form == "signed" else number(value, form)


def _diversity(row: Row) -> float:
    return mean(r.drift.diversity_trained / r.drift.diversity_base for r in row.finished if r.drift)


FIGURES = [
    Figure(
        "reward rise",
        "float64",
        "Reward rise",
        OVER,
        "training reward of the last round − the base's on the same prompts (old records: − the first round's); null where "
        "none are drawn",
        lambda row: mean(r.rises[-1][1] for r in row.finished if r.rises),
        "signed",
        "signed",
    ),
    Figure(
        "diversity",
        "float64",
        "Diversity",
        OVER,
        "Vendi score within a prompt, trained / base",
        _diversity,
        ".2f",
        ".2f",
    ),
    Figure(
        "kl",
        "float64",
        "KL",
        OVER,
        "mean per-step KL(trained || base) (nats)",
        lambda row: mean(r.drift.kl for r in row.finished if r.drift),
        ".4f",
        ".4f",
    ),
    Figure(
        "queries",
        "int64",
        "Queries",
        COST,
        "images the training reward scored in a run (count): the budget",
        lambda row: max((r.cost.reward_queries for r in row.records), default=0),
        ",.0f",
        ".0f",
    ),
    Figure(
        "evaluations",
        "int64",
        "Evaluations",
        COST,
        "network evaluations of a run (count): forwards of one sample",
        lambda row: max((r.cost.network_evaluations for r in row.records), default=0),
        ",.0f",
        ".0f",
    ),
    Figure(
        "seconds",
        "float64",
        "Seconds",
        COST,
        "wall time of a run, mean (s)",
        lambda row: mean(sum(r.cost.seconds.values()) for r in row.records),
        ",.0f",
        ".0f",
    ),
    Figure(
        "memory",
        "float64",
        "MB",
        COST,
        "peak memory of a run, mean (MB)",
        lambda row: mean(r.cost.peak_memory_mb for r in row.records),
        ",.0f",
        None,
    ),
]
