"""Publish boards as a Hugging Face dataset: a commit to the Hub, or a directory.

With each record goes what lies beside it for a check (`companions`). What is published is read first and merged with
one's own records; the tables are then made anew from all of them. A commit names the head it was merged with: where
somebody else was faster the Hub refuses it, and the new head is read and merged again. Nothing that others published is
ever lost.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from bench_dfusion.errors import UsageError, plain
from bench_dfusion.publish import card, dataset
from bench_dfusion.publish import tree as published_tree
from bench_dfusion.publish.dataset import README, Content
from bench_dfusion.results import companions
from bench_dfusion.results.leaderboard import Board
from bench_dfusion.results.records import Record
from bench_dfusion.util import files, picture_reader
from bench_dfusion.util.progress import bar
from bench_dfusion.version import __version__

ATTEMPTS = 6
WAIT = 1.0  # s before the second attempt, doubled before each further one
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
UPLOAD_FILES, UPLOAD_MB = 32, 100.0  # of one step of an upload, at most (but one file)
Beside = Mapping[str, Mapping[str, Path]]  # companions by name, by the cell's hash
Result = TypeVar("Result")


@dataclass(frozen=True)
class Published:
    """What a publication led to.

    where     the dataset's id or directory, what load_dataset takes
    url       of the commit's dataset or of the pull request; empty for a directory
    records   in the dataset now (count)
    added     of them new, or in the place of another (count)
    beside    files beside the records, LoRAs above all, that are new (count)
    changed   whether anything was written: the same content is not published twice
    content   all that is published now
    """

    where: str
    url: str
    records: int
    added: int
    beside: int
    changed: bool
    content: Content = field(default_factory=Content, repr=False, compare=False)


@dataclass(frozen=True)
class _Tree:
    """A published tree to write: contents by path, files to copy by path, and paths to take away."""

    content: Content
    made: Mapping[str, bytes]
    copied: Mapping[str, Path]
    superseded: set[str]


def summary(done: Published) -> str:
    """What to tell the user: where it is, and how to read it."""
    proposal = re.search(r"/discussions/(\d+)$", done.url)
    verb = "proposed" if proposal else "published"
    new = f"{card.counted(done.added, 'run')} of {done.records} new{_and_beside(done)}"
    what = new if done.changed else "it was there already"
    revision = f', revision="refs/pr/{proposal[1]}"' if proposal else ""
    return (
        f"{verb}: {done.url or done.where} ({what})\n"
        f'datasets.load_dataset("{done.where}", "leaderboard", split="train"{revision}) reads it'
    )


def _and_beside(done: Published) -> str:
    return f" and {card.counted(done.beside, 'file')} beside records" if done.beside else ""


# ---------------------------------------------------------------- a directory


def to_directory(boards: Sequence[Board], folder: Path, replace: bool = False, space: str | None = None) -> Published:
    """Write boards as a dataset directory, or merge them into the leaderboard that lies there.

    The directory is changed as a whole or not at all; files in it that are not of the dataset stay. Raises UsageError
    where it holds anything else than a leaderboard, or another result of a cell (see `dataset.merge`), and where what
    lies beside a record is not the record's (see `companions.beside`).
    """
    own, beside, bases = dataset.content_of(boards), _beside(boards), _bases(boards)
    folder = folder.expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: give another --to")
    folder.parent.mkdir(parents=True, exist_ok=True)
    replaced = folder.with_name(f".{folder.name}.replaced")
    with files.locked(folder.parent), tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as work:
        if replaced.exists() and not folder.exists():  # a kill between the two renames below
            replaced.rename(folder)
        paths, readme = _read(folder)
        if readme is None and any(folder.iterdir() if folder.exists() else ()):
            raise UsageError(f"{folder} is not empty and no leaderboard: give --to a new directory")
        published = _published(paths, readme, lambda path: (folder / path).read_bytes(), str(folder))
        page = space or published_tree.space_in(readme)
        tree = _tree(published, own, boards, beside, bases, paths, replace, Path(work), page)
        if readme is None or (folder / README).read_bytes() != tree.made[README]:
            new = Path(work) / "new"
            if folder.exists():
                shutil.copytree(folder, new, symlinks=True, copy_function=_link)
            for parent in {p for path in (*tree.made, *tree.copied, *tree.superseded) for p in Path(path).parents}:
                if (new / parent).is_symlink():
                    raise UsageError(f"{folder / parent} is a symbolic link: nothing is written through it")
            for path in tree.superseded:
                (new / path).unlink()
            with bar("write files", len(tree.made) + len(tree.copied)) as progress:
                for path in (*tree.made, *tree.copied):
                    (new / path).parent.mkdir(parents=True, exist_ok=True)
                    (new / path).unlink(missing_ok=True)  # it may be one file with the old one's
                    if path in tree.made:
                        (new / path).write_bytes(tree.made[path])
                    else:
                        shutil.copyfile(tree.copied[path], new / path)
                    progress.advance()
            new.chmod(0o755)
            if replaced.exists():
                shutil.rmtree(replaced)
            if folder.exists():
                folder.rename(replaced)
            new.rename(folder)
            shutil.rmtree(replaced, ignore_errors=True)
            return _result(str(folder), "", published, tree, changed=True)
    return _result(str(folder), "", published, tree, changed=False)


def check(folder: Path, found: Sequence[tuple[Path, Record]]) -> None:
    """Where a folder is a published leaderboard, whether the record files found in it are the records that its tables
    are made from, all of them. Raises UsageError."""
    paths, readme = _read(folder)
    if readme is None or not published_tree.is_ours(readme):
        return
    tables = _published(paths, readme, lambda path: (folder / path).read_bytes(), str(folder)).records
    for path, record in found:
        if tables.get(record.cell_hash) != record:
            raise UsageError(plain(f"{path} is not what the table {dataset.path_of('records')} holds of {record.name}"))
    for key in sorted(tables.keys() - {r.cell_hash for _, r in found}):
        raise UsageError(plain(f"{folder} has lost {dataset.run_path(key, 'record.json')} of {tables[key].name}"))


def _read(folder: Path) -> tuple[set[str], str | None]:
    """The paths of a directory's files, and its card, None where it has none."""
    paths = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    readme = folder / README
    return paths, readme.read_text(encoding="utf-8", errors="replace") if README in paths else None


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


