"""What the loop keeps of a round's pairs, and the dataset made of it: read back by datasets and by TRL, without a network."""

from __future__ import annotations

import io
import json
import math
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Features, Image, Value, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Picture
from processes import TINY, command
from torch import Tensor
from trl import unpair_preference_dataset

from bench_dfusion import registry
from bench_dfusion.builders.contract import Components, ConsistentSamples, Samples
from bench_dfusion.diffusion.policy import Trajectory
from bench_dfusion.errors import UsageError
from bench_dfusion.results import records
from bench_dfusion.runs import pairs

RUN = ("run", "--algo", "dpo", "--reward", "clip", *TINY, "--set=track.budget.prompts_per_round=1")  # four rounds

DYING = '''
import os, signal
from pathlib import Path
from typing import Any
from bench_dfusion.runs import pairs
from bench_dfusion.reward_models.clip import Clip

class Unused(Clip):  # a plugin file has to define one
    name = "unused"

keep = pairs.keep

def keep_and_die(folder, samples, reward, number, which):
    """Dies once after round 1 is written, before its checkpoint is, as if in the middle of writing another file."""
    keep(folder, samples, reward, number, which)
    if number == 1 and not Path("died").exists():
        Path("died").touch()
        (folder / ".round-002.parquet.half").write_bytes(b"PAR1")
        os.kill(os.getpid(), signal.SIGKILL)

pairs.keep = keep_and_die
'''


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four rounds on D-Fusion's samples."""
    folder = tmp_path_factory.mktemp("run")
    done = command(*RUN, cwd=folder)
    assert done.returncode == 0, done.stderr
    return only_run(folder)


