"""What the loop keeps of each round's pairs, and their export as a preference dataset.

After a round the loop writes its pairs to RUN/pairs/round-NNN.parquet, pictures as PNG: exactly what the reward
scored. Drawing them again would need every round's weights, as much compute as sampling did and the same hardware to
come out the same. A file is whole or absent and named by its round, so a round that a kill made run twice is there
once. What it takes: 64² pictures 2 MB a round, 512² about 0.3 GB (640 pictures). By default every round is kept
where pictures are small (`SMALL`), else the last one (`--keep-pairs`); nothing else of a run depends on it.

`export` copies those files beside a README that declares every column: `datasets.load_dataset(DIR)` reads the
directory, and so does the Hub, and `builders.preference_data` reads it again.
"""

from __future__ import annotations

import io
import math
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from torch import Tensor

from bench_dfusion.builders.contract import ConsistentSamples
from bench_dfusion.builders.preference_data import SCORES, SIDES
from bench_dfusion.errors import UsageError
from bench_dfusion.results import records
from bench_dfusion.results.records import Record
from bench_dfusion.util import files

Keep = Literal["all", "last", "none"]
Rounds = Literal["all", "last"]

SMALL = 128  # px: pictures up to this side are kept of every round unless the user says otherwise
GROUP = 50e6  # bytes of one row group at most: the Hub's viewer reads one at a time

# name: (dtype as `datasets` writes it, meaning)
COLUMNS = {
    "prompt": ("string", "the prompt of both pictures"),
    "chosen": ("image", "the winner's picture (PNG)"),
    "rejected": ("image", "the loser's picture (PNG)"),
    "chosen_score": ("float32", "the winner's training reward"),
    "rejected_score": ("float32", "the loser's training reward"),
    "chosen_seed": (
        "int64",
        "seed of the winner's noise; a fused winner has its base's, the rejected picture's; a branch takes from its own "
        "only what comes after the branch point",
    ),
    "rejected_seed": ("int64", "seed of the loser's noise, likewise"),
    "reward": ("string", "the training reward that scored both"),
    "round": ("int64", "the round of the run it is from, 0 drawn from the untrained policy"),
    "mask": (
        "image",
        "D-Fusion's mask at the resolution of the attention maps, averaged over the fused steps, white 1 (8-bit grey "
        "PNG); none without fusion",
    ),
}
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def columns_of(components: Iterable[str]) -> dict[str, tuple[str, str]]:
    """`COLUMNS`, and for each reward of a sum what it said of both pictures."""
    own = {
        f"{score}_{name}": (
            "float32",
            f"the {end}'s score by {name}, a reward of the sum; none where it does not apply",
        )
        for name in components
        for score, end in zip(SCORES, ("winner", "loser"), strict=True)
    }
    return COLUMNS | own


def schema_of(columns: Mapping[str, tuple[str, str]]) -> pa.Schema:
    return pa.schema([(n, IMAGE if d == "image" else pa.type_for_alias(d)) for n, (d, _) in columns.items()])


# ---------------------------------------------------------------- what the loop keeps


