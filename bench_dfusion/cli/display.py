"""What the terminal shows of a record, of what was scored again, and of a leaderboard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench_dfusion.errors import plain
from bench_dfusion.results import leaderboard, standings, tables
from bench_dfusion.results.figures import FIGURES, signed
from bench_dfusion.results.leaderboard import Board
from bench_dfusion.results.records import Drift, Record, Verdict
from bench_dfusion.results.standings import Score
from bench_dfusion.util.progress import duration

if TYPE_CHECKING:
    from bench_dfusion.doctor import Estimate
    from bench_dfusion.publish.verify import Verified
    from bench_dfusion.results.checked_base import CheckedBase
    from bench_dfusion.results.merge import Merged
    from bench_dfusion.runs.rescore import Rescored, ScoredWeights


def record(record: Record, folder: Path, out: Console) -> None:
    """What one run says: base against trained, before every judge."""
    title = f"{record.algorithm} on {record.builder} samples, reward {record.reward}, seed {record.seed}"
    if record.status == "failed":
        out.print(f"[red]{_text(title)}: failed. {_text(record.evidence or '')}[/red]\n{_text(folder)}")
        return
    _verdicts(title, record.verdicts, out)
    c = record.cost
    queries = f"{c.reward_queries} reward queries" if c.reward_queries else "offline, no reward query"
    drift = f"{_drift(record.drift)}; " if record.drift else ""
    out.print(f"{drift}{queries}, {sum(c.seconds.values()):.0f} s, {c.peak_memory_mb:.0f} MB")
    ladder = record.resolved["track"]["budget"].get("rungs") or ()
    if record.rung is not None and record.rung < len(ladder):
        further = f"--rung {record.rung + 1} goes on to {ladder[record.rung]:,} reward queries"
        out.print(f"rung {record.rung} of {len(ladder)}: {further}", highlight=False)
    if record.untrained:
        out.print(f"[yellow]nothing was trained: {_text(record.untrained)}[/yellow]", soft_wrap=True)
    out.print("one seed is a checkpoint, not a ranking of methods: --seeds 5 for an interval over seeds", style="dim")
    weights = ("pytorch_lora_weights.safetensors", "diffusion_pytorch_model.safetensors")
    names = ("record.json", *weights, "base_trained.png", "triples.png")
    out.print(f"{_text(folder)}/: {', '.join(n for n in names if (folder / n).exists())}")


def estimate(found: Estimate, out: Console) -> None:
    """What a run needs of a device, phase by phase, whether that fits, and what to change where it does not."""
    groups = {
        "trained": ("LoRA", "trained weights", "gradients", "AdamW"),
        "activations": ("activations", "kept for the backward"),
        "margin": ("margin",),
        "other": ("process", "CUDA context", "cached embeddings", "samples of the round"),
    }
    out.print(_text(f"{found.model} on {found.device}: {found.cell}"), highlight=False, soft_wrap=True)
    sizes = [f"{name} {count / 1e6:,.1f} M" for name, count in found.parameters.items()]
    disk = sum(found.on_disk.values())
    stored = f"; {_gb(disk)} on disk" if disk else ""
    out.print(_text(f"parameters: {', '.join(sizes)}{stored}"), style="dim", soft_wrap=True)
    grid = Table(box=None, pad_edge=False)
    for column in ("phase", "peak", "weights", *groups, "time"):
        grid.add_column(column, justify="left" if column == "phase" else "right")
    for p in found.phases:
        sums = [sum(p.parts.get(part, 0) for part in parts) for parts in groups.values()]
        once = "" if p.seconds is None else ("once " if p.name == "evaluate" else "") + duration(p.seconds)
        cells = [_gb(p.peak), _gb(p.peak - sum(sums)), *(_gb(size) for size in sums), once]
        grid.add_row(p.name, *cells, style="bold" if p.name == found.peak.name else None)
    out.print(grid)
    largest = sorted(found.peak.parts.items(), key=lambda part: -part[1])
    parts = ", ".join(f"{name} {_gb(size)}" for name, size in largest if size >= 5e6)
    out.print(_text(f"peak: {found.peak.name}, {_gb(found.peak.peak)}: {parts}"), highlight=False, soft_wrap=True)
    if found.round_seconds is not None and found.rates is not None:
        ending = next(p.seconds or 0.0 for p in found.phases if p.name == "evaluate")
        whole = found.rounds * found.round_seconds + ending
        out.print(
            f"time without the reward's: {duration(found.round_seconds)} a round, {duration(whole)} for {found.rounds} "
            f"rounds and the evaluation, at {found.rates.flops / 1e12:.3g} TFLOP/s and "
            f"{found.rates.bandwidth / 1e9:.3g} GB/s measured here",
            highlight=False,
            soft_wrap=True,
        )
    else:
        out.print("time: not estimated, this device is not here to measure", highlight=False)
    for note in found.notes:
        out.print(_text(f"note: {note}"), style="dim", soft_wrap=True)
    if found.fits:
        out.print(f"[green]fits[/green]: {_gb(found.peak.peak)} of {_gb(found.available)}", highlight=False)
        return
    out.print(f"[red]does not fit[/red]: {_gb(found.peak.peak)} of {_gb(found.available)}", highlight=False)
    changes = Table(box=None, pad_edge=False)
    for column in ("change", "saves", "peak then", "costs"):
        changes.add_column(
            column, justify="right" if column in ("saves", "peak then") else "left", no_wrap=column == "change"
        )
    for c in found.changes:
        changes.add_row(_text(_set(c.settings)), _gb(c.saves), _gb(c.peak), c.note)
    out.print(changes)
    if found.smallest is None:
        out.print("all of these together do not fit: a smaller model or a larger device", highlight=False)
        return
    what = f"the smallest set that fits, {_gb(found.smallest_peak or 0)}: {_set(found.smallest)}"
    out.print(_text(what), highlight=False, soft_wrap=True)


def _set(settings: Mapping[str, object]) -> str:
    return " ".join(f"--set track.{name}={str(value).lower()}" for name, value in settings.items())


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def base(path: Path, found: CheckedBase, again: CheckedBase | None, out: Console) -> None:
    """A track's checked base, beside one drawn anew."""
    k = next(iter(found.scores.values())).shape[1]
    grid = Table(title=_text(f"{len(found.prompts)} held-out prompts × {k} pictures"), title_justify="left")
    for column in ("judge", "base", *(("drawn anew", "scores that differ") if again else ())):
        grid.add_column(column, justify="left" if column == "judge" else "right")
    for name, scores in found.scores.items():
        other = again.scores[name] if again else scores
        more = [f"{other.mean():.4f}", f"{(scores != other).sum()} of {scores.size}"] if again else []
        grid.add_row(escape(name), f"{scores.mean():.4f}", *more)
    out.print(grid)
    out.print(_text(f"{path}: checked base {found.sha256[:12]}…"), soft_wrap=True, highlight=False)
    if again is not None:
        same = "the same to the last bit" if again.sha256 == found.sha256 else "drawn otherwise: see the table"
        out.print(_text(same), highlight=False)


