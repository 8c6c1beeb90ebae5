"""The chart at the top of a report: the mean difference of each method to the best single method, with intervals."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from unipelt.report.differences import Difference
from unipelt.report.numbers import interval, signed
from unipelt.report.results import Results

ABOVE, BELOW, UNCLEAR = "#0072b2", "#d55e00", "#5b6472"
"""Blue, orange and grey, which people with any colour vision can tell apart. The marks also differ in shape."""
_WIDTH, _ROW = 5.2, 0.36  # inches


@dataclass(frozen=True)
class Forest:
    """The content of one chart.

    Attributes:
        k: the number of training examples; None means all.
        against: the best single method.
        tasks: the tasks; every row has scores in all of them.
        rows: the rows, from the largest difference to the smallest.
    """

    k: int | None
    against: str
    tasks: tuple[str, ...]
    rows: tuple[Difference, ...]

    @property
    def size(self) -> tuple[float, float]:
        """The width and the height in inches."""
        lines = sum(max(1, len(_label(row).splitlines()) - 1) for row in self.rows)
        return _WIDTH, 1.3 + _ROW * (lines + 1)

    @property
    def words(self) -> str:
        """The content of the chart as text."""
        found = []
        for row in self.rows:
            effect = row.effect
            span = "" if effect.low is None or effect.high is None else f" ({interval(effect.low, effect.high)})"
            found.append(f"{row.row} {signed(100 * effect.mean)}{span}{', clear' if row.clear else ''}")
        return (
            f"Mean difference to {self.against}, the best single method, in points, with 95 % intervals over "
            f"{self.rows[0].unit}: {'; '.join(found)}."
        )


def forests(results: Results, differences: Sequence[Difference]) -> Iterator[Forest]:
    """Yield a chart for each K and best single method, of the rows that have the most tasks; the largest chart first.

    Rows with fewer tasks are compared on these tasks only, which is another scale. The tables show these rows.
    """
    groups: dict[tuple[int | None, str], list[Difference]] = defaultdict(list)
    for difference in differences:
        if difference.kind == "single" and difference.effect.low is not None:
            groups[difference.k, difference.against].append(difference)
    charts = []
    for k in results.ks:
        most = max((len(one.tasks) for (size, _), found in groups.items() if size == k for one in found), default=0)
        for (size, against), found in groups.items():
            rows = [one for one in found if len(one.tasks) == most]
            if size == k and rows:
                rows.sort(key=lambda one: -one.effect.mean)
                charts.append(Forest(k, against, rows[0].tasks, tuple(rows)))
    yield from sorted(charts, key=lambda forest: -len(forest.rows) * len(forest.tasks))


def draw_forest(axes: Any, forest: Forest) -> None:
    """Draw a mark for each row, a thick bar for the interval over seeds, and a thin line for that over tasks."""
    places = []
    place = 0.0
    for row in forest.rows:
        lines = len(_label(row).splitlines())
        place += max(1, lines - 1) / 2
        places.append(place)
        place += max(1, lines - 1) / 2
    for place, row in zip(places, forest.rows, strict=True):
        effect, other = row.effect, row.over_tasks
        colour, mark = _look(row)
        if other is not None and other.low is not None and other.high is not None:
            axes.plot([100 * other.low, 100 * other.high], [place, place], color=colour, linewidth=0.9)
        if effect.low is not None and effect.high is not None:
            axes.plot(
                [100 * effect.low, 100 * effect.high],
                [place, place],
                color=colour,
                linewidth=7,
                alpha=0.4,
                solid_capstyle="butt",
            )
        axes.plot([100 * effect.mean], [place], mark, color=colour, markersize=8, markeredgewidth=0)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(places, [_label(row) for row in forest.rows], fontsize=10)
    axes.set_ylim(places[-1] + 1, places[0] - 1)
    axes.tick_params(axis="x", labelsize=10)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"points against {forest.against}", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _look(row: Difference) -> tuple[str, str]:
    if not row.clear:
        return UNCLEAR, "o"
    return (ABOVE, ">") if row.effect.mean > 0 else (BELOW, "<")


def _label(row: Difference) -> str:
    return "\n".join(textwrap.wrap(row.row, 26, break_long_words=True)[:3]) or row.row
