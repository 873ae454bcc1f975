"""Reading preference datasets: prompts with a chosen and a rejected picture, exported by a run or anybody's."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageOps
from torch import Tensor

from bench_dfusion.errors import UsageError
from bench_dfusion.util import files, hub, parallel, picture_reader
from bench_dfusion.util.progress import bar

SIDES = ("chosen", "rejected")
SCORES = ("chosen_score", "rejected_score")
AT_ONCE = 32  # pairs whose files are in memory while they are checked
SLOW = 10.0  # s a check may take without a note that spares the next one


@dataclass(frozen=True, eq=False)
class Pairs:
    """A preference dataset: a prompt, a chosen and a rejected picture in each row. Ties are left out of it.

    source     the path or Hub id it was read from
    table      the `datasets.Dataset` of the pairs, pictures not decoded
    scored_by  the reward that scored both pictures, None where the dataset does not say
    rows       the number of each pair's row in the dataset
    scored     whether every row has both scores
    ties       the number of pairs left out because both pictures have the same score
    """

    source: str
    table: Any
    scored_by: str | None
    rows: Sequence[int]
    scored: bool
    ties: int

    def __len__(self) -> int:
        return len(self.table)

    @property
    def prompts(self) -> list[str]:
        return list(self.table["prompt"])

    def scores(self, pairs: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The scores of the chosen and the rejected pictures of pairs [N], float32: 1 and 0 where not every row has them."""
        if not self.scored:
            return torch.ones(len(pairs)), torch.zeros(len(pairs))
        part = self.table.select_columns(list(SCORES))[list(pairs)]
        chosen, rejected = (torch.tensor(part[name], dtype=torch.float32) for name in SCORES)
        return chosen, rejected

    def pictures(self, pairs: Sequence[int], side: int) -> tuple[Tensor, Tensor]:
        """The chosen and the rejected pictures of pairs [N], uint8 [N, side, side, 3]: resized, cropped at the centre."""
        found = []
        for name in SIDES:
            column = self.table.select_columns([name])
            images = [self._decoded(self._bytes(column[int(n)][name], name, n), name, n) for n in pairs]
            fitted = [ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC) for image in images]
            found.append(torch.from_numpy(np.stack([np.asarray(image) for image in fitted])))
        return found[0], found[1]

    @cached_property
    def sha256(self) -> str:
        """A hash of everything a training on these pairs depends on.

        Every picture is decoded on the way, so that none can fail in a run: raises UsageError that names the first that
        is missing, damaged or cannot be shown. Where that takes long (`SLOW`) it is noted that these files are fine.
        """
        note, known = self._note(), None
        if note is not None:
            with suppress(OSError, ValueError):  # there is none, or it is damaged
                known = files.read_json(note)
        if known is None:
            start = time.monotonic()
            known = self._check()
            if note is not None and time.monotonic() - start > SLOW and not known["outside"]:
                with suppress(OSError):  # a disk that is full or cannot be written to
                    files.write_json(note, known)
        for line in known["said"]:
            _say(line)
        return str(known["sha256"])

    def _check(self) -> dict[str, Any]:
        """The hash, what is to be said, and whether pictures lie outside the dataset's own files."""
        scores = [name for name in SCORES if name in self.table.column_names]
        table = self.table.select_columns(["prompt", *SIDES, *scores])
        digest, outside = hashlib.sha256(), False
        odd: list[str] = []

        def checked(cell: tuple[int, str, Any]) -> bytes:
            number, name, stored = cell
            data = self._bytes(stored, name, number)
            where = f"row {self.rows[number]}, {name}"
            self._decoded(data, name, number, lambda reason: odd.append(f"{where}: {reason}"))
            return hashlib.sha256(data).digest()

        threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        with bar(f"check {self.source}", len(self)) as progress, threads:
            for start in range(0, len(self), AT_ONCE):
                part = table[start : start + AT_ONCE]
                numbers = range(start, start + len(part["prompt"]))
                cells = [(n, name, part[name][n - start]) for n in numbers for name in SIDES]
                outside |= any((stored or {}).get("bytes") is None for _, _, stored in cells)
                hashes = threads.map(checked, cells)
                for n in numbers:
                    digest.update(repr([part[name][n - start] for name in ("prompt", *scores)]).encode())
                    for _ in SIDES:
                        digest.update(next(hashes))
                    progress.advance(1)
        if self.ties:  # a record counts them
            digest.update(f"{self.ties} ties".encode())
        said = []
        if odd:
            said.append(
                f"{len(odd)} pictures of {self.source} have a colour profile that cannot be used and are read without it "
                f"({min(odd)})"
            )
        return {"sha256": digest.hexdigest(), "said": said, "outside": outside}

    def _note(self) -> Path | None:
        """Where it stands that the dataset's files were checked as they are now; None where it has none on disk."""
        stats = [(file["filename"], os.stat(file["filename"])) for file in self.table.cache_files]
        state = [[name, s.st_mtime_ns, s.st_size, s.st_ino] for name, s in stats]
        reader = [Image.__version__, files.sha256(Path(picture_reader.__file__)), files.sha256(Path(__file__))]
        name = hashlib.sha256(repr([state, reader]).encode()).hexdigest()
        return files.cache() / "pairs" / f"{name}.json" if state else None

    def _bytes(self, stored: Mapping[str, Any] | None, name: str, number: int) -> bytes:
        """The file of a picture that is stored as `datasets` does."""
        data, path = ((stored or {}).get(key) for key in ("bytes", "path"))
        if data is not None:
            return bytes(data)
        row = self.rows[number]
        if not path:
            raise UsageError(f"{self.source}: row {row} has no {name} picture")
        try:
            if Path(path).is_file():
                return Path(path).read_bytes()
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{self.source}: the {name} picture of row {row}, {path}, cannot be read ({error})"
            ) from None
        raise UsageError(
            f"{self.source}: the {name} picture of row {row} is not there: no file {path}; put it there, or save the "
            "dataset with its pictures embedded"
        )

    def _decoded(
        self, data: bytes, name: str, number: int, ignored: Callable[[str], None] = lambda reason: None
    ) -> Image.Image:
        try:
            return picture_reader.read(data, ignored)
        except picture_reader.PictureError as error:
            row = self.rows[number]
            raise UsageError(f"{self.source}: the {name} picture of row {row} cannot be read ({error})") from None


