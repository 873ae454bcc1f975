"""Offline pairs: reading preference datasets, pictures to latents, rounds, whole runs, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Picture
from processes import SETTINGS, TINY, command
from tiny import policy_of, tiny_sd

import bench_dfusion
from bench_dfusion import micro, registry
from bench_dfusion.builders import preference_data
from bench_dfusion.builders.contract import ConsistentSamples, Samples
from bench_dfusion.builders.offline import Offline, OfflineConfig
from bench_dfusion.diffusion.policy import Trajectory
from bench_dfusion.errors import UsageError
from bench_dfusion.results import records
from bench_dfusion.runs import config, pairs
from bench_dfusion.testing.fakes import fake_policy
from bench_dfusion.testing.rounds import generator

ABLE = ("diffusion-dpo", "kto", "rwr", "sft")
FEATURES = Features(prompt=Value("string"), chosen=Image(), rejected=Image())


def picture(grey: int, size: tuple[int, int] = (8, 8)) -> Picture.Image:
    return Picture.new("RGB", size, (grey, grey, grey))


def table(n: int = 6, **columns: Any) -> Dataset:
    """Pairs whose pictures are greys: chosen 100 + i, rejected i."""
    content = {
        "prompt": [f"prompt {i % 2}" for i in range(n)],
        "chosen": [picture(100 + i) for i in range(n)],
        "rejected": [picture(i) for i in range(n)],
    }
    return Dataset.from_dict({**content, **columns}, Features({**FEATURES, **kinds(columns)}))


def kinds(columns: dict[str, Any]) -> dict[str, Any]:
    known = {"chosen_score": Value("float32"), "rejected_score": Value("float32"), "reward": Value("string")}
    return {name: known[name] for name in columns if name in known}


def parquet(folder: Path, data: Dataset, name: str = "pairs.parquet") -> str:
    data.to_parquet(folder / name)
    return str(folder / name)


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("form", ["file", "directory", "on disk", "splits"])
def test_pairs_are_read_from_every_form_alike(form: str, tmp_path: Path) -> None:
    data, path = table(), tmp_path / "data"
    if form == "on disk":
        data.save_to_disk(path)
    elif form == "splits":
        DatasetDict(train=data, test=table(2)).save_to_disk(path)
    else:
        path.mkdir()
        path = Path(parquet(path, data)) if form == "file" else Path(parquet(path, data)).parent
    found = preference_data.read(str(path))
    assert found.prompts == [f"prompt {i % 2}" for i in range(6)] and found.scored_by is None
    chosen, rejected = found.pictures([4, 0], 8)
    assert chosen.dtype == torch.uint8 and chosen.shape == (2, 8, 8, 3)
    assert chosen[:, 0, 0, 0].tolist() == [104, 100] and rejected[:, 7, 7, 2].tolist() == [4, 0]
    assert [s.tolist() for s in found.scores([0, 1])] == [[1, 1], [0, 0]]


def test_scores_and_their_reward_are_the_datasets_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = {"chosen_score": [0.5, 2.0, 3.0], "rejected_score": [0.25, 1.0, -1.0], "reward": ["clip"] * 3}
    found = preference_data.read(parquet(tmp_path, table(3, **columns)))
    assert found.scored_by == "clip"
    assert [s.tolist() for s in found.scores([2, 0])] == [[3, 0.5], [-1, 0.25]]
    columns["chosen_score"] = [0.5, None, 3.0]
    found = preference_data.read(parquet(tmp_path, table(3, **columns), "holes.parquet"))
    assert "1 of 3 rows of" in capsys.readouterr().err
    assert [s.tolist() for s in found.scores([0, 2])] == [[1, 1], [0, 0]]  # one is missing: none is used


def test_pictures_are_cropped_at_the_centre_turned_as_a_camera_says_and_without_alpha(tmp_path: Path) -> None:
    # 24 × 8, black, white, black thirds: the centre square is white. A camera's "turn by 180°" puts a black top
    # half below. A palette and an alpha channel become RGB.
    thirds = Picture.fromarray(np.repeat([[0] * 8 + [255] * 8 + [0] * 8], 8, 0).astype(np.uint8))
    halves = Picture.fromarray(np.repeat([[0], [0], [255], [255]], 4, 1).astype(np.uint8).repeat(2, 0).repeat(2, 1))
    turned = tmp_path / "turned.png"
    exif = Picture.Exif()
    exif[0x0112] = 3
    halves.save(turned, exif=exif)
    alpha = Picture.new("RGBA", (8, 8), (10, 20, 30, 255))
    data = {"prompt": ["p"] * 3, "chosen": [thirds, str(turned), alpha], "rejected": [alpha.convert("P")] * 3}
    found = preference_data.read(parquet(tmp_path, Dataset.from_dict(data, FEATURES)))
    chosen, rejected = found.pictures([0, 1, 2], 8)
    assert (chosen[0] == 255).all()
    assert (chosen[1][:3] == 255).all() and (chosen[1][5:] == 0).all()
    assert chosen[2][0, 0].tolist() == [10, 20, 30] and rejected.shape == (3, 8, 8, 3)
    small, _ = found.pictures([0], 4)
    assert small.shape == (1, 4, 4, 3)


def test_the_hash_is_of_what_is_trained_on_and_not_of_where_it_lies(tmp_path: Path) -> None:
    first = preference_data.read(parquet(tmp_path, table())).sha256
    table().save_to_disk(tmp_path / "elsewhere")
    assert preference_data.read(str(tmp_path / "elsewhere")).sha256 == first
    changed = table().to_list()
    changed[3]["rejected"] = picture(99)
    assert preference_data.read(parquet(tmp_path, Dataset.from_list(changed, FEATURES), "b.parquet")).sha256 != first
    changed = table().to_list()
    changed[3]["prompt"] += "!"
    assert preference_data.read(parquet(tmp_path, Dataset.from_list(changed, FEATURES), "c.parquet")).sha256 != first
    scored = table(chosen_score=[1.5] * 6, rejected_score=[0.0] * 6)
    assert preference_data.read(parquet(tmp_path, scored, "d.parquet")).sha256 != first
    # What it is of, so that a cell's hash stays: prompts and scores as Python writes them, hashes of the files.
    total, undecoded = hashlib.sha256(), Image(decode=False)
    for row in scored.cast_column("chosen", undecoded).cast_column("rejected", undecoded):
        total.update(f"[{row['prompt']!r}, 1.5, 0.0]".encode())
        for name in ("chosen", "rejected"):
            total.update(hashlib.sha256(row[name]["bytes"]).digest())
    assert preference_data.read(str(tmp_path / "d.parquet")).sha256 == total.hexdigest()


def with_scores(chosen: list[Any], rejected: list[Any]) -> Dataset:
    """Pairs with these scores, of the type that `datasets` finds them to be."""
    return table(len(chosen)).add_column("chosen_score", chosen).add_column("rejected_score", rejected)


def test_ties_are_left_out_counted_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = [3.0, 1.0, 2.0, 1 + 1e-12, 5.0], [1.0, 1.0, 0.0, 1.0, 1.0]  # rows 1 and 3, this one in float32
    found = preference_data.read(parquet(tmp_path, with_scores(*scores), "ties.parquet"))
    assert "pairs: 2 of 5 pairs of" in capsys.readouterr().err
    assert (len(found), found.ties, found.rows) == (3, 2, [0, 2, 4])
    assert [s.tolist() for s in found.scores([1, 2])] == [[2, 5], [0, 1]]
    chosen, rejected = found.pictures([0, 1, 2], 8)
    assert chosen[:, 0, 0, 0].tolist() == [100, 102, 104] and rejected[:, 0, 0, 0].tolist() == [0, 2, 4]
    assert found.prompts == ["prompt 0"] * 3
    without = preference_data.read(parquet(tmp_path, with_scores(*scores).select([0, 2, 4]), "none.parquet"))
    assert without.ties == 0 and without.sha256 != found.sha256, "the record counts ties"


def test_a_round_in_which_a_pass_begins_counts_its_ties(tmp_path: Path) -> None:
    policy = fake_policy()
    Encoder(policy)
    path = parquet(tmp_path, with_scores([2.0, 1.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]))
    builder = Offline(OfflineConfig(pairs=path, pairs_per_round=2))
    rounds = [builder.offline(policy, 5, n, 8) for n in range(6)]  # passes over 3 pairs begin at 0, 3, 6 and 9
    assert [r.dropped for r in rounds] == [1, 1, 0, 1, 1, 0]
    assert all(len(r.pairs) == 2 and (r.samples.rewards[:2] > r.samples.rewards[2:]).all() for r in rounds)


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ([1.0, 0.0, 0.5], [0.0, 1.0, 1.5], r"above the chosen one in 2 of 3 rows, row 1 for one \(1 over 0\)"),
        ([1, 1], [1, 1], "all 2 pairs are ties"),
        ([1.0, float("nan")], [0.0, 0.0], "chosen_score of row 1 is nan, which is no finite float32"),
        ([1.0, 2.0], [0.0, float("-inf")], "rejected_score of row 1 is -inf"),
        ([1e300, 2.0], [0.0, 0.0], r"chosen_score of row 0 is 1e\+300"),
        (["1", "2"], ["0", "0"], r"column chosen_score holds Value\('string'\), not numbers \(row 0: '1'\)"),
        ([[1.0]], [[0.0]], r"column chosen_score holds List\(Value\('float64'\)\), not numbers"),
        ([1.0, 1.0], [False, True], r"column rejected_score holds Value\('bool'\), not numbers"),
        ([None, 1.0], [float("nan"), 0.0], "rejected_score of row 0 is nan"),
    ],
)
def test_scores_that_say_nothing_or_the_contrary_are_refused(
    chosen: list[Any], rejected: list[Any], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=f"pairs.parquet: .*{expected}"):
        preference_data.read(parquet(tmp_path, with_scores(chosen, rejected)))


@pytest.mark.parametrize("values", [([3, 2], [1, 1]), ([None, None], [None, None])])
def test_scores_may_be_integers_or_none_at_all(values: tuple[list[Any], list[Any]], tmp_path: Path) -> None:
    found = preference_data.read(parquet(tmp_path, with_scores(*values)))
    assert [s.tolist() for s in found.scores([0, 1])] == ([[3, 2], [1, 1]] if values[0][0] else [[1, 1], [0, 0]])


def cells(*chosen: dict[str, Any]) -> Dataset:
    """Pairs with these chosen pictures as they are stored."""
    plain = {"bytes": png(), "path": None}
    data = {"prompt": ["p"] * len(chosen), "chosen": list(chosen), "rejected": [plain] * len(chosen)}
    return Dataset.from_dict(data, FEATURES)


def png(size: tuple[int, int] = (8, 8)) -> bytes:
    data = io.BytesIO()
    Picture.new("1", size).save(data, "PNG")
    return data.getvalue()


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ({"bytes": None, "path": "/nowhere/a.png"}, "the chosen picture of row 1 is not there: no file /nowhere/a.png"),
        ({"bytes": None, "path": "https://nowhere.invalid/a.png"}, "no file https://nowhere.invalid/a.png"),
        ({"bytes": None, "path": "/dev/zero"}, "no file /dev/zero"),
        ({"bytes": None, "path": "a\0b"}, "row 1 is not there"),
        ({"bytes": b"", "path": None}, r"the chosen picture of row 1 cannot be read \(the file is empty\)"),
        ({"bytes": png()[:45], "path": None}, "row 1 cannot be read .damaged"),
        ({"bytes": png((20_000, 20_000)), "path": None}, "row 1 cannot be read .it has more pixels than"),
        ({"bytes": png((9_000, 9_000)), "path": None}, "row 1 cannot be read .it has 9000 × 9000 pixels"),
    ],
)
def test_a_picture_that_cannot_be_had_is_found_before_any_round(
    cell: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "pairs.parquet")
    pq.write_table(cells({"bytes": png(), "path": None}, cell).data.table, path)
    with pytest.raises(UsageError, match=f"pairs.parquet: .*{expected}"):
        assert preference_data.read(path).sha256


def test_the_row_that_is_named_is_the_files_own_where_ties_are_left_out(tmp_path: Path) -> None:
    content = with_scores([1.0, 2.0, 2.0], [1.0, 1.0, 1.0]).to_list()
    content[2]["rejected"] = {"bytes": b"x", "path": None}
    path = parquet(tmp_path, Dataset.from_list(content, with_scores([1.0], [0.0]).features))
    with pytest.raises(UsageError, match="the rejected picture of row 2 cannot be read"):
        assert preference_data.read(path).sha256


def test_a_profile_that_cannot_be_used_is_said_once_for_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = io.BytesIO()
    picture(9).save(data, "PNG", icc_profile=b"broken")
    found = preference_data.read(parquet(tmp_path, cells(*[{"bytes": data.getvalue(), "path": None}] * 3)))
    assert found.sha256 and "pairs: 3 pictures of" in capsys.readouterr().err
    assert found.pictures([0], 8)[0].unique().tolist() == [9]


def test_a_long_check_is_noted_and_done_again_where_a_file_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BENCH_DFUSION_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(preference_data, "SLOW", -1)
    table().save_to_disk(tmp_path / "mine")
    first = preference_data.read(str(tmp_path / "mine"))
    digest = first.sha256
    (note,) = (tmp_path / "home").rglob("*.json")
    monkeypatch.setattr(preference_data.Pairs, "_check", lambda self: pytest.fail("checked again"))
    assert dataclasses.replace(first).sha256 == digest
    monkeypatch.undo()
    monkeypatch.setenv("BENCH_DFUSION_HOME", str(tmp_path / "home"))
    (arrow,) = (tmp_path / "mine").glob("*.arrow")
    os.utime(arrow, ns=(0, 0))
    again = preference_data.read(str(tmp_path / "mine"))
    assert again._note() != note and again.sha256 == digest


def test_pictures_that_lie_elsewhere_are_looked_at_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_DFUSION_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(preference_data, "SLOW", -1)
    picture(7).save(tmp_path / "a.png")
    path = str(tmp_path / "pairs.parquet")
    pq.write_table(cells({"bytes": None, "path": str(tmp_path / "a.png")}).data.table, path)
    assert preference_data.read(path).sha256 and not (tmp_path / "home").exists()


def text_pairs(folder: Path) -> str:
    return parquet(folder, Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}))


def other_columns(folder: Path) -> str:
    return parquet(folder, table().rename_column("chosen", "jpg_0"))


def no_train(folder: Path) -> str:
    DatasetDict(test=table(), validation=table()).save_to_disk(folder / "splits")
    return str(folder / "splits")


def no_picture(folder: Path) -> str:
    content = table().to_list()
    content[2]["rejected"] = None
    return parquet(folder, Dataset.from_list(content, FEATURES))


def no_prompt(folder: Path) -> str:
    return parquet(folder, table(prompt=["a", "b", " ", "c", "d", "e"]))


def two_rewards(folder: Path) -> str:
    return parquet(folder, table(2, reward=["clip", "oracle"]))


def empty(folder: Path) -> str:
    return parquet(folder, table(0))


def empty_split(folder: Path) -> str:
    DatasetDict(train=table(0), test=table(2)).save_to_disk(folder / "splits")
    return str(folder / "splits")


def lists(folder: Path) -> str:
    return parquet(folder, Dataset.from_dict({"prompt": ["a"], "chosen": [[1, 2]], "rejected": [[3, 4]]}))


def numbered(folder: Path) -> str:
    return parquet(folder, table(3).remove_columns("prompt").add_column("prompt", [1, 2, 3]))


def rewards_as_numbers(folder: Path) -> str:
    return parquet(folder, table(3).add_column("reward", [0.1, 0.2, 0.3]))


def half_scored(folder: Path) -> str:
    return parquet(folder, table(2, chosen_score=[1.0, 2.0]))


def one_file_damaged(folder: Path) -> str:
    (folder / "data").mkdir()
    parquet(folder / "data", table(), "a.parquet")
    path = Path(parquet(folder / "data", table(), "b.parquet"))
    content = bytearray(path.read_bytes())
    content[100:400] = b"\xff" * 300  # a page, not the footer
    path.write_bytes(content)
    return str(folder / "data")


def damaged(folder: Path) -> str:
    path = Path(parquet(folder, table()))
    path.write_bytes(path.read_bytes()[:-100])
    return str(path)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda folder: "no/such/place", "no dataset no/such/place"),
        (lambda folder: "./nowhere", "no dataset ./nowhere"),
        (lambda folder: "nobody/nothing", "nobody/nothing cannot be read as a dataset"),
        (damaged, "cannot be read as a dataset"),
        (
            other_columns,
            "has no column chosen: pairs are prompt, chosen and rejected, here are prompt, jpg_0, rejected",
        ),
        (text_pairs, "column chosen holds Value('string')"),
        (no_train, "has splits test, validation, and none of them is train"),
        (no_picture, "row 2 has no rejected picture"),
        (no_prompt, "row 2 has no prompt"),
        (two_rewards, "was scored by several rewards, clip, oracle"),
        (empty, "it, or a split of it, has no rows"),
        (empty_split, "it, or a split of it, has no rows"),
        (lists, "column chosen holds List(Value('int64')), not pictures"),
        (numbered, "column prompt holds Value('int64'), not text"),
        (rewards_as_numbers, "column reward holds Value('float64'), not the name of the reward"),
        (half_scored, "has a column chosen_score and no rejected_score"),
        (one_file_damaged, "data/b.parquet is damaged ("),
    ],
)
def test_what_is_no_preference_dataset_is_one_line_before_any_compute(
    make: Callable[[Path], str], expected: str, run_refused: Callable[..., str], tmp_path: Path
) -> None:
    assert expected in run_refused("--algo", "sft", "--pairs", make(tmp_path))


@pytest.fixture
def run_refused(refused: Callable[..., str], tmp_path: Path) -> Callable[..., str]:
    """What `run` refuses before it leaves anything."""

    def call(*words: str) -> str:
        message = refused("run", *words, cwd=tmp_path, bars=True)  # of `datasets`
        assert not list(tmp_path.rglob("cell.json"))
        return message

    return call


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--algo", "dpo"], "dpo learns from samples that the policy draws, and offline pairs are only pictures"),
        (["--algo", "grpo"], f"these learn from them: {', '.join(ABLE)}"),
        (["--algo", "sft", "--builder", "vanilla"], "leave --builder vanilla out"),
        (["--algo", "sft", "--reward", "oracle"], "were scored by clip, not by oracle"),
        (["--algo", "sft", "--set", "builder.sha256=abc"], "not to the abc… that is asked"),
        (["--algo", "sft", "--set", "builder.margin=1"], "unknown option builder 'margin'"),
        (
            ["--algo", "sft", "--set", 'track.prompts.heldout=["Prompt  1.", "x"]'],
            "holds out, 'prompt 1' and 'Prompt  1.', two",
        ),
        (["--algo", "sft", "--set", "algo.levels=[0.5,0.5]"], "algo.levels"),
    ],
)
def test_what_does_not_go_with_offline_pairs_is_one_line(
    words: list[str], expected: str, run_refused: Callable[..., str], tmp_path: Path
) -> None:
    path = parquet(tmp_path, table(reward=["clip"] * 6))
    assert expected in run_refused(*words, "--pairs", path)


def test_without_pairs_the_builder_and_the_reward_say_what_they_need(run_refused: Callable[..., str]) -> None:
    words = ["--algo", "sft", "--builder", "offline", "--reward", "clip"]
    assert "give --pairs PATH_OR_HUB_ID" in run_refused(*words)
    assert "give --reward" in run_refused("--algo", "sft")
    words = ["--algo", "sft", "--reward", "given", *TINY]
    assert "stands for the preferences of offline pairs" in run_refused(*words)


def test_the_cell_is_named_by_the_pairs_and_not_by_their_place(tmp_path: Path) -> None:
    first = config.resolve(algo="sft", pairs=parquet(tmp_path, table()))
    again = config.resolve(algo="sft", pairs=parquet(tmp_path, table(), "again.parquet"))
    other = config.resolve(algo="sft", pairs=parquet(tmp_path, table(5), "other.parquet"))
    assert first.hash == again.hash != other.hash
    assert first.resolved["builder"]["sha256"] == preference_data.read(str(tmp_path / "pairs.parquet")).sha256
    assert first.given["pairs"] == str(tmp_path / "pairs.parquet") and first.reward.name == "given"
    assert config.resolve(algo="sft", reward="clip", pairs=str(tmp_path / "pairs.parquet")).reward.name == "clip"


# ---------------------------------------------------------------- latents


def test_stable_diffusions_latents_are_the_posteriors_mean_scaled(tmp_path: Path) -> None:
    policy = policy_of(tiny_sd(tmp_path))
    assert policy.adapter.image_side == 32
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=generator())
    pipe = policy.adapter.pipe
    ready = pipe.image_processor.preprocess([Picture.fromarray(i.numpy()) for i in images])
    with torch.no_grad():
        expected = pipe.vae.encode(ready).latent_dist.mean * pipe.vae.config.scaling_factor
    torch.testing.assert_close(policy.encode(images), expected, rtol=1e-4, atol=1e-5)


def test_the_embedded_worlds_latents_come_back_from_their_pictures() -> None:
    policy = policy_of(micro.PIPELINE, lora=0, steps=8)
    assert policy.adapter.image_side == 64
    prompts = ["a red circle", "two blue rings", "a red ring above a blue cross", "three green rings"]
    drawn = policy.sample(prompts, torch.arange(4))
    images = policy.decode(drawn.final)
    again = policy.decode(policy.encode(images))
    distance = (again.float() - images.float()).square().mean().sqrt()
    apart = (images[:2].float() - images[2:].float()).square().mean().sqrt()
    assert distance < 12 < apart  # 8-bit levels
    error = (policy.encode(images) - drawn.final).square().mean().sqrt() / drawn.final.std()
    assert error < 0.5


# ---------------------------------------------------------------- rounds


class Encoder:
    """Pictures of one grey to latents of that grey / 255, for a fake policy."""

    image_side = 8

    def __init__(self, policy: Any):
        policy.adapter.__class__ = type("Encoding", (type(policy.adapter),), {"image_side": 8})
        policy.encode = lambda images: images[:, :1, :1, :1].permute(0, 3, 1, 2).float().expand(-1, 2, 2, 2) / 255


def test_rounds_pass_over_the_pairs_and_depend_on_seed_and_number_alone(tmp_path: Path) -> None:
    policy = fake_policy()
    Encoder(policy)
    path = parquet(tmp_path, table(chosen_score=[3.0] * 6, rejected_score=[1.0] * 6))
    builder = Offline(OfflineConfig(pairs=path))
    assert builder.queries(8) == 0
    rounds = [builder.offline(policy, 5, n, 8) for n in range(3)]  # 4 pairs each: two passes over the 6
    rows = [r.samples.trajectory.seeds[:4].tolist() for r in rounds]
    flat = [i for own in rows for i in own]
    assert sorted(flat[:6]) == sorted(flat[6:]) == list(range(6)) and flat[:6] != flat[6:]
    assert builder.offline(policy, 5, 1, 8).samples.trajectory.seeds.tolist() == rows[1] * 2
    assert Offline(OfflineConfig(pairs=path)).offline(policy, 6, 1, 8).samples.trajectory.seeds[:4].tolist() != rows[1]
    found = rounds[1]
    assert found.drawn == 0 and found.pairs.tolist() == [[i, 4 + i] for i in range(4)]
    assert found.samples.rewards.tolist() == [3] * 4 + [1] * 4 and found.train.tolist() == list(range(8))
    assert found.samples.prompts == [f"prompt {i % 2}" for i in rows[1]] * 2
    greys = [(100 + i) / 255 for i in rows[1]] + [i / 255 for i in rows[1]]
    torch.testing.assert_close(found.samples.trajectory.final[:, 0, 0, 0], torch.tensor(greys))
    assert len(Offline(OfflineConfig(pairs=path, pairs_per_round=3)).offline(policy, 5, 0, 8).pairs) == 3


@pytest.mark.parametrize("name", ["diffusion-dpo", "kto", "rwr"])
def test_offline_training_moves_towards_what_was_chosen(name: str) -> None:
    # A policy of one number whose data are N(0, 1); pairs prefer the larger of two draws of N(0, 1).
    cls = registry.load("algorithms", name)
    options = {"beta": 2.0} if name != "rwr" else {}
    algorithm = cls(cls.Config(learning_rate=2e-2, **options))
    policy = fake_policy(shape=(1, 1, 1), steps=5, scale=0.1, batch=1024)
    before = policy.sample(["p"] * 64, torch.arange(64)).final.mean()
    optimizer = torch.optim.AdamW(policy.parameters.values(), lr=2e-2)
    order = generator()
    for _ in range(20):
        latents = torch.randn(64, 2, generator=order).sort(1, descending=True).values.T.reshape(128, 1, 1, 1, 1)
        trajectory = Trajectory(latents, torch.zeros(128, 0), torch.arange(128), ["p"] * 128)
        images = torch.zeros(128, 1, 1, 3, dtype=torch.uint8)
        rewards = torch.tensor([1.0] * 64 + [0.0] * 64)
        numbers = torch.arange(64)
        samples = ConsistentSamples(
            Samples(trajectory, images, rewards),
            0,
            torch.stack([numbers, 64 + numbers], 1),
            torch.arange(128),
            torch.zeros(0, 3, dtype=torch.long),
        )
        rows = algorithm.prepare(policy, samples, order)
        optimizer.zero_grad()
        algorithm.loss(policy, samples, algorithm.batch(policy, samples, rows)).value.backward()
        optimizer.step()
    after = policy.sample(["p"] * 64, torch.arange(64)).final.mean()
    assert after > before + (0.3 if name != "rwr" else 0.1)  # whose optimum is the weighted mean of the draws, 0.43


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pairs of a short online run, rewarded by CLIP."""
    folder = tmp_path_factory.mktemp("online")
    done = command("run", "--algo", "dpo", "--reward", "clip", *TINY, cwd=folder)
    assert done.returncode == 0, done.stderr
    ((path, _),) = records.find(folder)
    pairs.export(path.parent, folder / "mine")
    return folder / "mine"


