"""All runs of a folder, and a table of one K: its rows, tasks, averages, and rows of a kind."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from unipelt.records.record import Floor, floor
from unipelt.report.cells import Cell, Run, k_order, kinds, sample_std
from unipelt.report.group import group_runs, pick_on_dev, row_order, task_order


@dataclass(frozen=True)
class Results:
    """What a folder of runs holds.

    Attributes:
        runs: each once.
        left_out: files that are no records, or damaged, or say a run twice: name and reason.
        failures: runs that failed and have no result: name and message.
        absent: planned runs without result and without failure, by name.
        seeds: the planned seeds by task, K and method's name; empty where there is no plan.
        choose: settings that a sweep varies to choose by dev score.
        plan: the sweep's configuration, where there is a plan.
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
        """Cells of the single method that is picked on dev; they repeat runs of other cells."""
        return tuple(pick_on_dev(self.cells))

    @property
    def ks(self) -> list[int | None]:
        """Each K once, all data last."""
        return sorted({cell.k for cell in self.cells}, key=k_order)

    def table(self, k: int | None) -> Table:
        """The cells of one K, those that are picked on dev among them."""
        chosen = [cell for cell in (*self.cells, *self.picked) if cell.k == k]
        return Table(k, {(cell.row, cell.task): cell for cell in sorted(chosen, key=lambda cell: row_order(cell.row))})


@dataclass(frozen=True)
class Table:
    """The cells of one K, by row and task."""

    k: int | None
    cells: Mapping[tuple[str, str], Cell]

    @property
    def rows(self) -> list[str]:
        """The rows' names, in the order of the paper's tables."""
        return list(dict.fromkeys(row for row, _ in self.cells))

    @property
    def tasks(self) -> list[str]:
        """The tasks, in that order too."""
        return sorted({task for _, task in self.cells}, key=task_order)

    def row(self, name: str) -> dict[str, Cell]:
        """A row's cells by task."""
        return {task: self.cells[name, task] for task in self.tasks if (name, task) in self.cells}

    def average(self, row: str) -> tuple[float, float | None] | None:
        """Mean over the tasks, and its standard deviation over seeds; None where a task is not there.

        The deviation is that of the seeds' averages, so it is None where tasks have different seeds.
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
        """The mean of the paper's numbers for the row over the table's tasks; None where one is not there."""
        printed = [cell.paper for cell in self.row(row).values()]
        if len(printed) < len(self.tasks) or None in printed:
            return None
        return statistics.fmean(number.mean for number in printed if number is not None)

    def first(self, row: str) -> Cell:
        """A row's first cell, for what all its cells share."""
        return next(iter(self.row(row).values()))

    def singles(self, setting: str) -> list[str]:
        """Rows whose method adds one kind of submodule, of a setting."""
        return [row for row in self.rows if self._adds(row) == 1 and self.first(row).setting == setting]

    def combined(self) -> list[str]:
        """Rows whose method adds more than one."""
        return [row for row in self.rows if self._adds(row) > 1]

    def named(self, method: str, setting: str) -> dict[str, Cell]:
        """The row of a method and setting; of several (learning rates), the one with the most tasks."""
        rows = [self.row(row) for row in self.rows]
        found = [
            row for row in rows for cell in [*row.values()][:1] if (cell.method, cell.setting) == (method, setting)
        ]
        return max(found, key=len, default={})

    def picked(self, setting: str) -> list[str]:
        """Rows of the single method that is picked on dev, of a setting."""
        return [row for row in self.rows if self.first(row).picked and self.first(row).setting == setting]

    def majority(self, task: str) -> Floor:
        """The score of the test set's most frequent class; of older records, of the train sets' the best.

        A task without classes has the floor that its records name. A regression has no score here.
        """
        found = [floor(run.record) for cell in self.column(task) for run in cell.runs]
        known = [one for one in found if one.of_test] or found
        return max(known, key=lambda one: -math.inf if one.score is None else one.score)

    def chance(self, task: str) -> float:
        """The score above which a method must be to say anything: that of `majority`, or 0 of a correlation."""
        return self.majority(task).score or 0.0

    def column(self, task: str) -> list[Cell]:
        """A task's cells."""
        return [cell for (_, name), cell in self.cells.items() if name == task]

    @property
    def has_paper(self) -> bool:
        """Whether the paper prints a number for any of the cells."""
        return any(cell.paper for cell in self.cells.values())

    def _adds(self, row: str) -> int:
        """How many parts a row's method adds; 0 of fine-tuning and of what is picked among methods."""
        first = self.first(row)
        return 0 if first.picked else len(kinds(first.runs[0].config))
