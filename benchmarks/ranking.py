"""Simulations behind intervals and ranks: `python benchmarks/ranking.py [--quick]`; docs/statistics.md has the figures.

Rows, seeds, prompts and pictures are drawn from one model, whose sizes are estimated from the records of
leaderboards/micro-v1. On the same tables: how often each of several ranking procedures separates rows that are equal,
how much it separates of rows that are not, how often the interval of a gain holds the truth, and what the control
variate saves.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from bench_dfusion.results import leaderboard, statistics
from bench_dfusion.util import progress

RESULTS = Path(__file__).parent / "results" / "ranking.json"
RECORDS = Path(__file__).parent.parent / "leaderboards"
DRAWS = 999  # gives a p-value near .05 to within .007, without bias
SEED = 0
Rng = np.random.Generator


# --- the model


@dataclass(frozen=True)
class Model:
    """Standard deviations of one mean gain's parts, in the judge's unit.

    gain of (row, seed, prompt) = seed + prompt + row × prompt + seed × prompt + (noise of K pictures) / √K. A picture's
    noise has a part that all rows share, one that the seeds of a row share, and one of the run: the evaluation's noise is
    the same for all.
    """

    seed: float
    seed_df: float | None = (
        None  # a row's seed variance is seed² · (df − 2) / χ²(df): the smaller, the less alike rows are
    )
    prompt: float = 0.014
    row_prompt: float = 0.014
    seed_prompt: float = 0.01
    picture: float = 0.0  # shared by all rows
    row_picture: float = 0.0  # shared by a row's seeds
    run_picture: float = 0.0
    pictures: int = 4
    shape: str = "normal"  # of the seed effects


def components(tables: np.ndarray) -> dict[str, float]:
    """Standard deviations of the parts of gains [R, S, P] by analysis of variance, negative variances taken as 0."""
    rows, seeds, prompts = tables.shape
    cell = tables - tables.mean((1, 2), keepdims=True)
    by_seed, by_prompt = cell.mean(2, keepdims=True), cell.mean(1, keepdims=True)
    common = by_prompt.mean(0)
    residual = float(((cell - by_seed - by_prompt) ** 2).sum()) / (rows * (seeds - 1) * (prompts - 1))
    interaction = seeds * float(((by_prompt - common) ** 2).sum()) / ((rows - 1) * (prompts - 1))
    prompt = rows * seeds * float((common**2).sum()) / (prompts - 1)
    seed = prompts * float((by_seed**2).sum()) / (rows * (seeds - 1))
    variances = {
        "seed": (seed - residual) / prompts,
        "prompt": (prompt - interaction) / (rows * seeds),
        "row_prompt": (interaction - residual) / seeds,
        "seed_prompt": residual,
    }
    return {name: max(0.0, variance) ** 0.5 for name, variance in variances.items()}


def record_like(tables: np.ndarray, pictures: int = 4) -> Model:
    """The model of records [R, S, P] whose prompts had that many pictures: all but the true parts is their noise."""
    found = components(tables)
    _, df = statistics.moderated_variances(tables.mean(2).var(1, ddof=1), tables.shape[1] - 1)
    true = Model(found["seed"], df - (tables.shape[1] - 1))
    noise = [
        (pictures * (found[n] ** 2 - getattr(true, n) ** 2)) ** 0.5 for n in ("prompt", "row_prompt", "seed_prompt")
    ]
    return replace(true, picture=noise[0], row_picture=noise[1], run_picture=noise[2], pictures=pictures)


def draw(model: Model, rng: Rng, rows: int, seeds: int, prompts: int) -> np.ndarray:
    """Gains [R, S, P] of rows that are equal."""
    spread = np.full(rows, model.seed)
    if model.seed_df is not None:
        spread *= np.sqrt((model.seed_df - 2) / rng.chisquare(model.seed_df, rows))
    if model.shape == "two wild rows":
        spread[:2] *= 10
    if model.shape == "half of the rows wild":
        spread[: rows // 2] *= 5
    effects = rng.standard_normal((rows, seeds))
    if model.shape in ("t", "collapsing"):
        effects = rng.standard_t(3, (rows, seeds)) / np.sqrt(3)
    if model.shape == "collapsing":
        effects -= 10 * ((rng.random((rows, seeds)) < 0.05) - 0.05)  # zero on average, as all are
    if model.shape == "lognormal":
        effects = np.exp(effects) - np.exp(0.5)

    def part(true: float, noise: float, *shape: int) -> np.ndarray:
        return np.hypot(true, noise / np.sqrt(model.pictures)) * rng.standard_normal(shape)

    return (
        (effects * spread[:, None])[:, :, None]
        + part(model.prompt, model.picture, 1, 1, prompts)
        + part(model.row_prompt, model.row_picture, rows, 1, prompts)
        + part(model.seed_prompt, model.run_picture, rows, seeds, prompts)
    )


def designs(records: Model) -> dict[str, Model]:
    """The four in which the chance of a false separation is to hold."""
    noiseless = replace(records, picture=0.0, row_picture=0.0, run_picture=0.0)
    return {
        "record-like": records,
        "seeds dominate": replace(records, seed=0.04, seed_df=None),
        "picture noise removed": noiseless,
        "heavy tails, collapsing seeds": replace(records, seed=0.01, shape="collapsing"),
    }


def harder(records: Model) -> dict[str, Model]:
    """Others that a table may be like."""
    return {
        "16 pictures": replace(records, pictures=16),
        "seeds dominate, rows unlike": replace(records, seed=0.04, seed_df=4.0),
        "heavy tails": replace(records, seed=0.02, seed_df=None, shape="t"),
        "skewed seeds": replace(records, seed=0.02, seed_df=None, shape="lognormal"),
        "two wild rows": replace(records, seed_df=None, shape="two wild rows"),
        "half of the rows wild": replace(records, seed_df=None, shape="half of the rows wild"),
    }


# --- ranking procedures: tables [R, S, P] to adjusted p-values [R, R]


def _pairs(tables: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of each pair (i < j): i, j, difference, and the terms of seeds, prompts and residuals of its paired variance."""
    rows, seeds, prompts = tables.shape
    i, j = np.triu_indices(rows, 1)
    gains, by_seed, by_prompt = tables.mean((1, 2)), tables.mean(2), tables.mean(1)
    residual = tables - by_seed[:, :, None] - by_prompt[:, None] + gains[:, None, None]

    def of_difference(values: np.ndarray, df: int) -> np.ndarray:
        products = values @ values.T / df
        return products[i, i] + products[j, j] - 2 * products[i, j]

    return (
        i,
        j,
        gains[i] - gains[j],
        of_difference(by_seed - gains[:, None], seeds - 1) / seeds,
        of_difference(by_prompt - gains[:, None], prompts - 1) / prompts,
        of_difference(residual.reshape(rows, -1), (seeds - 1) * (prompts - 1)) / (seeds * prompts),
    )


