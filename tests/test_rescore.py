"""Scoring again: a run against its record, and weights of other trainers, through the library and the command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from processes import SETTINGS
from safetensors.torch import load_file, save_file
from tiny import policy_of

import bench_dfusion
from bench_dfusion.cli.options import out
from bench_dfusion.diffusion import lora
from bench_dfusion.diffusion.policy import Policy
from bench_dfusion.errors import UsageError
from bench_dfusion.publish import repository, verify
from bench_dfusion.results import checked_base, leaderboard, records
from bench_dfusion.results.records import Record
from bench_dfusion.runs import config, evaluation, rescore
from bench_dfusion.tracks.schema import Track
from bench_dfusion.util import files


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny run."""
    out = tmp_path_factory.mktemp("runs")
    settings = [*SETTINGS, "algo.learning_rate=0.05"]
    bench_dfusion.run(algo="diffusion-dpo", builder="vanilla", reward="clip", settings=settings, out=out)
    ((path, _),) = records.find(out)
    return path.parent


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((folder / "record.json").read_text())
    change(content)
    (folder / "record.json").write_text(json.dumps(content))


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out, "width", 160)


def no_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("something was drawn")

    monkeypatch.setattr(evaluation, "draw", refuse)


# --- a run against its record


def test_a_run_matches_its_record_to_the_last_bit(finished: Path, said) -> None:
    before = sorted((p, p.stat().st_mtime_ns) for p in finished.rglob("*"))
    status, out, _ = said("eval", finished)
    assert status == 0 and "matches: 3 judges, 3 prompts" in out and "to the last bit" in out
    assert before == sorted((p, p.stat().st_mtime_ns) for p in finished.rglob("*")), "an eval only reads"


def test_one_changed_score_is_found_and_named(copied: Path, monkeypatch, said) -> None:
    edit(
        copied, lambda r: r["verdicts"][2]["per_prompt"][1].__setitem__(0, r["verdicts"][2]["per_prompt"][1][0] + 0.003)
    )
    found = rescore.run(copied)
    assert [(d.judge, d.what) for d in found.differences] == [("clip", "'two blue rings' base")]
    assert found.differences[0].size == pytest.approx(0.003) and found.largest["clip"] == pytest.approx(0.003)
    assert found.largest["oracle"] == 0 and not found.exact and found.status == "differs slightly"
    monkeypatch.setattr(rescore, "run", lambda *words: found)
    status, out, _ = said("eval", copied)
    assert status == 1 and "differs slightly" in out and "'two blue rings' base" in out
    assert "−0.003" in out.replace("-", "−")


def test_another_lora_under_the_same_hash_differs(copied: Path) -> None:
    file = copied / lora.FILE
    save_file({k: v * (-1 if ".lora_B" in k else 1) for k, v in load_file(file).items()}, file)
    edit(copied, lambda r: r["provenance"].__setitem__("lora_sha256", files.sha256(file)))
    found = rescore.run(copied)
    assert found.status.startswith("differs") and found.largest["clip"] > 1e-3
    whats = {d.what.rpartition(" ")[2] for d in found.differences if d.judge == "clip"}
    assert "trained" in whats and "base" not in whats, "the base is drawn without the LoRA"


def test_what_the_hashes_say_otherwise_is_named_and_nothing_is_drawn(copied: Path, monkeypatch, said) -> None:
    no_compute(monkeypatch)
    file = copied / lora.FILE
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    status, out, _ = said("eval", copied)
    (line,) = [line for line in out.splitlines() if line.startswith("- ")]
    assert status == 1 and f"the SHA-256 of {file}" in line

    def change(record: dict[str, Any]) -> None:
        record["track_hash"] = record["provenance"]["model_sha256"] = "0" * 64
        record["resolved"]["algorithm"]["learning_rate"] = 1
        record["provenance"]["lora_sha256"] = files.sha256(file)
        record["verdicts"].pop()
        record["verdicts"][1]["fingerprint"] = "0" * 64
        record["verdicts"][0]["per_prompt"].pop()

    edit(copied, change)
    wanted = (
        "the track's hash",
        "the hash of the options",
        "the SHA-256 of the model micro",
        "the fingerprint of the judge oracle:full",
        "the track's judges are oracle, oracle:full, clip, the record has oracle, oracle:full",
        "the record has oracle's scores of 2 prompts",
    )
    problems = rescore.run(copied).provenance
    assert len(problems) == len(wanted) and all(p.startswith(w) for p, w in zip(problems, wanted, strict=True))