def keep(folder: Path, samples: ConsistentSamples, reward: str, number: int, which: Keep | None) -> None:
    """Write the pairs of round `number` to `folder`; which rounds stay there: `which`, None by the pictures' size.

    `reward` is the name of the training reward. Offline pairs, of which none was drawn, are not kept again.
    """
    if not samples.drawn:
        return
    if which is None:
        which = "all" if max(samples.samples.images.shape[1:3]) <= SMALL else "last"
    if which == "none":
        return
    components = samples.samples.components
    schema = schema_of(columns_of(components.weights if components else ()))
    table = pa.Table.from_pylist(rows_of(samples, reward, number), schema)
    data = io.BytesIO()
    pq.write_table(table, data, row_group_size=max(1, int(GROUP * len(table) // max(1, table.nbytes))))
    files.write_atomic(path_of(folder, number), data.getvalue())
    for path in folder.glob(".round-*"):  # what a kill left of an earlier try
        path.unlink()
    if which == "last":
        for earlier in range(number):
            path_of(folder, earlier).unlink(missing_ok=True)


def path_of(folder: Path, number: int) -> Path:
    return folder / f"round-{number:03}.parquet"


def rows_of(samples: ConsistentSamples, reward: str, number: int) -> list[dict[str, object]]:
    """The pairs of a round as rows of `columns_of`."""
    scored, trajectory = samples.samples, samples.samples.trajectory
    pictures: dict[int, dict[str, object]] = {}

    def picture(row: int) -> dict[str, object]:
        if row not in pictures:
            pictures[row] = png(scored.images[row])
        return pictures[row]

    masks: dict[tuple[int, int], Tensor] = {}
    if len(samples.masks):
        ends = [(winner, base) for _, base, winner in samples.triples.tolist()]
        masks = dict(zip(ends, samples.masks, strict=True))
    rows: list[dict[str, object]] = []
    for winner, loser in samples.pairs.tolist():
        mask = masks.get((winner, loser))
        apart: dict[str, object] = {}
        for score, row in zip(SCORES, (winner, loser), strict=True):
            if scored.components is not None:
                own = zip(scored.components.weights, scored.components.scores[row].tolist(), strict=True)
                apart |= {f"{score}_{name}": None if math.isnan(value) else value for name, value in own}
        rows.append(
            {
                "prompt": trajectory.prompts[winner],
                "chosen": picture(winner),
                "rejected": picture(loser),
                "chosen_score": float(scored.rewards[winner]),
                "rejected_score": float(scored.rewards[loser]),
                "chosen_seed": int(trajectory.seeds[winner]),
                "rejected_seed": int(trajectory.seeds[loser]),
                "reward": reward,
                "round": number,
                "mask": None if mask is None else png((mask.clamp(0, 1) * 255).round().byte()),
                **apart,
            }
        )
    return rows


def png(pixels: Tensor) -> dict[str, object]:
    """A picture uint8 [H, W, 3] or [H, W] as `datasets` stores one."""
    data = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.numpy())).save(data, "PNG")
    return {"bytes": data.getvalue(), "path": None}


# ---------------------------------------------------------------- the export


@dataclass(frozen=True)
class Exported:
    """Where a dataset was written, its number of pairs by round, and how many rounds the run had."""

    folder: Path
    pairs: Mapping[int, int]
    rounds: int


def export(run: Path, out: Path | None = None, rounds: Rounds = "all", unpaired: bool = False) -> Exported:
    """Write the pairs of a finished run as a dataset directory, RUN/dataset unless `out` is given: of every round kept,
    or of the latest one.

    unpaired  in TRL's unpaired format, which KTO is trained on: a row for each picture, with `completion` and `label`

    Raises UsageError where `run` is no finished run, holds no pairs, or `out` is not empty.
    """
    record = _record(run)
    out = out or run / "dataset"
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} exists and is not empty: remove it, or give another --out")
    found = _kept(run, record)
    if rounds == "last":
        found = dict(list(found.items())[-1:])
    columns = _columns(record, list(found.values()))
    pairs = {n: _count(path, record.rounds[n].pairs, schema_of(columns)) for n, path in found.items()}
    if not sum(pairs.values()):
        raise UsageError(_why_none(run, record, found))
    out.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        (made / "data").mkdir()
        for n, path in found.items():
            if pairs[n]:
                shutil.copyfile(path, made / "data" / f"train-{path.name.removeprefix('round-')}")
        if unpaired:
            columns = _unpair(made / "data", columns)
        (made / "README.md").write_text(_card(record, pairs, columns), encoding="utf-8")
        made.chmod(0o755)
        made.replace(out)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return Exported(out, pairs, len(record.rounds))


