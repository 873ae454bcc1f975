"""The base that is drawn once for a track: what a run makes of it, its file, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from processes import SETTINGS
from torch import Tensor

import bench_dfusion
from bench_dfusion.errors import UsageError
from bench_dfusion.models.loading import load_adapter
from bench_dfusion.results import checked_base, checks, leaderboard, records, statistics, tables
from bench_dfusion.results.checked_base import CheckedBase
from bench_dfusion.results.records import Record
from bench_dfusion.rewards.contract import Reward, RewardConfig
from bench_dfusion.runs import base_drawing, config, evaluation
from bench_dfusion.runs.trainer import make_policy
from bench_dfusion.testing.fakes import ddim, fake_policy
from bench_dfusion.tracks.schema import Track
from bench_dfusion.util import files

OWN = [
    *SETTINGS,
    "track.evaluation.base_images_per_prompt=4",
    'track.prompts.clusters={"a red circle": "red", "a red ring above a blue cross": "red"}',
    "algo.learning_rate=0.05",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a track with two tiny runs; only the first of them drew the base."""
    out = tmp_path_factory.mktemp("runs")
    drawn: list[int] = []
    plain = base_drawing.draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_drawing, "draw", lambda *words: drawn.append(1) or plain(*words))
        for seed in (0, 1):
            bench_dfusion.run(
                algo="diffusion-dpo", builder="vanilla", reward="jpeg-compressibility", settings=OWN, out=out, seed=seed
            )
    assert drawn == [1]
    (folder,) = out.iterdir()
    return folder


@pytest.fixture
def copied(runs: Path, tmp_path: Path) -> Path:
    return shutil.copytree(runs, tmp_path / runs.name)


def of(folder: Path) -> list[tuple[Path, Record]]:
    return records.find(folder)


def base_of(folder: Path) -> Path:
    (path,) = folder.glob("base-*.parquet")
    return path


# --- what a run makes of it


def test_a_gain_is_what_base_and_scores_give(runs: Path) -> None:
    base = checked_base.read(base_of(runs))
    for path, record in of(runs):
        track = checks.track_of(record)
        assert record.provenance.base_sha256 == base.sha256
        assert record.provenance.scores_sha256 == files.sha256(path.with_name("scores.parquet"))
        prompts, scores = checked_base.read_scores(path.with_name("scores.parquet"))
        assert prompts == base.prompts == track.prompts.heldout
        for verdict in record.verdicts:
            x, y = base.scores[verdict.judge], scores[verdict.judge]
            assert x.shape == (3, 4) and y.shape == (3, 2)
            assert verdict.per_prompt == [
                (pytest.approx(b), pytest.approx(t)) for b, t in zip(x.mean(1), y.mean(1), strict=True)
            ]
            # By hand: each prompt's gain, less b times its luck, b from the prompts of the other clusters.
            centred = [(x[i, :2] - x[i, :2].mean(), y[i] - y[i].mean()) for i in range(3)]
            for i, others in enumerate(([1], [0, 2], [1])):
                up, down = (
                    sum(float(a @ b) for a, b in ((centred[j][0], centred[j][w]) for j in others)) for w in (1, 0)
                )
                b = up / down if down else 0.0
                luck = float(x[i, :2].mean() - x[i].mean())
                assert verdict.adjusted[i] == pytest.approx(float(y[i].mean() - x[i].mean()) - b * luck, abs=1e-6)
            gains = np.array(verdict.adjusted)
            assert verdict.gain.mean == pytest.approx((gains[[0, 2]].mean() + gains[1]) / 2), "a cluster counts once"
        assert record.drift.diversity_base == pytest.approx(base.diversity.mean())


def test_the_first_pictures_are_on_the_noise_of_a_run(runs: Path) -> None:
    (_, record), *_ = of(runs)
    base, track = checked_base.read(base_of(runs)), checks.track_of(record)
    adapter, _ = load_adapter(track.model, torch.device("cpu"), track.memory)
    policy = make_policy(track, adapter, 0, torch.device("cpu"))
    again = evaluation.draw(policy, base.prompts, 2, lambda n: None)
    assert torch.equal(again.images[::2], torch.from_numpy(base.pictures))


