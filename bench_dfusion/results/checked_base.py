"""The checked base of a track: the base's pictures of the held-out prompts, drawn and judged once, its hash in every record.

A run then draws its own pictures alone, on the noise of the base's first ones, and its gain is freed of their luck
(`statistics.adjusted_gains`). The base does not depend on budgets or train prompts, so tracks that differ in those alone
share it. It is looked for in the package (`tracks/bases/`), then beside the run directories, where it is drawn if it is
nowhere. A base is one Parquet file: a row for each picture with every judge's score, the first picture of each prompt in it.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench_dfusion import tracks
from bench_dfusion.errors import UsageError
from bench_dfusion.tracks.schema import Track, content_sha256
from bench_dfusion.util import files

SHIPPED = tracks.HERE / "bases"
SCORES = "scores.parquet"  # beside a record: every score of every held-out picture of the trained policy
REWARD = "training reward"  # its column of the training reward's scores; judges have their own names
REDRAW = "use another --out, or remove it to have it drawn again, and the track's records with it"  # what mends a base
_META = b"bench-dfusion"


@dataclass(frozen=True)
class CheckedBase:
    """What was drawn and judged of a track's base.

    of            the hash of all it depends on but the model's and the judges' weights (`key`)
    model_sha256  hash of the base model's weights and configuration
    fingerprints  hash of each judge's weights and rules, by judge in the track's order
    prompts       the held-out prompts, P
    scores        float32 [P, K₀] by judge
    pictures      the first picture of each prompt, uint8 [P, H, W, 3]
    diversity     Vendi score of each prompt's first K pictures [P] (effective images), K a run's images per prompt
    space         what the Vendi score's embeddings are
    made          code revision, hardware and versions that made it: of no consequence to the hash
    """

    of: str
    model_sha256: str
    fingerprints: Mapping[str, str]
    prompts: tuple[str, ...]
    scores: Mapping[str, np.ndarray]
    pictures: np.ndarray
    diversity: np.ndarray
    space: str
    made: Mapping[str, Any]

    @cached_property
    def sha256(self) -> str:
        """The hash of its content, whatever wrote the file."""
        total = hashlib.sha256(json.dumps(self._meta(), sort_keys=True).encode())
        for array in (*self.scores.values(), self.diversity, self.pictures):
            total.update(f"{array.dtype.str} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        return total.hexdigest()

    def _meta(self) -> dict[str, Any]:
        return {
            "of": self.of,
            "model_sha256": self.model_sha256,
            "fingerprints": dict(self.fingerprints),
            "prompts": list(self.prompts),
            "space": self.space,
        }


def key(track: Track) -> str:
    """The hash of what a track's base depends on, known without loading anything: model, sampler, held-out prompts and
    how they are judged. The model's and the judges' weights are compared when they are there."""
    fixed = track.fixed
    names = {judge.partition(":")[0] for judge in track.evaluation.judges}
    return content_sha256(
        {
            "model": fixed["model"],
            "sampler": fixed["evaluation"].get("sampler", fixed["sampler"]),
            "heldout": fixed["prompts"]["heldout"],
            "evaluation": fixed["evaluation"],
            "rewards": {name: options for name, options in fixed["rewards"].items() if name in names},
        }
    )


def means(scores: np.ndarray) -> np.ndarray:
    """The mean of each prompt's scores, float32 [P, K] to [P]."""
    return np.asarray(scores.mean(1, dtype=np.float64), np.float32)


def file_name(track: Track) -> str:
    """The name of a track's base among its run directories."""
    return f"base-{key(track)[:16]}.parquet"


def find(track: Track, folder: Path) -> Path | None:
    """The file of a track's base, in the package or in `folder`, the directory of the track's runs; None: in neither."""
    return next((p for p in (SHIPPED / file_name(track), folder / file_name(track)) if p.is_file()), None)


def load(track: Track, folder: Path) -> CheckedBase | None:
    """The base that `find` finds. Raises UsageError where it is damaged or another track's."""
    path = find(track, folder)
    return None if path is None else _of(track, _unchanged(path, path.stat().st_mtime_ns), path)


@lru_cache(maxsize=8)
def _unchanged(path: Path, changed: int) -> CheckedBase:
    """A file that a table of many records asks for as often: read once for each time it was written."""
    return read(path)


# ---------------------------------------------------------------- files


