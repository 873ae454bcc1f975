"""What goes wrong, in words: the errors that a user sees as one line, and how names and texts stand in them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """Something the user gave is wrong: shown as one line, exit status 2, before any compute."""


class PluginError(RuntimeError):
    """A plugin could not be imported; the message names it and its distribution."""


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """One line that says a name is unknown and which ones are near."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    # Of two as near, the one that begins alike: letters are swapped within a word more often than at its start.
    near.sort(key=lambda n: (-difflib.SequenceMatcher(None, n, name).ratio(), n[:1] != name[:1]))
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known) or 'none'}"
    return f"unknown {what} {name!r}; {hint}"


def plain(text: object) -> str:
    """Text from records, plugins and paths as one line a terminal can be shown: control characters are spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