# ---------------------------------------------------------------- the Hub


def to_hub(
    boards: Sequence[Board],
    repo: str,
    *,
    pr: bool = False,
    message: str | None = None,
    private: bool = False,
    replace: bool = False,
    endpoint: str | None = None,
    space: bool = False,
) -> Published:
    """Publish boards as the dataset `repo` (OWNER/NAME), made where there is none, in one commit or pull request.

    pr        propose: main stays as it is
    message   of the commit
    private   make a new dataset private
    replace   take one's own record where another result of its cell is published
    space     name in the card the Space of this name, which `space.to_hub` fills
    endpoint  the Hub's address (None: HF_ENDPOINT, else the public one)

    Raises UsageError, in one line with the fix, where there is no token, the dataset is none of ours, the token may not
    write, what lies beside a record is not the record's, or the Hub cannot be reached in `ATTEMPTS` attempts.
    """
    api, token = connect(repo, endpoint)
    own, beside, bases = dataset.content_of(boards), _beside(boards), _bases(boards)
    with tempfile.TemporaryDirectory() as work, bars_on_a_terminal():
        return persist(
            lambda: _commit(api, own, boards, beside, bases, repo, pr, message, private, replace, Path(work), space),
            repo,
            token,
            pr,
        )


def connect(repo: str, endpoint: str | None = None) -> tuple[Any, str]:
    """The Hub's client and the user's token. Raises UsageError where `repo` is no OWNER/NAME or there is no token."""
    from huggingface_hub import HfApi, get_token

    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo, re.ASCII):
        raise UsageError(f"{repo!r} is no id on the Hub: write OWNER/NAME")
    token = get_token()
    if not token:
        raise UsageError("no Hugging Face token: run `hf auth login`, or set HF_TOKEN")
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise UsageError("the Hugging Face token holds signs that no token has: run `hf auth login` again")
    return HfApi(endpoint, token=token, library_name="bench-dfusion", library_version=__version__), token