def write(path: Path, base: CheckedBase) -> None:
    """Write a base as one Parquet file, atomically."""
    from PIL import Image

    k = next(iter(base.scores.values())).shape[1]
    images: list[bytes | None] = [None] * (k * len(base.prompts))
    diversity: list[float | None] = [None] * len(images)
    for i, picture in enumerate(base.pictures):
        data = io.BytesIO()
        Image.fromarray(picture).save(data, "PNG", optimize=True)
        images[i * k], diversity[i * k] = data.getvalue(), float(base.diversity[i])
    columns = {"diversity": pa.array(diversity, pa.float64()), "image": pa.array(images, pa.binary())}
    _write(path, base.prompts, base.scores, columns, {**base._meta(), "made": dict(base.made)})


def write_scores(path: Path, prompts: Sequence[str], scores: Mapping[str, np.ndarray]) -> None:
    """Write the scores [P, K] of a policy's pictures of the held-out prompts, by judge (and `REWARD`), as Parquet."""
    _write(path, prompts, scores, {}, {})


def _write(
    path: Path,
    prompts: Sequence[str],
    scores: Mapping[str, np.ndarray],
    more: Mapping[str, pa.Array],
    meta: Mapping[str, Any],
) -> None:
    k = next(iter(scores.values())).shape[1]
    columns = {
        "prompt": pa.array([p for p in prompts for _ in range(k)], pa.string()),
        "picture": pa.array(list(range(k)) * len(prompts), pa.int32()),
        **{f"score {name}": pa.array(values.reshape(-1).astype(np.float32)) for name, values in scores.items()},
        **more,
    }
    table = pa.table(columns).replace_schema_metadata({_META: json.dumps({"judges": list(scores), **meta}).encode()})
    with files.replacing(path) as file:
        pq.write_table(table, file, compression="zstd")


def read(path: Path) -> CheckedBase:
    """The base in a file. Raises UsageError where it is none, or damaged."""
    from PIL import Image

    prompts, scores, table, meta = _read(path)
    try:
        k = len(table) // len(prompts)
        images = [table.column("image")[i * k].as_py() for i in range(len(prompts))]
        return CheckedBase(
            meta["of"],
            meta["model_sha256"],
            meta["fingerprints"],
            prompts,
            scores,
            np.stack([np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in images]),
            np.array([table.column("diversity")[i * k].as_py() for i in range(len(prompts))], float),
            meta["space"],
            meta["made"],
        )
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise UsageError(f"{path} is no checked base ({error}): remove it to have it drawn again") from None


def read_scores(path: Path) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """The prompts and the scores [P, K] by judge (and `REWARD`) that `write_scores` wrote. Raises UsageError."""
    prompts, scores, _, _ = _read(path)
    return prompts, scores


def _read(path: Path) -> tuple[tuple[str, ...], dict[str, np.ndarray], pa.Table, dict[str, Any]]:
    try:
        table = pq.read_table(io.BytesIO(path.read_bytes()))
        meta = json.loads((table.schema.metadata or {})[_META])
        each = table.column("prompt").to_pylist()
        k = table.column("picture").to_pylist().count(0)
        k = len(each) // k
        prompts = tuple(each[::k])
        if k < 1 or each != [p for p in prompts for _ in range(k)] or len(set(prompts)) < len(prompts):
            raise ValueError("its pictures are not those of each prompt in turn")
        columns = {name: table.column(f"score {name}") for name in meta["judges"]}
        scores = {name: column.to_numpy().astype(np.float32, casting="no") for name, column in columns.items()}
        return prompts, {name: values.reshape(len(prompts), k) for name, values in scores.items()}, table, meta
    except (pa.ArrowException, KeyError, TypeError, ValueError, ZeroDivisionError, OSError) as error:
        raise UsageError(f"{path} holds no scores of pictures ({str(error).splitlines()[0]})") from None


def _of(track: Track, base: CheckedBase, path: Path) -> CheckedBase:
    shape = (len(track.prompts.heldout), track.evaluation.base_images_per_prompt)
    sound = (
        base.of == key(track)
        and base.prompts == track.prompts.heldout
        and list(base.scores) == list(track.evaluation.judges)
        and all(s.shape == shape and np.isfinite(s).all() for s in base.scores.values())
    )
    if not sound:
        raise UsageError(f"{path} is not the base of {track.id}, or not all of it: {REDRAW}")
    return base
