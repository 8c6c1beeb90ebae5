"""Values, paths and other libraries' messages as texts for a message of one's own."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any


def show(value: Any) -> str:
    """A value for a message, cut to a length that can be read whatever it is."""
    try:
        shown = _SHORT.repr(value)
    except (ValueError, RecursionError):  # a whole number of more digits than Python prints
        shown = f"a {type(value).__name__} too large to be shown"
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


def show_path(path: str | Path) -> str:
    """A path for a message, less its middle where it is longer than most systems let a file's name be."""
    name = str(path)
    return name if len(name) <= 400 else f"{name[:150]}...{name[-150:]}"


def shorten(text: object) -> str:
    """Another library's message in one line, less its middle where it is long, for a message of one's own."""
    line = " ".join(str(text).split())
    return line if len(line) <= 400 else f"{line[:300]}...{line[-90:]}"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 12
_SHORT.maxlevel = 4