def test_the_agreement_of_the_reward_is_measured(runs: Path) -> None:
    from scipy.stats import spearmanr

    for path, record in of(runs):
        _, scores = checked_base.read_scores(path.with_name("scores.parquet"))
        assert record.agreement is not None and set(record.agreement) <= {"oracle", "oracle:full", "clip"}
        for judge, value in record.agreement.items():
            own = scores[checked_base.REWARD].ravel()
            assert value == pytest.approx(spearmanr(own, scores[judge].ravel()).statistic)


def test_agreement_by_hand() -> None:
    reward = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    same, turned, flat = 10 * reward, -reward, torch.ones(2, 2)
    swapped = torch.tensor([[1.0, 2.0], [4.0, 3.0]])  # 1 − 6·2 / (4·15)
    scores = {"same": same, "turned": turned, "flat": flat, "swapped": swapped}
    assert evaluation.agreement(reward, scores) == {"same": 1, "turned": -1, "swapped": pytest.approx(0.8)}
    assert evaluation.agreement(flat, scores) == {}


def test_eval_and_table_stand_on_the_base(runs: Path, said: Callable[..., Any]) -> None:
    folder = of(runs)[0][0].parent
    status, out, _ = said("eval", folder)
    assert status == 0 and "to the last bit" in out
    (board,) = leaderboard.boards(runs)
    (row,) = leaderboard.rows(board)
    assert row.clusters == ("red", "two blue rings", "red")
    table = tables.table(board).iloc[0]
    gains = np.array([r.verdicts[0].adjusted for r in board.records])
    assert table["oracle gain"] == pytest.approx(statistics.paired_gain(gains, clusters=row.clusters).mean)


# --- the base itself


def test_the_key_is_of_what_the_base_depends_on() -> None:
    def key(*settings: str) -> str:
        return checked_base.key(config.resolve_track("micro", settings=[*OWN[:-1], *settings]))

    same = [
        "track.budget.reward_queries=999",
        'track.prompts.train=["a blue cross"]',
        "track.lora.rank=7",
        "track.batch=5",
        "track.seeds=9",
        "track.memory.vae_slicing=true",
    ]
    other = [
        "track.sampler.steps=9",
        'track.prompts.heldout=["a red circle", "a red ring above a blue cross", "a blue circle"]',
        "track.evaluation.base_images_per_prompt=5",
        'track.evaluation.judges=["oracle"]',
        "track.model.dtype=bfloat16",
    ]
    assert {key(setting) for setting in same} == {key()}
    assert len({key(), *(key(setting) for setting in other)}) == 1 + len(other)


class Red(Reward):
    name, summary, paper, unit = "red", "mean of red", "none", "share, 0 to 1"
    calls = 0

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        Red.calls += 1
        if self.stop is not None and Red.calls > self.stop:
            raise KeyboardInterrupt
        return images[..., 0].float().flatten(1).mean(1) / 255

    def fingerprint(self) -> str:
        return "red"

    stop: int | None = None


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> tuple[Track, Any, dict[str, Reward]]:
    """A track of five held-out prompts, a policy and a judge; two prompts are drawn at a time."""
    heldout = ["a red circle", "two blue rings", "a cyan square", "a green cross", "a red ring"]
    settings = [f"track.prompts.heldout={json.dumps(heldout)}", 'track.prompts.train=["a red cross"]']
    settings += ["track.prompts.validation=[]", "track.prompts.templates=null"]
    track = config.resolve_track("micro", settings=[*settings, "track.evaluation.base_images_per_prompt=8"])
    section = track.evaluation.model_copy(update={"judges": ("red",)})
    monkeypatch.setattr(base_drawing, "AT_ONCE", 16)
    Red.calls, Red.stop = 0, None
    return track.model_copy(update={"evaluation": section}), fake_policy(scheduler=ddim()), {"red": Red(RewardConfig())}


def test_a_killed_drawing_goes_on_and_gives_the_same(small: Any, tmp_path: Path) -> None:
    track, policy, judges = small
    whole = base_drawing.ensure(track, tmp_path / "whole", policy, judges, "model")
    Red.calls, Red.stop = 0, 2
    with pytest.raises(KeyboardInterrupt):
        base_drawing.ensure(track, tmp_path / "killed", policy, judges, "model")
    assert not list((tmp_path / "killed").glob("base-*"))
    Red.calls, Red.stop = 0, None
    before = policy.network_evaluations
    again = base_drawing.ensure(track, tmp_path / "killed", policy, judges, "model")
    assert Red.calls == 1, "of three parts two were there"
    assert again.sha256 == whole.sha256 and policy.network_evaluations == before
    assert [p.name[0] for p in sorted((tmp_path / "killed").iterdir())] == [".", "b"], "lock and base, no parts"
    assert checked_base.read(base_of(tmp_path / "killed")).sha256 == whole.sha256, "a file says all of it"


