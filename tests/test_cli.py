"""The command as users meet it: help, lists, and one clear line on anything wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import TINY

from bench_dfusion import descriptions, registry
from bench_dfusion.cli.options import out

RUN = ("run", "--algo", "dpo", "--reward", "clip")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("run", "--algo", "dop", "--reward", "clip"), "unknown algorithm 'dop'; did you mean dpo"),
        (("run", "--algo", "dpo", "--reward", "klip"), "unknown reward 'klip'; did you mean clip"),
        ((*RUN, "--builder", "d-fusion"), "unknown builder 'd-fusion'; did you mean dfusion"),
        ((*RUN, "--track", "mikro"), "unknown track 'mikro'; did you mean micro"),
        ((*RUN, "--set", "algo.betta=1"), "unknown option algo 'betta'; did you mean beta"),
        ((*RUN, "--set", "algo.beta=-1"), "algo.beta"),
        ((*RUN, "--set", "algo.beta=strong"), "algo.beta"),
        ((*RUN, "--set", "beta=1"), "write SECTION.OPTION=VALUE"),
        ((*RUN, "--track", "micro", "--model", "no/such-dir"), "no model 'no/such-dir'"),
        ((*RUN, "--model", "no/such-dir"), "track paper leaves the prompts to you: give --prompts FILE"),
        ((*RUN, "--prompts", "missing.txt"), "no prompts file missing.txt"),
        ((*RUN, "--config", "missing.toml"), "no file missing.toml"),
        ((*RUN, "--seeds", "0"), "--seeds must be 1 or more"),
        ((*RUN, "--seed", "1", "--seeds", "2"), "exclude each other"),
        ((*RUN, "--plugin", "missing.py"), "no plugin file missing.py"),
        (("list", "algos"), "unknown kind of plugin 'algos'; did you mean algorithms"),
        (("list", "algorithms", "dpoo"), "did you mean dpo"),
        (("leaderboard", "nowhere"), "unknown track 'nowhere'"),
        (("rum",), "No such command"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(words: tuple[str, ...], expected: str, refused, tmp_path: Path) -> None:
    assert expected in refused(*words, cwd=tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_mistakes_and_lists_import_nothing_that_runs_need() -> None:
    code = f"""
import sys
from bench_dfusion import cli, registry
from bench_dfusion.runs import config
sys.argv = {["bench-dfusion", "run", "--algo", "dpo", "--reward", "clip", "--set", "algo.betta=1"]}
try:
    cli.main()
finally:
    for kind in registry.KINDS:
        for plugin in registry.plugins(kind).values():
            plugin.load()
    print(sorted({{"diffusers", "transformers", "peft", "datasets", "open_clip", "ray"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean beta" in done.stderr and done.stdout == "[]\n"


def test_lists_and_wrong_names_are_answered_without_torch() -> None:
    code = """
import sys
from bench_dfusion import cli
for words in (
    "list", "list algorithms", "run --algo dpoo --reward clip", "run --algo dpo --reward clop",
    "run --algo dpo --reward clip --builder fusion", "run --algo dpo --reward clip --track mikro",
    "sweep micro --algo dpo,ddpoo --reward clip", "doctor --algo dpoo", "leaderboard nowhere", "eval --track mikro x",
):
    sys.argv = ["bench-dfusion", *words.split()]
    try:
        cli.main()
    except SystemExit as ended:
        assert ended.code == (0 if words.startswith("list") else 2), (words, ended.code)
    assert "torch" not in sys.modules, words
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert len(done.stderr.splitlines()) == 8 and "diffusion-dpo" in done.stdout


def test_oracle_refuses_prompts_it_cannot_read_before_any_compute(refused, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("a photo of a dog\n")
    words = ("run", "--algo", "dpo", "--reward", "oracle", "--prompts", "mine.txt")
    assert "a photo of a dog" in refused(*words, cwd=tmp_path)


def test_list_shows_every_plugin_and_options_with_their_source(said: Callable[..., Any]) -> None:
    shown = said("list")
    assert shown.status == 0
    for name in ("dpo", "diffusion-dpo", "ddpo", "clip", "oracle", "dfusion", "vanilla", "micro"):
        assert name in shown.out
    dpo = said("list", "algorithms", "dpo").out
    assert "algo.beta" in dpo and "D3PO" in dpo
    assert "ViT-H-14" in said("list", "rewards", "clip").out


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Installs a third-party distribution as pip would lay it out, for this test."""
    monkeypatch.setattr(registry, "others", set())
    monkeypatch.setattr(out, "width", 160)
    folder = tmp_path / "site"

    def lay_out(name: str, body: str) -> None:
        folder.mkdir()
        (folder / f"{name}_plugin.py").write_text(body)
        info = folder / f"{name}_plugin-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-plugin\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[bench_dfusion.algorithms]\n{name} = {name}_plugin:Noop\n")
        monkeypatch.syspath_prepend(folder)

    return lay_out


EXAMPLE = (Path(__file__).parent / "plugin_example.py").read_text()


def test_a_third_party_algorithm_is_listed_and_runs(install: Any, said: Callable[..., Any], tmp_path: Path) -> None:
    install("noop", EXAMPLE)
    listed = said("list", "algorithms").out
    assert "noop" in listed and "noop-plugin 1.2" in listed
    done = said("run", "--algo", "noop", "--reward", "oracle", *TINY, cwd=tmp_path)
    assert done.status == 0, done.err
    assert "held-out prompts" in done.out and registry.others == {"noop-plugin 1.2"}


def test_what_a_plugin_is_is_read_from_its_source_as_it_would_be_from_the_plugin() -> None:
    assert all(descriptions.describe(track).summary for track in registry.plugins("tracks").values())
    for kind in set(registry.KINDS) - {"tracks"}:
        for plugin in registry.plugins(kind).values():
            value = plugin.load()
            expected = descriptions.Description(descriptions.summary_of(value), getattr(value, "paper", ""))
            assert descriptions.describe(plugin) == expected and expected.summary, plugin.name


def test_a_broken_plugin_breaks_only_its_own_run(install: Any, said: Callable[..., Any], tmp_path: Path) -> None:
    install("broken", "raise RuntimeError('boom')")
    listed = said("list", "algorithms")
    assert listed.status == 0 and "dpo" in listed.out and "broken: " in listed.out
    done = said("run", "--algo", "broken", "--reward", "oracle", *TINY, cwd=tmp_path)
    assert done.status == 2 and "broken-plugin 1.2" in done.err and "boom" in done.err


def test_two_distributions_of_one_name_are_refused(install: Any, refused: Callable[..., str]) -> None:
    install("dpo", EXAMPLE)
    line = refused("list", "algorithms")
    assert "dpo-plugin 1.2" in line and "bench-dfusion" in line