@contextmanager
def bars_on_a_terminal(hidden: bool = False) -> Iterator[None]:
    """The Hub's client draws its bars into logs too: not while this runs; with `hidden` none anywhere."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hide = (hidden or not sys.stderr.isatty()) and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()


def _commit(
    api: Any,
    own: Content,
    boards: Sequence[Board],
    beside: Beside,
    bases: Mapping[str, Path],
    repo: str,
    pr: bool,
    message: str | None,
    private: bool,
    replace: bool,
    work: Path,
    space: bool,
) -> Published:
    """One attempt: read the head, merge, commit on top of it."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.dataset_info(repo)
    except RepositoryNotFoundError:
        if pr:
            raise UsageError(f"there is no dataset {repo} to propose to (or the token may not see it)") from None
        api.create_repo(repo, repo_type="dataset", private=private or None, exist_ok=True)
        info = api.dataset_info(repo)
    if private and not info.private:
        raise UsageError(f"{repo} exists and is public: leave --private out, or change it on its settings page")

    def read(path: str) -> bytes:
        found = api.hf_hub_download(repo, path, repo_type="dataset", revision=info.sha, cache_dir=work / "cache")
        return Path(found).read_bytes()

    paths = {s.rfilename for s in info.siblings or []}
    readme = read(README).decode("utf-8", errors="replace") if README in paths else None
    if readme is None and paths - {".gitattributes", ".gitignore"}:
        raise UsageError(f"the dataset {repo} holds files and no leaderboard: give another OWNER/NAME")
    published = _published(paths, readme, read, repo)
    folder = Path(tempfile.mkdtemp(dir=work))
    page = f"{api.endpoint}/datasets/{repo}"
    shown = f"{api.endpoint}/spaces/{repo}" if space else published_tree.space_in(readme)
    tree = _tree(published, own, boards, beside, bases, paths, replace, folder, shown)
    # Also how an attempt whose answer was lost is found to have been a success.
    if readme is not None and readme.encode() == tree.made[README]:
        return _result(repo, page, published, tree, changed=False)
    new = _result(repo, page, published, tree, changed=True)
    title = message or f"bench-dfusion: {card.counted(new.added, 'run')}{_and_beside(new)} of {_names(boards)}"
    if pr:
        number = _proposed(api, repo, title, tree.made[README], work)
        if number is not None:
            return _result(repo, f"{page}/discussions/{number}", published, tree, changed=False)
    operations: list[Any] = [CommitOperationAdd(path, data) for path, data in tree.made.items()]
    additions = [CommitOperationAdd(path, str(source)) for path, source in tree.copied.items()]
    _upload(api, repo, additions, pr)
    operations += [*additions, *(CommitOperationDelete(path) for path in sorted(tree.superseded))]
    done = api.create_commit(
        repo, operations, commit_message=title, repo_type="dataset", parent_commit=info.sha, create_pr=pr
    )
    return _result(repo, done.pr_url or page, published, tree, changed=True)


def _upload(api: Any, repo: str, additions: Sequence[Any], pr: bool) -> None:
    """Send the files that a commit will add, some at a time, so that the time left is known. What the Hub holds already
    (from an attempt before) it does not ask for again."""
    sizes = [a.upload_info.size / 1e6 for a in additions]
    with bar("upload (MB)", max(1e-6, sum(sizes))) as progress, bars_on_a_terminal(hidden=True):
        step: list[int] = []
        for number in range(len(additions)):
            step.append(number)
            full = len(step) == UPLOAD_FILES or sum(sizes[n] for n in step) >= UPLOAD_MB
            if full or number == len(additions) - 1:
                api.preupload_lfs_files(repo, [additions[n] for n in step], repo_type="dataset", create_pr=pr)
                progress.advance(sum(sizes[n] for n in step))
                step = []