def only_run(folder: Path) -> Path:
    ((path, _),) = records.find(folder)
    return path.parent


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def loaded(folder: Path, cache: Path) -> Dataset:
    return load_dataset(str(folder), split="train", cache_dir=str(cache))


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """The run again, to be spoilt."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


# ---------------------------------------------------------------- a real run


def test_a_run_exports_to_a_dataset_that_datasets_reads(run: Path, tmp_path: Path) -> None:
    record = records.read(run / "record.json")
    done = command("pairs", "export", str(run), "--out", "mine", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    total = sum(r.pairs for r in record.rounds)
    assert total > 0 and f"{total} pairs of 4 of 4 rounds" in done.stdout
    dataset = loaded(tmp_path / "mine", tmp_path / "cache")
    assert dataset.features == Features(
        prompt=Value("string"),
        chosen=Image(),
        rejected=Image(),
        chosen_score=Value("float32"),
        rejected_score=Value("float32"),
        chosen_seed=Value("int64"),
        rejected_seed=Value("int64"),
        reward=Value("string"),
        round=Value("int64"),
        mask=Image(),
    )
    counts = {r.round: r.pairs for r in record.rounds if r.pairs}
    assert Counter(dataset["round"]) == counts
    assert set(dataset["prompt"]) <= set(record.resolved["track"]["prompts"]["train"])
    assert list(dataset["chosen_seed"]) == list(dataset["rejected_seed"])  # a target starts from its base's noise
    # The pictures are those that were scored, to the bit: the reward says the same of them again.
    reward = registry.load("rewards", "clip")
    clip = reward(reward.Config(model="micro-v2"), torch.device("cpu"))
    for side in ("chosen", "rejected"):
        images = torch.from_numpy(np.stack([np.asarray(image) for image in dataset[side]]))
        assert images.shape == (total, 64, 64, 3)
        again = clip.score(images, dataset["prompt"]).tolist()
        assert again == pytest.approx(dataset[f"{side}_score"], abs=1e-5)
    assert all(
        chosen > rejected for chosen, rejected in zip(dataset["chosen_score"], dataset["rejected_score"], strict=True)
    )
    assert all(mask.mode == "L" and mask.size == (8, 8) for mask in dataset["mask"])
    assert 0 < np.mean([np.asarray(mask) for mask in dataset["mask"]]) < 255


def test_trl_unpairs_it(run: Path, tmp_path: Path) -> None:
    pairs.export(run, tmp_path / "mine")
    dataset = loaded(tmp_path / "mine", tmp_path / "cache")
    done = pairs.export(run, tmp_path / "flat", unpaired=True)
    flat = loaded(tmp_path / "flat", tmp_path / "cache")
    assert sum(done.pairs.values()) == len(dataset) and "| `label` |" in (tmp_path / "flat" / "README.md").read_text()
    assert flat.column_names == unpair_preference_dataset(dataset).column_names
    n = len(dataset)
    assert len(flat) == 2 * n and {"prompt", "completion", "label"} <= set(flat.column_names)
    assert {"chosen", "rejected"}.isdisjoint(flat.column_names)
    assert list(flat["label"]) == [True] * n + [False] * n and list(flat["prompt"]) == list(dataset["prompt"]) * 2
    expected = [*dataset["chosen"], *dataset["rejected"]]
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(flat["completion"], expected, strict=True))


@pytest.mark.slow
def test_sigkill_between_a_rounds_pairs_and_its_checkpoint_leaves_the_same_files(run: Path, tmp_path: Path) -> None:
    (tmp_path / "dying.py").write_text(DYING)
    words = (*RUN, "--plugin", "dying.py")
    assert command(*words, cwd=tmp_path).returncode == -signal.SIGKILL
    (kept,) = tmp_path.rglob("pairs")
    assert sorted(contents(kept)) == [".round-002.parquet.half", "round-000.parquet", "round-001.parquet"]
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert contents(kept) == contents(run / "pairs") and len(contents(kept)) == 4
    ours, calm = (records.read(folder / "record.json") for folder in (only_run(tmp_path), run))
    assert ours.comparable() == calm.comparable()


def test_what_is_kept_changes_no_number_and_a_run_without_pairs_says_how_to_keep_them(
    run: Path, tmp_path: Path
) -> None:
    done = command(*RUN, "--keep-pairs", "none", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    other = only_run(tmp_path)
    assert not (other / "pairs").exists() and other.name == run.name
    ours, kept = (records.read(folder / "record.json") for folder in (other, run))
    assert ours.comparable() == kept.comparable()
    with pytest.raises(UsageError, match=r"kept no pairs.*--keep-pairs all"):
        pairs.export(other)


# ---------------------------------------------------------------- the export


def test_the_default_place_is_in_the_run_and_the_latest_round_can_be_had_alone(copy: Path, tmp_path: Path) -> None:
    pairs.keep(copy / "pairs", made([(1, 0), (2, 0)], []), "clip", 3, "all")
    edit_record(copy, lambda content: content["rounds"][3].update(pairs=2))
    done = pairs.export(copy, rounds="last")
    assert done.folder == copy / "dataset" and done.pairs == {3: 2} and done.rounds == 4
    assert sorted(p.name for p in copy.iterdir() if p.name.startswith(".")) == [".lock"], "no temporary directory"
    assert list(loaded(copy / "dataset", tmp_path / "cache")["round"]) == [3, 3]
    card = (copy / "dataset" / "README.md").read_text()
    assert (
        "rounds 3 of 4" in card
        and records.read(copy / "record.json").cell_hash in card
        and "dpo on dfusion samples, reward clip" in card
    )


def test_rounds_that_were_not_kept_are_named(copy: Path, tmp_path: Path) -> None:
    for n in (1, 2):
        pairs.path_of(copy / "pairs", n).unlink()
    done = pairs.export(copy, tmp_path / "mine")
    assert sorted(done.pairs) == [0, 3]
    assert "rounds 0, 3 of 4" in (tmp_path / "mine" / "README.md").read_text()


def test_files_beyond_the_record_stay_out(copy: Path, tmp_path: Path) -> None:
    shutil.copy(pairs.path_of(copy / "pairs", 0), pairs.path_of(copy / "pairs", 4))
    assert sorted(pairs.export(copy, tmp_path / "mine").pairs) == [0, 1, 2, 3]


def edit_record(run: Path, change: Callable[[dict], None]) -> None:
    content = json.loads((run / "record.json").read_text())
    change(content)
    (run / "record.json").write_text(json.dumps(content))


def unfinished(run: Path) -> None:
    (run / "record.json").unlink()


def no_run(run: Path) -> None:
    unfinished(run)
    (run / "cell.json").unlink()


def damaged(run: Path) -> None:
    path = pairs.path_of(run / "pairs", 2)
    path.write_bytes(path.read_bytes()[:-40])


def foreign(run: Path) -> None:
    edit_record(run, lambda content: content["rounds"][1].update(pairs=99))


def other_columns(run: Path) -> None:
    path = pairs.path_of(run / "pairs", 1)
    pq.write_table(pq.read_table(path).drop_columns(["mask"]), path)


def failed_at_once(run: Path) -> None:
    shutil.rmtree(run / "pairs")
    edit_record(run, lambda content: content.update(rounds=[], status="failed"))


def broken_record(run: Path) -> None:
    edit_record(run, lambda content: content.pop("track_hash"))


def no_winner(run: Path) -> None:
    for n in range(4):
        pairs.keep(run / "pairs", made([], [], n=2), "clip", n, "all")
    edit_record(run, lambda content: [r.update(pairs=0) for r in content["rounds"]])


def taken(run: Path) -> None:
    (run / "dataset").mkdir()
    (run / "dataset" / "thesis.txt").touch()


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (shutil.rmtree, "no directory copy"),
        (unfinished, "copy is not finished"),
        (no_run, "copy is no run's directory"),
        (damaged, "round-002.parquet is damaged"),
        (foreign, "the record says 99"),
        (other_columns, "round-001.parquet is of another version"),
        (failed_at_once, "it failed in its first round"),
        (broken_record, "track_hash"),
        (no_winner, "no winner scored above its loser"),
        (taken, "copy/dataset exists and is not empty"),
    ],
)
def test_a_run_that_cannot_be_exported_is_one_line_and_status_2(
    spoil: Callable[[Path], None], expected: str, copy: Path, refused: Callable[..., str]
) -> None:
    spoil(copy)
    before = set(copy.parent.rglob("*"))
    assert expected in refused("pairs", "export", "copy", cwd=copy.parent)
    assert set(copy.parent.rglob("*")) == before, "nothing written"


def test_a_folder_of_runs_names_one_and_an_unknown_choice_its_choices(copy: Path, refused: Callable[..., str]) -> None:
    assert "give one run, for example copy" in refused("pairs", "export", ".", cwd=copy.parent)
    message = refused("pairs", "export", "copy", "--rounds", "first", cwd=copy.parent)
    assert "'all', 'last'" in message


# ---------------------------------------------------------------- what the loop keeps


def made(
    ends: Sequence[tuple[int, int]], masks: Sequence[int], n: int = 6, side: int = 4, rewards: Sequence[float] = ()
) -> ConsistentSamples:
    """A round of `n` samples with pictures of their own, these pairs, and for each triple (0, loser, winner) a mask of
    one grey if `masks` gives it."""
    images = torch.randint(0, 256, (n, side, side, 3), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)
    seeds = torch.arange(n) * 1000 + 2**62  # as large as seeds get
    trajectory = Trajectory(torch.zeros(n, 2, 1, 1, 1), torch.zeros(n, 1), seeds, [f"prompt “{i}”" for i in range(n)])
    return ConsistentSamples(
        Samples(trajectory, images, torch.tensor(rewards or [i / 7 for i in range(n)])),
        drawn=n,
        pairs=torch.tensor(ends, dtype=torch.long).view(-1, 2),
        train=torch.arange(n),
        triples=torch.tensor([[0, loser, winner] for winner, loser in [(5, 4), *ends]]),
        masks=torch.stack([torch.full((2, 2), m / 255) for m in [1, *masks]]) if masks else torch.zeros(0, 0, 0),
    )


def pixels(cell: dict | None) -> Tensor | None:
    return None if cell is None else torch.from_numpy(np.array(Picture.open(io.BytesIO(cell["bytes"]))))


@settings(max_examples=30, deadline=None)
@given(
    ends=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)).filter(lambda e: e[0] != e[1]), unique=True),
    fused=st.booleans(),
    rewards=st.lists(st.floats(-1e3, 1e3, width=32), min_size=6, max_size=6),
)
def test_what_is_kept_is_what_was_there(
    ends: list[tuple[int, int]], fused: bool, rewards: list[float], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("kept")
    ends = [e for e in ends if e != (5, 4)]
    greys = [(37 * i) % 256 for i in range(len(ends))] if fused else []
    samples = made(ends, greys, rewards=rewards)
    pairs.keep(folder, samples, "klip", 7, "all")
    rows = pq.read_table(folder / "round-007.parquet").to_pylist()
    assert len(rows) == len(ends)
    for i, (row, (winner, loser)) in enumerate(zip(rows, ends, strict=True)):
        assert row["prompt"] == f"prompt “{winner}”" and row["round"] == 7 and row["reward"] == "klip"
        for side, sample in (("chosen", winner), ("rejected", loser)):
            assert torch.equal(pixels(row[side]), samples.samples.images[sample])
            assert row[f"{side}_score"] == rewards[sample] and row[f"{side}_seed"] == 1000 * sample + 2**62
        mask = pixels(row["mask"])
        assert mask is None if not greys else torch.equal(mask, torch.full((2, 2), greys[i], dtype=torch.uint8))


def test_without_fusion_there_is_no_mask_and_empty_rounds_do_no_harm(copy: Path, tmp_path: Path) -> None:
    rounds = [[(1, 0)], [], [(2, 0), (3, 1)], []]
    for n, ends in enumerate(rounds):
        pairs.keep(copy / "pairs", made(ends, []), "clip", n, "all")
    edit_record(copy, lambda content: [r.update(pairs=len(e)) for r, e in zip(content["rounds"], rounds, strict=True)])
    done = pairs.export(copy, tmp_path / "mine")
    assert done.pairs == {0: 1, 1: 0, 2: 2, 3: 0}
    dataset = loaded(tmp_path / "mine", tmp_path / "cache")
    assert list(dataset["mask"]) == [None] * 3 and list(dataset["round"]) == [0, 2, 2]
    assert list(dataset["prompt"]) == ["prompt “1”", "prompt “2”", "prompt “3”"]
    assert len(unpair_preference_dataset(dataset)) == 6


@pytest.mark.parametrize("kept", [True, False])
def test_each_reward_of_a_sum_stands_beside_it(kept: bool, copy: Path, tmp_path: Path) -> None:
    samples = made([(1, 0), (3, 2)], [])
    if kept:
        scores = torch.tensor([[0.5, 1.5], [2.5, 3.5], [4.5, math.nan], [6.5, 7.5]])
        samples.samples.components = Components({"aesthetic": 0.7, "red": 0.3}, scores)
    for n in range(4):
        pairs.keep(copy / "pairs", samples, "aesthetic-0.7+red-0.3", n, "all")

    def of_a_sum(content: dict[str, Any]) -> None:
        content["provenance"]["reward_components"] = {"aesthetic": "0" * 64, "red": "1" * 64}
        for entry in content["rounds"]:
            entry["pairs"] = 2

    edit_record(copy, of_a_sum)
    pairs.export(copy, tmp_path / "mine", rounds="last")
    dataset = loaded(tmp_path / "mine", tmp_path / "cache")
    names = [f"{side}_score_{name}" for side in ("chosen", "rejected") for name in ("aesthetic", "red")]
    assert set(names) <= set(dataset.column_names) if kept else not set(names) & set(dataset.column_names)
    if kept:
        assert [list(dataset[name]) for name in names] == [[2.5, 6.5], [3.5, 7.5], [0.5, 4.5], [1.5, None]]
    card = (tmp_path / "mine" / "README.md").read_text()
    assert ("`chosen_score_red` | the winner's score by red" in card) == kept


@pytest.mark.parametrize(
    ("side", "which", "expected"),
    [
        (128, None, [0, 1, 2]),
        (129, None, [2]),
        (129, "all", [0, 1, 2]),
        (16, "last", [2]),
        (16, "none", []),
    ],
)
def test_how_many_rounds_are_kept(side: int, which: pairs.Keep | None, expected: list[int], tmp_path: Path) -> None:
    for n in range(3):
        pairs.keep(tmp_path / "pairs", made([(1, 0)], [], side=side), "clip", n, which)
    found = sorted(tmp_path.rglob("*.parquet"))
    assert found == [pairs.path_of(tmp_path / "pairs", n) for n in expected]


def test_a_round_run_again_replaces_its_own_pairs(tmp_path: Path) -> None:
    for ends in ([(1, 0), (2, 0)], [(3, 0)]):
        pairs.keep(tmp_path, made(ends, []), "clip", 0, "all")
    assert list(contents(tmp_path)) == ["round-000.parquet"]
    assert pq.read_table(tmp_path / "round-000.parquet")["prompt"].to_pylist() == ["prompt “3”"]


def test_row_groups_stay_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = [(winner, loser) for winner in range(1, 6) for loser in range(winner)]
    pairs.keep(tmp_path, made(ends, [], side=64), "clip", 0, "all")
    whole = pq.ParquetFile(tmp_path / "round-000.parquet").metadata
    assert whole.num_row_groups == 1
    monkeypatch.setattr(pairs, "GROUP", 60_000)  # two random pictures of 64² px are 25 kB
    pairs.keep(tmp_path, made(ends, [], side=64), "clip", 1, "all")
    split = pq.ParquetFile(tmp_path / "round-001.parquet").metadata
    assert split.num_row_groups == 8 and split.num_rows == 15
