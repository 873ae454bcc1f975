"""Prompts that text encoders cut: what is said of them, and which are one prompt to the network."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from test_offline import parquet, table

from bench_dfusion import doctor
from bench_dfusion.builders.offline import Offline, OfflineConfig
from bench_dfusion.doctor.memory import Memory
from bench_dfusion.errors import UsageError
from bench_dfusion.models.base import Adapter
from bench_dfusion.models.loading import load_adapter
from bench_dfusion.runs import config, rescore, text_limits
from bench_dfusion.tracks.schema import ModelSection, PromptsSection

LONG = f"a photo of a {'very ' * 90}"  # more than CLIP's 77 tokens, fewer than a T5's 512 here
LONGER = LONG * 2  # more than those too
CLIP, T5 = "text_encoder (CLIPTextModel)", "text_encoder_2 (T5EncoderModel)"


@pytest.fixture(scope="module")
def adapter(request: pytest.FixtureRequest) -> Callable[[str], Adapter]:
    return cache(lambda name: load_adapter(ModelSection(id=str(request.getfixturevalue(f"{name}_dir"))))[0])


def section(*heldout: str) -> PromptsSection:
    return PromptsSection(train=("a cow",), heldout=heldout)


@pytest.mark.parametrize(
    ("name", "limits"),
    [("sd", (77,)), ("sdxl", (77, 77)), ("sd3", (77, 77, 256)), ("flux", (77, 512)), ("pixart", (16,))],
)
def test_every_text_encoder_has_its_limit_and_cuts_there(
    name: str, limits: tuple[int, ...], adapter: Callable[[str], Adapter]
) -> None:
    own = adapter(name)
    assert tuple(reader.length for reader in own.text_readers()) == limits
    encoded = [own.encode([prompt]) for prompt in (LONGER + "red bus", LONGER + "blue cup")]
    assert all((a == b).all() for a, b in zip(encoded[0].values(), encoded[1].values(), strict=True))
    with pytest.raises(UsageError, match="red bus' .trained on. and .* .held out. are one prompt to the network"):
        text_limits.check(own, [LONGER + "red bus"], section(LONGER + "blue cup", "two horses"))
    assert text_limits.cut(own, ["a red circle"]) is None


def test_the_line_names_how_many_and_which_by_which_encoder_at_how_many_tokens(
    adapter: Callable[[str], Adapter],
) -> None:
    prompts = ["a cat", LONG + "bus", LONG + "cup"]
    shown = [text_limits._short.repr(prompt) for prompt in prompts]
    assert text_limits.cut(adapter("sd"), prompts) == (
        f"2 of 3 prompts are cut: {CLIP} reads the first 77 tokens of {shown[1]} (97), {shown[2]} (97)"
    )
    line = text_limits.cut(adapter("sdxl"), [*prompts, *(f"{LONG}{i}" for i in range(3))]) or ""
    assert line.startswith(f"5 of 6 prompts are cut: {CLIP} and text_encoder_2 (CLIPTextModelWithProjection) read the")
    assert line.endswith(" and 2 more")
    assert text_limits.cut(adapter("flux"), prompts[:2]) == (
        f"1 of 2 prompts is cut: {CLIP} reads the first 77 tokens of {shown[1]} (97); {T5} reads up to 512 tokens, so it whole"
    )


def test_a_prompt_that_one_encoder_sees_whole_is_another_prompt(
    adapter: Callable[[str], Adapter], capsys: pytest.CaptureFixture[str]
) -> None:
    flux = adapter("flux")
    text_limits.check(flux, [LONG + "red bus"], section(LONG + "blue cup", "two horses"))
    assert capsys.readouterr().err.startswith("2 of 3 prompts are cut: ")


def test_two_that_are_trained_on_are_said_and_the_same_in_two_spellings_is_not(
    adapter: Callable[[str], Adapter], capsys: pytest.CaptureFixture[str]
) -> None:
    text_limits.check(adapter("sd"), [LONG + "bus", LONG + "cup", "a cow", "A cow"], section("a dog", "two horses"))
    cut, twins = capsys.readouterr().err.splitlines()
    assert cut.startswith("2 of 6 prompts are cut") and twins.startswith("the network cannot tell apart 'a photo of")
    assert twins.count("trained on") == 1 and "cow" not in twins
    text_limits.check(adapter("sd"), ["a cow"], section("a dog", "two horses"))
    assert capsys.readouterr().err == ""


def test_twins_are_shown_where_they_differ(adapter: Callable[[str], Adapter]) -> None:
    with pytest.raises(UsageError, match=r"very very red bus a photo.*very very blue cup a photo"):
        text_limits.check(adapter("sd"), [f"{LONG}red bus {LONG}"], section(f"{LONG}blue cup {LONG}", "two horses"))


def test_many_prompts_are_read_in_parts(adapter: Callable[[str], Adapter], monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [f"a cat number {i}" for i in range(7)] + [LONG]
    (whole,) = text_limits.read(adapter("sd"), prompts)
    monkeypatch.setattr(text_limits, "CHUNK", 3)
    (parts,) = text_limits.read(adapter("sd"), prompts)
    assert (parts.tokens, parts.kept, parts.cut) == (whole.tokens, whole.kept, [LONG])


def test_prompts_of_offline_pairs_are_trained_on(adapter: Callable[[str], Adapter], tmp_path: Path) -> None:
    data = table(2).remove_columns("prompt").add_column("prompt", ["a cat", LONG + "red bus"])
    builder = Offline(OfflineConfig(pairs=parquet(tmp_path, data)))
    held = section(LONG + "blue cup", "two horses")
    assert list(builder.trained_on(held)) == ["a cat", LONG + "red bus"]
    with pytest.raises(UsageError, match="red bus' .trained on. and .*blue cup' .held out. are one prompt"):
        text_limits.check(adapter("sd"), builder.trained_on(held), held)


def settings(train: str, held: str) -> list[str]:
    sets = {"train": [train], "validation": [], "heldout": [held, "two horses"]}
    small = [
        "batch=4",
        "sampler.steps=2",
        "evaluation.sampler=null",
        "budget.prompts_per_round=1",
        "budget.samples_per_prompt=4",
    ]
    small += ["budget.reward_queries=4", "evaluation.images_per_prompt=1", 'evaluation.judges=["jpeg-compressibility"]']
    return [f"track.{s}" for s in (*small, *(f"prompts.{key}={json.dumps(value)}" for key, value in sets.items()))]


def test_a_run_is_refused_before_any_compute(sd_dir: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    words = ["run", "--model", sd_dir, "--algo", "ddpo", "--builder", "vanilla", "--reward", "jpeg-compressibility"]
    words += [w for s in settings(LONG + "red bus", LONG + "blue cup") for w in ("--set", s)]
    line = refused(*words, "--out", tmp_path / "out", cwd=tmp_path)
    assert "are one prompt to the network: text_encoder (CLIPTextModel, 77 tokens) gets the same tokens" in line
    assert not (tmp_path / "out").exists()


def test_eval_and_the_doctor_say_what_is_cut(
    sd_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn(*args: object) -> None:
        raise AssertionError("drawn")

    own = settings("a cow", LONG + "blue cup")
    found = config.resolve_track(model=str(sd_dir), settings=own)
    monkeypatch.setattr(rescore.evaluation, "evaluate", drawn)
    with pytest.raises(AssertionError, match="drawn"):
        rescore.score_weights(found, tmp_path, checkpoint=sd_dir)
    assert "1 of 2 prompts is cut: text_encoder (CLIPTextModel) reads the first 77" in capsys.readouterr().err
    cell, _ = doctor.resolve(
        model=str(sd_dir), settings=own, algo="ddpo", builder="vanilla", reward="jpeg-compressibility"
    )
    notes = Memory(cell, torch.device("cpu"), fresh=False).notes
    assert any(note.startswith("1 of 3 prompts is cut") for note in notes)
