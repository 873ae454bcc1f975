"""How often the rule of collapse would end a run whose policy has not changed: `python benchmarks/collapse.py`.

Prompts have means and standard deviations of their own; each run has 50 rounds over 66 prompts, with the rewards' tails
and the sizes of rounds named in the result. Also how soon a policy that falls by 6 standard deviations is found.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from bench_dfusion.runs.baseline import Baseline
from bench_dfusion.util import files
from bench_dfusion.util.progress import bar

ROUNDS, PROMPTS = 50, 66
# prompts and samples of a prompt in a round, the base's pictures of a prompt, lognormal spread of the prompts' standard
# deviations, degrees of freedom of a t-distribution (None: normal), fall in standard deviations from round 10 on
DESIGNS = [
    (1, 4, 1, 1.0, None, 0.0),
    (1, 4, 2, 1.0, None, 0.0),
    (1, 4, 4, 1.0, None, 0.0),
    (1, 4, 1, 2.0, None, 0.0),
    (1, 4, 4, 2.0, None, 0.0),
    (1, 4, 4, 1.0, 2, 0.0),
    (1, 16, 4, 2.0, None, 0.0),
    (4, 8, 4, 0.5, None, 6.0),
    (24, 16, 4, 0.5, None, 6.0),
]


def run(
    rng: np.random.Generator, prompts: int, samples: int, pictures: int, spread: float, tails: int | None, fall: float
):
    """(whether some round alone lay low, the number of rounds until the run was ended, 0 for never)."""
    mean, deviation = rng.normal(size=PROMPTS), np.exp(spread * rng.normal(size=PROMPTS))

    def rewards(rows: np.ndarray) -> torch.Tensor:
        noise = rng.normal(size=len(rows)) if tails is None else rng.standard_t(tails, len(rows))
        return torch.tensor(mean[rows] + deviation[rows] * noise)

    base, order, low = Baseline(), np.zeros(0, int), False
    for number in range(ROUNDS):
        if len(order) < prompts:
            order = np.concatenate([order, rng.permutation(PROMPTS)])
        chosen, order = order[:prompts], order[prompts:]
        new = np.repeat([int(p) for p in base.missing([str(p) for p in chosen])], pictures).astype(int)
        base.take([str(p) for p in new], rewards(new))
        rows = np.repeat(chosen, samples)
        drawn = rewards(rows) - (fall if number >= 10 else 0.0)
        if base.collapsed([str(p) for p in rows], drawn):
            return True, number + 1
        low |= base.low
    return low, 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000, help="simulated runs of each design")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/collapse.json"))
    given = parser.parse_args()
    lines = []
    with bar("simulate", len(DESIGNS) * given.runs) as progress:
        for design in DESIGNS:
            rng = np.random.default_rng(0)
            found = []
            for _ in range(given.runs):
                found.append(run(rng, *design))
                progress.advance()
            ended = [n for _, n in found if n]
            names = ("prompts", "samples", "pictures", "spread", "tails", "fall")
            lines.append(
                {
                    **dict(zip(names, design, strict=True)),
                    "runs": given.runs,
                    "one_low_round": sum(low for low, _ in found) / given.runs,
                    "ended": len(ended) / given.runs,
                    "ended_after_rounds": float(np.mean(ended)) if ended else None,
                }
            )
            print(lines[-1], flush=True)
    files.write_json(given.out, lines)


if __name__ == "__main__":
    main()
