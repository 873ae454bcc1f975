"""bench-dfusion: which preference method aligns a text-to-image diffusion model best, at what cost, and the proof.

    import bench_dfusion
    record = bench_dfusion.run(algo="dpo", reward="clip")

The functions here have the words and the options of the command `bench-dfusion`, and do what it does. Each raises
UsageError on anything wrong, before any compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench_dfusion import _moved
from bench_dfusion.version import __version__ as __version__

if TYPE_CHECKING:
    import pandas as pd

    from bench_dfusion.results.leaderboard import Board
    from bench_dfusion.results.records import Record
    from bench_dfusion.runs.pairs import Keep
    from bench_dfusion.runs.rescore import Rescored, ScoredWeights

__all__ = ["eval", "leaderboard", "load_records", "run", "sweep"]

_moved.install()


def run(
    *,
    algo: str,
    reward: str | None = None,
    builder: str | None = None,
    pairs: str | None = None,
    track: str | Path | None = None,
    seed: int = 0,
    out: str | Path = "runs",
    device: str | None = None,
    keep_pairs: Keep | None = None,
    rung: int = 1,
    trackers: Sequence[str] = (),
    **options: Any,
) -> Record:
    """Train and evaluate one cell, or go on where it was stopped; returns its record.

    pairs       train offline on a preference dataset, by path or Hub id, in the place of `reward` and `builder`
    track       name or TOML file; None: micro-v2, with `model` paper
    out         where run directories go
    device      torch device; None: cuda where there is one
    keep_pairs  of which rounds the pairs stay, "all", "last" or "none"; None: by the pictures' size
    rung        of a track with rungs the one to end at
    trackers    experiment trackers that are shown the run: tensorboard, wandb, trackio, mlflow
    options     model, prompts, config (a TOML file), settings (a list of "SECTION.OPTION=VALUE"), teachers, as
                `bench_dfusion.runs.config.resolve` has them
    """
    from bench_dfusion.runs.config import resolve
    from bench_dfusion.runs.trainer import run_cell

    source = options.pop("track_source", track)  # the name that this option had
    cell = resolve(
        track_source=None if source is None else str(source),
        algo=algo,
        reward=reward,
        builder=builder,
        pairs=pairs,
        seed=seed,
        **options,
    )
    return run_cell(cell, Path(out), device, keep_pairs, rung=rung, tracked_by=trackers)


def sweep(
    track: str | Path,
    *,
    algo: Sequence[str],
    reward: Sequence[str],
    builder: Sequence[str] = ("dfusion", "vanilla"),
    seeds: int | None = None,
    out: str | Path = "runs",
    device: str | None = None,
    workers: int = 1,
    rung: int = 1,
    settings: Sequence[str] = (),
    model: str | None = None,
    trackers: Sequence[str] = (),
) -> list[Board]:
    """Run every algorithm × builder × reward × seed in processes of this machine; returns the boards of the track's runs.

    seeds    0 to this minus 1; None: as many as the track has
    device   torch devices, comma-separated; None: every GPU, else the CPU
    workers  cells at a time on each device
    Finished cells are skipped, stopped ones go on where they were; one that fails stops nothing and is seen in the board.
    """
    from bench_dfusion.results.leaderboard import boards
    from bench_dfusion.runs.trackers import check as check_trackers
    from bench_dfusion.sweeps import local, queue

    words = ["--track", str(track), *(["--model", model] if model is not None else [])]
    for setting in settings:
        words += ["--set", setting]
    for tracker in check_trackers(trackers):
        words += ["--tracker", tracker]
    given = {"settings": list(settings), "model": model}
    jobs, left_out = queue.plan(str(track), algo, builder, reward, seeds, Path(out), words, rung, **given)
    for reason in left_out:
        print(f"left out: {reason}")
    with local.Local(local.devices_of(device), workers) as place:
        queue.register(jobs)
        queue.Sweep(jobs, place).run()
    return boards(Path(out) / jobs[0].cell.track.id)


def eval(
    run: str | Path | None = None,
    *,
    lora: str | Path | None = None,
    checkpoint: str | Path | None = None,
    track: str | Path | None = None,
    out: str | Path = "runs",
    device: str | None = None,
    name: str | None = None,
    model: str | None = None,
    prompts: str | Path | None = None,
    settings: Sequence[str] = (),
) -> Rescored | ScoredWeights:
    """Score the weights of a finished run again and compare them with its record; or score a LoRA, or a pipeline's
    directory (`checkpoint`), that the suite did not train, on a track. Give one of `run`, `lora` and `checkpoint`."""
    from bench_dfusion.errors import UsageError
    from bench_dfusion.runs import config, rescore

    if sum(given is not None for given in (run, lora, checkpoint)) != 1:
        raise UsageError("give one of run, lora and checkpoint")
    if run is not None:
        return rescore.run(Path(run), device, model)
    on = config.resolve_track(
        None if track is None else str(track), model, None if prompts is None else Path(prompts), list(settings)
    )
    files = {"lora": lora, "checkpoint": checkpoint}
    weights = {key: None if path is None else Path(path) for key, path in files.items()}
    return rescore.score_weights(on, Path(out), **weights, name=name, device=device)[1]


def load_records(folder: str | Path = "runs") -> list[Record]:
    """Every record below a folder, by path, each checked as a table would check it."""
    from bench_dfusion.results import checks, records

    found = records.find(Path(folder))
    checks.check(found)
    return [record for _, record in found]


class _Leaderboard:
    """`bench_dfusion.leaderboard`, and what was in the module of this name before there were rooms."""

    def __call__(self, source: str | Path = "runs", *, rung: int | None = None, variants: bool = True) -> pd.DataFrame:
        """The table of the one track whose runs are below a folder, best first, as a DataFrame.

        The columns are those of `bench_dfusion.results.tables.table`. `rung`: of a track with rungs the one to compare at.
        """
        from bench_dfusion.errors import UsageError
        from bench_dfusion.results import tables
        from bench_dfusion.results.leaderboard import boards

        found = boards(Path(source))
        if len(found) != 1:
            names = ", ".join(board.track for board in found) or "no run"
            raise UsageError(f"below {source} there is {names}: give the folder of one track")
        return tables.table(found[0] if rung is None else found[0].at(rung), variants)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _moved.attribute("bench_dfusion.leaderboard", name, _moved.MOVED["leaderboard"])


leaderboard = _Leaderboard()
