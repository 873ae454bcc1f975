"""How far a run is, as it says itself, and what a sweep makes of that."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from processes import SETTINGS, TINY, command

import bench_dfusion
from bench_dfusion.runs import status
from bench_dfusion.sweeps import queue
from bench_dfusion.sweeps.job import Job
from bench_dfusion.sweeps.launcher import BUSY, Ended
from bench_dfusion.util import files


def test_the_share_and_the_time_left_are_of_the_training_since_this_process_began(tmp_path: Path, monkeypatch) -> None:
    clock = iter([1000.0, 1030.0, 1040.0])
    monkeypatch.setattr(status.time, "time", lambda: next(clock))
    reporter = status.Reporter(tmp_path)
    reporter.say("train", 2, 8)
    first = status.read(tmp_path)
    assert first is not None and first.share == 0.25 and first.seconds_left == float("inf")
    reporter.say("train", 4, 8, 0.5, [0.0, 0.1])
    second = status.read(tmp_path)
    assert second is not None and (second.begun, second.begun_at, second.seconds_left) == (1000.0, 2, 60.0)
    reporter.say("evaluate", 8, 8)
    last = status.read(tmp_path)
    assert last is not None and (last.share, last.seconds_left) == (1.0, 0.0)


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"stage": "resting"}', '{"stage": "train", "done": "some"}'])
def test_what_cannot_be_read_says_nothing(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / status.FILE).write_text(content)
    assert status.read(tmp_path) is None


def test_a_directory_that_takes_no_file_stops_no_run(tmp_path: Path) -> None:
    status.Reporter(tmp_path / "a file" / "below").path.parent.parent.write_text("")
    status.Reporter(tmp_path / "a file" / "below").say("train", 1, 2)


def test_a_run_says_what_it_does_and_at_its_end_that_it_is_over(tmp_path: Path, monkeypatch) -> None:
    said: list[tuple[str, int, int]] = []
    say = status.Reporter.say

    def noted(self, stage, done, total, *more) -> None:
        said.append((stage, done, total))
        say(self, stage, done, total, *more)

    monkeypatch.setattr(status.Reporter, "say", noted)
    options = {"track": "micro", "settings": [*SETTINGS, "track.budget.prompts_per_round=1"], "out": tmp_path}
    record = bench_dfusion.run(algo="dpo", builder="vanilla", reward="oracle", **options)  # type: ignore[arg-type]
    rounds = len(record.rounds)
    expected = [("base", 0, rounds), *(("train", n, rounds) for n in range(rounds))]
    assert said == [*expected, ("evaluate", rounds, rounds), ("done", rounds, rounds)]
    (path,) = tmp_path.rglob(status.FILE)
    last = status.read(path.parent)
    assert last is not None and last.stage == "done" and last.rises == [r.rise for r in record.rounds]


def test_a_command_whose_cell_another_process_runs_ends_with_a_status_of_its_own(tmp_path: Path) -> None:
    words = ("run", "--algo", "dpo", "--builder", "vanilla", "--reward", "oracle", "--track", "micro", *TINY)
    (job,) = queue.plan("micro", ["dpo"], ["vanilla"], ["oracle"], 1, tmp_path / "runs", settings=SETTINGS)[0]
    job.folder.mkdir(parents=True)
    with files.locked(job.folder / ".lock", "busy"):
        assert job.locked()
        done = command(*words, cwd=tmp_path)
    assert done.returncode == BUSY == os.EX_TEMPFAIL and "another process is running" in done.stderr
    assert not job.locked()


class Beaten:
    """A launcher whose first try finds the cell taken, by a process that goes on for a while and leaves a record or not."""

    places = 1

    def __init__(self, record: bytes | None):
        self.record, self.tries, self.looks = record, 0, 0

    def ready(self) -> bool:
        return True

    def taken(self, job: Job) -> bool:
        self.looks += 1
        if self.looks == 4 and self.record is not None:
            job.record.write_bytes(self.record)
        return 1 < self.looks < 4

    def start(self, job: Job) -> None:
        self.tries += 1
        job.state, job.started = "running", time.monotonic()

    def ended(self, job: Job) -> Ended | None:
        return Ended("status 75", BUSY) if self.tries == 1 else Ended("status 1", 1)

    def stop(self, jobs: Sequence[Job]) -> None: ...


@pytest.mark.parametrize("leaves", [True, False])
def test_a_cell_that_another_took_first_is_waited_for(leaves: bool, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(queue, "POLL", 0.0)
    options = {"settings": SETTINGS, "track": "micro"}
    record = bench_dfusion.run(algo="dpo", builder="vanilla", reward="oracle", out=tmp_path / "other", **options)  # type: ignore[arg-type]
    (path,) = (tmp_path / "other").rglob("record.json")
    jobs, _ = queue.plan("micro", ["dpo"], ["vanilla"], ["oracle"], 1, tmp_path / "runs", settings=SETTINGS)
    queue.register(jobs)
    launcher = Beaten(path.read_bytes() if leaves else None)
    assert queue.Sweep(jobs, launcher).run() == leaves
    assert jobs[0].state == ("finished" if leaves else "error") and launcher.tries == (1 if leaves else 2)
    assert jobs[0].result is None or jobs[0].result.cell_hash == record.cell_hash
