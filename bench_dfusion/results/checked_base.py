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
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench_dfusion import tracks
from bench_dfusion.registry import UsageError
from bench_dfusion.tracks.schema import Track, content_sha256
from bench_dfusion.util import files

if TYPE_CHECKING:
    from bench_dfusion.diffusion.policy import Policy
    from bench_dfusion.rewards.contract import Reward

SHIPPED = tracks.HERE / "bases"
SCORES = "scores.parquet"  # beside a record: every score of every held-out picture of the trained policy
REWARD = "training reward"  # its column of the training reward's scores; judges have their own names
AT_ONCE = 256  # pictures drawn between two looks at the disk: what a kill loses
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


def ensure(
    track: Track, folder: Path, policy: Policy, judges: Mapping[str, Reward], model_sha256: str
) -> CheckedBase | None:
    """A track's checked base, drawn now with the policy's reference and kept in `folder` where it is nowhere yet; None for
    a track that has none. Every process of a run calls it.

    Raises UsageError for a base of another model or other judges and where it cannot be drawn, PluginError where a judge
    gives no numbers. What was drawn before a kill is not drawn again.
    """
    from bench_dfusion.models.base import NotFinite
    from bench_dfusion.util import parallel

    if track.evaluation.base_images_per_prompt is None:
        return None
    base = parallel.once(lambda: load(track, folder))
    if base is None:
        path, parts = folder / file_name(track), folder / f".{file_name(track)}"
        with parallel.writing(_alone(folder, track)):
            base = parallel.once(lambda: load(track, folder))  # another run may have drawn it meanwhile
            if base is None:
                try:
                    base = draw(track, policy, judges, model_sha256, parts)
                except NotFinite as error:
                    raise UsageError(f"the base of {track.id} cannot be drawn: {error}") from None
                if parallel.first():
                    write(path, base)
                    for part in _parts(parts):
                        part.unlink()
                    parts.rmdir()
    where = find(track, folder) or folder / file_name(track)
    here = {name: judge.fingerprint() for name, judge in judges.items()}
    if base.model_sha256 != model_sha256:
        raise UsageError(
            f"{where} is the base of another model ({base.model_sha256[:12]}…, not {model_sha256[:12]}…): {_FIX}"
        )
    for name, fingerprint in here.items():
        if base.fingerprints.get(name) != fingerprint:
            raise UsageError(f"{where} was judged by another {name} (its weights or rules differ): {_FIX}")
    return base


_FIX = "use another --out, or remove it to have it drawn again, and the track's records with it"


@contextmanager
def _alone(folder: Path, track: Track) -> Iterator[None]:
    """Hold the lock of a track's base; say so where another run has it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / f".{file_name(track)}.lock"
    busy = f"another run draws the base of {track.id}"
    try:
        with files.locked(lock, busy):
            yield
        return
    except UsageError as error:
        if str(error) != busy:
            raise
    print(f"{busy}; this one waits for it", file=sys.stderr, flush=True)
    with files.locked(lock):
        yield


def draw(
    track: Track, policy: Policy, judges: Mapping[str, Reward], model_sha256: str, parts: Path | None = None
) -> CheckedBase:
    """Draw and judge a track's base with the policy's reference. `parts`: a directory that keeps what is done, prompts by
    prompts, and from which it goes on."""
    from bench_dfusion.results import records
    from bench_dfusion.runs import evaluation
    from bench_dfusion.util import parallel
    from bench_dfusion.util.progress import bar

    prompts, k, own = track.prompts.heldout, track.evaluation.base_images_per_prompt, track.evaluation.images_per_prompt
    assert k is not None
    before = policy.network_evaluations
    code, dirty = records.code_state()
    base = CheckedBase(
        of=key(track),
        model_sha256=model_sha256,
        fingerprints={name: judge.fingerprint() for name, judge in judges.items()},
        prompts=(),
        scores={},
        pictures=np.zeros((0, 1, 1, 3), np.uint8),
        diversity=np.zeros(0),
        space="",
        made={
            "code": code,
            "dirty": dirty,
            "hardware": records.hardware(),
            "versions": records.versions(judges.values()),
        },
    )
    embed = evaluation.embedder(judges)
    done = parallel.once(lambda: _done(parts, base))
    begun, step = sum(len(part.prompts) for part in done), max(1, AT_ONCE // k)
    label = f"base of {track.id}, once"
    with (
        bar(label, k * len(prompts), k * begun) as progress,
        evaluation.sampling(policy, track),
        policy.reference(),
    ):
        for start in range(begun, len(prompts), step):
            some = prompts[start : start + step]
            drawn = evaluation.draw(policy, some, k, progress.advance)
            scores = {name: evaluation.judged(judge, name, drawn, k).numpy() for name, judge in judges.items()}
            first = drawn.images.view(len(some), k, *drawn.images.shape[1:])
            diversity, space = evaluation.diversity(first[:, :own].flatten(0, 1), own, embed)
            new = CheckedBase(
                base.of, model_sha256, base.fingerprints, some, scores, first[:, 0].numpy(), diversity, space, base.made
            )
            if parts is not None and parallel.first():
                write(parts / f"{start:06d}.parquet", new)
            done.append(new)
    policy.network_evaluations = before  # the track's, not a run's
    return _joined(done)


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*.parquet"))


def _done(parts: Path | None, base: CheckedBase) -> list[CheckedBase]:
    """The parts that an earlier try has drawn of this very base, as far as they are whole."""
    found: list[CheckedBase] = []
    for path in _parts(parts) if parts is not None else ():
        try:
            part = read(path)
        except UsageError:
            part = None
        same = part and (part.of, part.model_sha256, part.fingerprints) == (
            base.of,
            base.model_sha256,
            base.fingerprints,
        )
        if part is None or not same or int(path.stem) != sum(len(p.prompts) for p in found):
            path.unlink()
            continue
        found.append(part)
    return found


def _joined(parts: Sequence[CheckedBase]) -> CheckedBase:
    first = parts[0]
    return CheckedBase(
        first.of,
        first.model_sha256,
        first.fingerprints,
        tuple(p for part in parts for p in part.prompts),
        {name: np.concatenate([part.scores[name] for part in parts]) for name in first.scores},
        np.concatenate([part.pictures for part in parts]),
        np.concatenate([part.diversity for part in parts]),
        first.space,
        first.made,
    )


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
        raise UsageError(f"{path} is not the base of {track.id}, or not all of it: {_FIX}")
    return base