@pytest.mark.parametrize("name", ABLE)
def test_a_run_trains_on_what_pairs_export_wrote(name: str, exported: Path, tmp_path: Path) -> None:
    settings = [*SETTINGS, "track.budget.reward_queries=16"]
    record = bench_dfusion.run(algo=name, pairs=str(exported), settings=settings, out=tmp_path)
    ((path, _),) = records.find(tmp_path)
    assert (record.algorithm, record.builder, record.reward) == (name, "offline", "clip")
    assert record.cost.reward_queries == 0 and len(record.rounds) == 2 and record.cost.updates == 4
    assert all(r.reward is None and r.pairs == 4 and r.queries == 0 for r in record.rounds)
    assert {v.judge: v.trained_on for v in record.verdicts} == {"oracle": False, "oracle:full": False, "clip": True}
    assert record.given["pairs"] == str(exported) and not (path.parent / "pairs").exists()
    assert (
        record.drift is not None
        and record.drift.kl > 0
        and all(math.isfinite(r.metrics["loss"]) for r in record.rounds)
    )


@pytest.mark.slow
def test_pairs_of_no_known_reward_train_too_and_a_killed_run_goes_on(exported: Path, tmp_path: Path) -> None:
    given = preference_data.read(str(exported)).table.select_columns(["prompt", "chosen", "rejected"])
    path = parquet(tmp_path, given)
    words = ("run", "--algo", "diffusion-dpo", "--pairs", path, *TINY)
    (tmp_path / "dying.py").write_text(DYING)
    calm = command(*words, cwd=tmp_path, env={})
    assert calm.returncode == 0, calm.stderr
    assert "offline, no reward query" in calm.stdout and "triples.png" not in calm.stdout
    assert "offline" in command("leaderboard", "runs", cwd=tmp_path).stdout.split("queries")[1]
    killed = command(*words, "--plugin", "dying.py", "--out", "killed", cwd=tmp_path)
    assert killed.returncode == -9 and list(tmp_path.rglob("killed/**/checkpoint.safetensors"))
    done = command(*words, "--out", "killed", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ours, theirs = (records.find(tmp_path / name)[0][1] for name in ("runs", "killed"))
    assert ours.reward == "given" and not any(v.trained_on for v in ours.verdicts)
    assert json.loads(json.dumps(ours.comparable())) == json.loads(json.dumps(theirs.comparable()))


DYING = """
import os, signal
from bench_dfusion.builders.offline import Offline
from bench_dfusion.reward_models.given import Given

class Unused(Given):  # a plugin file has to define one
    name = "unused"

offline = Offline.offline

def dying(self, policy, seed, number, drawn):
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return offline(self, policy, seed, number, drawn)

Offline.offline = dying
"""