def _names(boards: Sequence[Board]) -> str:
    return ", ".join("".join(c for c in b.track if c.isprintable()) for b in boards)[:80]


def _proposed(api: Any, repo: str, title: str, readme: bytes, work: Path) -> int | None:
    """The number of an open pull request that proposes exactly this, if there is one."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    found = api.get_repo_discussions(
        repo, repo_type="dataset", discussion_type="pull_request", discussion_status="open"
    )
    for number in [d.num for d in found if d.title == title]:
        try:
            path = api.hf_hub_download(
                repo, README, repo_type="dataset", revision=f"refs/pr/{number}", cache_dir=work / "cache"
            )
        except LocalEntryNotFoundError:  # the network, which is tried again
            raise
        except EntryNotFoundError:
            continue
        if Path(path).read_bytes() == readme:
            return number
    return None


def persist(attempt: Callable[[], Result], repo: str, token: str, pr: bool | None = None) -> Result:
    """Attempt again after what passes: a head that moved, a server or a network that failed.

    `pr`: whether a pull request is made; None where none can be.
    """
    from huggingface_hub.errors import OfflineModeIsEnabled

    wait = WAIT
    for number in range(1, ATTEMPTS + 1):
        try:
            return attempt()
        except (UsageError, OfflineModeIsEnabled) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError("HF_HUB_OFFLINE is set: unset it to publish") from None
        except Exception as error:
            problem, passes = _problem(error, repo, pr)
            problem = problem.replace(token, "…")
            if not passes:
                raise UsageError(problem) from None
            if number == ATTEMPTS:
                raise UsageError(f"{problem}; given up after {ATTEMPTS} attempts: try again later") from None
        print(f"{problem}; attempt {number + 1} of {ATTEMPTS}", file=sys.stderr, flush=True)
        time.sleep(wait * random.uniform(0.5, 1.5))  # two publishers must not meet again
        wait *= 2
    raise AssertionError("unreachable")


def _problem(error: Exception, repo: str, pr: bool | None) -> tuple[str, bool]:
    """What went wrong, in one line, and whether it may pass. Raises what is no fault of the Hub or the network."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError

    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for each in chain:  # an upload's error is wrapped in a RuntimeError, a download's in a LocalEntryNotFoundError
        if isinstance(each, HfHubHTTPError):
            status = each.response.status_code
            said = " ".join((each.server_message or "").split())[:200]
            if status in (409, 412):
                return f"{repo} was changed by somebody else meanwhile, merging again", True
            if status in TRANSIENT:
                return f"the Hub failed for the moment (status {status})", True
            if status == 401:
                return "the Hub does not accept the token: run `hf auth login`, or set HF_TOKEN to a valid one", False
            if status == 403:
                fix = "give the token the right to" if pr else "use a token that may"
                if pr is False:
                    fix = f"propose the rows with --pr, or {fix}"
                return f"the token may not write to {repo}: {fix} ({said})", False
            return f"the Hub refused to publish {repo}: status {status} {said}".rstrip(), False
        if isinstance(each, (HTTPError, ConnectionError, TimeoutError)):
            return f"the Hub cannot be reached ({type(each).__name__}: check the network)", True
    if isinstance(error, (LocalEntryNotFoundError, json.JSONDecodeError)):
        return "the Hub's answer was not whole", True
    raise error


# ---------------------------------------------------------------- both