def test_one_run_draws_and_the_others_wait(small: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    track, policy, judges = small
    found: list[CheckedBase | None] = []
    with files.locked(tmp_path / f".{checked_base.file_name(track)}.lock"):
        other = threading.Thread(
            target=lambda: found.append(base_drawing.ensure(track, tmp_path, policy, judges, "model"))
        )
        other.start()
        time.sleep(0.3)
        assert not found and not Red.calls
        base = base_drawing.draw(track, policy, judges, "model")
        calls = Red.calls
        checked_base.write(tmp_path / checked_base.file_name(track), base)
    other.join(60)
    assert found[0] is not None and found[0].sha256 == base.sha256 and Red.calls == calls
    assert "another run draws the base of micro-custom-v1; this one waits for it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda base: {"model_sha256": "other"}, "is the base of another model"),
        (lambda base: {"fingerprints": {"red": "other"}}, "was judged by another red"),
        (lambda base: {"of": "other"}, "is not the base of micro-custom-v1"),
        (lambda base: {"prompts": base.prompts[:4], "pictures": base.pictures[:4]}, "is not the base of|no scores"),
    ],
)
def test_another_base_is_refused(change: Any, why: str, small: Any, tmp_path: Path) -> None:
    track, policy, judges = small
    base = base_drawing.draw(track, policy, judges, "model")
    changed = CheckedBase(**{**vars(base), **change(base)})
    if len(changed.prompts) == 4:
        changed = CheckedBase(**{**vars(changed), "scores": {"red": base.scores["red"][:4]}})
    checked_base.write(tmp_path / checked_base.file_name(track), changed)
    with pytest.raises(UsageError, match=why):
        base_drawing.ensure(track, tmp_path, policy, judges, "model")


def test_a_damaged_file_is_one_line(small: Any, tmp_path: Path) -> None:
    track, policy, judges = small
    path = tmp_path / checked_base.file_name(track)
    for data in (b"", b"PAR1 nothing PAR1", b"\0" * 500):
        path.write_bytes(data)
        with pytest.raises(UsageError, match=r"holds no scores of pictures"):
            base_drawing.ensure(track, tmp_path, policy, judges, "model")


