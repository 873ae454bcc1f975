"""Preference datasets: what the loop keeps of each round's pairs, their export, and reading any such dataset.

After a round the loop writes its pairs to RUN/pairs/round-NNN.parquet, pictures as PNG: exactly what the reward
scored. Drawing them again would need every round's weights, as much compute as sampling did and the same hardware to
come out the same. A file is whole or absent and named by its round, so a round that a kill made run twice is there
once. What it takes: 64² pictures 2 MB a round, 512² about 0.3 GB (640 pictures). By default every round is kept
where pictures are small (`SMALL`), else the last one (`--keep-pairs`); nothing else of a run depends on it.

`export` copies those files beside a README that declares every column: `datasets.load_dataset(DIR)` reads the
directory, and so does the Hub. `read` reads it again, and every dataset of prompts with chosen and rejected pictures.
"""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageOps
from torch import Tensor

from bench_dfusion import files, hub, records
from bench_dfusion.consistent import ConsistentSamples
from bench_dfusion.progress import bar
from bench_dfusion.records import Record
from bench_dfusion.registry import UsageError

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
SCHEMA = pa.schema([(n, IMAGE if d == "image" else pa.type_for_alias(d)) for n, (d, _) in COLUMNS.items()])


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
    table = pa.Table.from_pylist(rows_of(samples, reward, number), SCHEMA)
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
    """The pairs of a round as rows of `SCHEMA`."""
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


def export(run: Path, out: Path | None = None, rounds: Rounds = "all") -> Exported:
    """Write the pairs of a finished run as a dataset directory, RUN/dataset unless `out` is given: of every round kept,
    or of the latest one.

    Raises UsageError where `run` is no finished run, holds no pairs, or `out` is not empty.
    """
    record = _record(run)
    out = out or run / "dataset"
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} exists and is not empty: remove it, or give another --out")
    found = _kept(run, record)
    if rounds == "last":
        found = dict(list(found.items())[-1:])
    pairs = {n: _count(path, record.rounds[n].pairs) for n, path in found.items()}
    if not sum(pairs.values()):
        raise UsageError(_why_none(run, record, found))
    out.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        (made / "data").mkdir()
        for n, path in found.items():
            if pairs[n]:
                shutil.copyfile(path, made / "data" / f"train-{path.name.removeprefix('round-')}")
        (made / "README.md").write_text(_card(record, pairs), encoding="utf-8")
        made.chmod(0o755)
        made.replace(out)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return Exported(out, pairs, len(record.rounds))


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


def _count(path: Path, expected: int) -> int:
    """How many pairs a round's file holds. Raises UsageError if it cannot be read or is not the record's."""
    try:
        schema, count = pq.read_schema(path), pq.read_metadata(path).num_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise UsageError(f"{path} is damaged ({str(error).splitlines()[0]})") from None
    if not schema.equals(SCHEMA):
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


def _card(record: Record, pairs: Mapping[int, int]) -> str:
    """The README: YAML that declares the columns, and what the pairs are."""
    features = "".join(f"  - name: {name}\n    dtype: {dtype}\n" for name, (dtype, _) in COLUMNS.items())
    columns = "".join(f"| `{name}` | {meaning} |\n" for name, (_, meaning) in COLUMNS.items())
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

{sum(pairs.values())} pairs that bench-dfusion's builder `{record.builder}` made from the policy while it was trained: {of}, track {record.track}; {kept}.
The chosen picture scored above the rejected one of the same prompt before the training reward `{record.reward}`.