def _published(paths: set[str], readme: str | None, read: Callable[[str], bytes], where: str) -> Content:
    """What a published tree holds. Raises UsageError where it is no leaderboard, or cannot be read whole."""
    if readme is None:
        return Content()
    if not published_tree.is_ours(readme):
        raise UsageError(
            f"{where} has a README.md that bench-dfusion did not write: it is another dataset, give another place"
        )
    records = sorted(p for p in paths if (shard := dataset.SHARD.fullmatch(p)) and shard[1] == "records")
    if not records:
        raise UsageError(
            f"{where} has lost {dataset.path_of('records')}: bring it back, or publish elsewhere, else rows would be lost"
        )
    found = Content(samples=published_tree.samples_in(paths))
    for path in records:  # one file, unless others wrote more
        found = dataset.merged(found, dataset.read_records(read(path), f"{where}: {path}"))
    return Content(found.records, found.unfinished, found.samples, published_tree.companions_in(paths, found))


def _beside(boards: Sequence[Board]) -> Beside:
    """What lies beside the records of boards for a check of them. Raises UsageError where it is not theirs."""
    places = [(r, p) for b in boards for r, p in zip(b.records, b.paths or [None] * len(b.records), strict=True)]
    found = {}
    with bar("check the files beside records", max(1, len(places))) as progress:
        for record, path in places:
            try:
                found[record.cell_hash] = companions.beside(path, record)
            except UsageError as error:
                raise UsageError(plain(f"{record.name} cannot be published: {error}")) from None
            progress.advance()
    return found


def _bases(boards: Sequence[Board]) -> dict[str, Path]:
    """The checked bases that the records of boards stand on, by path in the dataset. Raises UsageError."""
    found = {}
    for board in boards:
        for record, path in zip(board.records, board.paths or [None] * len(board.records), strict=True):
            try:
                base = companions.base(path, record)
            except UsageError as error:
                raise UsageError(plain(f"{record.name} cannot be published: {error}")) from None
            if base is not None:
                found[dataset.base_path(base.name)] = base
    return found


def _tree(
    published: Content,
    own: Content,
    boards: Sequence[Board],
    beside: Beside,
    bases: Mapping[str, Path],
    paths: set[str],
    replace: bool,
    work: Path,
    space: str | None,
) -> _Tree:
    """The tree that holds both; pictures that are not published yet are written to `work`. `space`: the address of its
    page in a Space."""
    merged = dataset.merged(published, own, replace)
    folders = {r.cell_hash: p.parent for b in boards for r, p in zip(b.records, b.paths, strict=False)}
    needed = {h: f for h, f in folders.items() if h[:16] not in merged.samples}
    samples, written = dict(merged.samples), {}
    with bar("read pictures", max(1, len(needed))) as progress:
        for cell_hash, folder in sorted(needed.items()):
            pictures = {k: _picture(folder / f"{k}.png") for k in dataset.PICTURES if (folder / f"{k}.png").is_file()}
            if pictures:
                data = dataset.sample_rows(own.records[cell_hash], pictures)
                path = dataset.sample_path(cell_hash, data)
                samples[cell_hash[:16]] = path
                written[path] = work / Path(path).name
                written[path].write_bytes(data)
            progress.advance(1)
    new = {
        dataset.run_path(cell_hash, name): source
        for cell_hash, own_files in beside.items()
        for name, source in own_files.items()
        if companions.hashes(merged.records[cell_hash]).get(name) == companions.hashes(own.records[cell_hash]).get(name)
    }
    new = {path: source for path, source in new.items() if path not in merged.companions}
    written |= {path: source for path, source in bases.items() if path not in paths}
    content = Content(merged.records, merged.unfinished, samples, merged.companions | new.keys())
    made = published_tree.files(content, space)
    return _Tree(content, made, written | new, published_tree.superseded(paths, content, made))


def _picture(path: Path) -> bytes:
    data = path.read_bytes()
    try:
        picture_reader.read(data)
    except picture_reader.PictureError as error:
        raise UsageError(f"{path} is no picture ({error}): remove it, or run its cell again") from None
    return data


def _result(where: str, url: str, published: Content, tree: _Tree, changed: bool) -> Published:
    now = tree.content.records
    added = sum(published.records.get(h) is not r for h, r in now.items())
    beside = sum(dataset.RUN.fullmatch(path) is not None for path in tree.copied)
    return Published(where, url, len(now), added, beside, changed, tree.content)