def _say(line: str) -> None:
    if parallel.first():
        print(f"pairs: {line}", file=sys.stderr, flush=True)


def read(source: str) -> Pairs:
    """A preference dataset by directory, Parquet file or Hub id: its split `train`, or the only one, without its ties.

    Read (and hashed) once a process: again where the files have changed, a Hub id never. Raises UsageError where there
    is none, a column is missing or holds something else, a prompt is empty, or a score is no number or contradicts what
    was chosen.
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

    found = _loaded(source, path, [Path(name) for name, *_ in state])
    _check_columns(source, found)
    for name in SIDES:
        found = found.cast_column(name, datasets.Image(decode=False))
    for number, prompt in enumerate(found["prompt"]):
        if not isinstance(prompt, str) or not prompt.strip():
            raise UsageError(f"{source}: row {number} has no prompt")
    rewards = set(found.unique("reward")) if "reward" in found.column_names else {None}
    if len(rewards) > 1:
        names = sorted(map(str, rewards))
        shown = ", ".join(names[:5]) + ", …" * (len(names) > 5)
        raise UsageError(f"{source} was scored by several rewards, {shown}: split it")
    rows, scored = _scored(source, found)
    ties = len(found) - len(rows)
    if ties:
        found = found.select(rows)
    return Pairs(source, found, next(iter(rewards)), rows, scored, ties)


def _loaded(source: str, path: Path, below: Sequence[Path]) -> Any:
    """The dataset's split `train`, or the only one. Raises UsageError where there is none or it has no rows."""
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
        if isinstance(error, datasets.exceptions.DatasetGenerationError) and isinstance(error.__cause__, Exception):
            error = error.__cause__  # which says what
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if isinstance(error, IndexError) or "corresponds to no data" in line:
            line = "it, or a split of it, has no rows"  # which `datasets` says in no words of its own
        raise UsageError(f"{source} cannot be read as a dataset: {_damaged(below) or line}") from None
    if isinstance(found, datasets.DatasetDict):
        if "train" not in found and len(found) > 1:
            raise UsageError(f"{source} has splits {', '.join(found)}, and none of them is train")
        found = found["train"] if "train" in found else next(iter(found.values()))
    if not len(found):
        raise UsageError(f"{source} has no rows" + (f" in its split {found.split}" if found.split else ""))
    return found


