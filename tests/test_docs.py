"""The documentation: its notebook runs, and its pages are all in the site."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def test_every_page_is_in_the_site_and_every_link_between_pages_leads_somewhere() -> None:
    navigation = set(re.findall(r": ([\w-]+\.md)$", (DOCS.parent / "mkdocs.yml").read_text(), re.M))
    pages = {path.name for path in DOCS.glob("*.md")}
    assert navigation == pages
    for path in DOCS.glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
            assert (DOCS / target).exists(), f"{path.name} links to {target}"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = json.loads((DOCS / "first_run.ipynb").read_text())
    names: dict[str, Any] = {}
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec("".join(cell["source"]), names)
    assert names["record"].status == "finished" and len(names["table"]) == 2
