"""What a report is made of, whatever it is written as: headings, text, tables, pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unipelt.report.pictures import Picture

MINUS, NONE = "\N{MINUS SIGN}", "\N{EN DASH}"
# A line of a table's entry: text, and how it is marked (best, second, minor, warn, or nothing).
Line = tuple[str, str]
Entry = Sequence[Line]


@dataclass(frozen=True)
class Heading:
    """A heading of level 1 to 3."""

    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """Running text; `warn` sets it off."""

    text: str
    warn: bool = False


@dataclass(frozen=True)
class Items:
    """A list with dots."""

    items: Sequence[str]


@dataclass(frozen=True)
class Grid:
    """A table; the first column names its rows."""

    head: Sequence[str]
    rows: Sequence[Sequence[Entry]]


@dataclass(frozen=True)
class Panels:
    """Pictures side by side."""

    pictures: Sequence[Picture]


Block = Heading | Paragraph | Items | Grid | Panels


def percent(value: float, std: float | None = None) -> str:
    """A fraction in percent, as the paper prints it."""
    return f"{100 * value:.2f}" + ("" if std is None else f" ± {100 * std:.2f}")


def signed(value: float) -> str:
    """A difference, of two digits, with a true minus."""
    return f"{value:+.2f}".replace("-", MINUS)
