"""The table of scores: a compact table, and the complete table in a fold."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from unipelt.report.blocks import Block, Entry, Fold, Grid, Heading, Items, Line, Paragraph
from unipelt.report.cells import Cell
from unipelt.report.compare import marks
from unipelt.report.numbers import NONE, k_name, percent, signed
from unipelt.report.paper import TASKS
from unipelt.report.results import Results, Table

CONSTANT = "majority class"
"""The row of the constant answer: the scores of the test data's most frequent class."""


def score_sections(table: Table, results: Results) -> list[Block]:
    """Return the blocks of one K's scores: the compact table, then folds with all its numbers and with explanations."""
    blocks: list[Block] = [
        Heading(2, f"Scores, {k_name(table.k)}"),
        Paragraph(
            "Percent on the test data, the standard deviation over seeds below. Bold is the best of a column, "
            "underlined the second best; grey is not clearly above the majority class."
        ),
        _compact(table),
        Fold("All numbers: seeds, and the paper's scores" if table.has_paper else "All numbers", [_whole(table)]),
        Fold("How to read this table", [Items([*_reading(table, results), *_notes(table)])]),
    ]
    chosen = [f"{cell.task}, {cell.row}: {cell.chosen}" for cell in table.cells.values() if cell.chosen]
    if chosen:
        words = "These settings were chosen by their dev scores. Only the chosen are in the tables and pictures."
        blocks.append(Fold("Settings that were chosen on dev", [Paragraph(words), Items(chosen)]))
    return blocks


def column_marks(table: Table) -> dict[str, list[str]]:
    """Return the mark of each row's score, for each task and for `average`: best, second, chance, or ""."""
    found = {}
    for task in table.tasks:
        level = table.chance(task)
        cells = [table.cells.get((row, task)) for row in table.rows]
        low = [cell is not None and cell.at_chance(level) for cell in cells]
        best = marks([None if cell is None or at else cell.mean for cell, at in zip(cells, low, strict=True)])
        found[task] = ["chance" if at else mark for at, mark in zip(low, best, strict=True)]
    averages = [table.average(row) for row in table.rows]
    found["average"] = marks([average[0] if average else None for average in averages])
    return found


def seeds_text(seeds: Iterable[tuple[int, int]]) -> str:
    """Return seeds as text. The data's seed is named if it differs from the run's."""
    return ", ".join(str(run) if run == data else f"{run} (data {data})" for run, data in seeds)


def metric_of(table: Table, task: str) -> str:
    """Return the name of the metric that a task is judged by, in words."""
    return table.column(task)[0].runs[0].primary.replace("_", " ")


def _head(table: Table) -> list[str]:
    average = ["average"] if len(table.tasks) > 1 else []
    return ["method", *average, *(f"{task}\n{metric_of(table, task)}" for task in table.tasks)]


def _compact(table: Table) -> Grid:
    """Return a table with a line for each method, the average first, and a line for the constant answer."""
    several = len(table.tasks) > 1
    marked = column_marks(table)
    rows: list[list[Entry]] = []
    for index, row in enumerate(table.rows):
        entries: list[Entry] = [[(row, "")]]
        if several:
            average = table.average(row)
            entries.append(_short(*average, marked["average"][index]) if average else [(NONE, "minor")])
        for task in table.tasks:
            cell = table.cells.get((row, task))
            if cell is None:
                entries.append([(NONE, "minor")])
                continue
            lines = _short(cell.mean, cell.std, marked[task][index])
            if cell.missing:
                lines.append((f"n = {len(cell.runs)}", "warn"))
            entries.append([*lines, ("; ".join(text for text, _ in _score(cell, "")), "hover")])
        rows.append(entries)
    levels = [table.chance(task) for task in table.tasks]
    constant: list[Entry] = [[(CONSTANT, "minor")]]
    if several:
        constant.append([(percent(sum(levels) / len(levels)), "minor")])
    rows.append([*constant, *([(_level(table, task), "minor")] for task in table.tasks)])
    return Grid(_head(table), rows, pinned=2 if several else 1)


def _level(table: Table, task: str) -> str:
    score = table.majority(task).score
    return NONE if score is None else percent(score)


