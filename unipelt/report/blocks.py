"""The blocks of a report, for every output format: headings, text, tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unipelt.report.pictures import Picture

# A line of a table's entry: its text and its mark. The mark is best, second, clear (a difference), minor, chance (not
# clearly above a constant answer), warn, hover (HTML shows the text only under the pointer), or empty.
Line = tuple[str, str]
Entry = Sequence[Line]


@dataclass(frozen=True)
class Heading:
    """A heading of level 1 to 3."""

    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """Running text. `warn` marks a warning."""

    text: str
    warn: bool = False


@dataclass(frozen=True)
class Items:
    """A bulleted list."""

    items: Sequence[str]


@dataclass(frozen=True)
class Grid:
    """A table. The first column names the rows.

    Attributes:
        head: the names of the columns. The part of a name after a line break is shown small.
        rows: the rows; a row has one entry for each column.
        pinned: the number of columns, 1 or 2, that stay visible when the others scroll.
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
    """Blocks under a title, which the reader can open."""

    title: str
    blocks: Sequence[Block]


Block = Heading | Paragraph | Items | Grid | Panels | Fold
