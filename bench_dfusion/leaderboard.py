"""A table computed from the records of one track, and from nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from bench_dfusion import statistics
from bench_dfusion.records import Record


@dataclass
class Row:
    """One algorithm × builder × reward: its records, one a seed."""

    algorithm: str
    builder: str
    reward: str
    records: list[Record]


def rows(records: Sequence[Record]) -> list[Row]:
    """Group records by algorithm, builder and reward. Raises ValueError where configurations of a row differ."""
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.algorithm, record.builder, record.reward), []).append(record)
    result = []
    for key, own in sorted(groups.items()):
        own = sorted(own, key=lambda r: r.seed)
        options = [{k: v for k, v in r.resolved.items() if k != "seed"} for r in own]
        if any(o != options[0] for o in options):
            raise ValueError(f"the runs of {'/'.join(key)} differ in their options: keep one configuration a table")
        seeds = [r.seed for r in own]
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{'/'.join(key)} has seed {next(s for s in seeds if seeds.count(s) > 1)} twice")
        result.append(Row(*key, own))
    return result


def table(records: Sequence[Record]) -> pd.DataFrame:
    """The leaderboard of one track's records, best first; the first judge of the track ranks.

    A row trained on the ranking judge is a ceiling: shown, unranked. Below three seeds there is no rank and
    no interval of the algorithm. A failed cell counts as a miss: its row's gain is minus infinity.
    """
    hashes = {r.track_hash for r in records}
    if len(hashes) > 1:
        raise ValueError(
            f"records of {len(hashes)} different tracks never share a table: {sorted({r.track for r in records})}"
        )
    lines, gains = [], {}
    for row in rows(records):
        failed = [r for r in row.records if r.status == "failed"]
        finished = [r for r in row.records if r.status == "finished"]
        name = f"{row.algorithm}/{row.builder}/{row.reward}"
        line: dict[str, object] = {
            "algorithm": row.algorithm,
            "builder": row.builder,
            "reward": row.reward,
            "seeds": len(row.records),
            "failed": len(failed),
        }
        ceiling = bool(finished) and finished[0].verdicts[0].trained_on
        for index, verdict in enumerate(finished[0].verdicts if finished else []):
            gain = np.array([[t - b for b, t in r.verdicts[index].per_prompt] for r in finished])
            interval = statistics.paired_gain(gain)
            prefix = verdict.judge
            line[f"{prefix} base"] = float(np.mean([r.verdicts[index].base for r in finished]))
            line[f"{prefix} trained"] = float(np.mean([r.verdicts[index].trained for r in finished]))
            line[f"{prefix} gain"] = float("-inf") if failed else interval.mean
            line[f"{prefix} low"], line[f"{prefix} high"] = interval.low, interval.high
            if index == 0:
                line["interval"] = interval.kind
                if not failed and not ceiling and len(finished) >= statistics.MIN_SEEDS:
                    gains[name] = gain
        if finished:
            drifts = [r.drift for r in finished if r.drift]
            line["diversity"] = float(np.mean([d.diversity_trained / d.diversity_base for d in drifts]))
            line["kl"] = float(np.mean([d.kl for d in drifts]))
        line["queries"] = max(r.cost.reward_queries for r in row.records)
        line["seconds"] = float(np.mean([sum(r.cost.seconds.values()) for r in row.records]))
        line["note"] = _note(failed, ceiling, len(row.records))
        line["name"] = name
        lines.append(line)
    shapes = {g.shape for g in gains.values()}
    ranges = statistics.rank_ranges(gains) if len(gains) > 1 and len(shapes) == 1 else dict.fromkeys(gains, (1, 1))
    for line in lines:
        low, high = ranges.get(str(line["name"]), (None, None))
        line["rank"] = "" if low is None else str(low) if low == high else f"{low}–{high}"
    frame = pd.DataFrame(lines).drop(columns="name")
    ranking = [c for c in frame.columns if c.endswith(" gain")]
    if ranking:
        frame = frame.sort_values(ranking[0], ascending=False, kind="stable")
    return frame[["rank", *(c for c in frame.columns if c != "rank")]].reset_index(drop=True)


def _note(failed: list[Record], ceiling: bool, seeds: int) -> str:
    if failed:
        return f"miss: {len(failed)} failed"
    if ceiling:
        return "ceiling: trained on the judge"
    return "" if seeds >= statistics.MIN_SEEDS else f"checkpoint: {seeds} of {statistics.MIN_SEEDS} seeds"
