"""Runs from start to record: what they leave, resuming after SIGKILL, failing with evidence."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import TINY, command

from bench_dfusion.results import records

DYING = '''
import os, signal
from pathlib import Path
from bench_dfusion.algorithms.dpo import DPO
from bench_dfusion.reward_models.oracle import Oracle

HERE = Path(os.environ["DIE_HERE"])

def maybe_die(what):
    """SIGKILL at the numbers of calls in DIE_AT that no earlier process died at."""
    log = HERE / what
    calls = len(log.read_text()) if log.exists() else 0
    with open(log, "a") as file:
        file.write(".")
    if f"{what}:{calls}" in os.environ.get("DIE_AT", "").split(","):
        os.kill(os.getpid(), signal.SIGKILL)

class DyingReward(Oracle):
    name = "dying"
    summary = "an oracle that kills the process"
    def score(self, images, prompts):
        with open(HERE / "queries", "a") as file:
            file.write("." * len(images))
        maybe_die("score")
        return super().score(images, prompts)

class DyingDPO(DPO):
    name = "dying-dpo"
    def loss(self, policy, samples, rows):
        maybe_die("loss")
        return super().loss(policy, samples, rows)

class DyingJudge(Oracle):
    name = "dying-judge"
    def score(self, images, prompts):
        maybe_die("judge")
        return super().score(images, prompts)

class BadReward(Oracle):
    name = "bad"
    def score(self, images, prompts):
        return super().score(images, prompts) / (0 if (HERE / "score").exists() else 1)
'''


def only_record(folder: Path) -> tuple[Path, records.Record]:
    ((path, record),) = records.find(folder)
    return path.parent, record


def test_a_run_leaves_record_lora_and_pictures_and_is_only_read_again(tmp_path: Path) -> None:
    words = ("run", "--algo", "ddpo", "--reward", "clip", "--builder", "vanilla", *TINY)
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder, record = only_record(tmp_path)
    assert "base" in done.stdout and "trained" in done.stdout and folder.name in done.stdout.replace("\n", "")
    names = ("record.json", "pytorch_lora_weights.safetensors", "base_trained.png", "triples.png", "cell.json")
    assert all((folder / n).stat().st_size for n in names)
    assert Image.open(folder / "base_trained.png").size[0] > 100
    assert record.cost.reward_queries == 24 and len(record.rounds) == 3
    assert record.cost.updates == 6
    judged = {v.judge: v for v in record.verdicts}
    assert judged["clip"].trained_on and not judged["oracle"].trained_on
    gains = np.array([t - b for b, t in judged["oracle"].per_prompt])
    assert judged["oracle"].gain.mean == pytest.approx(gains.mean())
    # by hand, one branch: 3 rounds x 8 samples x (4 steps drawn + 2 in the window trained on),
    # 6 evaluation images x 4 steps x 2 policies, 3 images x 4 steps x 2 policies for the KL
    assert record.cost.network_evaluations == 3 * 8 * (4 + 2) + 6 * 4 * 2 + 3 * 4 * 2
    stamp = (folder / "record.json").stat().st_mtime_ns
    again = command(*words, cwd=tmp_path)
    assert again.returncode == 0 and (folder / "record.json").stat().st_mtime_ns == stamp


def test_sigkill_in_every_phase_ends_with_the_same_record(tmp_path: Path) -> None:
    (tmp_path / "dying.py").write_text(DYING)
    words = ("run", "--algo", "dying-dpo", "--reward", "dying", "--plugin", "dying.py", *TINY)
    words += ('--set=track.evaluation.judges=["dying-judge"]',)
    for name in ("calm", "killed"):
        (tmp_path / name).mkdir()
    calm = command(*words, "--out", "calm/runs", cwd=tmp_path, env={"DIE_HERE": str(tmp_path / "calm")})
    assert calm.returncode == 0, calm.stderr
    # dfusion: 2 rounds of 8 + 4 queries, two score calls each and one for the base where a prompt is new; die while
    # scoring, twice, in the middle of an update, and while judging
    env = {"DIE_HERE": str(tmp_path / "killed"), "DIE_AT": "score:2,score:5,loss:3,judge:1"}
    codes = []
    for _ in range(5):
        codes.append(command(*words, "--out", "killed/runs", cwd=tmp_path, env=env).returncode)
        if codes[-1] == 0:
            break
    assert codes == [-signal.SIGKILL] * 4 + [0]
    _, expected = only_record(tmp_path / "calm")
    folder, record = only_record(tmp_path / "killed")
    assert record.comparable() == expected.comparable()
    spent = [len((tmp_path / n / "queries").read_text()) for n in ("calm", "killed")]
    # 24 queries, and one picture of the base for each of the three prompts, at most two new ones in a round
    assert spent[0] == 24 + 3 and spent[1] - spent[0] <= 3 * (12 + 2), "each kill may cost no more than its round"
    assert not [p for p in folder.iterdir() if p.name.startswith(".") and p.name != ".lock"], "no temporary files"


def test_a_non_finite_reward_fails_with_evidence_and_counts_as_a_miss(tmp_path: Path) -> None:
    (tmp_path / "dying.py").write_text(DYING)
    (tmp_path / "score").write_text(".")
    words = ("run", "--algo", "dpo", "--reward", "bad", "--plugin", "dying.py", *TINY)
    done = command(*words, cwd=tmp_path, env={"DIE_HERE": str(tmp_path)})
    assert done.returncode == 1
    _, record = only_record(tmp_path)
    assert record.status == "failed" and "bad returned" in (record.evidence or "")
    table = command("leaderboard", "--csv", cwd=tmp_path).stdout
    assert "miss: 1 of 1 runs collapsed" in table


def test_seeds_give_a_table_and_the_leaderboard_reads_the_same_runs(tmp_path: Path) -> None:
    words = ("run", "--algo", "diffusion-dpo", "--reward", "oracle", "--seeds", "3", *TINY)
    done = command(*words, "--set=track.budget.reward_queries=12", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first = command("leaderboard", "--csv", cwd=tmp_path).stdout
    assert first == command("leaderboard", "--csv", cwd=tmp_path).stdout
    header, line = first.strip().splitlines()
    assert "oracle gain" in header and "ceiling: trained on the judge" in line and "two-way t" in line


def test_prompts_config_and_set_reach_the_record(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("a purple cross\n\na blue circle\n")
    (tmp_path / "options.toml").write_text("[algo]\nbeta = 3.0\nupdates = 1\n")
    tiny = [w for w in TINY if "prompts.train" not in w and "prompts.validation" not in w]
    tiny += ["--set=track.prompts.validation=[]", "--set=track.budget.reward_queries=12"]
    words = ("--prompts", "mine.txt", "--config", "options.toml", "--set", "algo.beta=4", *tiny)
    done = command("run", "--algo", "dpo", "--reward", "oracle", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder, record = only_record(tmp_path)
    assert record.resolved["algorithm"]["beta"] == 4 and record.resolved["algorithm"]["updates"] == 1
    assert record.resolved["track"]["prompts"]["train"] == ["a purple cross", "a blue circle"]
    assert record.track == "micro-custom-v2"
    assert json.loads((folder / "cell.json").read_text())["given"]["config"]["algo"]["beta"] == 3.0


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "dying.py").write_text(DYING)
    words = ("run", "--algo", "dpo", "--reward", "dying", "--plugin", "dying.py", *TINY)
    env = {"DIE_HERE": str(tmp_path), "DIE_AT": "score:3"}
    assert command(*words, cwd=tmp_path, env=env).returncode == -signal.SIGKILL
    (checkpoint,) = tmp_path.rglob("checkpoint.safetensors")
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    done = command(*words, cwd=tmp_path, env=env)
    assert done.returncode == 2 and "checkpoint.safetensors is damaged" in done.stderr
