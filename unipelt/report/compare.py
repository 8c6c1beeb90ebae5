"""Methods compared: the upper bound, pairs of runs, gates beside scores, curves over one number."""

from __future__ import annotations

import itertools
import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from unipelt.config.schema import flatten
from unipelt.report.cells import PARTS, Cell, Results, Table, k_order, kinds, largest
from unipelt.report.paper import TASKS, paper_upper_bound
from unipelt.report.significance import paired_test, task_test

PAPERS = "unipelt-apl"
"""The combination that others are compared with."""
# What a number on the axis of a curve may be: the paper's Figures 2 and 3, and their like for the prefix.
_SIZES = ("adapter.bottleneck", "lora.alpha", "lora.rank", "prefix.length")


@dataclass(frozen=True)
class UpperBound:
    """The paper's Table 2: the best submodule of each task, were it known, beside their combination.

    Attributes:
        tasks: those in which the combination and all its submodules have scores.
        best: the mean over these tasks of the best submodule's mean score, a fraction.
        combined: the combination's mean over the same tasks, a fraction.
        chosen: the best submodule of each task.
        paper: the paper's two numbers in percent, where these are all its tasks.
    """

    row: str
    tasks: tuple[str, ...]
    best: float
    combined: float
    chosen: Mapping[str, str]
    paper: tuple[float, float] | None


@dataclass(frozen=True)
class Difference:
    """One row less another, over the pairs of task and seed that both have.

    Attributes:
        tasks: that both have.
        pairs: how many.
        difference: the mean, a fraction.
        low, high: its 95 % interval by bootstrap over pairs.
        t, wilcoxon: p values, two-sided; None where they are not defined.
        drawn: the interval where tasks are drawn too, and pairs from each: what to expect of other tasks like these.
            None of fewer than three tasks.
        t_tasks: p of the t-test over the tasks' means, two-sided; None of fewer than three tasks.
        by_task: the mean over the pairs of each task and its 95 % interval, where there are several tasks; None
            instead of the interval for a task of one pair, nothing for a task of none.
    """

    tasks: tuple[str, ...]
    pairs: int
    difference: float
    low: float
    high: float
    t: float | None
    wilcoxon: float | None
    drawn: tuple[float, float] | None
    t_tasks: float | None
    by_task: Mapping[str, tuple[float, tuple[float, float] | None]]


@dataclass(frozen=True)
class Paired(Difference):
    """A combination less the best single method.

    Attributes:
        single: the method that adds one kind of submodule and has the best mean over `tasks`.
        among: the methods that it is the best of.
    """

    row: str
    single: str
    among: tuple[str, ...]


@dataclass(frozen=True)
class HeadEffect(Difference):
    """A method with a head that trains less the same method whose head stays at its random start."""

    frozen: str
    trained: str


@dataclass(frozen=True)
class VariantEffect(Difference):
    """Another combination less the paper's, UniPELT(APL)."""

    row: str
    against: str


Kind = TypeVar("Kind", bound=Difference)


@dataclass(frozen=True)
class GateAgreement:
    """A combination's gates beside what its submodules do alone.

    Attributes:
        tasks: by task, for each submodule its gates' mean over layers, examples and seeds, and the mean score of the
            method that has it alone, a fraction.
        agreeing: the tasks in which the most open gate is that of the submodule that does best alone.
        correlation: Spearman's, of gates and scores over tasks and submodules, each less its submodule's mean over
            the tasks, since gates of one kind are more open than those of another whatever the task; None of fewer
            than three tasks, or where nothing varies.
    """

    row: str
    tasks: Mapping[str, Mapping[str, tuple[float, float]]]
    agreeing: tuple[str, ...]
    correlation: float | None


@dataclass(frozen=True)
class Curve:
    """Scores against one number of the method, all else equal.

    Attributes:
        key: the number's name, as in `adapter.bottleneck`.
        name: what is equal.
        cells: by the number, from small to large.
    """

    key: str
    name: str
    cells: Mapping[float, Cell]


def marks(values: Sequence[float | None], digits: int = 4) -> list[str]:
    """`best` and `second` for the largest and second largest of a column, ties included; otherwise empty.

    Values are compared as printed: with `digits` digits of the fraction. A column of one value marks nothing.
    """
    rounded = [None if value is None else round(value, digits) for value in values]
    ranks = sorted({value for value in rounded if value is not None}, reverse=True)
    if sum(value is not None for value in rounded) < 2:
        return [""] * len(values)
    names = dict(zip(ranks, ("best", "second"), strict=False))
    return ["" if value is None else names.get(value, "") for value in rounded]


