"""The files beside a record that a check of it needs; the record holds the hash of each.

A merge copies them, a publication carries them, `verify` compares them. The checked base of a track lies once among its
runs, beside their directories.
"""

from __future__ import annotations

from pathlib import Path

from bench_dfusion.errors import UsageError
from bench_dfusion.models.layout import LORA, WHOLE
from bench_dfusion.results import checked_base, checks, records
from bench_dfusion.results.records import Record
from bench_dfusion.util import files

HASHES = {
    LORA: "lora_sha256",
    WHOLE: "lora_sha256",
    checked_base.SCORES: "scores_sha256",
}  # the field of Record.provenance; None there: no such file
MAY_BE_MISSING = {LORA, WHOLE}  # records of schema version 1 were published without


def weights_file(record: Record) -> str:
    """The name of the file of a record's trained weights: the LoRA's, or the network's own."""
    shape = record.resolved.get("track", {}).get("lora", {})
    return WHOLE if isinstance(shape, dict) and shape.get("rank") == 0 else LORA


def hashes(record: Record) -> dict[str, str]:
    """The SHA-256 that a record gives of each of its companions, by name: those of earlier rungs are `rungs/N/NAME`."""
    found: dict[str, str] = {}
    for stage in record.stages:
        folder = "" if stage is record else f"{records.rung_folder(Path(), stage.rung or 1).as_posix()}/"
        names = (weights_file(record), checked_base.SCORES)
        of = {name: getattr(stage.provenance, HASHES[name]) for name in names}
        found |= {folder + name: digest for name, digest in of.items() if digest is not None}
    return found


def beside(path: Path | None, record: Record) -> dict[str, Path]:
    """The companions of the record in a file, by name. A file that is not called record.json (one sent by mail), or
    None, has none beside it.

    Raises UsageError, in one line that names the file, for one that is not the record's, and for one that is missing and
    not in MAY_BE_MISSING.
    """
    found = {}
    for name, expected in hashes(record).items():
        last = Path(name).name
        where = f"provenance.{HASHES[last]}"
        file = None
        if path is not None and path.name == "record.json":
            file = records.beside(path, record, name) if name == last else path.parent / name
        if file is None or not file.is_file():
            if last not in MAY_BE_MISSING:
                raise UsageError(f"{where}: {name} is missing; leave it beside the record")
            continue
        if files.sha256(file) != expected:
            raise UsageError(f"{where}: {file} is another file than the record's")
        found[name] = file
    return found


def base(path: Path | None, record: Record) -> Path | None:
    """The file of the checked base that the record in a file stands on; None where it has none, or the package ships it.

    Raises UsageError, in one line, where it is not among the runs, or another is.
    """
    if record.provenance.base_sha256 is None:
        return None
    track = checks.track_of(record)
    folder = Path() if path is None or path.name != "record.json" else path.parent.parent
    where = checked_base.find(track, folder)
    if where is None:
        name = checked_base.file_name(track)
        raise UsageError(
            f"provenance.base_sha256: {name} is missing; leave the checked base beside the run directories"
        )
    found = checked_base.load(track, folder)
    if found is None or found.sha256 != record.provenance.base_sha256:
        raise UsageError(f"provenance.base_sha256: {where} is another checked base than the record's")
    return None if where.parent == checked_base.SHIPPED else where