def _short(mean: float, std: float | None, mark: str) -> list[Line]:
    return [(percent(mean), mark), *([(f"± {100 * std:.2f}", "minor")] if std is not None else [])]


def _whole(table: Table) -> Grid:
    several = len(table.tasks) > 1
    marked = column_marks(table)
    rows: list[list[Entry]] = []
    for index, row in enumerate(table.rows):
        entries: list[Entry] = [[(row, "")]]
        if several:
            entries.append(_average(table, row, marked["average"][index]))
        for task in table.tasks:
            cell = table.cells.get((row, task))
            entries.append([(NONE, "minor")] if cell is None else _score(cell, marked[task][index]))
        rows.append(entries)
    return Grid(_head(table), rows, pinned=2 if several else 1)


def _score(cell: Cell, mark: str) -> list[Line]:
    lines = [(percent(cell.mean, cell.std), mark)]
    printed = cell.paper
    if printed is not None:
        std = "" if printed.std is None else f" ± {printed.std:.2f}"
        lines.append((f"paper {printed.mean:.2f}{std}", "minor"))
        lines.append((f"{signed(100 * cell.mean - printed.mean)} · n = {len(cell.runs)}", "minor"))
    else:
        lines.append((f"n = {len(cell.runs)}", "minor"))
    if cell.missing:
        lines.append((f"without seed {seeds_text(cell.missing)}", "warn"))
    return lines


def _average(table: Table, row: str, mark: str) -> Entry:
    average = table.average(row)
    if average is None:
        return [(NONE, "minor")]
    lines = [(percent(*average), mark)]
    printed = table.paper_average(row)
    if printed is not None:
        lines += [(f"paper {printed:.2f}", "minor"), (signed(100 * average[0] - printed), "minor")]
    return lines


def _reading(table: Table, results: Results) -> list[str]:
    known = "those of the sweep's plan" if results.seeds else "those of any run of this K"
    items = [
        "A score is a mean over n seeds with the standard deviation of a sample (n - 1)."
        + (" The paper does not say which deviation it prints." if table.has_paper else ""),
        f"Seeds that should be there are {known}.",
        f"{CONSTANT}: the score of always answering the most frequent class of the test data. It is 0 for Matthews' "
        "correlation, and for F1 where that class is the negative one.",
        *_older(table),
        "Grey: the 95 % t interval over seeds reaches the majority class. Of fewer than three seeds, the mean is less "
        "than two standard errors of the test set above it. A grey score is never marked as the best.",
    ]
    if len(table.tasks) > 1:
        also = (
            " The paper's average is over the same tasks." if table.has_paper and set(table.tasks) != {*TASKS} else ""
        )
        items.append(
            "The average is over all tasks of this table, of methods that have all of them. Its deviation is that of "
            f"the seeds' averages.{also}"
        )
    if any(cell.picked for cell in table.cells.values()):
        names = next(cell.picked for cell in table.cells.values() if cell.picked)
        items.append(
            f"picked on dev: for each task and seed, the one of {', '.join(names)} with the best dev score. One such "
            f"score takes {len(names)} trainings."
        )
    return items


def _older(table: Table) -> list[str]:
    """Return notes on tasks for which the row of the constant answer holds another number."""
    found = {task: table.majority(task) for task in table.tasks}
    regressions = [task for task, one in found.items() if one.score is None]
    items = []
    if regressions:
        also = " It counts as 0 in the average of that row." if len(found) > 1 else ""
        items.append(f"{', '.join(regressions)}: a task with scores has no classes, so it has no majority class.{also}")
    others: dict[str, list[str]] = defaultdict(list)
    for task, one in found.items():
        if one.score is not None and not one.of_test:
            others[one.name].append(task)
    items += [
        f"{', '.join(tasks)}: that row holds another number of the records: {name}. Of several seeds it is the largest."
        for name, tasks in others.items()
    ]
    return items


def _notes(table: Table) -> list[str]:
    said: dict[str, set[str]] = defaultdict(set)
    for cell in table.cells.values():
        for run in cell.runs:
            for note in run.record["task"]["notes"]:
                said[str(note)].add(cell.task)
    return [f"{', '.join(sorted(names))}: {note}" for note, names in said.items()]