def test_the_verb_draws_it_once_and_checks_it(tmp_path: Path, said: Callable[..., Any], refused) -> None:
    words = ["base", "micro", *(f"--set={s}" for s in OWN[:-1]), "--out", tmp_path]
    status, out, _ = said(*words, "--check")
    assert status == 0 and "0 of 12" in out and "the same to the last bit" in out
    path = base_of(tmp_path / "micro-custom-v1")
    base = checked_base.read(path)
    scores = {**base.scores, "oracle": np.clip(base.scores["oracle"] + np.float32(0.2), 0, 1)}
    checked_base.write(
        path, CheckedBase(**{**{k: v for k, v in vars(base).items() if k != "sha256"}, "scores": scores})
    )
    status, out, _ = said(*words, "--check")
    assert status == 1 and "drawn otherwise" in out
    assert "micro-v1 has no checked base" in refused("base", "micro", "--out", tmp_path)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["track.evaluation.base_images_per_prompt=1"], "needs images_per_prompt of 2 or more"),
        (["track.evaluation.base_images_per_prompt=8", "track.evaluation.images_per_prompt=9"], "not 9 and 8"),
        (['track.prompts.clusters={"a blue sea": "x"}'], "'a blue sea', which is not held out"),
    ],
)
def test_settings_that_cannot_be(settings: list[str], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        config.resolve_track("micro", settings=settings)


# --- bent records


def bend(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def raise_gain(content: dict[str, Any]) -> None:
    verdict = content["verdicts"][0]
    verdict["adjusted"] = [gain + 0.2 for gain in verdict["adjusted"]]
    verdict["gain"] |= {key: verdict["gain"][key] + 0.2 for key in ("mean", "low", "high")}


def raise_trained(content: dict[str, Any]) -> None:
    verdict = content["verdicts"][2]
    verdict["adjusted"] = [gain + 0.125 for gain in verdict["adjusted"]]
    verdict["gain"] |= {key: verdict["gain"][key] + 0.125 for key in ("mean", "low", "high")}
    verdict["per_prompt"] = [(b, t + 0.125) for b, t in verdict["per_prompt"]]
    verdict["trained"] = float(np.mean([t for _, t in verdict["per_prompt"]]))
    verdict["templates"] = {"all": (verdict["base"], verdict["trained"])}


def without(*names: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for name in names:
            del content["provenance"][name]

    return change


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (raise_gain, "verdict of oracle: adjusted: not what the scores of base and trained give"),
        (raise_trained, "verdict of clip: per_prompt: trained is not the mean of the scores in"),
        (lambda c: c["agreement"].update(clip=-0.99), "agreement.clip: -0.99, but the scores in"),
        (lambda c: c["provenance"].update(base_sha256="0" * 64), "is not the checked base of micro-custom-v2"),
        (lambda c: c["provenance"].update(scores_sha256="0" * 64), "provenance.scores_sha256: .* holds other scores"),
        (without("base_sha256"), "provenance.base_sha256: missing, and the track has a checked base"),
        (without("scores_sha256"), "provenance.scores_sha256: missing"),
        (lambda c: [v.pop("adjusted") for v in c["verdicts"]], "adjusted and slope are missing"),
    ],
)
def test_a_doctored_record_is_refused_by_the_files_beside_it(change: Any, why: str, copied: Path, refused) -> None:
    bend(of(copied)[1][0], change)
    message = refused("leaderboard", copied)
    assert re.search(why, message), message


def test_doctored_scores_are_refused(copied: Path, refused) -> None:
    path, _ = of(copied)[0]
    file = path.with_name("scores.parquet")
    prompts, scores = checked_base.read_scores(file)
    scores["oracle"] = np.ones_like(scores["oracle"])
    checked_base.write_scores(file, prompts, scores)
    bend(path, lambda c: c["provenance"].update(scores_sha256=files.sha256(file)))
    assert "trained is not the mean of the scores" in refused("leaderboard", copied)


def test_runs_on_two_bases_never_share_a_table(copied: Path) -> None:
    (_, record), (_, second) = of(copied)
    other = second.model_copy(update={"provenance": second.provenance.model_copy(update={"base_sha256": "0" * 64})})
    with pytest.raises(UsageError, match="stands on another checked base than"):
        checks.check([(None, record), (None, other)])


def test_scores_are_a_table_that_others_read(runs: Path) -> None:
    table = pq.read_table(base_of(runs))
    assert table.num_rows == 12 and table.column("prompt")[4].as_py() == "two blue rings"
    assert table.column("picture").to_pylist() == [0, 1, 2, 3] * 3
    assert str(table.schema.field("score clip").type) == "float"
    assert sum(image is not None for image in table.column("image").to_pylist()) == 3


# --- taken elsewhere


@pytest.fixture
def clean(copied: Path) -> Path:
    """The runs as of a commit without changes."""
    for path, _ in of(copied):
        bend(path, lambda c: c["provenance"].update(code="a" * 40, dirty=False))
    return copied


def test_a_merge_takes_the_base_along(clean: Path, tmp_path: Path, said: Callable[..., Any]) -> None:
    status, _, err = said("merge", clean, "--into", tmp_path / "board")
    assert status == 0, err
    (folder,) = (tmp_path / "board").iterdir()
    assert base_of(folder).read_bytes() == base_of(clean).read_bytes() and len(of(folder)) == 2
    assert said("leaderboard", folder).status == 0
    base_of(clean).unlink()
    status, out, _ = said("merge", clean, "--into", tmp_path / "other")
    assert status == 2 and "is missing; leave the checked base beside the run directories" in out
    assert not (tmp_path / "other").exists()


def test_a_publication_takes_the_base_along(clean: Path, tmp_path: Path, said: Callable[..., Any]) -> None:
    status, out, err = said("publish", "--to", tmp_path / "tables", "--from", clean)
    assert status == 0, err
    runs = tmp_path / "tables" / "runs"
    assert base_of(runs).read_bytes() == base_of(clean).read_bytes()
    assert len(list(runs.glob("*/scores.parquet"))) == 2
    assert said("leaderboard", tmp_path / "tables").status == 0, "the files beside the records are looked at"
    status, out, _ = said("publish", "--to", tmp_path / "tables", "--from", clean)
    assert status == 0 and "it was there already" in out
    base_of(clean).unlink()
    status, _, err = said("publish", "--to", tmp_path / "more", "--from", clean)
    assert status == 2 and "leave the checked base beside the run directories" in err
