"""Boards as a dataset: what is put in comes back, and nothing that others published is lost, whatever the Hub does."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import boards
import pyarrow.parquet as pq
import pytest
import yaml
from boards import leave, register
from hub_server import TOKEN, Handler, Hub
from markdown_it import MarkdownIt
from PIL import Image

from bench_dfusion import version
from bench_dfusion.errors import UsageError
from bench_dfusion.publish import dataset, repository, tree, verify
from bench_dfusion.results import checked_base, companions, leaderboard, records, tables
from bench_dfusion.results.leaderboard import Board
from bench_dfusion.results.records import Record
from bench_dfusion.runs import rescore

REPO = "somebody/table"
HELDOUT = {"a red ring": "single", "a cyan square": "single", "two blue rings": "count"}
TINY = boards.track(HELDOUT, name="tiny", seeds=3)
OTHER = boards.track(HELDOUT, name="other", seeds=3)
record = partial(boards.record, gains=0.1, of=TINY)
OURS = [record(seed=s) for s in range(3)]
THEIRS = [record("ddpo", "vanilla", seed=s) for s in range(3)]


def board(*cells: Record) -> Board:
    return Board(cells)


def put(hub: Hub, cells: list[Record], **options: object) -> repository.Published:
    return repository.to_hub([board(*cells)], REPO, endpoint=hub.url, **options)


def hashes(files: dict[str, bytes]) -> set[str]:
    """The cells whose records are in a published tree; its card has to agree with every table."""
    names = [config["config_name"] for config in header(files)["configs"]]
    found = {c: pq.read_table(io.BytesIO(files[dataset.path_of(c)])).to_pylist() for c in names if c != "samples"}
    stored = [row["cell_hash"] for row in found["records"]]
    assert len(stored) == len(set(stored)), "a cell twice"
    scored = {row["cell_hash"] for row in found["scores"]}
    assert scored == set(stored) and sum(r["seeds"] for r in found["leaderboard"]) == len(stored)
    for row in found["records"]:
        assert json.loads(files[dataset.run_path(row["cell_hash"], "record.json")]) == json.loads(row["record"])
    return set(stored)


def header(files: dict[str, bytes]) -> dict:
    return yaml.safe_load(files["README.md"].decode().split("\n---", 1)[0])


def cells(*records: Record) -> set[str]:
    return {r.cell_hash for r in records}


def run_folder(folder: Path, *records: Record, color: str = "red") -> Path:
    """Run directories with pictures."""
    leave(folder, *records)
    for path in folder.rglob("record.json"):
        Image.new("RGB", (4, 3), color).save(path.with_name("base_trained.png"))
    return folder


def with_files(of: Record, scores: bool = True) -> Record:
    """The record whose companions `leave_files` leaves."""
    named = boards.changed(of, "provenance.lora_sha256", boards.digest(f"LoRA {of.cell_hash} {of.verdicts}"))
    return boards.changed(named, "provenance.scores_sha256", boards.digest(of.cell_hash)) if scores else named


def leave_files(folder: Path, *found: Record) -> Path:
    """Run directories with the companions of `with_files`."""
    leave(folder, *found)
    for each in found:
        run = boards.place(folder, each).parent
        (run / companions.LORA).write_text(f"LoRA {each.cell_hash} {each.verdicts}")
        if each.provenance.scores_sha256:
            (run / checked_base.SCORES).write_text(each.cell_hash)
    return folder


def beside(of: Record, files: dict[str, bytes]) -> dict[str, str]:
    """What is published beside a record, by name."""
    start = dataset.run_path(of.cell_hash, "")
    return {p.removeprefix(start): d.decode() for p, d in files.items() if p.startswith(start) and ".json" not in p}


# ---------------------------------------------------------------- through datasets, as a user would

CHILD = """
import json, sys
import datasets
from bench_dfusion import cli

datasets.disable_progress_bars()

def publish(*words):
    sys.argv = ["bench-dfusion", "publish", *words]
    try:
        cli.main()
    except SystemExit as stopped:
        assert not stopped.code, stopped.code

