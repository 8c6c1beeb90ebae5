"""What a report is made of, whatever it is written as: headings, text, tables, pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unipelt.report.pictures import Picture

# A line of a table's entry: text, and how it is marked: best, second, clear (a difference), minor, chance (not clearly
# above a constant answer), warn, hover (shown by HTML under the pointer only), or nothing.
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
    """A table; the first column names its rows.

    Attributes:
        head: a name for each column; what follows a line break in it is small.
        rows: an entry for each column.
        pinned: columns that stay in sight when the others scroll, 1 or 2.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Entry]]
    pinned: int = 1


@dataclass(frozen=True)
class Panels:
    """Pictures side by side."""

    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Fold:
    """Blocks behind a title, which a reader opens."""

    title: str
    blocks: Sequence[Block]


Block = Heading | Paragraph | Items | Grid | Panels | Fold
