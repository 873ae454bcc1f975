"""Merging: what comes in, what is refused and why, and that nothing is ever written elsewhere or in part."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from boards import changed, digest, leave, place, record, track

from bench_dfusion.errors import UsageError
from bench_dfusion.results import checked_base, companions, leaderboard, merge, records
from bench_dfusion.util import files

LEADERBOARDS = Path(__file__).parent.parent / "leaderboards"


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def only_refusal(done: merge.Merged) -> str:
    ((_, reason),) = done.refused
    return reason


def test_published_records_come_in_as_they_are_and_only_once(tmp_path: Path, said) -> None:
    into = tmp_path / "board"
    published = tmp_path / "micro-v1"
    for folder in (LEADERBOARDS / "micro-v1").glob("dpo-*"):
        shutil.copytree(folder, published / folder.name)
    n = len(list(published.iterdir()))
    assert n == 20
    code, out, _ = said("merge", published, "--into", into, "--dry-run")
    assert code == 0 and f"{n} to add, 0 there already, 0 refused; nothing written" in out and not into.exists()
    code, out, _ = said("merge", published, "--into", into)
    assert code == 0 and f"{n} added, 0 there already, 0 refused" in out
    assert files_of(into).keys() == {f"micro-v1/{name}" for name in files_of(published)}
    assert [r for _, r in records.find(into)] == [r for _, r in records.find(published)], "in this schema, nothing lost"
    stamps = {p: p.stat().st_mtime_ns for p in into.rglob("*")}
    code, out, _ = said("merge", published, into, "--into", into)
    assert code == 0 and f"0 to add, {2 * n} there already, 0 refused" in out
    assert {p: p.stat().st_mtime_ns for p in into.rglob("*")} == stamps


def test_files_run_directories_and_leaderboards_are_sources(tmp_path: Path) -> None:
    first = changed(record(seed=0), "provenance.lora_sha256", digest("weights"))
    runs = leave(tmp_path / "runs", first, record(seed=1))
    (place(runs, first).parent / companions.LORA).write_bytes(b"weights")
    one = tmp_path / "sent by mail.json"
    records.write(one, record(seed=2))
    other = leave(tmp_path / "board", record(seed=2, of=track(name="other")))
    done = merge.merge([runs, one, other, runs], tmp_path / "into")
    assert done.written and [source for source, _ in done.added][2] == one
    expected = [record(seed=s) for s in range(3)] + [record(seed=2, of=track(name="other"))]
    assert sorted(p for _, p in done.added) == sorted(place(tmp_path / "into", r) for r in expected)
    assert {r.cell_hash for _, r in records.find(tmp_path / "into")} == {r.cell_hash for r in expected}
    assert len(files_of(tmp_path / "into")) == 5 and done.loras == 1, "records, and the LoRA of the one that has it"
    assert (place(tmp_path / "into", first).parent / companions.LORA).read_bytes() == b"weights"
    assert [len(b.records) for b in leaderboard.boards(tmp_path / "into")] == [1, 3]


def test_the_lora_of_another_run_beside_a_doctored_record_is_refused(tmp_path: Path) -> None:
    theirs = leave(tmp_path / "theirs", record())
    (place(theirs, record()).parent / companions.LORA).write_bytes(b"another")
    done = merge.merge([theirs], tmp_path / "into")
    assert "provenance.lora_sha256: " in only_refusal(done) and "is another file" in only_refusal(done)


def test_scores_go_with_their_record_and_must_not_be_missing(tmp_path: Path) -> None:
    scored = changed(record(), "provenance.scores_sha256", digest("scores"))
    theirs = leave(tmp_path / "theirs", scored)
    assert "scores.parquet is missing" in only_refusal(merge.merge([theirs], tmp_path / "into"))
    place(theirs, scored).with_name(checked_base.SCORES).write_bytes(b"scores")
    done = merge.merge([theirs], tmp_path / "into")
    assert done.written and done.loras == 0
    assert place(tmp_path / "into", scored).with_name(checked_base.SCORES).read_bytes() == b"scores"
    place(theirs, scored).with_name(checked_base.SCORES).write_bytes(b"another")
    done = merge.merge([theirs], tmp_path / "elsewhere")
    assert "provenance.scores_sha256: " in only_refusal(done) and "is another file" in only_refusal(done)


def test_a_submitter_is_written_into_records_that_name_none(tmp_path: Path, refused) -> None:
    named = record(seed=1).model_copy(update={"submitter": "them"})
    merge.merge([leave(tmp_path / "theirs", record(), named)], tmp_path / "into", submitter="me")
    assert {r.seed: r.submitter for _, r in records.find(tmp_path / "into")} == {0: "me", 1: "them"}
    assert "submitter '../x'" in refused("merge", tmp_path / "theirs", "--into", tmp_path / "b", "--submitter", "../x")


def test_the_same_result_is_there_already_whatever_ran_it(tmp_path: Path) -> None:
    into = leave(tmp_path / "into", record())
    before = files_of(into)
    again = record()
    for path, value in {
        "cost.seconds": {"sample": 9.0},
        "cost.device": "H100",
        "provenance.hardware": "another computer",
        "provenance.plugins": dict.fromkeys(("algo", "builder", "reward"), "bench-dfusion 0.2.0"),
        "given.set": ["algo.beta=1"],
    }.items():
        again = changed(again, path, value)
    done = merge.merge([leave(tmp_path / "theirs", again)], into)
    assert len(done.present) == 1 and not done.added and not done.refused
    assert files_of(into) == before


def refusals() -> dict[str, tuple[records.Record, str]]:
    """Against a leaderboard that holds record(gains=(0.25,) * 4)."""
    other_version = record(seed=1, of=track(sampler={"steps": 5}))
    judge = changed(record(seed=1), "verdicts.0.fingerprint", digest("another oracle"))
    unpinned = track(model={"id": "toy"})
    return {
        "track": (other_version, "results of different track versions never merge"),
        "judge": (judge, "its judge oracle has other weights or rules than that of "),
        "check": (changed(record(seed=1), "verdicts.0.gain.mean", 0.9), "it contradicts itself: verdict of oracle"),
        "result": (record(gains=(0.25, 0.25, 0.25, 0.5)), "verdicts.0.trained is 0.75 there and 0.8125 here"),
        "batch": (record(of=track(batch=7)), "resolved.track.batch is 64 there and 7 here"),
        "unpinned": (record(seed=1, of=unpinned), "results of different track versions never merge"),
    }


@pytest.mark.parametrize("case", refusals())
def test_what_cannot_stand_beside_the_others_is_refused_and_nothing_is_written(case: str, tmp_path: Path, said) -> None:
    bad, expected = refusals()[case]
    into = leave(tmp_path / "into", record(gains=(0.25,) * 4))
    before = files_of(into)
    source = leave(tmp_path / "theirs", bad, record(seed=2))
    code, out, err = said("merge", source, "--into", into)
    assert code == 2 and "1 to add, 0 there already, 1 refused; nothing written" in out and not err
    assert files_of(into) == before
    (line,) = [line for line in out.splitlines() if line.startswith("refused")]
    assert str(place(source, bad)) in line and expected in line
    if case != "check":
        assert str(place(into, record())) in line, "the file it does not fit is named"

    code, out, err = said("merge", source, "--into", into, "--skip-refused")
    assert code == 1 and "1 added, 0 there already, 1 refused" in out and "nothing written" not in out
    assert files_of(into).keys() - before.keys() == {str(place(Path(), record(seed=2)))}


def test_base_models_must_be_one_where_the_track_does_not_fix_it(tmp_path: Path) -> None:
    free = track(model={"id": "toy"})
    other = changed(record(seed=1, of=free), "provenance.model_sha256", digest("another model"))
    done = merge.merge([leave(tmp_path / "theirs", record(of=free), other)], tmp_path / "into")
    assert "its base model is not that of" in only_refusal(done) and not done.written


def test_sources_that_contradict_each_other_are_refused_and_the_first_counts(tmp_path: Path) -> None:
    first = leave(tmp_path / "a", record())
    second = leave(tmp_path / "b", record(gains=(0.1, 0.2, 0.3, 0.5)))
    done = merge.merge([second, first], tmp_path / "into")
    assert not done.written and not (tmp_path / "into").exists()
    assert str(second) in only_refusal(done)
    merge.merge([second, first], tmp_path / "into", skip_refused=True)
    ((_, kept),) = records.find(tmp_path / "into")
    assert kept == record(gains=(0.1, 0.2, 0.3, 0.5))


def test_a_refused_record_does_not_decide_about_others(tmp_path: Path) -> None:
    """Not its track, and not its judges."""
    bad = changed(record(seed=1, of=track(sampler={"steps": 5})), "verdicts.0.gain.mean", 0.9)
    source = leave(tmp_path / "theirs", bad)
    done = merge.merge([source, leave(tmp_path / "good", record())], tmp_path / "into", skip_refused=True)
    assert len(done.added) == 1 and "contradicts itself" in only_refusal(done)


@pytest.mark.parametrize("part", ["algorithm", "builder", "reward"])
@pytest.mark.parametrize(
    "name", ["../../outside", "/etc/x", "..", ".hidden", "a/b", "A", "a\n", "a\x1b[31m", "", "x" * 300]
)
def test_hostile_names_never_become_paths(part: str, name: str, tmp_path: Path) -> None:
    hostile = record(**{part: name})
    assert records.check(hostile) == []
    records.write(tmp_path / "theirs" / "record.json", hostile)
    done = merge.merge([tmp_path / "theirs"], tmp_path / "board" / "into", skip_refused=True)
    reason = only_refusal(done)
    assert "cannot name a directory" in reason or "too long" in reason
    assert reason.isprintable()
    assert not (tmp_path / "board").exists() and len(files_of(tmp_path)) == 1


def test_a_hostile_track_or_seed_never_becomes_a_path(tmp_path: Path) -> None:
    for path, value in {"track": "../outside", "seed": -1, "cell_hash": "../../../x"}.items():
        records.write(tmp_path / "theirs" / "record.json", changed(record(), path, value))
        done = merge.merge([tmp_path / "theirs"], tmp_path / "into", skip_refused=True)
        assert "it contradicts itself" in only_refusal(done)
    assert not (tmp_path / "into").exists()


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_symbolic_links_in_the_leaderboard_are_never_written_through(depth: int, tmp_path: Path) -> None:
    into, outside = tmp_path / "into", tmp_path / "outside"
    outside.mkdir()
    target = place(into, record())
    link = [target.parent.parent, target.parent, target][depth]
    link.parent.mkdir(parents=True)
    link.symlink_to(outside / "nothing yet" if depth == 2 else outside)
    done = merge.merge([leave(tmp_path / "theirs", record())], into, skip_refused=True)
    assert "is a symbolic link" in only_refusal(done)
    assert not files_of(outside) and link.is_symlink()


def test_what_is_in_the_way_is_named(tmp_path: Path) -> None:
    source = leave(tmp_path / "theirs", record())
    into = tmp_path / "into"
    target = place(into, record())
    target.parent.parent.mkdir(parents=True)
    target.parent.write_text("a file")
    assert "is in the way" in only_refusal(merge.merge([source], into))
    with pytest.raises(UsageError, match="is no directory"):
        merge.merge([source], target.parent)


def test_damaged_records_are_refused_by_name(tmp_path: Path, said) -> None:
    source = leave(tmp_path / "theirs", record())
    half = tmp_path / "theirs" / "half\x1b[31m" / "record.json"
    half.parent.mkdir()
    half.write_text(place(source, record()).read_text()[:500])
    code, out, _ = said("merge", source, "--into", tmp_path / "into")
    assert code == 2 and "half\\x1b[31m/record.json: is no record, or only a part of one" in out
    assert "\x1b" not in out and not (tmp_path / "into").exists()


def test_wrong_sources_and_an_unsound_leaderboard_are_one_line(tmp_path: Path, refused) -> None:
    (tmp_path / "empty").mkdir()
    good = leave(tmp_path / "good", record())
    twice = leave(tmp_path / "twice", record())
    records.write(tmp_path / "twice" / "copy" / "record.json", record())
    mixed = leave(tmp_path / "mixed", record(), record(seed=1, of=track(seeds=4)))
    broken = tmp_path / "broken"
    (broken / "toy-v1").mkdir(parents=True)
    (broken / "toy-v1" / "record.json").write_text("{")
    for source, into, expected in (
        (tmp_path / "none", good, f"no file or directory {tmp_path / 'none'}"),
        (tmp_path / "empty", good, f"no record.json below {tmp_path / 'empty'}"),
        (good, twice, "in the leaderboard already"),
        (good, mixed, "different track versions never merge"),
        (good, broken, "only a part of one"),
    ):
        before = files_of(tmp_path)
        assert expected in refused("merge", source, "--into", into)
        assert files_of(tmp_path) == before


def test_a_kill_between_two_records_leaves_whole_ones_and_the_next_merge_the_rest(tmp_path: Path, monkeypatch) -> None:
    of = track(seeds=4)
    source = leave(tmp_path / "theirs", *(record(seed=s, of=of) for s in range(4)))
    into = tmp_path / "into"
    replace, placed = os.replace, []

    def dying(a: Path, b: Path) -> None:
        if Path(b).name == "record.json":
            placed.append(b)
            if len(placed) == 3:
                raise KeyboardInterrupt
        replace(a, b)

    with monkeypatch.context() as killed:
        killed.setattr(os, "replace", dying)
        killed.setattr(merge.shutil, "rmtree", lambda *_, **__: None)  # a killed process cleans nothing up
        with pytest.raises(KeyboardInterrupt):
            merge.merge([source], into)
    assert len(records.find(into)) == 2 and list(into.glob(".merge-*"))
    done = merge.merge([source], into)
    assert len(done.added) == 2 and len(done.present) == 2
    assert files_of(into) == files_of(source)
    assert not list(into.glob(".*"))


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    source = leave(tmp_path / "theirs", record(seed=0), record(seed=1))
    write = records.write

    def full(path: Path, content: records.Record) -> None:
        if content.seed == 1:
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(records, "write", full)
    with pytest.raises(UsageError, match="cannot write below .*No space left"):
        merge.merge([source], tmp_path / "into")
    assert not files_of(tmp_path / "into") and not list((tmp_path / "into").iterdir())


def test_two_cells_of_one_directory_name_are_refused(tmp_path: Path) -> None:
    """As their hashes may begin alike."""
    known = merge._Known(tmp_path)
    known.places[place(tmp_path, record())] = Path("theirs/record.json")
    with pytest.raises(UsageError, match="theirs/record.json is another cell of the same directory name"):
        known.take(Path("ours"), record())
    assert known.take(Path("ours"), record(seed=1)) == place(tmp_path, record(seed=1))


def test_what_a_killed_merge_left_is_removed_and_links_are_not_followed(tmp_path: Path) -> None:
    source, into, outside = leave(tmp_path / "theirs", record()), tmp_path / "into", tmp_path / "outside"
    for folder in (into / ".merge-left", outside):
        folder.mkdir(parents=True)
        (folder / "0.json").write_text("{}")
    (into / ".merge-link").symlink_to(outside)
    assert merge.merge([source], into).written
    assert sorted(files_of(outside)) == ["0.json"] and not (into / ".merge-left").exists()


def test_two_merges_at_once_are_refused(tmp_path: Path) -> None:
    source, into = leave(tmp_path / "theirs", record()), tmp_path / "into"
    into.mkdir()
    with files.locked(into), pytest.raises(UsageError, match="another merge is writing"):
        merge.merge([source], into)
    assert merge.merge([source], into).written


def test_what_came_in_between_is_never_overwritten(tmp_path: Path, monkeypatch) -> None:
    source, into = leave(tmp_path / "theirs", record()), tmp_path / "into"
    find = records.find

    def late(folder: Path) -> list[tuple[Path, records.Record]]:
        found = find(folder)
        leave(into, record(gains=(0.1, 0.2, 0.3, 0.5)))
        return found

    with monkeypatch.context() as racing:
        racing.setattr(records, "find", late)
        with pytest.raises(UsageError, match="was written meanwhile"):
            merge.merge([source], into)
    ((_, kept),) = records.find(into)
    assert kept == record(gains=(0.1, 0.2, 0.3, 0.5))
