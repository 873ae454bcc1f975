"""What mkdocs does with a page: links to files of the repository outside `docs/` become their paths, which no site has."""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, **page: Any) -> str:
    def path(link: re.Match[str]) -> str:
        text, target = link[1], link[2]
        return text if target in text.strip("`") else f"{text} (`{target}`)"

    return OUTSIDE.sub(path, markdown)
