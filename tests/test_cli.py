"""The command as users meet it: help, lists, and one clear line on anything wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import TINY, command

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


def test_oracle_refuses_prompts_it_cannot_read_before_any_compute(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("a photo of a dog\n")
    done = command("run", "--algo", "dpo", "--reward", "oracle", "--prompts", "mine.txt", cwd=tmp_path)
    assert done.returncode == 2 and "a photo of a dog" in done.stderr
    assert "Traceback" not in done.stderr


def test_list_shows_every_plugin_and_options_with_their_source(tmp_path: Path) -> None:
    shown = command("list", cwd=tmp_path)
    assert shown.returncode == 0
    for name in ("dpo", "diffusion-dpo", "ddpo", "clip", "oracle", "dfusion", "vanilla", "micro"):
        assert name in shown.stdout
    dpo = command("list", "algorithms", "dpo", cwd=tmp_path).stdout
    assert "algo.beta" in dpo and "D3PO" in dpo
    assert "ViT-H-14" in command("list", "rewards", "clip", cwd=tmp_path).stdout


def plugin_package(folder: Path, name: str = "noop", broken: bool = False) -> Path:
    """A third-party distribution as pip would lay it out."""
    folder.mkdir()
    body = "raise RuntimeError('boom')" if broken else (Path(__file__).parent / "plugin_example.py").read_text()
    (folder / f"{name}_plugin.py").write_text(body)
    info = folder / f"{name}_plugin-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-plugin\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[bench_dfusion.algorithms]\n{name} = {name}_plugin:Noop\n")
    return folder


def test_a_third_party_algorithm_is_listed_and_runs(tmp_path: Path) -> None:
    env = {"PYTHONPATH": str(plugin_package(tmp_path / "site"))}
    listed = command("list", "algorithms", cwd=tmp_path, env=env).stdout
    assert "noop" in listed and "noop-plugin 1.2" in listed
    done = command("run", "--algo", "noop", "--reward", "oracle", *TINY, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert "held-out prompts" in done.stdout


def test_a_broken_plugin_breaks_only_its_own_run(tmp_path: Path) -> None:
    env = {"PYTHONPATH": str(plugin_package(tmp_path / "site", "broken", broken=True))}
    listed = command("list", "algorithms", cwd=tmp_path, env=env)
    assert listed.returncode == 0 and "dpo" in listed.stdout
    done = command("run", "--algo", "broken", "--reward", "oracle", *TINY, cwd=tmp_path, env=env)
    assert done.returncode == 2 and "broken-plugin 1.2" in done.stderr and "boom" in done.stderr


def test_two_distributions_of_one_name_are_refused(tmp_path: Path) -> None:
    first = plugin_package(tmp_path / "a", "dpo")
    done = command("list", "algorithms", cwd=tmp_path, env={"PYTHONPATH": str(first)})
    assert done.returncode == 2
    assert "dpo-plugin 1.2" in done.stderr and "bench-dfusion" in done.stderr
