"""`bench-dfusion pairs`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from bench_dfusion.cli.options import out


def export(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a finished run.")],
    folder: Annotated[
        Path | None, typer.Option("--out", help="Where the dataset goes, a new directory (default: RUN/dataset).")
    ] = None,
    rounds: Annotated[Literal["all", "last"], typer.Option(help="Every round kept, or the latest one.")] = "all",
    unpaired: Annotated[
        bool, typer.Option("--unpaired", help="TRL's unpaired format, for KTO: prompt, completion and label.")
    ] = False,
) -> None:
    """Write a run's pairs as a dataset of prompt, chosen and rejected, for datasets.load_dataset and the Hub."""
    from bench_dfusion.runs import pairs

    done = pairs.export(run_folder, folder, rounds, unpaired)
    out.print(
        f"{sum(done.pairs.values())} pairs of {len(done.pairs)} of {done.rounds} rounds in {escape(str(done.folder))}; "
        f'datasets.load_dataset("{escape(str(done.folder))}") reads them',
        soft_wrap=True,
        highlight=False,
    )