def test_status_by_the_size_of_a_difference(finished: Path) -> None:
    record = records.read(finished / "record.json")
    prompts = record.resolved["track"]["prompts"]["heldout"]
    assert record.drift is not None

    def shifted(amount: float) -> rescore.Rescored:
        verdict = record.verdicts[2]
        moved = [(b + amount, t) for b, t in verdict.per_prompt]
        other = verdict.model_copy(update={"per_prompt": moved, "base": verdict.base + amount})
        old = record.model_copy(update={"verdicts": [*record.verdicts[:2], other]})
        differences, largest = rescore.compare(old, record.verdicts, record.drift, prompts)
        return rescore.Rescored(old, [], record.verdicts, differences, largest, False, [])

    gain = record.verdicts[2].gain
    half = (gain.high - gain.low) / 2
    assert shifted(1e-7).status == "matches" and shifted(1e-7).largest["clip"] > 0
    assert shifted(0.9 * half).status == "differs slightly"
    assert shifted(1.1 * half).status == "differs"


def failed(record: dict[str, Any]) -> None:
    record |= {"status": "failed", "evidence": "reward bad returned nan", "verdicts": []}


@pytest.mark.parametrize(
    ("change", "words", "expected"),
    [
        (lambda f: shutil.rmtree(f), (), "no run directory"),
        (lambda f: (f / "record.json").unlink(), (), "record.json"),
        (lambda f: (f / lora.FILE).unlink(), (), f"no file run/{lora.FILE}"),
        (lambda f: edit(f, failed), (), "reward bad returned nan"),
        (lambda f: edit(f, lambda r: r["resolved"].pop("track")), (), "no track"),
        (lambda f: None, ("--model", "."), "no model_index.json"),
        (lambda f: None, ("--track", "micro"), "--track does not go with RUN"),
        (lambda f: None, ("--lora", "run"), "give one of RUN"),
    ],
)
def test_a_run_that_cannot_be_scored_again_is_one_line(change, words, expected, copied, monkeypatch, refused) -> None:
    no_compute(monkeypatch)
    change(copied)
    assert expected in refused("eval", "run", *words, cwd=copied.parent)


# --- weights of other trainers


def tiny_track() -> Track:
    return config.resolve_track(settings=[s for s in SETTINGS if s.startswith("track.")])


def plain(verdicts: list[records.Verdict]) -> list[dict[str, Any]]:
    return [v.model_dump(exclude={"trained_on"}) for v in verdicts]


