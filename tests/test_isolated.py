"""Scorers in environments of their own: how they are built, what they answer, and every way they go wrong.

The environment holds toypkg 1.0 while this process imports toypkg 2.0; both are wheels made here, so that no registry is
asked.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import time
import weakref
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import Said
from processes import TINY

from bench_dfusion.errors import UsageError
from bench_dfusion.rewards import isolated
from bench_dfusion.rewards.isolated import IsolatedReward, ScorerError

HERE = Path(__file__).parent


def wheel(folder: Path, version: str) -> Path:
    """A wheel of `toypkg`, whose module says its version."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"toypkg-{version}-py3-none-any.whl"
    info = f"toypkg-{version}.dist-info"
    content = {
        "toypkg.py": f"VERSION = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: toypkg\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    content[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*content, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as file:
        for name, text in content.items():
            file.writestr(name, text)
    return path


PLUGIN = """
from bench_dfusion.isolated import IsolatedConfig, IsolatedReward


class ToyConfig(IsolatedConfig):
    scale: float = 1.0
    fail: bool = False
    note: str = ""
    weights: str = ""


class Toy(IsolatedReward):
    name = "toy"
    summary = "brightness"
    paper = "none"
    unit = "none"
    Config = ToyConfig
    requirements = ({requirement!r},)
    located_by = frozenset({{"weights"}})
    worker = {worker!r}
"""


@pytest.fixture(scope="session")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plugin file of the reward `toy`."""
    folder = tmp_path_factory.mktemp("toy")
    path = folder / "toy.py"
    requirement = f"toypkg @ {wheel(folder, '1.0').as_uri()}"
    path.write_text(PLUGIN.format(requirement=requirement, worker=str(HERE / "toy_scorer.py")))
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _home(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_DFUSION_HOME", str(cache))
    monkeypatch.setenv("PIP_NO_INDEX", "1")


@pytest.fixture
def toy(plugin: Path) -> Iterator[Callable[..., IsolatedReward]]:
    """`toy(timeout=1)`: the reward with these options."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("toy_plugin", plugin)
    assert spec and spec.loader
    module = sys.modules["toy_plugin"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: list[weakref.ref[IsolatedReward]] = []

    def make(**options: object) -> IsolatedReward:
        reward: IsolatedReward = module.Toy(module.ToyConfig(**{"timeout": 30, **options}))
        made.append(weakref.ref(reward))
        return reward

    yield make
    for reference in made:
        if (reward := reference()) is not None:
            reward.close()


IMAGES = torch.arange(5 * 2 * 3 * 3, dtype=torch.uint8).view(5, 2, 3, 3)
PROMPTS = ["a", "bb", "ccc", "dddd", "eeeee"]
SCORES = IMAGES.flatten(1).sum(1) / 1000 + torch.arange(1, 6)


def gone(pid: int, seconds: float = 5.0) -> bool:
    """Whether a process ends in this time; a zombie that only its new parent has to reap has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def children(pid: int) -> list[bytes]:
    """The command lines of a process's children."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(OSError):  # ended meanwhile
            found.append(Path(f"/proc/{child}/cmdline").read_bytes())
    return found


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    own = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return own + [grandchild for child in own for grandchild in descendants(child)]


def open_files(pid: int) -> list[str]:
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            found.append(os.readlink(link))
    return found


def pid_of(reward: IsolatedReward) -> int:
    assert reward._worker is not None
    return reward._worker.process.pid


def test_scores_come_from_the_other_environment_in_batches(
    toy: Callable[..., IsolatedReward], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(wheel(tmp_path, "2.0")))
    monkeypatch.setenv("PYTHONPATH", str(wheel(tmp_path, "2.0")))  # must not reach the worker
    import toypkg

    assert toypkg.VERSION == "2.0"
    reward = toy(batch=2)
    assert torch.equal(reward.score(IMAGES, PROMPTS), SCORES) and reward.score(IMAGES, PROMPTS).dtype == torch.float32
    assert reward.versions() == {"toy/python": sys.version.split()[0], "toy/toypkg": "1.0"}
    pid = pid_of(reward)
    opened = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
    assert opened and not [name for name in opened if name.startswith("socket:")]  # pipes alone, no network
    del reward
    gc.collect()
    assert not Path(f"/proc/{pid}").exists()  # no zombie either


def test_a_big_batch_passes_through_the_pipes(toy: Callable[..., IsolatedReward]) -> None:
    images = torch.full((3, 300, 400, 3), 2, dtype=torch.uint8)  # many times a pipe's buffer
    assert toy().score(images, ["x"] * 3).tolist() == [721.0] * 3


def test_the_fingerprint_is_of_what_a_score_depends_on(toy: Callable[..., IsolatedReward], tmp_path: Path) -> None:
    first, copy, other = tmp_path / "first", tmp_path / "copy", tmp_path / "other"
    for path, content in ((first, "w"), (copy, "w"), (other, "x")):
        path.write_text(content)
    plain = toy().fingerprint()
    assert plain == toy(batch=3, timeout=5, restarts=0).fingerprint()
    assert len({plain, toy(scale=2.0).fingerprint(), toy(weights=str(first)).fingerprint()}) == 3
    assert toy(weights=str(first)).fingerprint() == toy(weights=str(copy)).fingerprint()
    assert toy(weights=str(first)).fingerprint() != toy(weights=str(other)).fingerprint()


def test_a_dead_worker_is_replaced_and_its_batch_sent_again(
    toy: Callable[..., IsolatedReward], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = toy(batch=2, note=str(tmp_path / "died"))
    prompts = ["a", "bb", "die-once x", "dddd", "eeeee"]
    pid = pid_of(reward)
    scores = reward.score(IMAGES, prompts)
    assert pid_of(reward) != pid and gone(pid)
    torch.testing.assert_close(scores, SCORES + torch.tensor([0, 0, 7, 0, 0]))  # that prompt is longer
    assert torch.equal(reward.score(IMAGES, prompts), scores)
    assert "the scorer was killed by SIGSEGV; starting another" in capsys.readouterr().err


def test_one_that_keeps_dying_is_an_error_with_its_last_lines(toy: Callable[..., IsolatedReward]) -> None:
    reward = toy(restarts=1)
    with pytest.raises(ScorerError) as caught:
        reward.score(IMAGES, ["die"] * 5)
    text = str(caught.value)
    assert "reward toy: the scorer ended with status 7 (2 times on one batch); its last lines:" in text
    assert text.splitlines()[-1].strip() == "my last words\\x1b[31m"
    assert torch.equal(reward.score(IMAGES, PROMPTS), SCORES)  # what follows has a worker again


def test_one_that_hangs_is_ended_with_its_children(toy: Callable[..., IsolatedReward], tmp_path: Path) -> None:
    reward = toy(timeout=0.7, note=str(tmp_path / "pids"))
    with pytest.raises(ScorerError, match="gave no answer in 1 s; raise reward.timeout"):
        reward.score(IMAGES, ["hang"] * 5)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2 and all(gone(pid) for pid in pids)


def test_wrong_answers(toy: Callable[..., IsolatedReward]) -> None:
    reward = toy()
    scores = reward.score(IMAGES, ["nan", *PROMPTS[1:]])
    assert scores[0].isnan() and scores[1:].isfinite().all()  # passed on: to the trainer it is a collapse
    with pytest.raises(ScorerError, match="returned 4 scores for 5 images"):
        reward.score(IMAGES, ["few", *PROMPTS[1:]])
    pid = pid_of(reward)
    with pytest.raises(ScorerError, match="(?s)the scorer failed.*cannot read this picture"):
        reward.score(IMAGES, ["raise", *PROMPTS[1:]])
    assert pid_of(reward) == pid and torch.equal(reward.score(IMAGES, PROMPTS), SCORES)


def test_one_that_does_not_load_says_why_before_anything_is_written(
    said: Callable[..., Said], plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench_dfusion.registry._from_files", {})
    out = tmp_path / "runs"
    words = ["--algo", "dpo", "--reward", "toy", "--plugin", plugin, "--out", out, "--set", "reward.fail=true"]
    done = said("run", *words)
    assert done.status == 2 and not out.exists()
    assert "bench-dfusion: reward toy: the scorer ended with status 1 while it was loading; its last lines:" in done.err
    assert done.err.strip().splitlines()[-1].strip() == "RuntimeError: no weights here"


def test_an_environment_changed_by_hand_is_refused(toy: Callable[..., IsolatedReward]) -> None:
    reward = toy()
    marker = reward.environment.folder / "complete.json"
    content = marker.read_text()
    marker.write_text(content.replace('"1.0"', '"1.1"'))
    try:
        with pytest.raises(ScorerError, match="was changed after it was built"):
            toy()
    finally:
        marker.write_text(content)


def test_two_processes_build_one_environment_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"  # what this process sees there must not count as installed
    zipfile.ZipFile(wheel(tmp_path, "3.0")).extractall(site)
    home = {"BENCH_DFUSION_HOME": str(tmp_path / "home"), "PIP_LOG": str(tmp_path / "log")}
    for name, value in {"PYTHONPATH": str(site), "PIP_FIND_LINKS": str(tmp_path), **home}.items():
        monkeypatch.setenv(name, value)
    folder = isolated._folder("two", ["toypkg==3.0"], sys.version)
    folder.parent.mkdir(parents=True)
    words = [
        sys.executable,
        "-c",
        "from bench_dfusion.rewards import isolated; print(isolated.build('two', ['toypkg==3.0']))",
    ]
    with open(f"{folder}.lock", "w") as lock:
        assert isolated._flock(lock)
        both = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in "ab"]
        while not all(any("two-" in name for name in open_files(process.pid)) for process in both):
            assert all(process.poll() is None for process in both)
            time.sleep(0.02)
        time.sleep(0.5)
        assert not folder.exists()  # they wait
    said = [process.communicate(timeout=60)[0] for process in both]
    assert said[0] == said[1] and "versions={'toypkg': '3.0'}" in said[0]
    assert (tmp_path / "log").read_text().count("Successfully installed toypkg-3.0") == 1


def test_a_build_killed_in_the_middle_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BENCH_DFUSION_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(isolated, "TICK", 0.05)
    requirement = f"toypkg @ {wheel(tmp_path, '4.0').as_uri()}"
    code = f"from bench_dfusion.rewards import isolated; isolated.build('cut', [{requirement!r}])"
    process = subprocess.Popen([sys.executable, "-c", code])
    scorers = tmp_path / "home" / "scorers"
    while not any(b"install" in words for words in children(process.pid)):
        assert process.poll() is None
        time.sleep(0.005)
    while len(family := descendants(process.pid)) < 2:  # who watches, and pip
        assert process.poll() is None
        time.sleep(0.005)
    (cut,) = (p for p in scorers.iterdir() if p.is_dir())
    with open(f"{cut}.lock") as lock:
        assert not isolated._flock(lock)
        process.kill()
        process.wait()
        assert all(gone(pid) for pid in family) and isolated._flock(lock)  # pip has died with who started it
    assert not (cut / "complete.json").exists()
    (cut / "half").touch()
    found = isolated.build("cut", [requirement])
    assert found.folder == cut and found.versions == {"toypkg": "4.0"} and not (cut / "half").exists()
    assert isolated.build("cut", [requirement]) == found


def test_what_cannot_be_installed_says_so_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_DFUSION_HOME", str(tmp_path))
    with pytest.raises(
        ScorerError, match=r"(?s)reward bad: its environment cannot be built \(nowhere==1\).*\n  ERROR: No"
    ):
        isolated.build("bad", ["nowhere==1"])
    assert [p.suffix for p in (tmp_path / "scorers").iterdir()] == [".lock"]
    with pytest.raises(UsageError, match="reward bad needs python9.9, which is not on PATH"):
        isolated.build("bad", [], "python9.9")


@pytest.mark.parametrize("end", ["kill", "exit"])
def test_no_worker_outlives_its_parent(plugin: Path, tmp_path: Path, end: str) -> None:
    note = tmp_path / "pids"
    code = f"""
import sys, time, torch
sys.path.insert(0, {str(plugin.parent)!r})
import toy
reward = toy.Toy(toy.ToyConfig(note={str(note)!r}))
print(reward._worker.process.pid, flush=True)
if {end!r} == "kill":
    reward.score(torch.zeros(1, 2, 2, 3, dtype=torch.uint8), ["hang"])  # ended while it is busy
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    pids = [int(process.stdout.readline())]
    if end == "kill":
        while not note.exists() or len(note.read_text().split()) < 2:
            assert process.poll() is None
            time.sleep(0.02)
        pids += map(int, note.read_text().split())
        process.send_signal(signal.SIGKILL)
    assert process.wait(30) == (-signal.SIGKILL if end == "kill" else 0)
    process.stdout.close()
    assert all(gone(pid) for pid in pids)


def test_a_run_trains_on_an_isolated_reward(
    said: Callable[..., Said], plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench_dfusion.registry._from_files", {})
    listed = said("list", "rewards", "toy", "--plugin", plugin)
    assert "brightness [isolated: an environment of its own]" in listed.out and "toypkg @ file:" in listed.out
    monkeypatch.setattr("bench_dfusion.registry._from_files", {})
    words = ["--algo", "ddpo", "--builder", "vanilla", "--reward", "toy", "--plugin", plugin, "--out", tmp_path]
    done = said("run", *words, *TINY)
    assert done.status == 0, done.err
    (path,) = tmp_path.glob("*/*/record.json")
    record = json.loads(path.read_text())
    assert record["cost"]["reward_queries"] == 24 and record["rounds"][0]["reward_sd"] > 0
    provenance = record["provenance"]
    assert provenance["versions"]["toy/toypkg"] == "1.0" and len(provenance["reward_fingerprint"]) == 64


def test_the_scorers_that_need_an_environment_are_installed(said: Callable[..., Said]) -> None:
    listed = " ".join(said("list", "rewards").out.split())
    assert listed.count("[isolated:") == 2
    for name in ("imagereward", "hpsv3"):
        assert "reward.revision" in said("list", "rewards", name).out
