"""The workflow of a results repository: its shell steps, run as GitHub runs them, on pull requests good and bad."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from boards import changed, digest, leave, place, record

from bench_dfusion.results import companions, merge, records

WORKFLOW = yaml.safe_load((Path(__file__).parent.parent / "leaderboards" / "results-repository.yml").read_text())
STEPS = [s for s in WORKFLOW["jobs"]["check"]["steps"] if "run" in s and s["name"] != "Install"]
OURS, THEIRS = record(seed=1), record("ddpo", "vanilla", seed=0)


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    return subprocess.run(
        ["git", "-C", str(folder), *who, *words], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A results repository with two records."""
    folder = tmp_path / "repository"
    merge.merge([leave(tmp_path / "published", record(), THEIRS)], folder / "results")
    git(tmp_path, "init", "-q", "-b", "main", str(folder))
    (folder / "README.md").write_text("results\n")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "base")
    return folder


def propose(folder: Path, change: Callable[[Path], object]) -> None:
    """Check out what GitHub checks out of a pull request: its merge into the base."""
    git(folder, "checkout", "-qb", "theirs")
    change(folder)
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "a submission")
    git(folder, "checkout", "-q", "main")
    git(folder, "merge", "-q", "--no-ff", "-m", "merge", "theirs")
    git(folder, "checkout", "-q", "--detach")


def steps(folder: Path, first: int = 0, last: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run steps of the workflow until one fails."""
    temporary = folder.parent / "temporary"
    temporary.mkdir(exist_ok=True)
    env = {
        **os.environ,
        **{name: str(value) for name, value in WORKFLOW["env"].items()},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RUNNER_TEMP": str(temporary),
        "GITHUB_STEP_SUMMARY": str(folder.parent / "summary.md"),
        "HF_HUB_OFFLINE": "1",
    }
    for number, step in enumerate(STEPS[first:last]):
        script = folder.parent / f"step{number}.sh"
        script.write_text(step["run"])
        words = ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)]
        done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=900)
        if done.returncode:
            break
    return done


def submit(*found: records.Record, lora: bytes | None = None) -> Callable[[Path], object]:
    """What SUBMITTING.md says: records merged into a clone."""

    def change(folder: Path) -> None:
        theirs = leave(folder.parent / "theirs", *found)
        for each in found:
            if lora is not None:
                place(theirs, each).with_name(companions.LORA).write_bytes(lora)
        merge.merge([theirs], folder / "results", submitter="them")

    return change


def renamed(folder: Path) -> None:
    (folder / "results" / "toy-v1").rename(folder / "results" / "toy-v2")


def linked(folder: Path) -> None:
    target = place(folder / "results", OURS)
    target.parent.mkdir(parents=True)
    target.symlink_to("/etc/passwd")


def written(name: str, text: str = "{}") -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    return change


def executable(folder: Path) -> None:
    written("results/toy-v1/x/record.json")(folder)
    (folder / "results/toy-v1/x/record.json").chmod(0o755)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: place(folder / "results", THEIRS).unlink(),
        lambda folder: place(folder / "results", THEIRS).write_text("{}"),
        renamed,
        linked,
        executable,
        written("results/reviewed.json"),
        written("results/toy-v1/x/record.json\nrecord.json"),
        written("results/toy-v1/$(touch ran)`touch ran`;touch ran/record.json"),
        written("results/toy-v1/é/record.json"),
        written("results/toy-v1/-rf x/record.json"),
        written("results/toy-v1/x/run.py"),
        written("::stop-commands::x"),
        written(".gitattributes", "*.json filter=x\n"),
        written(".github/workflows/results.yml"),
        written("README.md"),
    ],
)
def test_only_new_files_of_runs_are_taken(change: Callable[[Path], object], repository: Path) -> None:
    propose(repository, change)
    done = steps(repository, last=1)
    assert done.returncode == 1 and done.stdout.startswith("::error::more than new runs is added, changed or removed:")
    assert all(line.startswith(":") and not line.startswith("::") for line in done.stdout.splitlines()[1:])
    assert not list(repository.parent.rglob("ran")) and not done.stderr


def test_a_submission_is_taken(repository: Path) -> None:
    propose(repository, submit(changed(OURS, "provenance.lora_sha256", digest("LoRA")), lora=b"LoRA"))
    done = steps(repository, last=1)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
def test_all_steps_on_a_submission_and_what_each_finds(repository: Path) -> None:
    propose(repository, submit(OURS, record(seed=2)))
    done = steps(repository)
    summary = (repository.parent / "summary.md").read_text()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| dpo | dfusion | clip | 1 |" in summary and "| dpo | dfusion | clip (by them) | 2 |" in summary
    assert summary.count("no LoRA: cannot be verified") == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (submit(OURS), None),
        (
            lambda folder: shutil.copytree(place(folder / "results", THEIRS).parent, folder / "results/a/copy"),
            "Only in",
        ),
        (lambda folder: records.write(folder / "results/toy-v1/elsewhere/record.json", OURS), "Only in results/toy-v1"),
        (written("results/toy-v1/x/record.json"), "no schema_version"),
        (lambda folder: records.write(place(folder / "results", OURS), changed(OURS, "cost.updates", -1)), "updates"),
        (written("results/toy-v1/x/pytorch_lora_weights.safetensors"), "no record.json below"),
    ],
)
def test_what_is_not_what_a_merge_writes_is_refused(
    change: Callable[[Path], object], expected: str | None, repository: Path
) -> None:
    propose(repository, change)
    done = steps(repository, last=2)
    assert (done.returncode == 0) == (expected is None), done.stdout + done.stderr
    assert expected is None or expected in done.stdout + done.stderr


def test_it_runs_without_rights_and_secrets() -> None:
    assert WORKFLOW[True] == {"pull_request": {"paths": ["results/**"]}}, "not pull_request_target"
    assert WORKFLOW["permissions"] == {"contents": "read"} and "secrets" not in str(WORKFLOW)
    checkout, python = WORKFLOW["jobs"]["check"]["steps"][:2]
    assert checkout["with"] == {"fetch-depth": 2, "persist-credentials": False}
    assert python["with"]["cache-dependency-path"] == ".github/workflows/results.yml"
    assert all("${{" not in step["run"] for step in WORKFLOW["jobs"]["check"]["steps"] if "run" in step)