| column | what it is |
|---|---|
{columns}
| the run | |
|---|---|
| status | {record.status} |
| configuration | `{record.cell_hash}` |
| track | `{record.track_hash}` |
| base model | `{record.provenance.model_sha256}` |
| training reward | `{record.provenance.reward_fingerprint}` |
| code | `{record.provenance.code}` |
"""


# ---------------------------------------------------------------- reading


@dataclass(frozen=True, eq=False)
class Pairs:
    """A preference dataset: a prompt, a chosen and a rejected picture in each row.

    source     the path or Hub id it was read from
    table      the `datasets.Dataset`
    scored_by  the reward that scored both pictures, None where the dataset does not say
    """

    source: str
    table: Any
    scored_by: str | None

    def __len__(self) -> int:
        return len(self.table)

    @property
    def prompts(self) -> list[str]:
        return list(self.table["prompt"])

    def scores(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The scores of the chosen and the rejected pictures of rows [N], float32: 1 and 0 where there are none."""
        names = ("chosen_score", "rejected_score")
        if all(n in self.table.column_names for n in names):
            part = self.table.select_columns(list(names))[list(rows)]
            if not any(value is None for n in names for value in part[n]):
                return torch.tensor(part[names[0]]).float(), torch.tensor(part[names[1]]).float()
        return torch.ones(len(rows)), torch.zeros(len(rows))

    def pictures(self, rows: Sequence[int], side: int) -> tuple[Tensor, Tensor]:
        """The chosen and the rejected pictures of rows [N], uint8 [N, side, side, 3]: resized, cropped at the centre."""
        found = []
        for name in ("chosen", "rejected"):
            column = self.table.select_columns([name])
            found.append(torch.stack([self._picture(column, name, row, side) for row in rows]))
        return found[0], found[1]

    def _picture(self, column: Any, name: str, row: int, side: int) -> Tensor:
        try:
            image = ImageOps.exif_transpose(column[int(row)][name]).convert("RGB")
        except (OSError, ValueError, AttributeError) as error:
            raise UsageError(f"{self.source}: the {name} picture of row {row} cannot be read ({error})") from None
        return torch.from_numpy(np.array(ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)))

    @cached_property
    def sha256(self) -> str:
        """A hash of everything a training on these pairs depends on. Raises UsageError where a picture is missing."""
        from datasets import Image as ImageColumn

        scores = [n for n in ("chosen_score", "rejected_score") if n in self.table.column_names]
        table = self.table.select_columns(["prompt", "chosen", "rejected", *scores])
        for name in ("chosen", "rejected"):
            table = table.cast_column(name, ImageColumn(decode=False))
        digest = hashlib.sha256()
        with bar(f"hash {self.source}", len(table)) as progress:
            for number, row in enumerate(table):
                digest.update(repr([row["prompt"], *(row[n] for n in scores)]).encode())
                for name in ("chosen", "rejected"):
                    stored = row[name] or {}
                    data = stored.get("bytes")
                    if data is None and stored.get("path"):
                        data = Path(stored["path"]).read_bytes()
                    if data is None:
                        raise UsageError(f"{self.source}: row {number} has no {name} picture")
                    digest.update(hashlib.sha256(data).digest())
                progress.advance(1)
        return digest.hexdigest()


def read(source: str) -> Pairs:
    """A preference dataset by directory, Parquet file or Hub id: its split `train`, or the only one.

    Read (and hashed) once a process: again where the files have changed, a Hub id never. Raises UsageError where there
    is none, a column is missing or holds something else, or a prompt is empty.
    """
    path = Path(source).expanduser()
    below = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] if path.exists() else []
    stats = [(str(p), p.stat()) for p in below]
    return _read(source, path, tuple((name, s.st_mtime_ns, s.st_size, s.st_ino) for name, s in stats))


@lru_cache(maxsize=4)
def _read(source: str, path: Path, state: tuple[tuple[str, int, int, int], ...]) -> Pairs:
    """`state` of the local files is what tells one reading from the next."""
    hub.look(source)
    import datasets

    if not path.exists() and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source):
        raise UsageError(f"no dataset {source}: there is no such directory or file, and it is no Hub id")
    try:
        if path.is_file():
            found = datasets.load_dataset("parquet", data_files=str(path))
        elif any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(str(path))
        else:
            found = datasets.load_dataset(str(path) if path.is_dir() else source)
    except Exception as error:  # of datasets, the Hub's client, pyarrow: many kinds
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UsageError(f"{source} cannot be read as a dataset: {line}") from None
    if isinstance(found, datasets.DatasetDict):
        if "train" not in found and len(found) > 1:
            raise UsageError(f"{source} has splits {', '.join(found)}, and none of them is train")
        found = found["train"] if "train" in found else next(iter(found.values()))
    for name in ("prompt", "chosen", "rejected"):
        if name not in found.column_names:
            raise UsageError(
                f"{source} has no column {name}: pairs are prompt, chosen and rejected, here are "
                f"{', '.join(found.column_names)}"
            )
    for name in ("chosen", "rejected"):
        if not isinstance(found.features[name], datasets.Image):
            raise UsageError(f"{source}: column {name} holds {found.features[name]}, not pictures (datasets.Image)")
    for number, prompt in enumerate(found["prompt"]):
        if not isinstance(prompt, str) or not prompt.strip():
            raise UsageError(f"{source}: row {number} has no prompt")
    rewards = set(found.unique("reward")) if "reward" in found.column_names else {None}
    if len(rewards) > 1:
        raise UsageError(f"{source} was scored by several rewards, {', '.join(sorted(map(str, rewards)))}: split it")
    return Pairs(source, found, next(iter(rewards)))
