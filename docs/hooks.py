"""What mkdocs does with a page's references to files of the repository outside `docs/`: links become paths, which no site
has, and pictures are put into the page."""

from __future__ import annotations

import base64
import mimetypes
import re
from pathlib import Path
from typing import Any

OUTSIDE = re.compile(r"(!?)\[([^\]]+)\]\((\.\./[^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, **more: Any) -> str:
    def inside(found: re.Match[str]) -> str:
        picture, text, target = found.groups()
        if picture:
            path = Path(page.file.abs_src_path).parent / target
            kind = mimetypes.guess_type(path)[0]
            return f"![{text}](data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()})"
        name = target.removeprefix("../")
        return text if name in text.strip("`") else f"{text} (`{name}`)"

    return OUTSIDE.sub(inside, markdown)