def evaluation(found: ScoredWeights, folder: Path, out: Console) -> None:
    """What the judges say of weights that the suite did not train."""
    shape = f", rank {found.lora.rank}, alpha {found.lora.alpha:g}" if found.lora else ""
    _verdicts(f"{found.label} ({found.kind}{shape}) on {found.track}", found.verdicts, out)
    out.print(f"{_drift(found.drift)}; {found.seconds:.0f} s, {found.peak_memory_mb:.0f} MB")
    note = "a checkpoint result, never ranked; a judge that it was trained on, which is not known here, is a ceiling"
    out.print(note, style="dim")
    out.print(f"{_text(folder)}/: evaluation.json, base_trained.png", soft_wrap=True)


def rescored(found: Rescored, folder: Path, out: Console, most: int = 12) -> None:
    """Whether a run, scored again, matches its record, and what does not, the largest first."""
    if found.provenance:
        out.print(_text(f"{folder} is not what its record says; nothing was drawn:"), style="red", soft_wrap=True)
        for line in found.provenance:
            out.print(_text(f"- {line}"), soft_wrap=True, highlight=False)
        return
    prompts = len(found.verdicts[0].per_prompt)
    what = f"{len(found.verdicts)} judges, {prompts} prompts, base and trained"
    size = "every figure to the last bit"
    if not found.exact:
        size = "largest difference of a prompt's score: " + ", ".join(f"{j} {v:.2g}" for j, v in found.largest.items())
    out.print(_text(f"{folder} {found.status}: {what}; {size}"), soft_wrap=True, highlight=False)
    if found.differences:
        grid = Table(box=None, pad_edge=False)
        for column in ("judge", "figure", "record", "now", "difference", "tolerance"):
            grid.add_column(column, justify="left" if column in ("judge", "figure") else "right", overflow="fold")
        ordered = sorted(found.differences, key=lambda d: -d.size / d.tolerance if d.tolerance else -np.inf)
        for d in ordered[:most]:
            numbers = (f"{v:.6g}" for v in (d.recorded, d.found, d.found - d.recorded, d.tolerance))
            grid.add_row(_text(d.judge), _text(d.what), *numbers)
        out.print(grid)
        if len(ordered) > most:
            out.print(f"and {len(ordered) - most} more", style="dim")
        for old, new in zip(found.record.verdicts, found.verdicts, strict=True):
            interval = f"{signed(new.gain.low)} to {signed(new.gain.high)}"
            gains = f"{signed(old.gain.mean)} in the record, {signed(new.gain.mean)} ({interval}) now"
            out.print(_text(f"{new.judge} gain: {gains}"), highlight=False)
    if not found.exact:
        for line in found.elsewhere:
            out.print(_text(line), style="dim", soft_wrap=True)


