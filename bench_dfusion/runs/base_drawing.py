"""A track's checked base is drawn and judged where it is nowhere yet, once for all runs in a folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from bench_dfusion.diffusion.policy import Policy
from bench_dfusion.errors import UsageError
from bench_dfusion.models.base import NotFinite
from bench_dfusion.results import records
from bench_dfusion.results.checked_base import REDRAW, CheckedBase, file_name, find, key, load, read, write
from bench_dfusion.rewards.contract import Reward
from bench_dfusion.runs import evaluation
from bench_dfusion.tracks.schema import Track
from bench_dfusion.util import files, parallel
from bench_dfusion.util.progress import bar

AT_ONCE = 256  # pictures drawn between two looks at the disk: what a kill loses


def ensure(
    track: Track, folder: Path, policy: Policy, judges: Mapping[str, Reward], model_sha256: str
) -> CheckedBase | None:
    """A track's checked base, drawn now with the policy's reference and kept in `folder` where it is nowhere yet; None for
    a track that has none. Every process of a run calls it.

    Raises UsageError for a base of another model or other judges and where it cannot be drawn, PluginError where a judge
    gives no numbers. What was drawn before a kill is not drawn again.
    """
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
            f"{where} is the base of another model ({base.model_sha256[:12]}…, not {model_sha256[:12]}…): {REDRAW}"
        )
    for name, fingerprint in here.items():
        if base.fingerprints.get(name) != fingerprint:
            raise UsageError(f"{where} was judged by another {name} (its weights or rules differ): {REDRAW}")
    return base


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
    except files.Busy:
        pass
    print(f"{busy}; this one waits for it", file=sys.stderr, flush=True)
    with files.locked(lock):
        yield


def draw(
    track: Track, policy: Policy, judges: Mapping[str, Reward], model_sha256: str, parts: Path | None = None
) -> CheckedBase:
    """Draw and judge a track's base with the policy's reference. `parts`: a directory that keeps what is done, prompts by
    prompts, and from which it goes on."""
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