def _damaged(below: Sequence[Path]) -> str | None:
    """The first Parquet file that cannot be read, and why."""
    for path in below:
        if path.suffix == ".parquet":
            try:
                for _ in pq.ParquetFile(path).iter_batches():
                    pass
            except (pa.ArrowException, OSError) as error:
                return f"{path} is damaged ({str(error).splitlines()[0]})"
    return None


def _check_columns(source: str, found: Any) -> None:
    """Raise UsageError where a column is missing or of another kind than a training reads."""
    import datasets

    for name in ("prompt", *SIDES):
        if name not in found.column_names:
            raise UsageError(
                f"{source} has no column {name}: pairs are prompt, chosen and rejected, here are "
                f"{', '.join(found.column_names)}"
            )
    for name in SIDES:
        if not isinstance(found.features[name], datasets.Image):
            raise UsageError(
                f"{source}: column {name} holds {_kind(found, name)}, not pictures (datasets.Image), which "
                "dataset.cast_column makes of files' paths or bytes"
            )
    for name, what in (("prompt", "text"), ("reward", "the name of the reward that scored the pictures")):
        kind = found.features.get(name)
        texts = ("string", "large_string", "string_view") + ("null",) * (name == "reward")
        if kind is not None and getattr(kind, "dtype", None) not in texts:
            raise UsageError(f"{source}: column {name} holds {_kind(found, name)}, not {what}")


def _kind(found: Any, name: str) -> str:
    text = str(found.features[name])
    return text if len(text) <= 80 else text[:80] + "…"


def _scored(source: str, found: Any) -> tuple[Sequence[int], bool]:
    """The rows that are no ties, and whether every row has both scores.

    Scores are compared as training has them, in float32. Raises UsageError where one is no finite number, a rejected
    picture scored above the chosen one, or all rows are ties.
    """
    given = [name for name in SCORES if name in found.column_names]
    if not given:
        return range(len(found)), False
    if len(given) == 1:
        missing = next(name for name in SCORES if name not in given)
        raise UsageError(f"{source} has a column {given[0]} and no {missing}: add it, or leave both out")
    chosen, rejected = (_numbers(source, found, name) for name in SCORES)
    missing_score = np.isnan(chosen) | np.isnan(rejected)
    wrong = np.flatnonzero(rejected > chosen)
    if len(wrong):
        row = wrong[0]
        raise UsageError(
            f"{source}: the rejected picture scored above the chosen one in {len(wrong)} of {len(found)} rows, row {row} "
            f"for one ({rejected[row]:.6g} over {chosen[row]:.6g}): swap the two there or leave the rows out; negate "
            "scores of which the lower is the better"
        )
    rows = np.flatnonzero(chosen != rejected).tolist()  # a missing score equals nothing
    ties = len(found) - len(rows)
    if not rows:
        raise UsageError(f"{source}: all {ties} pairs are ties, chosen_score equals rejected_score: none is preferred")
    if ties:
        row = int(np.argmax(chosen == rejected))
        _say(f"{ties} of {len(found)} pairs of {source} are ties, row {row} for one, and are left out")
    unscored = int(missing_score.sum())
    if 0 < unscored < len(found):
        row = int(np.argmax(missing_score))
        _say(
            f"{unscored} of {len(found)} rows of {source} lack a score, row {row} for one: none is used, chosen "
            "pictures count 1 and rejected ones 0"
        )
    return rows if ties else range(len(found)), not unscored


def _numbers(source: str, found: Any, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A column of scores, float32 [N]: NaN where a row has none. Raises UsageError where one is no finite number."""
    values = list(found[name])
    if not re.fullmatch(r"u?int\d+|float\d+|null", str(getattr(found.features[name], "dtype", ""))):
        raise UsageError(
            f"{source}: column {name} holds {_kind(found, name)}, not numbers (row 0: {str(values[0])[:40]!r}): cast it "
            "to float32"
        )
    with np.errstate(over="ignore"):
        numbers = np.array([np.nan if v is None else v for v in values], np.float64).astype(np.float32)
    for row in np.flatnonzero(~np.isfinite(numbers)):
        if values[row] is not None:
            raise UsageError(f"{source}: {name} of row {row} is {values[row]}, which is no finite float32")
    return numbers
