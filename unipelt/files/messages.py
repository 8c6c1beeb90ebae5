"""Functions that format values, paths and other libraries' messages for a message of this library."""

from __future__ import annotations

import difflib
import re
import reprlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def show(value: Any) -> str:
    """Return any value as a text for a message, cut to about 200 characters."""
    try:
        shown = _SHORT.repr(value)
    except (ValueError, RecursionError):  # a whole number of more digits than Python prints
        shown = f"a {type(value).__name__} too large to be shown"
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


def suggest(name: object, known: Iterable[str], otherwise: str = "") -> str:
    """Return a question with the known name that is nearest to a wrong name, or with up to three equally near names.

    Args:
        name: The wrong name.
        known: The known names.
        otherwise: The text to return if no known name is near.
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
    """Return a text with an escape sequence for every control character except line breaks and tabs.

    A terminal obeys control characters: they can clear the screen or overwrite its text. Characters that change the
    direction of writing are replaced too.
    """
    return _CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)


def say(text: object) -> None:
    """Print a line. Control characters are escaped, because the line may hold other people's text."""
    print(printable(str(text)), flush=True)


def complain(program: str, error: object) -> None:
    """Print an error as one line on standard error. Control characters are escaped, as in `say`."""
    print(printable(f"{program}: {' '.join(str(error).split())}"), file=sys.stderr)


def show_path(path: str | Path) -> str:
    """Return a path for a message. A path of more than 400 characters loses its middle."""
    name = printable(str(path))
    return name if len(name) <= 400 else f"{name[:150]}...{name[-150:]}"


def shorten(text: object) -> str:
    """Return another library's message in one line. A line of more than 400 characters loses its middle."""
    line = printable(" ".join(str(text).split()))
    return line if len(line) <= 400 else f"{line[:300]}...{line[-90:]}"


_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 12
_SHORT.maxlevel = 4