def test_a_run_on_a_directory_goes_on_and_is_scored_again_wherever_that_is(
    pixart_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.toml").write_text(OWN)
    shutil.copytree(pixart_dir, tmp_path / "model")
    monkeypatch.chdir(tmp_path)

    def run(model: str) -> Record:
        settings = ["track.budget.reward_queries=8", "track.budget.samples_per_prompt=4"]
        return bench_dfusion.run(
            algo="diffusion-dpo",
            builder="vanilla",
            reward="clip",
            track_source="own.toml",
            model=model,
            settings=settings,
        )

    record = run("model")
    ((path, _),) = records.find(tmp_path / "runs")
    assert record.resolved["track"]["model"]["id"] == "local" and record.given["model"] == "model"
    assert list(records.check(record)) == []
    assert run(str(tmp_path / "model") + "/").model_dump() == record.model_dump(), "what is there is only read"
    assert rescore.run(path.parent).exact
    (tmp_path / "model").rename(tmp_path / "moved")
    with pytest.raises(UsageError, match="the directory model, which is not here: give --model"):
        rescore.run(path.parent)
    assert rescore.run(path.parent, model="moved").exact


@pytest.mark.parametrize("part", [lora.FILE, "peft"])
def test_a_runs_own_lora_gets_the_records_verdicts(part: str, finished: Path, tmp_path: Path) -> None:
    record: Record = records.read(finished / "record.json")
    folder, found = rescore.score_weights(tiny_track(), tmp_path, lora=finished / part)
    assert plain(found.verdicts) == plain(record.verdicts) and found.drift == record.drift
    assert not any(v.trained_on for v in found.verdicts)
    assert found.lora is not None and (found.lora.rank, found.lora.alpha) == (4, 4)
    assert folder.parent == tmp_path / "micro-custom-v2" and found.model_sha256 == record.provenance.model_sha256


@pytest.fixture(scope="module")
def sd_lora(sd_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a LoRA for the tiny Stable Diffusion, not of the track's shape."""
    folder = tmp_path_factory.mktemp("lora")
    policy_of(sd_dir, lora=0.3, rank=2, alpha=6.0, targets=["to_k"]).save(folder)
    return folder


OWN = """
name = "own"
version = 1
batch = 8
[sampler]
steps = 3
[lora]
rank = 4
[prompts]
train = ["a cat"]
heldout = ["a dog", "two cats"]
[budget]
reward_queries = 24
prompts_per_round = 1
[evaluation]
judges = ["clip"]
images_per_prompt = 2
[rewards.clip]
model = "micro"
"""


def test_a_stable_diffusion_lora_of_another_rank(
    sd_dir: Path, sd_lora: Path, tmp_path: Path, monkeypatch, said, refused
) -> None:
    (tmp_path / "own.toml").write_text(OWN)
    shutil.copytree(sd_lora, tmp_path / "my style")
    words = ("eval", "--lora", "my style", "--track", "own.toml", "--model", sd_dir)
    status, out, _ = said(*words, cwd=tmp_path)
    assert status == 0 and "clip" in out
    assert "my-style (lora, rank 2, alpha 6) on own-custom-v1: 2 held-out prompts" in " ".join(out.split())
    (path,) = (tmp_path / "runs" / "own-custom-v1").glob("eval-my-style-*/evaluation.json")
    found = rescore.read(path)
    assert found.lora is not None and found.lora.modules == 14 and found.drift.pixels > 0
    assert found.verdicts[0].base != found.verdicts[0].trained
    assert Image.open(path.with_name("base_trained.png")).size[0] > 100
    no_compute(monkeypatch)
    again = said(*words)
    assert again.status == 0 and again.out == out, "what is there is only read"
    path.write_text("{}")
    assert "evaluation.json is no evaluation" in refused(*words)


def test_a_pipeline_trained_as_a_whole_beside_its_base(sd_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(OWN)
    track = config.resolve_track(str(tmp_path / "own.toml"), model=str(sd_dir))
    # Merged into the weights, a LoRA is a pipeline trained as a whole.
    policy = policy_of(sd_dir, lora=0.3, rank=2)
    policy.save(tmp_path / "lora")
    for module in list(policy.adapter.network.modules()):
        if hasattr(module, "merge"):
            module.merge()
    weights = {k: v for k, v in policy.adapter.network.state_dict().items() if "lora_" not in k}
    merged = shutil.copytree(sd_dir, tmp_path / "merged")
    (file,) = merged.glob("unet/*.safetensors")
    save_file({k.replace(".base_layer", ""): v.contiguous() for k, v in weights.items()}, file, {"format": "pt"})
    _, whole = rescore.score_weights(track, tmp_path, checkpoint=merged)
    _, apart = rescore.score_weights(track, tmp_path, lora=tmp_path / "lora")
    torch.testing.assert_close(whole.verdicts[0].per_prompt, apart.verdicts[0].per_prompt, atol=1e-3, rtol=0)
    assert whole.drift.kl == pytest.approx(apart.drift.kl, rel=1e-2) and whole.drift.kl > 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "give one of RUN"),
        (("--lora", "nowhere"), "no LoRA at nowhere"),
        (("--lora", "run"), "is a LoRA of another model"),
        (("--lora", "run", "--name", "../up"), "--name '../up'"),
        (("--lora", "run", "--track", "mikro"), "unknown track 'mikro'; did you mean micro"),
        (("--lora", "run", "--set", "algo.beta=1"), "only track.OPTION"),
        (("--lora", "run", "--model", "somewhere"), "give --prompts FILE"),
        (("--checkpoint", "nowhere"), "no pipeline directory nowhere"),
        (("--checkpoint", "run"), "no model_index.json"),
        (("--checkpoint", "SD"), "no noise is the same for both"),
    ],
)
def test_a_mistake_is_one_line_before_any_compute(
    words, expected, sd_dir, sd_lora, tmp_path, monkeypatch, refused
) -> None:
    no_compute(monkeypatch)
    shutil.copytree(sd_lora, tmp_path / "run")
    assert expected in refused("eval", *(sd_dir if w == "SD" else w for w in words), cwd=tmp_path)
    assert not (tmp_path / "runs").exists()


# --- verifying a folder


def raised(folder: Path, by: float = 0.05) -> None:
    """The trained scores before the last judge raised, and all that follows from them."""

    def change(content: dict[str, Any]) -> None:
        verdict = content["verdicts"][-1]
        verdict["per_prompt"] = [[base, trained - by] for base, trained in verdict["per_prompt"]]
        verdict["trained"] -= by
        verdict["gain"] |= {key: verdict["gain"][key] - by for key in ("mean", "low", "high")}
        verdict["templates"] = {t: [b, a - by] for t, (b, a) in verdict["templates"].items()}

    edit(folder, change)


def test_verify_evaluates_again_and_runs_again(copied: Path, monkeypatch, said) -> None:
    status, out, _ = said("verify", copied.parent, "--sample", 3, "--rerun", 1)
    lines = [line.split() for line in out.splitlines() if "again" in line and "diffusion-dpo" in line]
    assert status == 0 and [" ".join(line[2:4]) for line in lines[-2:]] == ["evaluated again", "run again"]
    assert out.count("matches") == 2 and out.count("to the last bit") == 2

    raised(copied)
    status, out, _ = said("verify", copied.parent, "--sample", 1)
    assert status == 1 and "differs" in out and "clip" in out

    (copied / lora.FILE).write_bytes(b"another")
    ((verified),) = verify.run(copied.parent, 1)
    assert verified.status == "differs" and "provenance.lora_sha256: " in verified.detail

    (copied / lora.FILE).unlink()
    no_compute(monkeypatch)
    status, out, _ = said("verify", copied.parent)
    assert status == 0 and "no LoRA: cannot be verified" in out and "matches" not in out