def _square(rows: int, i: np.ndarray, j: np.ndarray, p: np.ndarray) -> np.ndarray:
    result = np.ones((rows, rows))
    result[i, j] = result[j, i] = p
    return result


def holm_two_way(tables: np.ndarray, df: str = "satterthwaite") -> np.ndarray:
    """Holm over pairwise two-way t: what ranked before. `df="seeds"`: on the seeds' degrees of freedom alone."""
    rows, seeds, prompts = tables.shape
    i, j, difference, seed, prompt, shared = _pairs(tables)
    variance = np.maximum(seed + prompt - shared, np.maximum(seed, prompt))
    freedom = 1 / ((seed / variance) ** 2 / (seeds - 1) + (prompt / variance) ** 2 / (prompts - 1))
    tails = freedom if df == "satterthwaite" else seeds - 1
    return _square(rows, i, j, statistics.holm(2 * stats.t.sf(np.abs(difference) / np.sqrt(variance), tails)))


def tukey_pooled(tables: np.ndarray) -> np.ndarray:
    """Tukey's studentised range, the seed variance pooled over rows, the prompts' pair by pair."""
    rows, seeds, prompts = tables.shape
    i, j, difference, _, prompt, shared = _pairs(tables)
    seed = 2 * tables.mean(2).var(1, ddof=1).mean() / seeds
    variance = np.maximum(seed + prompt - shared, np.maximum(seed, prompt))
    freedom = 1 / ((seed / variance) ** 2 / (rows * (seeds - 1)) + (prompt / variance) ** 2 / (prompts - 1))
    q = np.sqrt(2) * np.abs(difference) / np.sqrt(variance)
    # The range's distribution by draws, at the pairs' mean degrees of freedom: by integration it takes seconds.
    rng, df = np.random.default_rng(SEED), float(np.mean(freedom))
    ranges = np.sort(np.ptp(rng.standard_normal((DRAWS, rows)), axis=1) / np.sqrt(rng.chisquare(df, DRAWS) / df))
    return _square(rows, i, j, (DRAWS - np.searchsorted(ranges, q) + 1) / (DRAWS + 1))


