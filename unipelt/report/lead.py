"""The sentences at the top of a report, made from its numbers."""

from __future__ import annotations

from collections.abc import Sequence

from unipelt.report.cells import largest
from unipelt.report.differences import PAPERS, Difference
from unipelt.report.numbers import interval, k_name, number, percent, signed
from unipelt.report.results import Table


def lead_sentences(tables: Sequence[Table], differences: Sequence[Difference]) -> list[str]:
    """Return sentences on the best method, the combination against the best single method, and tasks at chance level.

    They describe the table with the most cells.
    """
    table = max(tables, key=lambda table: len(table.cells))
    return [_best(table), _combination(table, differences), _chance(table)]


def _best(table: Table) -> str:
    averages = {row: average for row in table.rows if (average := table.average(row))}
    where = f"At {k_name(table.k)}" if table.k is not None else "With all data"
    if not averages:
        return f"{where}, no method has all {len(table.tasks)} tasks, so there is no average to compare."
    best = largest({row: mean for row, (mean, _) in averages.items()})
    over = f"average over {len(table.tasks)} tasks" if len(table.tasks) > 1 else f"score on {table.tasks[0]}"
    text = f"{where}, {best} has the best {over}: {percent(*averages[best])}."
    singles = {row: averages[row][0] for row in table.singles(table.first(best).setting) if row in averages}
    if singles and (single := largest(singles)) != best:
        text += f" The best single method is {single}: {percent(*averages[single])}."
    return text


def _combination(table: Table, differences: Sequence[Difference]) -> str:
    found = [
        difference
        for difference in differences
        if (difference.kind, difference.k) == ("single", table.k) and difference.row in table.combined()
    ]
    if not found:
        return "There is no pair of a combination and a single method to compare."
    papers = [difference for difference in found if table.first(difference.row).method == PAPERS]
    found = papers or found
    chosen = max(found, key=lambda difference: (len(difference.tasks), difference.effect.mean))
    effect = chosen.effect
    side = "above" if effect.mean > 0 else "below"
    text = f"{chosen.row} is {number(abs(effect.mean))} points {side} {chosen.against}"
    if effect.low is None or effect.high is None:
        return f"{text}, from one pair."
    text += f" (95 % interval {interval(effect.low, effect.high)})"
    verdict = "a clear difference" if chosen.clear else "a difference that chance may have made"
    text += f": {verdict} among {len(differences)} comparisons."
    if chosen.by_task:
        task, most = max(chosen.by_task.items(), key=lambda item: abs(item[1].mean))
        text += f" The task with the largest difference is {task}, {signed(100 * most.mean)}."
    return text


def _chance(table: Table) -> str:
    at = {task: [cell.at_chance(table.chance(task)) for cell in table.column(task)] for task in table.tasks}
    grey, cells = sum(map(sum, at.values())), len(table.cells)
    if not grey:
        return "Every score is clearly above the majority class."
    whole = [task for task, found in at.items() if all(found)]
    text = f"{grey} of {cells} scores are not clearly above the majority class."
    if whole:
        text += f" No method is clearly above it on {' and '.join(whole) if len(whole) < 3 else ', '.join(whole)}."
    return text
