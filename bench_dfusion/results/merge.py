"""Records from other machines or people into one leaderboard directory, checked first.

A record's place follows from its own names, never from the path it was found at:
DIR/<track>/<algorithm>-<builder>-<reward>-s<seed>-<hash>/record.json.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench_dfusion.errors import UsageError, plain
from bench_dfusion.results import checks, companions, leaderboard, records
from bench_dfusion.results.records import Record
from bench_dfusion.util import files
from bench_dfusion.util.progress import bar

NAME = re.compile(r"[a-z0-9][a-z0-9._+-]*")
STAGING = ".merge-"  # begins the name of the directory that holds what is not in place yet


@dataclass
class Merged:
    """What a merge did, or with `dry_run` would do."""

    added: list[tuple[Path, Path]] = field(default_factory=list)  # (source, its place in the leaderboard)
    loras: int = 0  # of the added records that come with their LoRA (count)
    present: list[Path] = field(default_factory=list)  # sources whose result is there already
    refused: list[tuple[Path, str]] = field(default_factory=list)  # (source, why)
    written: bool = False


def merge(
    sources: Sequence[Path],
    into: Path,
    dry_run: bool = False,
    skip_refused: bool = False,
    submitter: str = "",
) -> Merged:
    """Add the records of the sources (files, or directories searched below) to the leaderboard directory `into`.

    Everything is checked before anything is written. If a record is refused nothing is written, or with `skip_refused`
    only the others. `submitter` is written into those that name none. Raises UsageError for a source without records
    and for a leaderboard that is itself unsound.
    """
    if submitter and not NAME.fullmatch(submitter.lower()):
        raise UsageError(f"submitter {submitter!r}: letters, digits and . _ + - only")
    paths = _find(sources)
    if into.exists() and not into.is_dir():
        raise UsageError(f"{into} is no directory")
    done = Merged()
    with bar("read records", len(paths)) as progress:
        known = _Known(into)
        accepted: list[tuple[Path, Path, Record, dict[str, Path]]] = []
        bases: dict[Path, Path] = {}
        for path in paths:
            progress.advance()
            try:
                record = records.read(path)
                record = record.model_copy(update={"submitter": record.submitter or submitter})
                beside = companions.beside(path, record)
                base = companions.base(path, record)
                place = known.take(path, record)
            except UsageError as error:
                reason = plain(error).removeprefix(plain(path)).lstrip(": ")
                done.refused.append((path, reason))
                continue
            if place is None:
                done.present.append(path)
            else:
                accepted.append((path, place, record, beside))
                if base is not None:
                    bases[place.parent.parent / base.name] = base
    accepted = list({place: found for found in accepted for place in found[1:2]}.values())  # the one that goes further
    done.added = [(path, place) for path, place, _, _ in accepted]
    done.loras = sum(companions.weights_file(record) in beside for *_, record, beside in accepted)
    if accepted and not dry_run and (skip_refused or not done.refused):
        _write([(place, record, beside) for _, place, record, beside in accepted], bases, into, known.replaced)
        done.written = True
    return done


def _find(sources: Sequence[Path]) -> list[Path]:
    """The record files of the sources, in the order given, each once."""
    found: dict[Path, None] = {}
    for source in sources:
        if not source.exists():
            raise UsageError(f"no file or directory {source}")
        below = records.below(source, "record.json") if source.is_dir() else [source]
        if not below:
            raise UsageError(f"no record.json below {source}")
        found |= dict.fromkeys(below)
    return list(found)


class _Known:
    """The records of the leaderboard and those accepted so far: what the next one is held against."""

    def __init__(self, into: Path):
        self.into = into
        self.cells: dict[str, tuple[Path, Record]] = {}  # by leaderboard.identity
        self.tracks: dict[str, tuple[Path, Record]] = {}  # the first record of each track
        self.judges: dict[tuple[str, str], tuple[Path, str]] = {}  # (track, judge) to its fingerprint
        self.places: dict[Path, Path] = {}
        self.at: dict[str, Path] = {}  # the place of each cell's record
        self.replaced: set[Path] = set()  # places of records of the leaderboard whose run has gone on
        self.checker = checks.Checker()
        self.known = dict(records.find(into))
        for path, record in self.known.items():
            try:
                cell = leaderboard.identity(record)
                if cell in self.cells and not records.differences(self.cells[cell][1], record):
                    raise UsageError(f"{self.cells[cell][0]} is the same result")
                self.at[cell] = path
                self.take(path, record)
            except UsageError as error:
                raise UsageError(
                    plain(f"{path}, in the leaderboard already: {error}; remove it, or merge elsewhere")
                ) from None

    def take(self, path: Path, record: Record) -> Path | None:
        """The place of a record that is new and sound, or goes further than the known one of its cell, whose place it then
        takes; None where all it says is known.

        Raises UsageError where it contradicts itself or cannot stand beside those before it.
        """
        self.checker.refuse(record)
        self.checker.beside(path, record)
        for flag in self.checker.flags(record):
            raise UsageError(f"not to be published: {flag}")
        place = self._place(record)
        cell = leaderboard.identity(record)
        if cell in self.cells:
            other, known = self.cells[cell]
            found = records.differences(known, record)
            if found:
                raise UsageError(f"another result of the same cell is {other}: {found[0]}")
            if not records.further(known, record):
                return None
            self.checker.take(str(path), record)
            self.cells[cell] = path, record
            self.replaced |= {self.at[cell]} & self.known.keys()
            return self.at[cell]
        other, known = self.tracks.get(record.track, (path, record))
        if record.track_hash != known.track_hash:
            raise UsageError(
                f"its {record.track} is not that of {other} ({record.track_hash[:12]}…, not {known.track_hash[:12]}…): "
                "results of different track versions never merge"
            )
        if record.provenance.model_sha256 != known.provenance.model_sha256:
            raise UsageError(f"its base model is not that of {other}: the hashes differ")
        judges = {(record.track, v.judge): (path, v.fingerprint) for v in record.verdicts}
        for judge, (_, fingerprint) in judges.items():
            other, expected = self.judges.get(judge, (path, fingerprint))
            if fingerprint != expected:
                raise UsageError(
                    f"its judge {judge[1]} has other weights or rules than that of {other}: the fingerprints differ"
                )
        if place in self.places:
            raise UsageError(f"{self.places[place]} is another cell of the same directory name")
        self.checker.take(str(path), record)
        self.cells[cell] = path, record
        self.tracks.setdefault(record.track, (path, record))
        self.judges = judges | self.judges
        self.places[place] = path
        return self.at.setdefault(cell, place)

    def _place(self, record: Record) -> Path:
        """Where a record belongs. Raises UsageError for names that are no plain file names, and for a link there."""
        names = {"track": record.track, "algorithm": record.algorithm, "builder": record.builder}
        for what, name in {**names, "reward": record.reward}.items():
            if not NAME.fullmatch(name):
                raise UsageError(
                    f"{what} {name!r} cannot name a directory: lower-case letters, digits and . _ + - only"
                )
        cell = records.folder_name(record.algorithm, record.builder, record.reward, record.seed, record.cell_hash)
        if max(len(record.track), len(cell)) > 200:
            raise UsageError("its names are too long for a directory's")
        place = self.into / record.track / cell / "record.json"
        for part in (place.parent.parent, place.parent, place):
            if part.is_symlink():
                raise UsageError(f"{part} is a symbolic link, and a merge writes below {self.into} only")
            if part.exists() and part.is_dir() == (part == place):
                raise UsageError(f"{part} is in the way")
        return place


def _write(
    accepted: Sequence[tuple[Path, Record, dict[str, Path]]],
    bases: Mapping[Path, Path],
    into: Path,
    replaced: Collection[Path] = (),
) -> None:
    """Stage every record and its companions, copy the checked bases to their places, then move each into its place, a
    record after its companions: a full disk stops it before, a kill between two moves leaves whole records only, and the
    same merge adds the rest. `replaced`: the places where a record is."""
    try:
        into.mkdir(parents=True, exist_ok=True)
        with files.locked(into, f"another merge is writing to {into}"):
            for left in into.glob(f"{STAGING}*"):  # by a merge that was killed
                if not left.is_symlink():
                    shutil.rmtree(left)
            staging = Path(tempfile.mkdtemp(dir=into, prefix=STAGING))
            try:
                with bar("write records", 2 * len(accepted)) as progress:
                    for number, (_, record, beside) in enumerate(accepted):
                        records.write(staging / f"{number}.json", record)
                        for name, source in beside.items():
                            shutil.copyfile(source, staging / _staged(number, name))
                        progress.advance()
                    for place, *_ in accepted:
                        if place.exists() and place not in replaced:
                            raise UsageError(f"{place} was written meanwhile: merge again")
                    for place, source in bases.items():  # before the records that stand on them
                        files.write_atomic(place, source.read_bytes())
                    for number, (place, _, beside) in enumerate(accepted):
                        place.parent.mkdir(parents=True, exist_ok=True)
                        for name in companions.HASHES if place in replaced else ():  # they are of the earlier rung
                            place.with_name(name).unlink(missing_ok=True)
                        for name in beside:
                            (place.parent / name).parent.mkdir(parents=True, exist_ok=True)
                            os.replace(staging / _staged(number, name), place.parent / name)
                        os.replace(staging / f"{number}.json", place)
                        progress.advance()
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise UsageError(f"cannot write below {into} ({error}); what is written is whole, merge again") from None


def _staged(number: int, name: str) -> str:
    return f"{number}.{name.replace('/', '.')}"