def resampled_max_t(tables: np.ndarray, draws: int = DRAWS) -> np.ndarray:
    """Step-down max-t: seeds resampled from the residuals of all rows, prompts resampled whole, variance pooled."""
    rows, seeds, prompts = tables.shape
    rng = np.random.default_rng(SEED)
    i, j, difference, _, prompt, shared = _pairs(tables)
    by_seed, gains = tables.mean(2), tables.mean((1, 2))
    seed = 2 * by_seed.var(1, ddof=1).mean() / seeds
    t = np.abs(difference) / np.sqrt(np.maximum(seed + prompt - shared, np.maximum(seed, prompt)))
    effects = ((by_seed - gains[:, None]) * np.sqrt(seeds / (seeds - 1))).ravel()
    drawn = effects[rng.integers(0, len(effects), (draws, rows, seeds))]
    weights = rng.multinomial(prompts, np.full(prompts, 1 / prompts), draws) / prompts
    errors = drawn.mean(2) + weights @ (tables.mean(1) - gains[:, None]).T
    spread = np.sqrt(2 * drawn.var(2, ddof=1).mean(1)[:, None] / seeds + prompt)
    order = np.argsort(t)
    ratios = np.abs(errors[:, i[order]] - errors[:, j[order]]) / spread[:, order]
    as_far = (np.maximum.accumulate(ratios, axis=1) >= t[order]).sum(0)
    p = np.maximum.accumulate(((as_far + 1) / (draws + 1))[::-1])[::-1]
    return _square(rows, i[order], j[order], p)


def moderated_holm(tables: np.ndarray) -> np.ndarray:
    """Holm over pairwise t with the seed variances that `statistics.separation` moderates, on Satterthwaite's tails."""
    rows, seeds, prompts = tables.shape
    i, j, difference, _, prompt, shared = _pairs(tables)
    variances, df = statistics.moderated_variances(tables.mean(2).var(1, ddof=1), seeds - 1)
    each = variances / seeds
    seed = each[i] + each[j]
    variance = np.maximum(seed + prompt - shared, np.maximum(seed, prompt))
    freedom = variance**2 / ((each[i] ** 2 + each[j] ** 2) / df + prompt**2 / (prompts - 1))
    return _square(rows, i, j, statistics.holm(2 * stats.t.sf(np.abs(difference) / np.sqrt(variance), freedom)))


def chosen(tables: np.ndarray) -> np.ndarray:
    return statistics.separation(tables, DRAWS)


PROCEDURES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Holm, two-way t (before)": holm_two_way,
    "Holm, t on S − 1 degrees of freedom": lambda tables: holm_two_way(tables, "seeds"),
    "Tukey, pooled seed variance": tukey_pooled,
    "resampled max-t, pooled": resampled_max_t,
    "Holm, moderated seed variance": moderated_holm,
    "moderated max-t (chosen)": chosen,
}


# --- what is measured


def false_separations(
    model: Model, rows: int, seeds: int, prompts: int, names: list[str], runs: int, advance: Callable[[], None]
) -> dict[str, float]:
    """The share of tables of equal rows in which a procedure separates any pair at .05."""
    found = dict.fromkeys(names, 0)
    rng = np.random.default_rng(SEED)
    for _ in range(runs):
        tables = draw(model, rng, rows, seeds, prompts)
        for name in names:
            found[name] += bool((PROCEDURES[name](tables) <= 0.05).any())
        advance()
    return {name: count / runs for name, count in found.items()}


def power(
    model: Model,
    effects: np.ndarray,
    seeds: int,
    prompts: int,
    names: list[str],
    runs: int,
    advance: Callable[[], None],
) -> dict[str, float]:
    """The share of unequal pairs that a procedure separates at .05 in the right order, for rows of these true gains."""
    found = dict.fromkeys(names, 0.0)
    rng = np.random.default_rng(SEED + 1)
    true = effects[:, None] - effects
    for _ in range(runs):
        tables = draw(model, rng, len(effects), seeds, prompts) + effects[:, None, None]
        gains = tables.mean((1, 2))
        right = (true * (gains[:, None] - gains)) > 0
        for name in names:
            found[name] += ((PROCEDURES[name](tables) <= 0.05) & right).sum() / (true != 0).sum()
        advance()
    return {name: total / runs for name, total in found.items()}


