"""All runs of a folder, and the table of one K: its rows, tasks, averages, and rows of one kind."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from unipelt.records.record import Floor, floor
from unipelt.report.cells import Cell, Run, k_order, kinds, sample_std
from unipelt.report.group import group_runs, pick_on_dev, row_order, task_order
from unipelt.report.lines import frame_of


@dataclass(frozen=True)
class Results:
    """The content of a folder of runs.

    Attributes:
        runs: the runs, without duplicates.
        left_out: name and reason of files that are not records, are damaged, or repeat a run.
        failures: name and message of runs that failed and have no result.
        absent: names of planned runs with neither a result nor a failure.
        seeds: the planned seeds by task, K and the method's name; empty without a plan.
        choose: the settings that a sweep varies to choose by dev score.
        plan: the path of the sweep file, or None without a plan.
    """

    runs: tuple[Run, ...]
    left_out: tuple[tuple[str, str], ...] = ()
    failures: tuple[tuple[str, str], ...] = ()
    absent: tuple[str, ...] = ()
    seeds: Mapping[tuple[str, int | None, str], frozenset[tuple[int, int]]] = field(default_factory=dict)
    choose: tuple[str, ...] = ()
    plan: str | None = None

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """All cells, in the order of the paper's tables."""
        return tuple(group_runs(self.runs, self.choose, self.seeds))

    @cached_property
    def picked(self) -> tuple[Cell, ...]:
        """The cells of the single method that is picked on dev. They repeat runs of other cells."""
        return tuple(pick_on_dev(self.cells))

    @property
    def ks(self) -> list[int | None]:
        """Each K once; all data (None) come last."""
        return sorted({cell.k for cell in self.cells}, key=k_order)

    def to_frame(self) -> Any:
        """Return a `pandas.DataFrame` with a row for each run and the columns of `runs.csv`.

        Scores are fractions. An absent value is None.

        Raises:
            ImportError: pandas is not installed.
        """
        return frame_of(self.runs, self.cells)

    def table(self, k: int | None) -> Table:
        """Return the table of one K, with the cells that are picked on dev."""
        chosen = [cell for cell in (*self.cells, *self.picked) if cell.k == k]
        return Table(k, {(cell.row, cell.task): cell for cell in sorted(chosen, key=lambda cell: row_order(cell.row))})


@dataclass(frozen=True)
class Table:
    """The cells of one K, by row and task."""

    k: int | None
    cells: Mapping[tuple[str, str], Cell]

    @property
    def rows(self) -> list[str]:
        """The names of the rows, in the order of the paper's tables."""
        return list(dict.fromkeys(row for row, _ in self.cells))

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks, in the order of the paper's tables."""
        return sorted({task for _, task in self.cells}, key=task_order)

    def row(self, name: str) -> dict[str, Cell]:
        """Return the cells of a row by task."""
        return {task: self.cells[name, task] for task in self.tasks if (name, task) in self.cells}

    def average(self, row: str) -> tuple[float, float | None] | None:
        """Return the mean over the tasks and its standard deviation over seeds, or None if the row lacks a task.

        Both are fractions. The deviation is that of the seeds' averages. If tasks have different seeds, the deviation
        is None.
        """
        cells = self.row(row)
        if len(cells) < len(self.tasks):
            return None
        seeds = {frozenset(cell.scores) for cell in cells.values()}
        mean = statistics.fmean(cell.mean for cell in cells.values())
        if len(seeds) > 1:
            return mean, None
        return mean, sample_std([statistics.fmean(c.scores[seed] for c in cells.values()) for seed in seeds.pop()])

    def paper_average(self, row: str) -> float | None:
        """Return the mean of the paper's numbers for the row over the table's tasks, in percent.

        The mean is None if one of the numbers is missing.
        """
        printed = [cell.paper for cell in self.row(row).values()]
        if len(printed) < len(self.tasks) or None in printed:
            return None
        return statistics.fmean(number.mean for number in printed if number is not None)

    def first(self, row: str) -> Cell:
        """Return the first cell of a row, for values that all its cells share."""
        return next(iter(self.row(row).values()))

    def singles(self, setting: str) -> list[str]:
        """Return the rows of a setting whose method adds one kind of submodule."""
        return [row for row in self.rows if self._adds(row) == 1 and self.first(row).setting == setting]

    def combined(self) -> list[str]:
        """Return the rows whose method adds more than one kind of submodule."""
        return [row for row in self.rows if self._adds(row) > 1]

    def named(self, method: str, setting: str) -> dict[str, Cell]:
        """Return the cells of a method and setting by task.

        Of several rows (learning rates), the one with most tasks counts.
        """
        rows = [self.row(row) for row in self.rows]
        found = [
            row for row in rows for cell in [*row.values()][:1] if (cell.method, cell.setting) == (method, setting)
        ]
        return max(found, key=len, default={})

    def picked(self, setting: str) -> list[str]:
        """Return the rows of a setting for the single method that is picked on dev."""
        return [row for row in self.rows if self.first(row).picked and self.first(row).setting == setting]

    def majority(self, task: str) -> Floor:
        """Return the score of the test set's most frequent class.

        Older records may hold only the score of the train set's most frequent class. Then the largest of these is
        returned. A task without classes has the floor that its records name. A regression has no score here.
        """
        found = [floor(run.record) for cell in self.column(task) for run in cell.runs]
        known = [one for one in found if one.of_test] or found
        return max(known, key=lambda one: -math.inf if one.score is None else one.score)

    def chance(self, task: str) -> float:
        """Return the score that a useful method must exceed: that of `majority`, or 0 for a correlation."""
        return self.majority(task).score or 0.0

    def column(self, task: str) -> list[Cell]:
        """Return the cells of a task."""
        return [cell for (_, name), cell in self.cells.items() if name == task]

    @property
    def has_paper(self) -> bool:
        """Whether the paper prints a number for any of the cells."""
        return any(cell.paper for cell in self.cells.values())

    def _adds(self, row: str) -> int:
        """Return how many parts a row's method adds: 0 for fine-tuning and for a row that is picked among methods."""
        first = self.first(row)
        return 0 if first.picked else len(kinds(first.runs[0].config))
