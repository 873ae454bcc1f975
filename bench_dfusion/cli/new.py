"""`bench-dfusion new`: a plugin package that works, with a test of its contract."""

from __future__ import annotations

import keyword
import re
import shutil
import tempfile
from importlib.resources import files as resources
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from bench_dfusion import errors, registry
from bench_dfusion.cli.options import out
from bench_dfusion.errors import UsageError

KINDS = tuple(kind.removesuffix("s") for kind in registry.KINDS)
RUNS = {
    "algorithm": "bench-dfusion run --algo {name} --reward clip --track micro-fast",
    "reward": "bench-dfusion run --algo dpo --reward {name} --track micro-fast",
    "builder": "bench-dfusion run --algo dpo --builder {name} --reward clip --track micro-fast",
    "model": "bench-dfusion doctor --model YOUR_CHECKPOINT",
    "track": "bench-dfusion run --algo dpo --reward clip --track {name}",
}


def new(
    kind: Annotated[str, typer.Argument(help="algorithm, reward, builder, model or track.")],
    name: Annotated[str, typer.Argument(help="What it is called: letters, digits and -.")],
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="Where it goes, a new directory (default: NAME).")
    ] = None,
) -> None:
    """Write an installable plugin package: a small one that works, a test of its contract, and a README."""
    if kind not in KINDS:
        raise UsageError(errors.unknown("kind of plugin", kind, KINDS))
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise UsageError(f"the name {name!r}: write small letters, digits and single -, a letter first")
    known = registry.plugins(f"{kind}s")
    if name in known:
        raise UsageError(f"the {kind} {name!r} is there already, of {known[name].source}: take another name")
    folder = (to or Path(name)).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not empty: give another --to")
    _write(kind, name, folder)
    install = "pip install -e '.[test]' && pytest"
    out.print(escape(f"{folder}: {kind} {name}\ncd {folder} && {install}"), soft_wrap=True, highlight=False)


def _write(kind: str, name: str, folder: Path) -> None:
    """The package, whole or not at all."""
    import jinja2

    words = name.split("-")
    cls = "".join(word.capitalize() for word in words)
    package = f"bench_dfusion_{'_'.join(words)}"
    assert cls.isidentifier() and not keyword.iskeyword(package)
    values = {
        "kind": kind,
        "name": name,
        "cls": cls,
        "package": package,
        "article": "an" if kind == "algorithm" else "a",
        "command": RUNS[kind].format(name=name),
    }
    sources = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        f"{package}/__init__.py": f"{kind}.py",
        f"tests/test_{'_'.join(words)}.py": f"test_{kind}.py",
    }
    if kind == "track":
        sources[f"{package}/{name}-v1.toml"] = "track.toml"
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    templates = resources(__package__) / "templates"
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        for path, source in sources.items():
            text = (templates / f"{source}.jinja").read_text(encoding="utf-8")
            (made / path).parent.mkdir(parents=True, exist_ok=True)
            (made / path).write_text(environment.from_string(text).render(values), encoding="utf-8")
        made.chmod(0o755)
        made.replace(folder)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
