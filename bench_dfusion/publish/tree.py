"""The tree of a published leaderboard: its files by path, and which of those that are there are ours."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from bench_dfusion.publish.card import PAGE_AT, card
from bench_dfusion.publish.dataset import (
    MADE,
    MARK,
    README,
    RUN,
    SAMPLE,
    SHARD,
    Content,
    json_line,
    parquet,
    path_of,
    run_files,
    tables,
)
from bench_dfusion.results import checks


def files(content: Content, space: str | None = None) -> dict[str, bytes]:
    """The tables, the card and the cells, by path in the dataset; samples and companions are files of their own. Raises
    UsageError for records that cannot stand beside each other. `space`: the address of its page."""
    checks.check([(None, r) for r in content.records.values()])
    made = tables(content)
    data = {config: parquet(table) for config, table in made.items() if len(table)}
    digests = {config: hashlib.sha256(value).hexdigest() for config, value in data.items()}
    if content.samples:
        digests["samples"] = hashlib.sha256(json_line(sorted(content.samples.values())).encode()).hexdigest()
    if content.companions:  # what they hold, the records say
        beside = f"{digests['records']} {json_line(sorted(content.companions))}"
        digests["records"] = hashlib.sha256(beside.encode()).hexdigest()
    made = {path_of(config): value for config, value in data.items()}
    return made | run_files(content) | {README: card(content, digests, space).encode()}


def space_in(readme: str | None) -> str | None:
    """The address of the page that a card names."""
    found = re.search(rf"(?m)^{re.escape(PAGE_AT)}<(\S+)>$", readme or "")
    return found[1] if found else None


def is_ours(readme: str) -> bool:
    """Whether a README is the card of a leaderboard that this module wrote."""
    readme = readme.replace("\r\n", "\n")
    head = readme.split("\n---", 1)[0] if readme.startswith("---") else ""
    return f"\n- {MARK}\n" in head + "\n"


def samples_in(paths: Iterable[str]) -> dict[str, str]:
    """The samples among the paths of a published tree, as in `Content`."""
    return {match[1]: path for path in sorted(paths) if (match := SAMPLE.fullmatch(path))}


def companions_in(paths: Iterable[str], content: Content) -> frozenset[str]:
    """Those of a published tree's paths that lie beside the content's records, of whatever name: a later bench-dfusion
    may know more companions."""
    runs = {p: run for p in paths if (run := RUN.fullmatch(p))}
    return frozenset(p for p, run in runs.items() if run[1] in content.records and run[2] not in MADE)


def superseded(paths: Iterable[str], content: Content, made: Iterable[str]) -> set[str]:
    """Paths of a published tree that its configs would still load, or a reader of its cells still find, and whose rows the
    new content has or replaces. `made`: the paths of `files(content)`."""
    kept = {*made, *content.samples.values(), *content.companions}
    cells = content.records.keys() | content.unfinished.keys()

    def ours(path: str) -> bool:
        run = RUN.fullmatch(path)
        return bool(SHARD.fullmatch(path) or SAMPLE.fullmatch(path) or (run and run[1] in cells))

    return {path for path in paths if path not in kept and ours(path)}