def _unpair(data: Path, columns: Mapping[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Replace a directory's pairs by what TRL makes of them; returns the columns there are then."""
    import datasets
    from trl import unpair_preference_dataset

    paths = sorted(data.iterdir())
    with tempfile.TemporaryDirectory() as cache:
        paired = datasets.Dataset.from_parquet([str(path) for path in paths], cache_dir=cache)
        for name in SIDES:
            paired = paired.cast_column(name, datasets.Image(decode=False))
        flat = unpair_preference_dataset(paired).cast_column("completion", datasets.Image())
        flat.to_parquet(str(data / "unpaired.parquet"))
    for path in paths:
        path.unlink()
    (data / "unpaired.parquet").replace(data / "train-00000.parquet")
    about = {"completion": ("image", "the picture (PNG)"), "label": ("bool", "whether it was the winner of its pair")}
    return {name: columns.get(name) or about[name] for name in flat.column_names}


def _record(run: Path) -> Record:
    if not run.is_dir():
        raise UsageError(f"no directory {run}; a run's directory is below runs/TRACK/, named by what it ran")
    if (run / "record.json").exists():
        return records.read(run / "record.json")
    if (run / "cell.json").exists():
        raise UsageError(f"{run} is not finished; the command that started it goes on")
    inside = records.below(run, "record.json")
    hint = f"give one run, for example {inside[0].parent}" if inside else "bench-dfusion run leaves runs in runs/TRACK/"
    raise UsageError(f"{run} is no run's directory (it has no record.json); {hint}")


def _kept(run: Path, record: Record) -> dict[int, Path]:
    """The files of the record's rounds that there are, by number."""
    paths = {r.round: path_of(run / "pairs", r.round) for r in record.rounds}
    return {n: path for n, path in paths.items() if path.exists()}


def _columns(record: Record, paths: Sequence[Path]) -> dict[str, tuple[str, str]]:
    """The columns that the first of the files has: runs of sums did not always keep each reward's."""
    apart = columns_of(record.provenance.reward_components)
    with suppress(pa.ArrowInvalid, OSError):  # `_count` says what is wrong
        if paths and pq.read_schema(paths[0]).equals(schema_of(apart)):
            return apart
    return COLUMNS


def _count(path: Path, expected: int, columns: pa.Schema) -> int:
    """How many pairs a round's file holds. Raises UsageError if it cannot be read or is not the record's."""
    try:
        schema, count = pq.read_schema(path), pq.read_metadata(path).num_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise UsageError(f"{path} is damaged ({str(error).splitlines()[0]})") from None
    if not schema.equals(columns):
        raise UsageError(f"{path} is of another version of bench-dfusion: its columns are {', '.join(schema.names)}")
    if count != expected:
        raise UsageError(f"{path} holds {count} pairs, the record says {expected}: it is not of this run")
    return count


def _why_none(run: Path, record: Record, found: Mapping[int, Path]) -> str:
    if found:
        which = f"{'round' if len(found) == 1 else 'rounds'} {', '.join(map(str, found))}"
        return f"{run} has no pairs: in {which} no winner scored above its loser by the margin"
    if not record.rounds:
        return f"{run} has no pairs: it failed in its first round"
    return f"{run} kept no pairs; a new run keeps them with bench-dfusion run --keep-pairs all"


def _card(record: Record, pairs: Mapping[int, int], columns: Mapping[str, tuple[str, str]]) -> str:
    """The README: YAML that declares the columns, and what the pairs are."""
    features = "".join(f"  - name: {name}\n    dtype: {dtype}\n" for name, (dtype, _) in columns.items())
    described = "".join(f"| `{name}` | {meaning} |\n" for name, (_, meaning) in columns.items())
    of = f"{record.algorithm} on {record.builder} samples, reward {record.reward}, seed {record.seed}"
    missing = len(record.rounds) - len(pairs)
    kept = f"rounds {', '.join(map(str, pairs))} of {len(record.rounds)}" if missing else f"all {len(pairs)} rounds"
    return f"""---
configs:
- config_name: pairs
  default: true
  data_files:
  - split: train
    path: data/train-*
dataset_info:
- config_name: pairs
  features:
{features}task_categories:
- text-to-image
tags:
- preference
- bench-dfusion
---
# Preference pairs of a training run

{sum(pairs.values())} pairs{", a row for each of their pictures," if "label" in columns else ""} that bench-dfusion's builder `{record.builder}` made from the policy while it was trained: {of}, track {record.track}; {kept}.
The chosen picture scored above the rejected one of the same prompt before the training reward `{record.reward}`.

| column | what it is |
|---|---|
{described}
| the run | |
|---|---|
| status | {record.status} |
| configuration | `{record.cell_hash}` |
| track | `{record.track_hash}` |
| base model | `{record.provenance.model_sha256}` |
| training reward | `{record.provenance.reward_fingerprint}` |
| code | `{record.provenance.code}` |
"""
