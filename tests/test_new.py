"""`bench-dfusion new`: what it writes works as it stands, and what cannot be is refused before anything is written."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bench_dfusion
from bench_dfusion import registry
from bench_dfusion.cli.new import KINDS


def package_of(kind: str) -> str:
    return f"bench_dfusion_my_{kind}"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_a_plugin_that_keeps_its_contract(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[..., Any]
) -> None:
    name = f"my-{kind}"
    done = said("new", kind, name, cwd=tmp_path)
    assert done.status == 0 and f"{kind} {name}" in done.out
    folder = tmp_path / name
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    (entries,) = project["project"]["entry-points"].values()
    info = folder / f"bench_dfusion_my_{kind}-0.1.0.dist-info"  # as pip would lay it out
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['project']['name']}\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(f"[bench_dfusion.{kind}s]\n{name} = {entries[name]}\n")
    monkeypatch.setattr(registry, "others", set())
    monkeypatch.syspath_prepend(folder)
    monkeypatch.syspath_prepend(folder / "tests")
    assert name in registry.plugins(f"{kind}s") and registry.load(f"{kind}s", name)
    try:
        tests = importlib.import_module(f"test_my_{kind}")
        (test,) = (value for key, value in vars(tests).items() if key.startswith("test_"))
        test(*([tmp_path] if kind == "model" else []))
    finally:
        for module in (f"test_my_{kind}", package_of(kind)):
            sys.modules.pop(module, None)
    assert name in (folder / "README.md").read_text() and "{{" not in "".join(
        p.read_text() for p in folder.rglob("*.*y")
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("algoritm", "mine"), "unknown kind of plugin 'algoritm'; did you mean algorithm?"),
        (("algorithm", "My_Algo"), "the name 'My_Algo': write small letters, digits and single -, a letter first"),
        (("algorithm", "a--b"), "write small letters"),
        (("reward", "../up"), "write small letters"),
        (("reward", "clip"), "the reward 'clip' is there already, of bench-dfusion"),
        (("track", "micro"), "the track 'micro' is there already"),
        (("builder", "mine", "--to", "full"), "full exists and is not empty: give another --to"),
        (("builder", "mine", "--to", "full/file"), "exists and is not empty"),
    ],
)
def test_a_mistake_writes_nothing(words: tuple[str, ...], expected: str, tmp_path: Path, refused) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert expected in refused("new", *words, cwd=tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "full"]


def test_it_needs_no_torch() -> None:
    code = "import sys; from bench_dfusion import cli; sys.argv = ['x', 'new', 'reward', 'clip']\n"
    code += "try: cli.main()\nexcept SystemExit: print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.slow
def test_pip_installs_each_and_its_own_test_passes(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    root = Path(bench_dfusion.__file__).parents[1]
    (site / "here.pth").write_text(
        "".join(f"import site; site.addsitedir({p!r})\n" for p in sys.path if p.endswith("-packages"))
    )
    python = str(venv / "bin" / "python")

    def run(*words: str, cwd: Path) -> str:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([python, *words], cwd=cwd, capture_output=True, text=True, env=env)
        assert not done.returncode, done.stdout + done.stderr
        return done.stdout

    for kind in KINDS:
        run("-m", "bench_dfusion", "new", kind, f"my-{kind}", cwd=tmp_path)
        install = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            python,
            "install",
            "-q",
            "--no-deps",
            "--no-build-isolation",
        ]
        subprocess.run([*install, str(tmp_path / f"my-{kind}")], check=True, cwd=tmp_path)
        assert "1 passed" in run("-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=tmp_path / f"my-{kind}")
        assert f"my-{kind}" in run("-m", "bench_dfusion", "list", f"{kind}s", f"my-{kind}", cwd=tmp_path)
    assert root.is_dir()
    tiny = ["--set", "track.budget.reward_queries=96", "--set", "track.evaluation.images_per_prompt=2"]
    words = ["--algo", "my-algorithm", "--builder", "my-builder", "--reward", "my-reward", "--track", "my-track", *tiny]
    assert "oracle" in run("-m", "bench_dfusion", "run", *words, "--set", "track.model.autocast=null", cwd=tmp_path)
