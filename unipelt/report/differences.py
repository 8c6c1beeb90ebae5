"""Compare rows pair by pair: the same task, the same seed, another method. Compare last choices run by run.

All comparisons of a page are one family of tests. An interval is a t interval. For the tasks of a table, the interval
is over seeds: each seed gives one number, its mean difference over the tasks. For other tasks like these, the interval
is over tasks: each task gives its mean difference over the seeds.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from unipelt.report.cells import Cell, Run, largest
from unipelt.report.results import Table
from unipelt.report.significance import MeanEffect, holm, mean_effect

PAPERS = "unipelt-apl"
"""The combination with which the other combinations are compared."""

Kind = Literal["single", "picked", "paper", "head", "average", "tested"]
"""The sides of a comparison. The other side is the best single method, the method picked on dev, the paper's
combination, or the same method with a frozen head. For `average` and `tested` both sides are of the same runs: the
average of the weights, or the model that was tested after all last choices, against the weights of the best epoch.
"""
BEST_EPOCH = "best epoch"
"""The name of the other side where both sides are of the same runs."""


@dataclass(frozen=True)
class Difference:
    """One row minus another, over the pairs of task and seed that both rows have.

    Attributes:
        kind: the kind of the other row.
        k: the training examples of the table; None means all.
        row, against: the names of the two rows; `against` is `best epoch` where both sides are of the same runs.
        tasks: the tasks that both rows have.
        pairs: the number of pairs.
        effect: the mean over the pairs, a fraction, with the interval for these tasks.
        unit: the unit of the interval: `seeds`, or `pairs` if tasks have different seeds or only one seed.
        over_tasks: the mean over the tasks' means, with the interval for other tasks like these; None for fewer than
            three tasks.
        by_task: the mean of each task over its pairs, if there are several tasks.
        among: for the best single method, the methods from which it was chosen.
        holm, holm_tasks: `effect.p` and `over_tasks.p`, corrected for all comparisons of the page.
    """

    kind: Kind
    k: int | None
    row: str
    against: str
    tasks: tuple[str, ...]
    pairs: int
    effect: MeanEffect
    unit: Literal["seeds", "pairs"]
    over_tasks: MeanEffect | None
    by_task: Mapping[str, MeanEffect]
    among: tuple[str, ...] = ()
    holm: float | None = None
    holm_tasks: float | None = None

    @property
    def clear(self) -> bool:
        """Whether the difference on these tasks is clear: the corrected p value is below 0.05."""
        return self.holm is not None and self.holm < 0.05


def compare_all(tables: Sequence[Table]) -> list[Difference]:
    """Return all comparisons of a page, with p values that are corrected for the number of comparisons."""
    found = [
        difference
        for table in tables
        for compare in (against_best_single, against_picked, against_papers, against_frozen_heads, last_choices)
        for difference in compare(table)
    ]
    effects = holm([difference.effect.p for difference in found])
    tasks = holm([difference.over_tasks.p if difference.over_tasks else None for difference in found])
    return [
        replace(difference, holm=one, holm_tasks=other)
        for difference, one, other in zip(found, effects, tasks, strict=True)
    ]


def against_best_single(table: Table) -> list[Difference]:
    """Compare every row with the best single method, over the pairs that both have.

    The best is chosen among the single methods that have all tasks of the row. If no single method has them all, the
    best is chosen among all single methods, on the tasks that all of them have.
    """
    found: list[Difference] = []
    for row in table.rows:
        cells = table.row(row)
        everyone = table.singles(table.first(row).setting)
        singles = [name for name in everyone if all(task in table.row(name) for task in cells)] or everyone
        tasks = [task for task in cells if all(task in table.row(single) for single in singles)]
        if not singles or not tasks:
            continue
        best = largest({name: statistics.fmean(table.row(name)[task].mean for task in tasks) for name in singles})
        if row != best:
            found += _compare("single", table, row, best, tasks, tuple(singles))
    return found


def against_picked(table: Table) -> Iterator[Difference]:
    """Compare every combination with the single method that is picked on dev."""
    for row in table.combined():
        for picked in table.picked(table.first(row).setting):
            yield from _compare("picked", table, row, picked)


def against_papers(table: Table) -> Iterator[Difference]:
    """Compare every other combination with `unipelt-apl`."""
    for row in table.combined():
        first = table.first(row)
        theirs = table.named(PAPERS, first.setting)
        if theirs and first.method != PAPERS:
            yield from _compare("paper", table, row, next(iter(theirs.values())).row)


def against_frozen_heads(table: Table) -> Iterator[Difference]:
    """Compare each method with a trained head with the same method with a frozen head.

    All else is equal, also the learning rate.
    """
    for frozen, trained in itertools.permutations(table.rows, 2):
        one, other = table.first(frozen), table.first(trained)
        if one.picked or other.picked or one.setting != other.setting:
            continue
        if one.runs[0].config.get("train_head") is not False:
            continue
        rates = [cell.runs[0].record["method"]["learning_rate"] for cell in (one, other)]
        if {**one.runs[0].config, "train_head": True} == other.runs[0].config and rates[0] == rates[1]:
            yield from _compare("head", table, trained, frozen)


def last_choices(table: Table) -> Iterator[Difference]:
    """Compare what a run could test at its end with the weights of its best epoch, for runs with such choices.

    One training gives both sides (`tests` in its record).
    """
    sides: dict[Kind, Callable[[Run], float | None]] = {
        "average": lambda run: run.tests.get("average"),
        "tested": lambda run: run.score,
    }
    for kind, side in sides.items():
        for row in table.rows:
            cells = table.row(row)
            if any(cell.picked for cell in cells.values()):
                continue
            pairs = {
                task: {run.seed: ours - run.tests["best_epoch"] for run in cell.runs if (ours := side(run)) is not None}
                for task, cell in cells.items()
                if all("best_epoch" in run.tests for run in cell.runs)
            }
            yield from _difference(kind, table, row, BEST_EPOCH, pairs)


def _compare(
    kind: Kind,
    table: Table,
    row: str,
    against: str,
    tasks: Sequence[str] | None = None,
    among: tuple[str, ...] = (),
) -> list[Difference]:
    """Return one row minus another on these tasks, by default on all that both have."""
    ours, theirs = table.row(row), table.row(against)
    pairs = {task: _pairs(ours[task], theirs[task]) for task in (ours if tasks is None else tasks) if task in theirs}
    return _difference(kind, table, row, against, pairs, among)


def _difference(
    kind: Kind,
    table: Table,
    row: str,
    against: str,
    pairs: Mapping[str, Mapping[tuple[int, int], float]],
    among: tuple[str, ...] = (),
) -> list[Difference]:
    """Return the comparison of these differences by task and seed. The list is empty for fewer than two of them."""
    pairs = {task: paired for task, paired in pairs.items() if paired}
    if sum(map(len, pairs.values())) < 2:
        return []
    values = [value for paired in pairs.values() for value in paired.values()]
    seeds = {frozenset(paired) for paired in pairs.values()}
    over_seeds = len(seeds) == 1 and len(next(iter(seeds))) > 1
    if over_seeds:
        values = [statistics.fmean(paired[seed] for paired in pairs.values()) for seed in sorted(seeds.pop())]
    by_task = {task: mean_effect([*paired.values()]) for task, paired in pairs.items()}
    return [
        Difference(
            kind,
            table.k,
            row,
            against,
            tuple(pairs),
            sum(map(len, pairs.values())),
            mean_effect(values),
            "seeds" if over_seeds else "pairs",
            mean_effect([effect.mean for effect in by_task.values()]) if len(by_task) > 2 else None,
            by_task if len(by_task) > 1 else {},
            among,
        )
    ]


def _pairs(ours: Cell, theirs: Cell) -> dict[tuple[int, int], float]:
    """Return the differences by seed, for the seeds that both cells have."""
    return {seed: ours.scores[seed] - theirs.scores[seed] for seed in sorted(ours.scores) if seed in theirs.scores}