def coverage(
    model: Model, seeds: int, prompts: int, each: int, runs: int, advance: Callable[[], None]
) -> dict[str, float]:
    """How often the interval of a row's gain holds the truth. With `each` over 1 the prompts are that many phrasings of a
    composition, which share an effect of sd .03: by the compositions' labels, and as if the prompts were independent."""
    rng = np.random.default_rng(SEED + 2)
    labels = np.repeat(np.arange(prompts // each), each)
    given = {"interval": None} if each == 1 else {"labels": labels.tolist(), "no labels": None}
    held = dict.fromkeys(given, 0)
    for _ in range(runs):
        table = draw(model, rng, 1, seeds, prompts)[0]
        if each > 1:
            table = table + 0.03 * rng.standard_normal(prompts // each)[labels]
        for name, clusters in given.items():
            interval = statistics.paired_gain(table, clusters=clusters)
            held[name] += interval.low <= 0 <= interval.high
        advance()
    return {name: count / runs for name, count in held.items()}


@dataclass(frozen=True)
class Pictures:
    """Scores of single pictures: sd within a prompt, and the correlation, on one noise, of base and trained and of a row's
    seeds. Where `bounded`, scores before the gain are clipped to [0, 1]: skewed, and with another slope for each prompt."""

    sd: float
    with_base: float = 0.66
    of_seeds: float = 0.79
    seed: float = 0.008
    prompt: float = 0.02
    seed_prompt: float = 0.01
    difficulty: float = 0.15
    bounded: bool = False


def draw_pictures(
    model: Pictures, rng: Rng, seeds: int, prompts: int, base: int, trained: int, truth: float
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of base [P, K₀] and trained [S, P, K] pictures, on noise that all seeds share."""

    def unit(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape)

    common = np.sqrt(model.with_base) * unit(prompts, base)
    of_row = np.sqrt(model.of_seeds - model.with_base) * unit(prompts, trained)
    of_run = np.sqrt(1 - model.of_seeds) * unit(seeds, prompts, trained)
    level = 0.58 + model.difficulty * unit(prompts, 1)
    x = level + model.sd * (common + np.sqrt(1 - model.with_base) * unit(prompts, base))
    y = level + model.sd * (common[:, :trained] + of_row + of_run)
    if model.bounded:
        x, y = np.clip(x, 0, 1), np.clip(y, 0, 1)
    effects = model.seed * unit(seeds, 1) + model.prompt * unit(prompts) + model.seed_prompt * unit(seeds, prompts)
    return x, y + (truth + effects)[:, :, None]


def control_variate(
    model: Pictures, seeds: int, prompts: int, runs: int, advance: Callable[[], None]
) -> dict[str, dict[str, float]]:
    """Coverage and mean half-width of the gain's interval, by how the gain is taken from the pictures."""
    rng = np.random.default_rng(SEED + 3)
    truth = 0.03
    ways = ("4 on 4 pictures", "16 on the base's first 16", "16 on 64, adjusted", "16 on 64, unadjusted")
    held, widths, slopes = dict.fromkeys(ways, 0), dict.fromkeys(ways, 0.0), []
    for _ in range(runs):
        x, y = draw_pictures(model, rng, seeds, prompts, 64, 16, truth)
        adjusted = [statistics.adjusted_gains(x, run[None]) for run in y]  # as records hold it: each run by itself
        slopes += [run.slope for run in adjusted]
        tables = (
            y[:, :, :4].mean(2) - x[:, :4].mean(1),
            y.mean(2) - x[:, :16].mean(1),
            np.concatenate([run.table for run in adjusted]),
            y.mean(2) - x.mean(1),
        )
        for way, table in zip(ways, tables, strict=True):
            interval = statistics.paired_gain(table)
            held[way] += interval.low <= truth <= interval.high
            widths[way] += (interval.high - interval.low) / 2
        advance()
    return {
        "coverage": {w: held[w] / runs for w in ways},
        "half width": {w: widths[w] / runs for w in ways},
        "slope": {"mean": float(np.mean(slopes)), "sd": float(np.std(slopes))},
    }


# --- the command


def ranked() -> np.ndarray:
    """The gains [R, S, P] of micro-v1's rows that have a rank."""
    (board,) = leaderboard.boards(RECORDS)
    rows = [row for row in leaderboard.rows(board) if not row.state]
    return np.stack([[gains for _, gains in sorted(row.gains().items())] for row in rows])


def simulate(scale: float, only: str = "", rows: int = 24, prompts: int = 64) -> dict[str, Any]:
    """All of it, or the tables whose title begins with `only`, with `scale` times the full numbers of runs: a figure by
    table, design and procedure."""
    tables = ranked()
    records, effects = record_like(tables), tables.mean((1, 2))
    main, more, every, own = designs(records), harder(records), list(PROCEDURES), [list(PROCEDURES)[-1]]
    noise = records.picture**2 + records.row_picture**2 + records.run_picture**2
    pictures = Pictures(float(np.sqrt(noise / (2 * (1 - Pictures.with_base)))))
    # Table, line of it, runs, milliseconds of a run, what to compute.
    jobs: list[tuple[str, str, int, float, Callable[[int, Callable[[], None]], dict[str, Any]]]] = []
    for name, model in main.items():
        for seeds, full in ((5, 500), (3, 200)):
            title = f"false separations, {rows} equal rows, {seeds} seeds"
            jobs.append((title, name, full, 50, partial(false_separations, model, rows, seeds, prompts, every)))
    for name, model in (main | {"16 pictures": more["16 pictures"]}).items():
        title = f"power, {rows} rows as far apart as micro-v1's, 5 seeds"
        jobs.append((title, name, 100, 50, partial(power, model, effects, 5, prompts, every)))
    for count, seeds in ((rows, 5), (rows, 10), (rows, 3), (4, 5)):
        title = f"false separations of the chosen procedure, {count} equal rows, {seeds} seeds"
        for name, model in (main | more).items():
            full = 2_000 if (count, seeds) == (rows, 5) and name in main else 500
            jobs.append((title, name, full, 0.4 * count, partial(false_separations, model, count, seeds, prompts, own)))
    for name, model in main.items():
        for seeds in (3, 5, 10):
            job = partial(coverage, model, seeds, prompts, 1)
            jobs.append((f"coverage of a gain's interval, {seeds} seeds", name, 4_000, 0.6, job))
        job = partial(coverage, model, 5, prompts, 4)
        jobs.append(("coverage with four phrasings a composition, 5 seeds", name, 4_000, 1.2, job))
    for name, judge in (("normal scores", pictures), ("scores clipped to [0, 1]", replace(pictures, bounded=True))):
        jobs.append(("control variate, 5 seeds", name, 4_000, 2.7, partial(control_variate, judge, 5, prompts)))

    jobs = [job for job in jobs if job[0].startswith(only)]

    def runs(full: int) -> int:
        return max(10, round(full * scale))

    result: dict[str, Any] = {
        "rows": rows,
        "prompts": prompts,
        "records": components(tables),
        "designs": {name: asdict(model) for name, model in (main | more).items()},
        "pictures": asdict(pictures),
    }
    with progress.bar("simulations", sum(runs(full) * cost for _, _, full, cost, _ in jobs)) as bar:
        for title, name, full, cost, job in jobs:
            figures = job(runs(full), partial(bar.advance, cost, name))
            result.setdefault(title, {})[name] = {"runs": runs(full), **figures}
    return result


def markdown(result: dict[str, Any]) -> str:
    """The figures of `simulate` as tables, a line for each design."""
    text = []
    for title, lines in result.items():
        if ", " not in title and "coverage" not in title:
            continue  # a setting, no table
        columns: list[tuple[str, ...]] = []
        for line in lines.values():
            columns += [c for c in _columns(line) if c not in columns]
        text += ["", f"**{title[0].upper()}{title[1:]}**", ""]
        text += ["| design | " + " | ".join(": ".join(c) for c in columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for name, line in lines.items():
            text.append(f"| {name} | " + " | ".join(_figure(line, c) for c in columns) + " |")
    return "\n".join(text[1:]) + "\n"


def _columns(line: dict[str, Any]) -> list[tuple[str, ...]]:
    return [c for k, v in line.items() for c in ([(k, n) for n in v] if isinstance(v, dict) else [(k,)])]


def _figure(line: dict[str, Any], column: tuple[str, ...]) -> str:
    value: Any = line
    for key in column:
        value = value[key]
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if column[0] == "half width" else f"{value:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a twentieth of the runs: a minute or two")
    parser.add_argument(
        "--only", metavar="TABLE", help="simulate the tables whose title begins so, and keep the others"
    )
    parser.add_argument("--out", type=Path, help="the JSON file (default: results/ranking.json)")
    parser.add_argument("--tables", action="store_true", help="print the file's figures as Markdown, simulate nothing")
    arguments = parser.parse_args()
    if arguments.tables:
        print(markdown(json.loads((arguments.out or RESULTS).read_text(encoding="utf-8"))), end="")
        return
    import measuring  # here, for it imports PyTorch, and the simulations need none

    kept = json.loads((arguments.out or RESULTS).read_text(encoding="utf-8")) if arguments.only else {}
    found = simulate(0.05 if arguments.quick else 1.0, arguments.only or "")
    measuring.write("ranking", kept | found, arguments.out)


if __name__ == "__main__":
    main()
