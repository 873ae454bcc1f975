"""What a user gives against what a cell is; tracks' own rules; files that are whole or absent."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file

from bench_dfusion.errors import UsageError
from bench_dfusion.models import layout
from bench_dfusion.runs.config import _settings, resolve, resolve_track
from bench_dfusion.tracks import schema
from bench_dfusion.tracks.schema import PromptsSection, Track
from bench_dfusion.util import files

TRACK = """
name = "toy"
version = 3
[model]
id = "micro"
[sampler]
steps = 4
[prompts]
train = ["a cat", "a dog"]
validation = ["a bird", "a fish"]
heldout = ["a horse", "a cow"]
[budget]
reward_queries = 64
prompts_per_round = 2
samples_per_prompt = 4
[evaluation]
judges = ["oracle"]
[algorithms.dpo]
beta = 2.0
updates = 3
[builders.dfusion]
margin = 0.25
[rewards.oracle]
score = "full"
"""


@pytest.fixture
def toy(tmp_path: Path) -> str:
    path = tmp_path / "toy.toml"
    path.write_text(TRACK)
    return str(path)


def cell(toy: str, **options):
    return resolve(**{"track_source": toy, "algo": "dpo", "reward": "oracle", **options})


def refusal(toy: str, **options) -> str:
    """The message, which is one line."""
    with pytest.raises(UsageError) as refused:
        cell(toy, **options)
    message = str(refused.value)
    assert len(message.splitlines()) == 1
    return message


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "options.toml"
    path.write_text(text)
    return path


# --- precedence


def test_default_then_track_then_file_then_set(toy: str, tmp_path: Path) -> None:
    plain = cell(toy).algorithm_config
    assert plain.grad_norm == 1.0  # the class's default
    assert (plain.beta, plain.updates) == (2.0, 3)  # the track's
    file = toml(tmp_path, "[algo]\nupdates = 5\nbeta = 6.0\n")
    with_file = cell(toy, config=file).algorithm_config
    assert (with_file.beta, with_file.updates) == (6.0, 5)
    both = cell(toy, config=file, settings=["algo.beta=7", "algo.beta=8"]).algorithm_config
    assert (both.beta, both.updates, both.grad_norm) == (8.0, 5, 1.0)  # the last of two settings holds


def test_what_is_tuned_for_a_builder_stands_between_the_tracks_defaults_and_the_file(toy: str, tmp_path: Path) -> None:
    text = "[track.tuned.dpo.dfusion]\nupdates = 7\ngrad_norm = 0.5\n[algo]\ngrad_norm = 0.25\n"
    file = toml(tmp_path, text)
    own = cell(toy, builder="dfusion", config=file).algorithm_config
    assert (own.beta, own.updates, own.grad_norm) == (2.0, 7, 0.25)
    other = cell(toy, builder="vanilla", config=file).algorithm_config
    assert (other.beta, other.updates) == (2.0, 3)


def test_every_section_has_the_same_precedence(toy: str, tmp_path: Path) -> None:
    plain = cell(toy)
    assert plain.builder_config.margin == 0.25 and plain.reward_config.score == "full"
    text = (
        '[builder]\nmargin = 0.5\nthreshold = 0.1\n[reward]\nscore = "graded"\n[track.sampler]\nsteps = 6\neta = 0.5\n'
    )
    file = toml(tmp_path, text)
    changed = cell(toy, config=file, settings=["builder.threshold=mean+1", "track.sampler.steps=7"])
    assert changed.builder_config.margin == 0.5 and changed.builder_config.threshold == "mean+1"
    assert changed.reward_config.score == "graded"
    assert (changed.track.sampler.steps, changed.track.sampler.eta, changed.track.sampler.guidance) == (7, 0.5, 1.0)
    assert changed.track.budget == plain.track.budget


def test_what_was_given_and_what_came_of_it_are_both_kept(toy: str, tmp_path: Path) -> None:
    file = toml(tmp_path, "[algo]\nbeta = 6.0\n")
    found = cell(toy, config=file, settings=["algo.updates=1"], seed=4)
    assert found.given["config"] == {"algo": {"beta": 6.0}} and found.given["set"] == ["algo.updates=1"]
    assert found.given["track"] == toy and found.given["seed"] == 4
    assert found.resolved["algorithm"]["beta"] == 6.0 and found.resolved["algorithm"]["window"] == [0.0, 1.0]
    assert found.resolved["seed"] == 4 and found.resolved["track"]["name"] == "toy"
    json.dumps(found.resolved, allow_nan=False)


# --- mistakes


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"algo": "dop"}, "unknown algorithm 'dop'; did you mean dpo"),
        ({"algo": "zzz"}, "known: "),
        ({"reward": "orakle"}, "did you mean oracle"),
        ({"builder": "vanila"}, "did you mean vanilla"),
        ({"track_source": "mikro"}, "did you mean micro"),
        ({"track_source": "nowhere.toml"}, "no track file nowhere.toml"),
        ({"settings": ["algo.betta=1"]}, "unknown option algo 'betta'; did you mean beta"),
        ({"settings": ["builder.thresold=1"]}, "did you mean threshold"),
        ({"settings": ["reward.scor=full"]}, "did you mean score"),
        ({"settings": ["track.sampler.stepz=3"]}, "did you mean steps"),
        ({"settings": ["track.budgit.reward_queries=3"]}, "did you mean budget"),
        ({"settings": ["alog.beta=1"]}, "unknown section 'alog'; did you mean algo"),
    ],
)
def test_unknown_names_come_with_the_near_ones(toy: str, options: dict, expected: str) -> None:
    assert expected in refusal(toy, **options)


@pytest.mark.parametrize(
    "setting",
    [
        "algo.beta=0",
        "algo.beta=-1",
        "algo.beta=NaN",
        "algo.beta=strong",
        "algo.beta=null",
        "algo.beta.deep=1",
        "algo.ratio_clamp=1",
        "algo.updates=0",
        "algo.updates=1.5",
        "algo.learning_rate=0",
        "algo.step_weight=half",
        "algo.window=[0, 0.5, 1]",
        "builder.margin=-1",
        "track.sampler.steps=0",
        "track.sampler.eta=0",
        "track.sampler.eta=1.5",
        "track.budget.samples_per_prompt=6",
        "track.budget.reward_queries=0",
        "track.evaluation.judges=[]",
        'track.prompts.heldout=["a horse"]',
        "track.name=A B",
        "track.version=0",
    ],
)
def test_values_out_of_range_name_their_option(toy: str, setting: str) -> None:
    option = setting.partition("=")[0].removesuffix(".deep")
    assert option in refusal(toy, settings=[setting])


def test_a_negative_seed_is_refused(toy: str) -> None:
    assert "-1" in refusal(toy, seed=-1)


@pytest.mark.parametrize("setting", ["algo.beta=Infinity", "track.sampler.guidance=Infinity"])
def test_infinite_values_are_refused(toy: str, setting: str) -> None:
    refusal(toy, settings=[setting])


@pytest.mark.parametrize("setting", ["", "=1", "beta=1", "algo.beta", "algo.=1", ".beta=1", "algo..beta=1", "algo=1"])
def test_a_setting_says_how_it_is_written(toy: str, setting: str) -> None:
    assert "SECTION.OPTION=VALUE" in refusal(toy, settings=[setting])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("algo = 5\n", "algo is a section"),
        ("seed = 1\n", "unknown section 'seed'"),
        ("[algo\n", "options.toml"),
        ("[algo]\nbetta = 1\n", "did you mean beta"),
    ],
)
def test_a_bad_config_file_is_one_line(toy: str, tmp_path: Path, text: str, expected: str) -> None:
    assert expected in refusal(toy, config=toml(tmp_path, text))


def test_a_config_file_that_is_missing_or_no_text(toy: str, tmp_path: Path) -> None:
    assert "no file" in refusal(toy, config=tmp_path / "missing.toml")
    (tmp_path / "options.toml").write_bytes(b"\xff\xfe\x00")
    assert "options.toml" in refusal(toy, config=tmp_path / "options.toml")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


@given(VALUES)
@settings(max_examples=50, deadline=None)
def test_a_json_value_is_read_back_as_it_is(value: object) -> None:
    assert _settings([f"algo.x={json.dumps(value)}"]) == {"algo": {"x": value}}


def test_values_that_are_no_json_are_text() -> None:
    assert _settings(["reward.model=ViT-H-14", "reward.tag=a=b"]) == {"reward": {"model": "ViT-H-14", "tag": "a=b"}}
    assert _settings(["track.a.b=1", "track.a.c=None"]) == {"track": {"a": {"b": 1, "c": None}}}


# --- prompts


def prompts(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "mine.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_own_prompts_replace_the_tracks_and_leave_the_validation_set(toy: str, tmp_path: Path) -> None:
    found = cell(toy, prompts=prompts(tmp_path, "  a lion ", "", "a bird\tanimals")).track
    assert cell(toy, prompts=prompts(tmp_path, "a lion", "A FISH.")).track.prompts.validation == ("a bird",)
    assert found.prompts.train == ("a lion", "a bird")
    assert found.prompts.validation == ("a fish",) and found.prompts.heldout == ("a horse", "a cow")
    assert found.name == "toy-custom"


def test_held_out_prompts_are_never_trained_on(toy: str, tmp_path: Path) -> None:
    assert "'a cow' is a held-out prompt" in refusal(toy, prompts=prompts(tmp_path, "a lion", "a cow"))
    assert "'a cow' is a held-out prompt" in refusal(toy, prompts=prompts(tmp_path, "a  cow", "a\u00a0lion"))
    for spelling in ("A cow", "a cow.", "the cow", "a c\u00adow"):
        assert "is the held-out prompt 'a cow' of" in refusal(toy, prompts=prompts(tmp_path, "a lion", spelling))
    message = refusal(toy, settings=['track.prompts.train=["a horse"]'])
    assert "train" in message and "heldout" in message and "'a horse'" in message
    # Nor by giving a file and other held-out prompts at once.
    changed = ['track.prompts.heldout=["a lion", "a fox"]']
    assert "'a lion'" in refusal(toy, prompts=prompts(tmp_path, "a lion"), settings=changed)
    assert "'a cow'" in refusal(toy, prompts=prompts(tmp_path, "a cow"), settings=changed)


def test_own_prompts_leave_a_validation_set_that_was_given(toy: str, tmp_path: Path) -> None:
    found = cell(toy, prompts=prompts(tmp_path, "a lion"), settings=["track.prompts.validation=[]"])
    assert found.track.prompts.validation == ()


def test_a_track_without_prompts_holds_out_every_fourth_of_ones_own(tmp_path: Path) -> None:
    bare = str(tmp_path / "bare.toml")
    Path(bare).write_text(TRACK.split("[prompts]")[0] + "[budget]" + TRACK.split("[budget]")[1])
    own = [f"scene {i}" for i in range(9)]
    found = cell(bare, prompts=prompts(tmp_path, *own, "scene 0")).track.prompts
    assert found.heldout == ("scene 3", "scene 7") and len(found.train) == 7
    assert {*found.train, *found.heldout} == set(own)
    assert "at least 8" in refusal(bare, prompts=prompts(tmp_path, *own[:7]))
    assert "--prompts FILE" in refusal(bare)


def test_prompt_files_without_prompts_or_with_one_twice(toy: str, tmp_path: Path) -> None:
    assert "holds no prompt" in refusal(toy, prompts=prompts(tmp_path, "", "  "))
    assert "'a lion' twice" in refusal(toy, prompts=prompts(tmp_path, "a lion", "a fox", "a lion "))
    assert "no prompts file" in refusal(toy, prompts=tmp_path / "missing.txt")
    (tmp_path / "mine.txt").write_bytes(b"caf\xe9\n")
    assert "mine.txt" in refusal(toy, prompts=tmp_path / "mine.txt")


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        ({"train": ["a", "b", "a"]}, "prompts.train holds 'a' twice"),
        ({"heldout": ["x", "x"]}, "prompts.heldout holds 'x' twice"),
        ({"train": ["a", " "]}, "prompts.train holds an empty prompt"),
        ({"validation": [""]}, "prompts.validation holds an empty prompt"),
        ({"train": ["a", "v"]}, "prompts.train and prompts.validation share 'v'"),
        ({"train": ["a", "y"]}, "prompts.train and prompts.heldout share 'y'"),
        ({"validation": ["y"]}, "prompts.validation and prompts.heldout share 'y'"),
        ({"train": []}, "train"),
    ],
)
def test_prompt_sets_are_disjoint_and_without_repetition(sets: dict, expected: str) -> None:
    whole = {"train": ["a", "b"], "validation": ["v"], "heldout": ["x", "y"], **sets}
    with pytest.raises(UsageError) as refused:
        schema.validate(PromptsSection, whole, "")
    assert expected in str(refused.value) and len(str(refused.value).splitlines()) == 1


def test_a_tracks_prompt_files_lie_beside_it_and_carry_templates(tmp_path: Path) -> None:
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "held.txt").write_text("a horse\tanimals\na cow\tanimals\n")
    (tmp_path / "toy.toml").write_text(TRACK.replace('["a horse", "a cow"]', '"sets/held.txt"'))
    found = cell(str(tmp_path / "toy.toml")).track.prompts
    assert found.heldout == ("a horse", "a cow") and found.templates == {"a horse": "animals", "a cow": "animals"}


# --- identity


def test_a_changed_track_is_another_track(toy: str) -> None:
    plain, changed = cell(toy), cell(toy, settings=["track.sampler.steps=5"])
    assert plain.track.id == "toy-v3" and changed.track.id == "toy-custom-v3"
    assert plain.track.hash != changed.track.hash and plain.hash != changed.hash
    assert changed.folder.startswith("toy-custom-v3/")
    other = cell(toy, model="/some/pipeline").track
    assert other.name == "toy-custom" and other.model.id == "/some/pipeline" and other.hash != plain.track.hash
    # An algorithm's option changes the cell and not the track.
    tuned = cell(toy, settings=["algo.beta=9"])
    assert tuned.track.hash == plain.track.hash and tuned.hash != plain.hash


def test_a_model_is_what_it_holds_however_it_is_named(
    toy: str, pixart_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(pixart_dir, tmp_path / "home" / "model")
    copy = shutil.copytree(pixart_dir, tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    first = cell(toy, model=str(folder))
    assert first.track.model.id == str(folder) and first.given["model"] == str(folder)
    digest = layout.read(folder).sha256()
    fixed = first.resolved["track"]["model"]
    assert (fixed["id"], fixed["sha256"], fixed["revision"]) == ("local", digest, None)
    assert str(tmp_path) not in json.dumps(first.resolved)
    spellings = ["home/model", f"{folder}/", "./home/../home/model", "link", "~/model", str(copy)]
    for name in spellings:
        found = cell(toy, model=name)
        assert (found.hash, found.track.hash, found.folder) == (first.hash, first.track.hash, first.folder), name
        assert found.given["model"] == name
        for written in (cell(toy, settings=[f"track.model.id={name}"]), resolve_track(toy, model=name)):
            assert getattr(written, "track", written).hash == first.track.hash, name
    assert cell(toy, settings=["track.model.id=link"]).given["model"] == "link"
    fixed_too = cell(toy, settings=["track.model.id=link", f"track.model.sha256={digest}"])
    assert fixed_too.track.hash == first.track.hash  # the same content, said twice
    (copy / "scheduler" / "scheduler_config.json").write_text(
        (copy / "scheduler" / "scheduler_config.json").read_text().replace("}", ',"beta_end": 0.03}')
    )
    assert cell(toy, model=str(copy)).track.hash != first.track.hash
    # A record reads as it is, wherever it is read.
    read = schema.Track.model_validate(first.resolved["track"])
    assert read.hash == first.track.hash == schema.hash_of(first.resolved["track"])


def test_the_hash_is_of_what_was_resolved(toy: str, tmp_path: Path) -> None:
    plain = cell(toy)
    assert cell(toy).hash == plain.hash and cell(toy).folder == plain.folder
    assert len(plain.hash) == 64 and plain.folder == f"toy-v3/dpo-dfusion-oracle-s0-{plain.hash[:8]}"
    assert cell(toy, settings=["algo.beta=2"]).hash == plain.hash  # the track's value, said again
    two = ["algo.beta=5", "builder.margin=1"]
    assert cell(toy, settings=two).hash == cell(toy, settings=two[::-1]).hash
    file = toml(tmp_path, "[builder]\nmargin = 1\n[algo]\nbeta = 5\n")
    assert cell(toy, config=file).hash == cell(toy, settings=two).hash
    different = [cell(toy, seed=1), cell(toy, algo="ddpo"), cell(toy, builder="vanilla"), cell(toy, settings=two)]
    assert len({c.hash for c in [plain, *different]}) == 5


def test_a_tracks_hash_is_of_what_it_holds_equal(toy: str) -> None:
    plain: Track = cell(toy).track
    assert plain.model_copy(update={"batch": 7}).hash == plain.hash
    assert plain.model_copy(update={"seeds": 9}).hash != plain.hash
    swapped = plain.prompts.model_copy(update={"heldout": plain.prompts.heldout[::-1]})
    assert plain.model_copy(update={"prompts": swapped}).hash != plain.hash


# --- files


@pytest.mark.parametrize("fails", ["replace", "fsync"])
def test_a_file_keeps_its_old_content_if_writing_fails(tmp_path: Path, monkeypatch, fails: str) -> None:
    path = tmp_path / "record.json"
    files.write_atomic(path, "old")
    files.save_tensors(tmp_path / "c.safetensors", {"a": torch.zeros(2)})

    def fail(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, fails, fail)
    with pytest.raises(OSError, match="no space"):
        files.write_atomic(path, b"new")
    with pytest.raises(OSError, match="no space"):
        files.save_tensors(tmp_path / "c.safetensors", {"a": torch.ones(2)})
    assert path.read_text() == "old"
    assert load_file(tmp_path / "c.safetensors")["a"].tolist() == [0, 0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.safetensors", "record.json"]


def test_what_cannot_be_written_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "record.json"
    files.write_json(path, {"a": "é"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "é"}
    for bad, error in (({"a": float("nan")}, ValueError), ({"a": object()}, TypeError), ("\ud800", UnicodeEncodeError)):
        with pytest.raises(error):
            files.write_json(path, bad)
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "é"}
    assert [p.name for p in path.parent.iterdir()] == ["record.json"]


def test_tensors_and_meta_come_back_as_they_were(tmp_path: Path) -> None:
    tensors = {"a.b c": torch.randn(2, 3).t(), "n": torch.tensor(3), "half": torch.randn(2).bfloat16()}
    tensors["same memory"] = tensors["half"]
    files.save_tensors(tmp_path / "x" / "c.safetensors", tensors, {"round": 3, "x": [1.5, None]})
    found, meta = files.load_tensors(tmp_path / "x" / "c.safetensors")
    assert meta == {"round": 3, "x": [1.5, None]} and found.keys() == tensors.keys()
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in tensors.items())


def test_an_optimizer_goes_on_identically_after_a_checkpoint(tmp_path: Path) -> None:
    def step(optimizer: torch.optim.Optimizer, seed: int) -> list[torch.Tensor]:
        parameters = optimizer.param_groups[0]["params"]
        generator = torch.Generator().manual_seed(seed)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        return [p.detach().clone() for p in parameters]

    def adamw(values: list[torch.Tensor]) -> torch.optim.AdamW:
        return torch.optim.AdamW([torch.nn.Parameter(v.clone()) for v in values], lr=0.1, weight_decay=0.01)

    whole = adamw([torch.ones(3), torch.zeros(2, 2)])
    for seed in range(3):
        values = step(whole, seed)
    files.save_tensors(tmp_path / "c.safetensors", {"other": torch.zeros(1), **files.optimizer_tensors(whole)})
    resumed, forgetful = adamw(values), adamw(values)
    files.restore_optimizer(resumed, files.load_tensors(tmp_path / "c.safetensors")[0])
    for seed in range(3, 6):
        expected, found, without = (step(o, seed) for o in (whole, resumed, forgetful))
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(expected, without, strict=True))


def test_a_restored_optimizer_keeps_its_own_learning_rate_and_a_fresh_one_is_restored_from_nothing() -> None:
    fresh = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=0.5)
    files.restore_optimizer(fresh, files.optimizer_tensors(torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])))
    assert fresh.param_groups[0]["lr"] == 0.5 and not fresh.state


def test_the_batch_size_does_not_make_another_track(toy: str) -> None:
    plain, other = cell(toy), cell(toy, settings=["track.batch=3"])
    assert other.track.batch == 3
    assert (other.track.name, other.track.hash) == (plain.track.name, plain.track.hash)


def test_a_track_that_suggests_options_for_another_algorithm_stays_what_it_is(toy: str) -> None:
    plain, other = cell(toy), cell(toy, settings=["track.algorithms.sft.timesteps=2", "track.tuning=two runs each"])
    assert (other.track.name, other.track.hash, other.hash) == (plain.track.name, plain.track.hash, plain.hash)
    assert other.track.tuning == "two runs each"
    suggested = cell(toy, settings=["track.algorithms.dpo.beta=9"])
    assert suggested.hash == cell(toy, settings=["algo.beta=9"]).hash != plain.hash


def test_own_heldout_prompts_leave_all_own_training_prompts(tmp_path: Path) -> None:
    bare = str(tmp_path / "bare.toml")
    Path(bare).write_text(TRACK.split("[prompts]")[0] + "[budget]" + TRACK.split("[budget]")[1])
    own = ["a lion", "a fox"]
    held = 'track.prompts.heldout=["a hen", "a cow"]'
    found = cell(bare, prompts=prompts(tmp_path, *own), settings=[held]).track.prompts
    assert found.train == tuple(own) and found.heldout == ("a hen", "a cow")


def test_a_count_that_is_never_reached_is_refused() -> None:
    from bench_dfusion.algorithms.ddpo import DDPOConfig

    with pytest.raises(ValidationError, match="never be reached"):
        DDPOConfig(buffer=4, min_count=16)


# --- what goes together


@pytest.mark.parametrize("name", ["dpo", "ddpo", "grpo", "dpok"])
def test_an_algorithm_that_needs_a_steps_density_is_refused_where_there_is_none(toy: str, name: str) -> None:
    with pytest.raises(UsageError) as refused:
        resolve(track_source=toy, algo=name, reward="oracle", settings=["track.sampler.eta=0"])
    said = str(refused.value)
    assert said.startswith(f"{name} trains on the probability of denoising steps") and "\n" not in said
    for other in ("nft", "crd", "awm", "dgpo", "kto", "diffusion-dpo", "sft", "rwr"):
        assert other in said.partition("do without: ")[2].split(", ")
        resolve(track_source=toy, algo=other, reward="oracle", settings=["track.sampler.eta=0"])