def upper_bounds(table: Table) -> list[UpperBound]:
    """For each combination, the mean over tasks of the best of its submodules (the paper's Table 2).

    The best submodule of a task is the one with the best mean over seeds. A submodule is the preset of its name.
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
        printed = paper_upper_bound().get((table.k or 0, first.method))
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


def paired_tests(table: Table) -> list[Paired]:
    """Each combination against the best single method, over the pairs that both have.

    The best is sought among the single methods that have all of the combination's tasks; if none has, among all of
    them on the tasks that all of them have.
    """
    found: list[Paired] = []
    for row in table.combined():
        cells = table.row(row)
        everyone = table.singles(table.first(row).setting)
        singles = [name for name in everyone if all(task in table.row(name) for task in cells)] or everyone
        tasks = [task for task in cells if all(task in table.row(single) for single in singles)]
        if not singles or not tasks:
            continue
        best = largest({name: statistics.fmean(table.row(name)[task].mean for task in tasks) for name in singles})
        other = table.row(best)
        found += _compare(Paired, cells, other, tasks, row=row, single=best, among=tuple(singles))
    return found


def _compare(
    kind: type[Kind], ours: Mapping[str, Cell], theirs: Mapping[str, Cell], tasks: Sequence[str], **rows: Any
) -> list[Kind]:
    """Ours less theirs on these tasks, with the names of the rows; nothing where there are fewer than two pairs."""
    pairs = {
        task: [
            ours[task].scores[seed] - theirs[task].scores[seed]
            for seed in sorted(ours[task].scores)
            if seed in theirs[task].scores
        ]
        for task in tasks
    }
    pairs = {task: found for task, found in pairs.items() if found}
    differences = [difference for found in pairs.values() for difference in found]
    if len(differences) < 2:
        return []
    by_task = {task: _mean_and_interval(found) for task, found in pairs.items()} if len(tasks) > 1 else {}
    drawn, t_tasks = task_test(list(pairs.values())) if len(pairs) > 2 else (None, None)
    return [kind(tuple(tasks), len(differences), *paired_test(differences), drawn, t_tasks, by_task, **rows)]


def _mean_and_interval(differences: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    mean, low, high, _, _ = paired_test(differences)
    return mean, (low, high) if len(differences) > 1 else None


def head_effects(table: Table) -> list[HeadEffect]:
    """What it does to a method that its head does not train, all else equal: the learning rate too."""
    found: list[HeadEffect] = []
    for frozen, trained in itertools.permutations(table.rows, 2):
        one, other = table.first(frozen), table.first(trained)
        if one.runs[0].config.get("train_head") is not False or one.setting != other.setting:
            continue
        rates = [cell.runs[0].record["method"]["learning_rate"] for cell in (one, other)]
        if {**one.runs[0].config, "train_head": True} != other.runs[0].config or rates[0] != rates[1]:
            continue
        ours, theirs = table.row(trained), table.row(frozen)
        tasks = [task for task in ours if task in theirs]
        found += _compare(HeadEffect, ours, theirs, tasks, frozen=frozen, trained=trained)
    return found


def variant_effects(table: Table) -> list[VariantEffect]:
    """Every other combination against `unipelt-apl`, on the tasks and seeds that both have."""
    found: list[VariantEffect] = []
    for row in table.combined():
        first = table.first(row)
        theirs = table.named(PAPERS, first.setting)
        if not theirs or first.method == PAPERS:
            continue
        ours = table.row(row)
        tasks = [task for task in ours if task in theirs]
        found += _compare(VariantEffect, ours, theirs, tasks, row=row, against=next(iter(theirs.values())).row)
    return found


def gate_agreements(table: Table) -> list[GateAgreement]:
    """For each combination with gates, whether they are more open for the submodule that does better alone."""
    found = []
    for row in table.combined():
        cells, first = table.row(row), table.first(row)
        gates = {task: _mean_gates(cell) for task, cell in cells.items()}
        singles = {part: table.named(part, first.setting) for part in kinds(first.runs[0].config) if part in PARTS}
        tasks = {
            task: {part: (gates[task][part], single[task].mean) for part, single in singles.items()}
            for task in cells
            if all(part in gates[task] and task in single for part, single in singles.items())
        }
        if not tasks:
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


def _mean_gates(cell: Cell) -> dict[str, float]:
    """The mean gate of each submodule over its gates, layers and seeds."""
    found: dict[str, list[float]] = defaultdict(list)
    for run in cell.runs:
        for name, gate in (run.record["gates"] or {"values": {}})["values"].items():
            for part in PARTS:
                if part in name:
                    found[part].append(statistics.fmean(gate["mean"]))
    return {part: statistics.fmean(means) for part, means in found.items()}


def _correlation(values: np.ndarray) -> float | None:
    from scipy import stats  # slow to import

    gates, scores = values.round(12).reshape(-1, 2).T  # what is equal but for rounding has one rank
    if len(values) < 3 or np.ptp(gates) < 1e-12 or np.ptp(scores) < 1e-12:
        return None
    return float(stats.spearmanr(gates, scores).statistic)


def curves(results: Results) -> list[Curve]:
    """Cells that differ in one number of their method only, at least two of them."""
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
