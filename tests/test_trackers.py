"""Experiment trackers see every round once, and change nothing."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from processes import SETTINGS
from rounds import stopped_in_round

import bench_dfusion
from bench_dfusion.errors import UsageError
from bench_dfusion.results import records
from bench_dfusion.results.records import Record
from bench_dfusion.runs import trackers


class Fake(GeneralTracker):
    """Keeps what it is told, draws random numbers, and fails at a step where it is asked to."""

    name = "fake"
    requires_logging_directory = True
    told: ClassVar[list[tuple[int, dict[str, Any]]]] = []
    pictures: ClassVar[list[tuple[int, str, tuple[int, ...]]]] = []
    configured: ClassVar[list[dict[str, Any]]] = []
    fails_at: ClassVar[int | None] = None

    def __init__(self, run_name: str, logging_dir: str):
        super().__init__()
        self.run_name, self.logging_dir = run_name, logging_dir

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict) -> None:
        self.configured.append(values)

    def log(self, values: dict, step: int | None = None, **options: Any) -> None:
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        torch.set_num_threads(1)
        if step == self.fails_at:
            raise ConnectionError("the server is away\nfor good")
        self.told.append((int(step or 0), values))

    def log_images(self, values: dict, step: int | None = None, **options: Any) -> None:
        self.pictures += [(int(step or 0), what, images[0].shape) for what, images in values.items()]

    def finish(self) -> None:
        self.told.append((-1, {}))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "fake", Fake)
    for name in ("told", "pictures", "configured"):
        monkeypatch.setattr(Fake, name, [])
    monkeypatch.setattr(Fake, "fails_at", None)
    return Fake


def run(out: Path, *names: str) -> Record:
    options: dict[str, Any] = {
        "settings": [*SETTINGS, "track.budget.prompts_per_round=1"],
        "track": "micro",
        "out": out,
    }
    return bench_dfusion.run(algo="dpo", builder="vanilla", reward="oracle", trackers=names, **options)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Record:
    return run(tmp_path_factory.mktemp("calm"))


def same(a: Record, b: Record) -> bool:
    return a.comparable() == b.comparable() and a.provenance.lora_sha256 == b.provenance.lora_sha256


def rounds_of(fake: type[Fake]) -> list[int]:
    return [step for step, values in fake.told if "round/reward" in values]


def test_every_round_is_logged_once_with_its_picture_and_no_number_changes(
    fake: type[Fake], calm: Record, tmp_path: Path
) -> None:
    found = run(tmp_path, "fake")
    assert same(found, calm)
    n = len(found.rounds)
    assert rounds_of(fake) == list(range(n)) and fake.told[-1] == (-1, {})
    curves = {step: values for step, values in fake.told if "round/reward" in values}
    assert [curves[r.round]["round/reward"] for r in found.rounds] == [r.reward for r in found.rounds]
    assert curves[0]["train/loss"] == found.rounds[0].metrics["loss"]
    (judged,) = [values for _, values in fake.told if "oracle/gain" in values]
    assert judged["oracle/gain"] == found.verdicts[0].gain.mean and found.drift and judged["drift/kl"] == found.drift.kl
    assert [(step, what) for step, what, _ in fake.pictures] == [
        *((i, "triples") for i in range(n)),
        (n - 1, "base_trained"),
    ]
    (config,) = fake.configured
    assert config["algorithm.name"] == "dpo" and config["seed"] == 0 and isinstance(config["track.sampler.steps"], int)
    assert all(isinstance(value, str | float | int | bool) for value in config.values())


def test_a_resumed_run_goes_on_with_the_round_that_was_not_logged(
    fake: type[Fake], calm: Record, tmp_path: Path
) -> None:
    with stopped_in_round(2):
        run(tmp_path, "fake")
    assert rounds_of(fake) == [0, 1]
    assert same(run(tmp_path, "fake"), calm)
    assert rounds_of(fake) == list(range(len(calm.rounds))) and len(fake.configured) == 1


def test_one_that_fails_is_left_out_with_a_line_and_the_run_goes_on(
    fake: type[Fake], calm: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fake, "fails_at", 1)
    assert same(run(tmp_path, "fake"), calm) and rounds_of(fake) == [0]
    said = [line for line in capsys.readouterr().err.splitlines() if "tracker fake" in line]
    assert said == ["tracker fake failed and is left out of the rest of this run (ConnectionError: the server is away)"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tensorbord", "unknown tracker 'tensorbord'; did you mean tensorboard?"),
        ("wandb", "--tracker wandb needs a package that is not installed: pip install wandb"),
    ],
)
def test_a_tracker_that_is_not_there_is_said_before_any_compute(
    name: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda package: None)
    with pytest.raises(UsageError) as said:
        run(tmp_path, name)
    assert str(said.value) == expected
    words = ("--algo", "dpo", "--reward", "clip", "--tracker", name)
    assert expected in refused("run", *words, cwd=tmp_path)
    assert expected in refused("sweep", "micro", *words, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_trackers_write_is_no_part_of_a_record(fake: type[Fake], tmp_path: Path) -> None:
    run(tmp_path, "fake")
    ((path, _),) = records.find(tmp_path)
    assert (path.parent / trackers.FOLDER / "logged.json").is_file()
    done = bench_dfusion.load_records(tmp_path)
    assert len(done) == 1


def test_tensorboard_shows_the_curves(calm: Record, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert same(run(tmp_path, "tensorboard"), calm)
    (file,) = [
        p for p in tmp_path.rglob("events.out*") if p.parent.name == p.parents[3].name or "hparams" not in p.name
    ][:1]
    found = events.EventAccumulator(str(file.parent)).Reload()
    assert [e.value for e in found.Scalars("round/reward")] == pytest.approx([r.reward for r in calm.rounds])
    assert found.Images("triples") and found.Images("base_trained")
