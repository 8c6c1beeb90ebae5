"""Compare methods: the upper bound, gates beside scores, and curves over one number of a method."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unipelt.config.schema import flatten
from unipelt.report.cells import Cell, k_order, kinds, largest
from unipelt.report.paper import TASKS, paper_upper_bound
from unipelt.report.results import Results, Table

# The numbers on the x axis of a curve: those of the paper's Figures 2 and 3, and the length of the prefix.
_SIZES = ("adapter.bottleneck", "lora.alpha", "lora.rank", "prefix.length")


@dataclass(frozen=True)
class UpperBound:
    """The paper's Table 2: the best submodule of each task, chosen by its score, beside the combination of all of them.

    Attributes:
        tasks: the tasks in which the combination and all its submodules have scores.
        best: the mean over these tasks of the best submodule's mean score, a fraction.
        combined: the mean score of the combination over the same tasks, a fraction.
        chosen: the best submodule of each task.
        paper: the paper's two numbers in percent, if `tasks` are all tasks of the paper.
    """

    row: str
    tasks: tuple[str, ...]
    best: float
    combined: float
    chosen: Mapping[str, str]
    paper: tuple[float, float] | None


@dataclass(frozen=True)
class GateAgreement:
    """The gates of a combination beside the scores of its submodules alone.

    Attributes:
        tasks: by task and submodule, two numbers: the mean gate over layers, examples and seeds, and the mean score of
            the method that has only this submodule, a fraction.
        agreeing: the tasks in which the submodule with the most open gate also has the best score alone.
        correlation: Spearman's correlation of gates and scores over tasks and submodules. Each value is taken minus the
            mean of its submodule over the tasks, because gates of some submodules are more open on every task. None for
            fewer than three tasks, or if the gates or the scores do not vary.
    """

    row: str
    tasks: Mapping[str, Mapping[str, tuple[float, float]]]
    agreeing: tuple[str, ...]
    correlation: float | None


@dataclass(frozen=True)
class Curve:
    """Scores by one number of a method, with all else equal.

    Attributes:
        key: the name of the number, such as `adapter.bottleneck`.
        name: the method and the settings that the cells share.
        cells: the cells by the number, from small to large.
    """

    key: str
    name: str
    cells: Mapping[float, Cell]


def marks(values: Sequence[float | None], digits: int = 4) -> list[str]:
    """Return `best` and `second` for the largest and second largest values of a column, and "" for the others.

    Equal values have the same mark. Values are compared as printed, with `digits` digits of the fraction. A column with
    one value has no marks.
    """
    rounded = [None if value is None else round(value, digits) for value in values]
    ranks = sorted({value for value in rounded if value is not None}, reverse=True)
    if sum(value is not None for value in rounded) < 2:
        return [""] * len(values)
    names = dict(zip(ranks, ("best", "second"), strict=False))
    return ["" if value is None else names.get(value, "") for value in rounded]


def upper_bounds(table: Table) -> list[UpperBound]:
    """Return the mean over tasks of the best submodule, for each combination (the paper's Table 2).

    The best submodule of a task is the one with the best mean over seeds. The score of a submodule is that of the
    preset with its name.
    """
    found = []
    for row in table.combined():
        cells, first = table.row(row), table.first(row)
        parts = kinds(first.runs[0].config)
        singles = {part: table.named(part, first.setting) for part in parts}
        tasks = [task for task in cells if all(task in single for single in singles.values())]
        if not tasks:
            continue
        chosen = {task: largest({part: cell[task].mean for part, cell in singles.items()}) for task in tasks}
        printed = paper_upper_bound().get((table.k, first.method))
        found.append(
            UpperBound(
                row=row,
                tasks=tuple(tasks),
                best=statistics.fmean(singles[part][task].mean for task, part in chosen.items()),
                combined=statistics.fmean(cells[task].mean for task in tasks),
                chosen=chosen,
                paper=printed if set(tasks) == set(TASKS) else None,
            )
        )
    return found


def gate_agreements(table: Table) -> list[GateAgreement]:
    """Return, for each combination with gates, whether gates are more open for the submodule that is better alone."""
    found = []
    for row in table.combined():
        cells, first = table.row(row), table.first(row)
        parts = kinds(first.runs[0].config)
        gates = {task: _mean_gates(cell, parts) for task, cell in cells.items()}
        singles = {part: table.named(part, first.setting) for part in parts}
        tasks = {
            task: {part: (gates[task][part], single[task].mean) for part, single in singles.items()}
            for task in cells
            if all(part in gates[task] and task in single for part, single in singles.items())
        }
        if not tasks or len(singles) < 2:
            continue
        agreeing = tuple(
            task
            for task, parts in tasks.items()
            if largest({part: gate for part, (gate, _) in parts.items()})
            == largest({part: score for part, (_, score) in parts.items()})
        )
        values = np.array([list(parts.values()) for parts in tasks.values()])  # (tasks, submodules, 2)
        found.append(GateAgreement(row, tasks, agreeing, _correlation(values - values.mean(axis=0))))
    return found


def _mean_gates(cell: Cell, parts: Sequence[str]) -> dict[str, float]:
    """Return the mean gate of each submodule over its gates, layers and seeds."""
    found: dict[str, list[float]] = defaultdict(list)
    for run in cell.runs:
        for name, gate in (run.record["gates"] or {"values": {}})["values"].items():
            for part in parts:
                if name.rpartition(".")[2].startswith(part):
                    found[part].append(statistics.fmean(gate["mean"]))
    return {part: statistics.fmean(means) for part, means in found.items()}


def _correlation(values: np.ndarray) -> float | None:
    from scipy import stats  # slow to import

    gates, scores = values.round(12).reshape(-1, 2).T  # values that differ only by rounding get the same rank
    if len(values) < 3 or np.ptp(gates) < 1e-12 or np.ptp(scores) < 1e-12:
        return None
    return float(stats.spearmanr(gates, scores).statistic)


def curves(results: Results) -> list[Curve]:
    """Return the curves: cells that differ only in one number of their method, at least two cells for each curve."""
    found: dict[tuple[Any, ...], dict[float, Cell]] = defaultdict(dict)
    for cell in results.cells:
        flat = flatten(cell.runs[0].config)
        for key in _SIZES:
            size = flat.get(key)
            if isinstance(size, (int, float)) and not isinstance(size, bool):
                rest = json.dumps({name: value for name, value in flat.items() if name != key}, sort_keys=True)
                found[key, cell.task, k_order(cell.k), rest, cell.row.removeprefix(cell.method)].setdefault(
                    float(size), cell
                )
    return [
        Curve(group[0], next(iter(cells.values())).method.partition(",")[0] + group[4], dict(sorted(cells.items())))
        for group, cells in found.items()
        if len(cells) > 1
    ]