def load(where, config):
    table = datasets.load_dataset(where, config, split="train")
    rows = [{k: list(v.size) if k == "image" else v for k, v in row.items()} for row in table]
    kinds = {k: "image" if isinstance(f, datasets.Image) else f.dtype for k, f in table.features.items()}
    return rows, kinds

configs = ("leaderboard", "scores", "curves", "samples", "records")
publish("somebody/table", "--from", "runs")
publish("--to", "out", "--from", "runs")
hub, directory = ({c: load(where, c) for c in configs} for where in ("somebody/table", "out"))
assert directory == hub
assert datasets.load_dataset("out", split="train").column_names == list(hub["leaderboard"][1])
publish("somebody/table", "--from", "more")
publish("--to", "out", "--from", "more")
again, changed = ({c: load(where, c) for c in ("leaderboard", "samples")} for where in ("somebody/table", "out"))
assert again == changed
json.dump([hub, changed], open("found.json", "w"))
"""


def test_published_is_what_load_dataset_returns(hub: Hub, tmp_path: Path) -> None:
    good = [with_files(record(seed=s)) for s in range(3)]
    missed = record("ddpo", seed=0, gains=None)
    elsewhere = record(
        "kto", "vanilla", "oracle", of=boards.track(HELDOUT, name="other", seeds=3, evaluation={"judges": ["clip"]})
    )
    leave_files(run_folder(tmp_path / "runs", *good, missed, elsewhere), *good)
    run_folder(tmp_path / "more", record("grpo", seed=2))
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "load_dataset(" in done.stdout and TOKEN not in done.stdout + done.stderr
    first, second = json.loads((tmp_path / "found.json").read_text())

    for config, (rows, kinds) in first.items():
        assert kinds == {name: kind for name, (kind, _) in dataset.COLUMNS[config].items()}
        assert rows and all(list(row) == list(kinds) for row in rows)
    ranked, miss = [r for r in first["leaderboard"][0] if r["track"] == "tiny-v1"]
    (other,) = [r for r in first["leaderboard"][0] if r["track"] == "other-v1"]
    frame = tables.table(board(*good, missed))
    assert ranked["gain"] == frame["oracle gain"][0] and ranked["low"] == frame["oracle low"][0]
    assert (ranked["rank_low"], ranked["rank_high"], ranked["rank"]) == (1, 1, "1") and ranked["state"] == "complete"
    assert miss["gain"] == -math.inf and miss["state"] == "miss"
    empty = ("rank_low", "rank_high", "rank", "base", "trained", "low", "high", "interval", "diversity", "kl")
    assert all(miss[name] is None for name in empty)
    assert (other["judge"], other["state"], other["rank"]) == ("clip", "checkpoint", None)

    stored = {r["cell_hash"]: Record.model_validate_json(r["record"]) for r in first["records"][0]}
    assert stored == {r.cell_hash: r for r in (*good, missed, elsewhere)}
    of = [r for r in first["scores"][0] if r["cell_hash"] == good[0].cell_hash and r["judge"] == "oracle"]
    whole, verdict = of[0], good[0].verdicts[0]
    assert (whole["template"], whole["prompt"], whole["n"]) == (None, None, 3)
    assert (whole["gain"], whole["low"], whole["high"]) == (verdict.gain.mean, verdict.gain.low, verdict.gain.high)
    parts = {r["template"]: (r["base"], r["trained"], r["n"]) for r in of if r["prompt"] is None and r["template"]}
    assert parts == {"single": (*verdict.templates["single"], 2), "count": (*verdict.templates["count"], 1)}
    each = {r["prompt"]: (r["base"], r["trained"]) for r in of if r["prompt"]}
    assert each == dict(zip(HELDOUT, verdict.per_prompt, strict=True))
    assert [r["gain"] for r in first["scores"][0] if r["cell_hash"] == missed.cell_hash] == [-math.inf] * 2
    curve = [r for r in first["curves"][0] if r["cell_hash"] == good[0].cell_hash]
    assert [r["value"] for r in curve if r["metric"] == "train/loss"] == [r.metrics["loss"] for r in good[0].rounds]
    assert [(r["round"], r["value"]) for r in curve if r["metric"] == "winner_reward"] == [(1, 0.6)]  # none in round 0
    assert {tuple(r["image"]) for r in first["samples"][0]} == {(4, 3)} and len(first["samples"][0]) == 5
    assert first["samples"][0][0]["prompts"].splitlines() == list(HELDOUT)

    # The directory has other content now, and load_dataset had read it before.
    assert len(second["samples"][0]) == 6
    assert len(second["leaderboard"][0]) == len(first["leaderboard"][0]) + 1
    # What is published is a folder of runs too, as the card says.
    made = leaderboard.boards(tmp_path / "out")
    assert [tables.csv(b) for b in made] == [
        tables.csv(b) for b in (board(elsewhere), board(*good, missed, record("grpo", seed=2)))
    ]


# ---------------------------------------------------------------- merging


@pytest.fixture(params=["hub", "directory"])
def place(request: pytest.FixtureRequest, tmp_path: Path):
    """Publishes to either place; returns the published files."""
    if request.param == "hub":
        server = request.getfixturevalue("hub")

        def to_hub(found: list[leaderboard.Board], replace: bool = False) -> dict[str, bytes]:
            repository.to_hub(found, REPO, replace=replace, endpoint=server.url)
            return server.repos[REPO].files

        return to_hub

    def to_directory(found: list[leaderboard.Board], replace: bool = False) -> dict[str, bytes]:
        folder = tmp_path / "out"
        repository.to_directory(found, folder, replace)
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    return to_directory


def test_others_rows_and_pictures_survive(place, tmp_path: Path) -> None:
    theirs = leaderboard.boards(run_folder(tmp_path / "theirs", *THEIRS))
    before = place(theirs)
    ours = leaderboard.boards(run_folder(tmp_path / "ours", *OURS, color="blue"))
    after = place(ours)
    assert hashes(before) == cells(*THEIRS) and hashes(after) == cells(*THEIRS, *OURS)
    kept = {p: d for p, d in before.items() if p.startswith("samples/")}
    assert len(kept) == 3 and kept.items() <= after.items()
    assert len([p for p in after if p.startswith("samples/")]) == 6
    assert place(theirs) == after  # theirs again: nothing changes
    alone = place([board(record("nft", of=OTHER))])
    assert {r["track"] for r in pq.read_table(io.BytesIO(alone[dataset.path_of("leaderboard")])).to_pylist()} == {
        "tiny-v1",
        "other-v1",
    }


def test_another_result_of_a_cell_is_refused_and_replaced_on_demand(place, tmp_path: Path) -> None:
    def with_verdicts(gain: float) -> Record:
        return OURS[0].model_copy(update={"verdicts": record(gains=gain).verdicts})

    before = place(leaderboard.boards(run_folder(tmp_path / "a", OURS[0])))
    slower = OURS[0].model_copy(update={"cost": OURS[0].cost.model_copy(update={"seconds": {"train": 99.0}})})
    assert place([board(slower)]) == before  # timings apart they agree: the published one stays
    changed = leaderboard.boards(run_folder(tmp_path / "b", with_verdicts(0.3), color="blue"))
    with pytest.raises(UsageError, match=r"verdicts\.0\.trained is 0\.\d+ there and 0\.\d+ here.*--replace"):
        place(changed)
    after = place(changed, replace=True)
    (row,) = pq.read_table(io.BytesIO(after[dataset.path_of("leaderboard")])).to_pylist()
    assert row["gain"] == pytest.approx(0.3, abs=0.05)
    old, new = ([p for p in files if p.startswith("samples/")] for files in (before, after))
    assert len(new) == 1 and new != old, "the old picture shows another run"


def test_an_unfinished_cell_counts_as_missing_until_it_has_a_record(place, tmp_path: Path) -> None:
    folder = leave(tmp_path / "runs", *OURS[:2])
    register(folder, OURS[2])
    table = dataset.path_of("leaderboard")
    (row,) = pq.read_table(io.BytesIO(place(leaderboard.boards(folder))[table])).to_pylist()
    assert (row["state"], row["seeds"], row["missing"]) == ("incomplete", 2, 1)
    assert row["low"] is not None and row["rank"] is None
    (row,) = pq.read_table(io.BytesIO(place([board(OURS[2])])[table])).to_pylist()
    assert (row["state"], row["seeds"], row["missing"]) == ("complete", 3, 0)


def test_what_lies_beside_records_is_carried_and_stays(place, tmp_path: Path) -> None:
    theirs, ours = [with_files(r) for r in THEIRS], [with_files(r, scores=False) for r in OURS]
    names = {companions.LORA, checked_base.SCORES}
    before = place(leaderboard.boards(leave_files(tmp_path / "theirs", *theirs)))
    kept = {r.cell_hash: beside(r, before) for r in theirs}
    assert all(k.keys() == names for k in kept.values()) and len({k[companions.LORA] for k in kept.values()}) == 3
    bare = place(leaderboard.boards(leave(tmp_path / "bare", *ours)))
    assert hashes(bare) == cells(*ours, *theirs) and not any(beside(r, bare) for r in ours)
    assert {r.cell_hash: beside(r, bare) for r in theirs} == kept
    assert place(leaderboard.boards(tmp_path / "theirs")) == bare

    after = place(leaderboard.boards(leave_files(tmp_path / "ours", *ours)))  # their owner has found the LoRAs
    assert {r.cell_hash: beside(r, after) for r in theirs} == kept
    assert [beside(r, after).keys() for r in ours] == [{companions.LORA}] * 3
    assert after["README.md"] != bare["README.md"], "by which a proposal of these files is known"
    assert place(leaderboard.boards(tmp_path / "bare")) == after


def test_a_record_is_replaced_with_what_lies_beside_it(place, tmp_path: Path) -> None:
    old = with_files(OURS[0])
    new = with_files(OURS[0].model_copy(update={"verdicts": record(gains=0.3).verdicts}), scores=False)
    before = place(leaderboard.boards(leave_files(tmp_path / "a", old, with_files(OURS[1]))))
    changed = leaderboard.boards(leave_files(tmp_path / "b", new))
    with pytest.raises(UsageError, match="--replace"):
        place(changed)
    after = place(changed, replace=True)
    assert beside(old, before).keys() == {companions.LORA, checked_base.SCORES}
    assert beside(new, after) == {companions.LORA: f"LoRA {new.cell_hash} {new.verdicts}"}
    assert beside(OURS[1], after) == beside(OURS[1], before) and hashes(after) == cells(*OURS[:2])


@pytest.mark.parametrize("name", [companions.LORA, checked_base.SCORES])
def test_a_companion_that_is_not_the_records_is_refused_before_anything_is_written(
    name: str, hub: Hub, tmp_path: Path, refused
) -> None:
    ours = with_files(OURS[0])
    found = boards.place(leave_files(tmp_path / "runs", ours), ours).with_name(name)
    found.write_text("another")
    message = refused("publish", "--to", "out", "--from", "runs", cwd=tmp_path)
    field = {companions.LORA: "lora_sha256", checked_base.SCORES: "scores_sha256"}[name]
    assert f"provenance.{field}: " in message and f"{name} is another file" in message
    with pytest.raises(UsageError, match=f"{name} is another file"):
        repository.to_hub(leaderboard.boards(tmp_path / "runs"), REPO, endpoint=hub.url)
    assert not (tmp_path / "out").exists() and not hub.repos


def test_scores_that_a_record_names_must_lie_beside_it(tmp_path: Path) -> None:
    ours = with_files(OURS[0])
    boards.place(leave_files(tmp_path / "runs", ours), ours).with_name(checked_base.SCORES).unlink()
    for found in (leaderboard.boards(tmp_path / "runs"), [board(ours)]):
        with pytest.raises(UsageError, match="provenance.scores_sha256: scores.parquet is missing"):
            repository.to_directory(found, tmp_path / "out")


def test_a_directory_of_before_there_were_files_beside_records_gets_them(tmp_path: Path) -> None:
    theirs, ours = [with_files(r) for r in THEIRS], with_files(OURS[0])
    repository.to_directory(leaderboard.boards(leave_files(tmp_path / "theirs", *theirs)), tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "runs")
    done = repository.to_directory(leaderboard.boards(leave_files(tmp_path / "ours", ours)), tmp_path / "out")
    assert (done.records, done.added, done.beside) == (4, 1, 2)
    assert repository.summary(done).startswith(
        f"published: {tmp_path / 'out'} (1 run of 4 new and 2 files beside records)"
    )
    done = repository.to_directory(leaderboard.boards(tmp_path / "theirs"), tmp_path / "out")
    assert (done.added, done.beside, done.changed) == (0, 6, True)
    repository.check(tmp_path / "out", records.find(tmp_path / "out"))


def test_a_published_directory_can_be_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong, bare = map(with_files, OURS)
    leave_files(tmp_path / "runs", right, wrong)
    leave(tmp_path / "runs", bare := bare.model_copy(update={"provenance": OURS[2].provenance}))
    repository.to_directory(leaderboard.boards(tmp_path / "runs"), tmp_path / "out")
    places = {r.cell_hash: tmp_path / "out" / dataset.run_path(r.cell_hash, "record.json") for r in OURS}
    places[wrong.cell_hash].with_name(companions.LORA).write_bytes(b"another")
    drawn: list[Path] = []

    def again(folder: Path, *_: object) -> rescore.Rescored:
        drawn.append(folder)
        return rescore.Rescored(right, [], right.verdicts, [], {}, True, [])

    monkeypatch.setattr(rescore, "run", again)
    found = {v.record.cell_hash: (v.status, v.detail) for v in verify.run(tmp_path / "out", 3)}
    assert found[right.cell_hash] == ("matches", "to the last bit") and drawn == [places[right.cell_hash].parent]
    assert found[wrong.cell_hash][0] == "differs" and companions.LORA in found[wrong.cell_hash][1]
    assert found[bare.cell_hash] == ("cannot be verified", "no LoRA: cannot be verified but by --rerun")

    records.write(places[right.cell_hash], boards.changed(right, "drift.kl", 0.02))
    with pytest.raises(UsageError, match="is not what the table records/train.* holds of dpo/dfusion/clip/seed 0"):
        verify.run(tmp_path / "out", 0)
    places[right.cell_hash].unlink()
    with pytest.raises(UsageError, match=f"has lost runs/{right.cell_hash}/record.json"):
        verify.run(tmp_path / "out", 0)


def test_links_in_a_directory_are_never_written_through(tmp_path: Path) -> None:
    repository.to_directory([board(*THEIRS)], tmp_path / "out")
    shutil.move(tmp_path / "out" / "runs", tmp_path / "elsewhere")
    (tmp_path / "out" / "runs").symlink_to(tmp_path / "elsewhere")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    with pytest.raises(UsageError, match="runs is a symbolic link"):
        repository.to_directory([board(*OURS)], tmp_path / "out")
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_a_dataset_of_something_else_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.create(REPO, {"README.md": b"---\nlicense: mit\n---\n# Cats\n- bench-dfusion-leaderboard\n", "cats.csv": b"a"})
    with pytest.raises(UsageError, match=f"{REPO} has a README.md that bench-dfusion did not write"):
        put(hub, OURS)
    assert set(hub.repos[REPO].files) == {".gitattributes", "README.md", "cats.csv"}
    hub.create("somebody/data", {"data.csv": b"a"})
    with pytest.raises(UsageError, match="holds files and no leaderboard"):
        repository.to_hub([board(*OURS)], "somebody/data", endpoint=hub.url)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty and no leaderboard"):
        repository.to_directory([board(*OURS)], tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("damage", ["gone", "cut", "forged"])
def test_records_that_cannot_be_read_are_never_written_over(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    repository.to_directory([board(*THEIRS)], folder)
    stored = folder / dataset.path_of("records")
    data = stored.read_bytes()
    stored.unlink()
    if damage == "cut":
        stored.write_bytes(data[:-20])
    if damage == "forged":
        table = pq.read_table(io.BytesIO(data))
        stored.write_bytes(dataset.parquet(table.set_column(2, "cell_hash", [["0" * 64] * 3])))
    readme = (folder / "README.md").read_bytes()
    with pytest.raises(UsageError, match="records/train"):
        repository.to_directory([board(*OURS)], folder)
    assert (folder / "README.md").read_bytes() == readme


def test_a_directory_is_whole_after_a_kill_and_keeps_foreign_files(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    repository.to_directory([board(*THEIRS)], folder)
    (folder / "notes.txt").write_text("mine")
    folder.rename(tmp_path / ".out.replaced")  # as a kill between the two renames leaves it
    done = repository.to_directory([board(*OURS)], folder)
    assert (done.records, done.added) == (6, 3) and (folder / "notes.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# ---------------------------------------------------------------- the Hub at its worst


def test_two_publishers_at_once_both_get_in(hub: Hub) -> None:
    hub.create(REPO)
    together = threading.Barrier(2)
    hub.faults = [lambda _: together.wait(20) and None, lambda _: together.wait(20) and None]
    failed: list[BaseException] = []

    def publisher(own: list[Record]) -> None:
        try:
            put(hub, own)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=publisher, args=(own,)) for own in (OURS, THEIRS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed
    assert hashes(hub.repos[REPO].files) == cells(*OURS, *THEIRS)
    assert len(hub.repos[REPO].log) == 3 and sum("/commit/" in r for r in hub.requests) == 3


def test_a_commit_cut_in_the_middle_changes_nothing_and_is_tried_again(hub: Hub) -> None:
    hub.create(REPO)
    seen: list[set[str]] = []

    def cut(request: Handler) -> bool:
        request.rfile.read(int(request.headers["Content-Length"]) // 2)
        seen.append(set(hub.repos[REPO].files))
        request.cut()
        return True

    hub.faults = [cut]
    put(hub, OURS)
    assert seen == [{".gitattributes"}] and len(hub.repos[REPO].log) == 2
    assert hashes(hub.repos[REPO].files) == cells(*OURS)


@pytest.mark.parametrize("pr", [False, True])
def test_a_commit_whose_answer_was_lost_is_not_made_twice(pr: bool, hub: Hub) -> None:
    put(hub, THEIRS)
    before = hub.repos[REPO].refs["main"]
    hub.faults = [lambda request: request.cut]
    done = put(hub, OURS, pr=pr)
    repo = hub.repos[REPO]
    assert len(repo.commits) == 3 and len(repo.refs) == 1 + pr
    assert (repo.refs["main"] == before) == pr
    assert done.url.endswith("/discussions/1" if pr else REPO) and done.records == 6
    assert hashes(repo.commits[repo.refs["refs/pr/1" if pr else "main"]]) == cells(*OURS, *THEIRS)


def test_a_proposal_leaves_main_alone_and_is_made_once(hub: Hub) -> None:
    with pytest.raises(UsageError, match=f"no dataset {REPO} to propose to"):
        put(hub, OURS, pr=True)
    assert not hub.repos
    put(hub, THEIRS)
    repo = hub.repos[REPO]
    main = repo.refs["main"]
    done = put(hub, OURS, pr=True, message="my rows")
    assert done.url == f"{hub.url}/datasets/{REPO}/discussions/1" and done.changed
    assert repo.refs["main"] == main and hashes(repo.files) == cells(*THEIRS)
    proposed = repo.refs["refs/pr/1"]
    assert repo.titles[proposed] == "my rows" and hashes(repo.commits[proposed]) == cells(*OURS, *THEIRS)
    again = put(hub, OURS, pr=True, message="my rows")
    assert repository.summary(done).splitlines() == [
        f"proposed: {done.url} (3 runs of 6 new)",
        f'datasets.load_dataset("{REPO}", "leaderboard", split="train", revision="refs/pr/1") reads it',
    ]
    assert "it was there already" in repository.summary(again)
    assert again.url == done.url and not again.changed and len(repo.refs) == 2


def test_a_failing_server_is_tried_again_and_given_up_in_one_line(
    hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.down = 2
    put(hub, OURS)
    said = capsys.readouterr().err.splitlines()
    assert said == [f"the Hub failed for the moment (status 503); attempt {n} of 6" for n in (2, 3)]
    hub.faults = [lambda request: request.error(500, "boom") or True] * 3
    monkeypatch.setattr(repository, "ATTEMPTS", 3)
    with pytest.raises(UsageError, match=r"status 500.*after 3 attempts") as stopped:
        put(hub, THEIRS)
    assert "\n" not in str(stopped.value) and not hub.faults
    assert hashes(hub.repos[REPO].files) == cells(*OURS)


def test_a_refusal_is_told_in_one_line_without_the_token(hub: Hub) -> None:
    for status, fix in ((400, "refused to publish"), (403, "propose the rows with --pr")):
        hub.faults = [lambda request, s=status: request.error(s, f"not\nwith {TOKEN}") or True]
        with pytest.raises(UsageError, match=fix) as stopped:
            put(hub, OURS)
        assert TOKEN not in str(stopped.value) and "\n" not in str(stopped.value)


def test_rows_survive_a_server_that_fails_while_they_are_read(hub: Hub) -> None:
    put(hub, THEIRS)
    hub.down, hub.down_for = 2, "/resolve/"
    put(hub, OURS)
    assert not hub.down and hashes(hub.repos[REPO].files) == cells(*OURS, *THEIRS)


def test_no_network_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repository, "ATTEMPTS", 2)
    address = hub.url
    hub.shutdown()
    hub.server_close()
    with pytest.raises(UsageError, match="the Hub cannot be reached .*check the network"):
        repository.to_hub([board(*OURS)], REPO, endpoint=address)


def test_a_new_dataset_is_private_on_demand_and_a_public_one_stays(hub: Hub) -> None:
    put(hub, OURS, private=True)
    assert hub.repos[REPO].private
    hub.repos[REPO].private = False
    with pytest.raises(UsageError, match="exists and is public"):
        put(hub, THEIRS, private=True)
    assert hashes(hub.repos[REPO].files) == cells(*OURS)


@pytest.mark.parametrize(
    ("token", "expected"),
    [("", "hf auth login"), ("hf_wrong", "does not accept the token"), ("hf_sécret", "holds signs that no token has")],
)
def test_a_bad_token_is_named_and_never_shown(
    token: str, expected: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused
) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    message = refused("publish", REPO, "--from", ".", cwd=leave(tmp_path, *OURS))
    assert expected in message and (not token or token not in message)
    assert not hub.repos


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "give one of OWNER/NAME"),
        ((REPO, "--to", "d"), "give one of OWNER/NAME"),
        (("--to", "d", "--pr"), "are of the Hub"),
        (("table",), "write OWNER/NAME"),
        ((REPO, "--from", "nowhere"), "unknown track 'nowhere'"),
    ],
)
def test_wrong_words_are_one_line(words, expected, tmp_path, refused) -> None:
    leave(tmp_path, *OURS)
    (tmp_path / "runs").symlink_to(tmp_path / "tiny-v1")
    assert expected in refused("publish", *words, cwd=tmp_path)
    assert not (tmp_path / "d").exists()


# ---------------------------------------------------------------- the card


def test_hostile_text_is_only_text() -> None:
    evil = (
        "<script>alert(1)</script> | [x](http://evil) ![y](http://evil/i.png) `` ` ``\n---\n# h\x1b[31m @all **b** &lt;"
    )
    prompt = evil.replace("\n", " ").replace("\x1b", "")  # a track has no prompt with a control character
    of = boards.track({prompt: "single", "a red ring": "count"}, name="tiny", seeds=3)
    options = {"window": evil}
    rows = [
        record("+[a](http://evil)", builder=evil, reward=evil, of=of, options=o, tuning=evil) for o in (options, {})
    ]
    card = tree.files(dataset.content_of([board(*rows)]))["README.md"].decode()
    assert header({"README.md": card.encode()})["tags"][0] == dataset.MARK and "\x1b" not in card
    shown = MarkdownIt("commonmark").enable("table").render(card.split("\n---\n", 1)[1])
    for markup in ("<script", "<img", "<a ", "<strong>", "<h1>h"):
        assert markup not in shown
    assert shown.count("<h1>") == 1 and "&lt;script&gt;alert(1)&lt;/script&gt; | [x](http://evil)" in shown
    assert {row.count("<td") for row in shown.split("</table>")[0].split("<tr>")[2:]} == {13}


def test_the_card_declares_only_what_can_be_loaded_and_cites_as_the_project_does(tmp_path: Path) -> None:
    published = tree.files(dataset.content_of([board(record(gains=None, rounds=0))]))
    head = header(published)
    names = ["leaderboard", "scores", "records"]
    assert [c["config_name"] for c in head["configs"]] == names == [c["config_name"] for c in head["dataset_info"]]
    assert [c["config_name"] for c in head["configs"] if c.get("default")] == ["leaderboard"]
    card = published["README.md"].decode()
    assert "not declared: `curves`, `samples`" in card and dataset.path_of("curves") not in published
    citation = yaml.safe_load((Path(__file__).parent.parent / "CITATION.cff").read_text())
    paper = citation["references"][0]
    for text in (citation["title"], citation["version"], citation["authors"][0]["name"], paper["title"]):
        assert text in version.BIBTEX
    assert " and ".join(a["family-names"] for a in paper["authors"]) in version.BIBTEX and version.BIBTEX in card


def test_one_collapsed_run_makes_its_row_a_miss_without_an_interval() -> None:
    made = dataset.tables(dataset.content_of([board(*OURS[:2], record(seed=2, gains=None))]))
    (row,) = made["leaderboard"].to_pylist()
    assert (row["state"], row["gain"], row["low"], row["high"], row["failed"]) == ("miss", -math.inf, None, None, 1)
    assert row["base"] == pytest.approx(sum(r.verdicts[0].base for r in OURS[:2]) / 2)


def test_the_same_records_give_the_same_bytes_in_any_order() -> None:
    everything = [*OURS, *THEIRS, record(of=OTHER)]
    first, second = (
        tree.files(dataset.Content({r.cell_hash: r for r in order})) for order in (everything, everything[::-1])
    )
    assert first == second


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"cell_hash": "../../etc"}, "cell_hash is not the hash of"),
        ({"verdicts": OURS[0].verdicts[:1]}, r"verdicts of \['oracle'\], but the track's judges are"),
        ({"resolved": {**OURS[0].resolved, "track": {}}}, "resolved.track is no track"),
        ({"seed": 1}, "seed 1, but the resolved seed is 0"),
        ({"drift": OURS[0].drift.model_copy(update={"kl": math.nan})}, "not finite"),  # type: ignore[union-attr]
    ],
)
def test_a_record_that_contradicts_itself_is_not_published(changes: dict, expected: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=expected):
        repository.to_directory([board(OURS[0].model_copy(update=changes))], tmp_path / "out")
    with pytest.raises(UsageError, match="its seed has more than 64 bits"):
        repository.to_directory([board(record(seed=2**70))], tmp_path / "out")
    assert not (tmp_path / "out").exists()
