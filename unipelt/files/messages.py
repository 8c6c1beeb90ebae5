"""Values, paths and other libraries' messages as texts for a message of one's own."""

from __future__ import annotations

import difflib
import re
import reprlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def show(value: Any) -> str:
    """A value for a message, cut to a length that can be read whatever it is."""
    try:
        shown = _SHORT.repr(value)
    except (ValueError, RecursionError):  # a whole number of more digits than Python prints
        shown = f"a {type(value).__name__} too large to be shown"
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


def suggest(name: object, known: Iterable[str], otherwise: str = "") -> str:
    """A question with the known name that was meant; of equally near ones, up to three.

    Args:
        name: What was written.
        known: The names that there are.
        otherwise: The answer where no known name is near.
    """
    meant = str(name)[:100].lower().lstrip("-")  # cut, so that a long text costs no time
    near: dict[str, float] = {}
    for other in known:
        bare = other.lower().lstrip("-")
        ratio = difflib.SequenceMatcher(None, meant, bare).ratio()
        near[other] = 2.0 if sorted(bare) == sorted(meant) else ratio  # letters in another order are the nearest
    best = max(near.values(), default=0.0)
    if best < 0.6:
        return otherwise
    names = [other for other, ratio in near.items() if ratio == best][:3]
    first = f"{', '.join(map(repr, names[:-1]))} or " if names[1:] else ""
    return f"did you mean {first}{names[-1]!r}?"


def printable(text: str) -> str:
    """Return a text in which every control character but a line break and a tab is spelt out.

    A terminal acts upon such characters: they clear the screen, or write over what stands there. Characters that turn
    the direction of writing are spelt out too.
    """
    return _CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)


def say(text: object) -> None:
    """Print a line, which may hold what others wrote."""
    print(printable(str(text)), flush=True)


def complain(program: str, error: object) -> None:
    """Print an error as one line on standard error, which may hold what others wrote."""
    print(printable(f"{program}: {' '.join(str(error).split())}"), file=sys.stderr)


def show_path(path: str | Path) -> str:
    """A path for a message, less its middle where it is longer than most systems let a file's name be."""
    name = printable(str(path))
    return name if len(name) <= 400 else f"{name[:150]}...{name[-150:]}"


def shorten(text: object) -> str:
    """Another library's message in one line, less its middle where it is long, for a message of one's own."""
    line = printable(" ".join(str(text).split()))
    return line if len(line) <= 400 else f"{line[:300]}...{line[-90:]}"


_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 12
_SHORT.maxlevel = 4