def _verdicts(title: str, verdicts: Sequence[Verdict], out: Console) -> None:
    grid = Table(title=_text(f"{title}: {len(verdicts[0].per_prompt)} held-out prompts"), title_justify="left")
    for column in ("judge", "base", "trained", "gain", "95 % (prompts)", ""):
        grid.add_column(column, justify="left" if column in ("judge", "") else "right")
    for v in verdicts:
        note = "training reward" if v.trained_on else ""
        grid.add_row(
            _text(v.judge),
            f"{v.base:.3f}",
            f"{v.trained:.3f}",
            signed(v.gain.mean),
            f"{signed(v.gain.low)} to {signed(v.gain.high)}",
            note,
        )
        for template, (base, trained) in v.templates.items():
            if len(v.templates) > 1:
                grid.add_row(
                    f"  {_text(template)}", f"{base:.3f}", f"{trained:.3f}", signed(trained - base), "", style="dim"
                )
    out.print(grid)


def _drift(d: Drift) -> str:
    diversity = f"diversity {d.diversity_base:.2f} → {d.diversity_trained:.2f} effective images"
    return f"{diversity}, drift {d.pixels:.1f} levels, KL {d.kl:.4f}"


def wins(board: Board, out: Console) -> None:
    """Pairwise win rates: how often the row's policy beats the column's, in %."""
    frame = standings.win_rates(board)
    judge = board.judges[0] if board.judges else "no judge yet"
    title = f"{board.track}: wins of a row over a column before {judge}, % of prompts and shared seeds, ties half"
    out.print(f"[italic]{_text(title)}", highlight=False)
    cells = [["–" if np.isnan(v) else f"{100 * v:.0f}" for v in values] for values in frame.to_numpy()]
    digits = max(map(len, [str(len(cells)), *(c for line in cells for c in line)]))
    named = min(max(map(len, frame.index), default=0), out.width // 2)  # longer names fold
    fit = max((out.width - named - digits - 2) // (digits + 1), 1)
    for first in range(0, len(cells), fit):  # the columns in blocks that fit the terminal
        block = range(first, min(first + fit, len(cells)))
        grid = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
        grid.add_column("", justify="right", no_wrap=True)
        grid.add_column("", overflow="fold", max_width=named)
        for column in block:
            grid.add_column(str(column + 1), justify="right", no_wrap=True)
        for number, (name, line) in enumerate(zip(frame.index, cells, strict=True), 1):
            grid.add_row(str(number), _text(name), *(line[column] for column in block))
        if first:
            out.print()
        out.print(grid)


def board(board: Board, out: Console, variants: bool = False) -> None:
    """The table of a track and the effect of D-Fusion, in 80 columns; `leaderboard --csv` has every column."""
    lines, judges = standings.lines(board, variants), board.judges
    place = f", {board.place}" if board.place else ""
    out.print(f"[italic]{_text(board.track)}  ({board.track_hash[:12]}){place}", highlight=False, soft_wrap=True)
    grid = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    grid.add_column("rank", no_wrap=True)
    grid.add_column("algorithm\nbuilder, reward", no_wrap=True)
    for column in ("seeds", *("\n".join([*_text(j).split(":"), "gain"]) for j in judges), "queries"):
        grid.add_column(column, justify="right", no_wrap=True)
    queries = next(figure for figure in FIGURES if figure.name == "queries")
    for line in lines:
        row = line.row
        gains = [signed(score.gain) for score in line.scores]
        if gains:  # the judge that ranks shows its interval
            gains[0] = escape("\n".join(_gain(line.scores[0])))
        reward = _text(row.reward).replace("+", "+\n  ")  # a weighted sum takes a line for each component
        name = [_text(row.algorithm), f"{_text(row.builder)}, {reward}", *([_text(row.label)] if row.label else [])]
        seeds = f"{line.seeds}/{line.seeds + line.missing}" if line.missing else str(line.seeds)
        spent = queries.text(row, line.figures[queries.name], ".0f")
        grid.add_row(line.place, "\n".join(name), seeds, *gains, spent)
    out.print(grid)
    for note in dict.fromkeys(line.note for line in lines):
        if note:
            out.print(_text(note), style="dim")
    for text in tables.remarks(board, lines, variants):
        out.print(_text(text), style="yellow", soft_wrap=True, highlight=False)
    for row in leaderboard.rows(board):
        for cell in row.unfinished:
            if cell.error:
                out.print(f"{_text(row.name)}, seed {cell.seed}: {_text(cell.error)}", style="red")
    _by_rung(board, out, variants)
    effect = standings.contrasts(board)
    if effect:
        out.print()
        title = f"D-Fusion's effect on {_text(judges[0])}: dfusion − vanilla, paired; p after Holm"
        out.print(f"[italic]{title}", highlight=False)
        grid = Table(box=None, pad_edge=False)
        for column in ("algorithm", "reward", "seeds", "difference", "p"):
            grid.add_column(column, justify="left" if column in ("algorithm", "reward") else "right")
        for c in effect:
            words = (c.algorithm, c.reward, c.seeds, tables.difference_text(c), f"{c.holm:.3f}")
            grid.add_row(*(_text(w) for w in words))
        out.print(grid)


def _gain(score: Score) -> list[str]:
    """A gain, and where it is finite its interval, for lines of their own."""
    interval = [tables.interval_text(score.low, score.high)] if np.isfinite(score.gain) else []
    return [signed(score.gain), *interval]


def _by_rung(board: Board, out: Console, variants: bool) -> None:
    climbs = standings.climbs(board, variants)
    if not climbs:
        return
    out.print(f"\n[italic]{_text(board.judges[0])} gain at each rung, by its reward queries", highlight=False)
    grid = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    grid.add_column("algorithm\nbuilder, reward", no_wrap=True)
    for budget in board.ladder:
        grid.add_column(f"{budget:,}\nrank", justify="right", no_wrap=True)
    for climb in climbs:
        name = [climb.algorithm, f"{climb.builder}, {climb.reward}", climb.label]
        cells = []
        for line in climb.at:
            gain = _gain(line.scores[0]) if line and line.scores else ["–"]
            cells.append("\n".join([*gain, *([str(line.rank)] if line and line.rank else [])]))
        grid.add_row("\n".join(_text(t) for t in name if t), *map(escape, cells))
    out.print(grid)


def merged(done: Merged, into: Path, out: Console) -> None:
    """What a merge added, and why it refused what it did not."""
    for _, place in done.added:
        out.print(f"{'added' if done.written else 'new'}  {_text(place)}", soft_wrap=True, highlight=False)
    for source, reason in done.refused:
        out.print(f"[red]refused[/red]  {_text(f'{source}: {reason}')}", soft_wrap=True, highlight=False)
    verb = "added" if done.written else "to add"
    loras = f" ({done.loras} with their LoRA)" if done.loras else ""
    counts = f"{len(done.added)} {verb}{loras}, {len(done.present)} there already, {len(done.refused)} refused"
    ending = "" if done.written or not done.added else "; nothing written"
    out.print(f"{_text(into)}: {counts}{ending}", soft_wrap=True, highlight=False)


STATUS_STYLE = {"matches": "green", "within rounding": "green", "differs": "red", "cannot be verified": "dim"}


def verified(done: Sequence[Verified], out: Console) -> None:
    """Of each record that was looked at again whether it holds, and why not."""
    grid = Table(box=None, pad_edge=False)
    for column in ("record", "how", "result", ""):
        grid.add_column(column, overflow="fold", no_wrap=column in ("how", "result"))
    for v in done:
        grid.add_row(_text(v.record.name), v.how, f"[{STATUS_STYLE[v.status]}]{v.status}", _text(v.detail))
    out.print(grid)


def _text(value: object) -> str:
    """What records and paths say, as text alone: no markup, no control characters."""
    return escape(plain(value))
