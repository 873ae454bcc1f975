"""The report page of a published leaderboard as a static Space beside its dataset, each linked to the other."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_dfusion import report
from bench_dfusion.errors import UsageError
from bench_dfusion.publish import dataset, repository
from bench_dfusion.publish.dataset import README, Content
from bench_dfusion.results.leaderboard import Board

PAGE, FOLDER = "index.html", "space"
LARGEST = 10_000_000  # bytes: larger files of a static Space would have to go to the Hub's store of large ones


def to_directory(content: Content, boards: Sequence[Board], folder: Path) -> Path:
    """Write the Space of a published directory into its subdirectory `space`; returns that.

    content  what is published; boards  one's own, whose pictures the page shows
    """
    target = folder.expanduser() / FOLDER
    made = _files(content, boards, "..")
    for name, data in made.items():
        target.mkdir(exist_ok=True)
        part = target / f".{name}.part"
        part.write_bytes(data)
        part.replace(target / name)
    return target


def to_hub(
    content: Content,
    boards: Sequence[Board],
    repo: str,
    *,
    message: str | None = None,
    private: bool = False,
    endpoint: str | None = None,
) -> str:
    """Put the page of what is published as the dataset `repo` into the static Space of the same name, made where there is
    none, in one commit; returns its address. The same page is not committed twice.

    Raises UsageError, in one line with the fix, where the Space is none of ours or the Hub does not take it.
    """
    api, token = repository.connect(repo, endpoint)
    made = _files(content, boards, f"{api.endpoint}/datasets/{repo}", repo)
    with tempfile.TemporaryDirectory() as work, repository.bars_on_a_terminal():
        return repository.persist(lambda: _commit(api, repo, made, message, private, Path(work)), repo, token)


def address(endpoint: str, repo: str) -> str:
    return f"{endpoint}/spaces/{repo}"


def _commit(api: Any, repo: str, made: dict[str, bytes], message: str | None, private: bool, work: Path) -> str:
    """One attempt: read the head, commit on top of it."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.errors import RepositoryNotFoundError

    where = address(api.endpoint, repo)
    try:
        head = api.space_info(repo)
    except RepositoryNotFoundError:
        api.create_repo(repo, repo_type="space", space_sdk="static", private=private or None, exist_ok=True)
        head = api.space_info(repo)
    there = {s.rfilename for s in head.siblings or []}
    old = {
        name: Path(
            api.hf_hub_download(repo, name, repo_type="space", revision=head.sha, cache_dir=work / "cache")
        ).read_bytes()
        for name in made
        if name in there
    }
    if (
        README in old
        and dataset.MARK not in old[README].decode(errors="replace")
        and there
        - {".gitattributes"}
        - {
            *made,
            "style.css",  # which the Hub puts into a new static Space
        }
    ):
        raise UsageError(f"the Space {repo} holds something else: remove it, or publish the dataset under another name")
    if old == made:
        return where
    operations = [CommitOperationAdd(name, data) for name, data in made.items()]
    title = message or "bench-dfusion: the report page"
    api.create_commit(repo, operations, commit_message=title, repo_type="space", parent_commit=head.sha)
    return where


def _files(content: Content, boards: Sequence[Board], home: str, repo: str | None = None) -> dict[str, bytes]:
    """The page and the card of a Space; `home` is the dataset's address, `repo` its name on the Hub."""
    with tempfile.TemporaryDirectory() as work:
        page = report.html(_with_pictures(content, boards, Path(work)), home=home).encode()
    if len(page) > LARGEST:
        raise UsageError(f"the page has {len(page) / 1e6:.0f} MB, too many for a Space: publish fewer tracks together")
    datasets = f"datasets:\n- {repo}\n" if repo else ""
    card = f"""---
title: bench-dfusion leaderboard
sdk: static
app_file: {PAGE}
pinned: false
license: apache-2.0
tags:
- {dataset.MARK}
- leaderboard
{datasets}---
The report page of the leaderboard in [the dataset]({home}), from which it is made: tables, charts, pictures and every record.
"""
    return {PAGE: page, README: card.encode()}


def _with_pictures(content: Content, boards: Sequence[Board], work: Path) -> list[Board]:
    """The boards of everything published, each record at a path as in the dataset, with the pictures of one's own beside."""
    folders = {r.cell_hash: p.parent for b in boards for r, p in zip(b.records, b.paths, strict=False)}
    found = []
    for board in dataset.boards_of(content):
        paths = [work / dataset.run_path(r.cell_hash, "record.json") for r in board.records]
        for record, path in zip(board.records, paths, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            for kind in dataset.PICTURES:
                source = folders.get(record.cell_hash, work) / f"{kind}.png"
                if source.is_file():
                    _link(source, path.parent / source.name)
        unfinished = tuple(
            replace(u, folder=(work / dataset.run_path(u.cell_hash, "cell.json")).parent) for u in board.unfinished
        )
        found.append(replace(board, paths=tuple(paths), unfinished=unfinished))
    return found


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