@pytest.mark.slow
def test_a_published_run_is_evaluated_again_from_its_lora(copied: Path, tmp_path: Path) -> None:
    edit(copied, lambda record: record["provenance"].update(code="0" * 40, dirty=False))
    repository.to_directory(leaderboard.boards(copied.parent), tmp_path / "published")
    shutil.rmtree(copied)
    (verified,) = verify.run(tmp_path / "published")
    assert (verified.status, verified.detail) == ("matches", "to the last bit")


def test_verify_says_what_it_cannot_run_again(copied: Path, monkeypatch, refused, tmp_path: Path) -> None:
    (found,) = records.find(copied.parent)
    other = found[1].model_copy(update={"cell_hash": "0" * 64})
    with pytest.raises(UsageError, match="its options come out otherwise here"):
        verify.cell_of(other)
    offline = {**found[1].resolved, "builder": {"name": "offline"}}
    with pytest.raises(UsageError, match="a dataset of pairs, which the record does not hold"):
        verify.cell_of(found[1].model_copy(update={"builder": "offline", "resolved": offline}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef f(images, prompts): return [0]\n")
    for reward in (f"{tmp_path}/evil.py:f", f"clip:0.5,{tmp_path}/evil.py:f:0.5"):
        with pytest.raises(UsageError, match="a user's function, whose code the record does not hold"):
            verify.cell_of(found[1].model_copy(update={"reward": reward}))
    assert not (tmp_path / "ran").exists()
    (tmp_path / "empty").mkdir()
    assert "no record.json below" in refused("verify", tmp_path / "empty")
    assert "no directory" in refused("verify", tmp_path / "none")


def test_which_records_are_verified_their_content_decides(finished: Path) -> None:
    (path, one), *_ = records.find(finished.parent)
    found = [(path.parent / str(n) / path.name, one.model_copy(update={"seed": n})) for n in range(20)]
    order = [r.seed for _, r in verify.drawn(found)]
    moved = [(Path("elsewhere") / str(r.seed), r) for _, r in reversed(found)]
    assert [r.seed for _, r in verify.drawn(moved)] == order != sorted(order)
    more = [*found, (path, one.model_copy(update={"seed": 20}))]
    assert [r.seed for _, r in verify.drawn(more) if r.seed < 20] != order, "one more record draws all anew"


# --- a sampler of its own for what is judged


def test_what_is_judged_is_drawn_by_the_evaluations_sampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training on the ODE in 8 steps, judged in 3 with guidance; scored again it is the same to the last bit."""
    seen: list[tuple[int, float, int]] = []
    plain = Policy.sample

    def sample(self: Policy, *words: Any) -> Any:
        assert not self.schedule.stochastic.any()
        seen.append((len(self.schedule), self.guidance, self.branches))
        return plain(self, *words)

    monkeypatch.setattr(Policy, "sample", sample)
    settings = [
        *SETTINGS,
        "algo.learning_rate=0.05",
        "track.budget.reward_queries=8",
        "track.sampler.eta=0",
        'track.evaluation.sampler={"steps": 3, "eta": 0, "guidance": 2.0, "resolution": 64}',
        "track.evaluation.base_images_per_prompt=4",
    ]
    names: dict[str, Any] = {"algo": "diffusion-dpo", "builder": "vanilla", "reward": "oracle"}
    record = bench_dfusion.run(**names, settings=settings, out=tmp_path)
    training, judging = (4, 1.0, 1), (3, 2.0, 2)
    assert set(seen) == {training, judging} and seen[-1] == judging
    assert record.drift is not None and record.drift.kl > 0  # of steps without a density: by the family's own noise
    ((path, _),) = records.find(tmp_path)
    assert rescore.run(path.parent).exact
    # the base is of the evaluation's sampler, whatever trains
    track = config.resolve_track(settings=[s for s in settings if s.startswith("track.")])
    own = track.model_copy(update={"sampler": track.sampler.model_copy(update={"steps": 5})})
    assert checked_base.key(own) == checked_base.key(track) and own.hash != track.hash


def test_a_sampler_that_the_model_has_not_is_refused_before_compute(tmp_path: Path) -> None:
    settings = [*SETTINGS, 'track.evaluation.sampler={"steps": 1001}']
    with pytest.raises(UsageError, match="1001"):
        bench_dfusion.run(algo="sft", builder="vanilla", reward="oracle", settings=settings, out=tmp_path)
    assert not list(tmp_path.iterdir())
