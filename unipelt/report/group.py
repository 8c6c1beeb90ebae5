"""Runs brought together in cells, and the single method that is best on dev, picked for each task and seed."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from unipelt.report.cells import Cell, Run, k_order, largest
from unipelt.report.paper import TASKS

PICKED = "picked on dev"
"""The row of the single method with the best dev score of each task and seed."""
CANDIDATES = ("adapter", "bitfit", "lora")
"""The methods that it is picked from; of equal dev scores, the first counts."""
_ORDER = ("fine-tuning", "bitfit", "adapter", "prefix", "lora", PICKED)
_COMBINED = ("unipelt-ap-nogate", "unipelt-ap", "unipelt-apl")
_OF_THE_METHOD = ("learning_rate", "method_config")


def group_runs(
    runs: Sequence[Run],
    choose: Sequence[str],
    seeds: Mapping[tuple[str, int | None, str], frozenset[tuple[int, int]]],
) -> list[Cell]:
    """Runs by task, K, method and whatever else sets them apart; of candidates, the best on dev.

    Args:
        runs: each once.
        choose: settings whose values are candidates.
        seeds: the planned seeds by task, K and method's name, where there is a plan.
    """
    groups: dict[tuple[str, int | None, str], list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.task, run.k, run.method].append(run)
    seen = {k: frozenset(run.seed for run in runs if run.k == k) for k in {run.k for run in runs}}
    # What sets runs of one task, K and method apart is named in every row, so that rows can be compared by it; but
    # what belongs to a method in the rows of that method only.
    apart: set[str] = set()
    own: dict[str, set[str]] = defaultdict(set)
    for (_, _, method), alike in groups.items():
        for key in set().union(*(run.variant for run in alike)) - set(choose):
            if len({_text(run.variant.get(key)) for run in alike}) > 1:
                (own[method] if key in _OF_THE_METHOD else apart).add(key)
    models = {(run.variant["model"], run.variant["model_sha256"]) for run in runs}
    if "model" in apart and len(models) == len({name for name, _ in models}):
        apart.discard("model_sha256")  # the names tell them apart
    cells = []
    for (task, k, method), alike in groups.items():
        variants: dict[tuple[str, str], dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
        for run in alike:
            setting, rest = (
                ", ".join(f"{key}={_text(run.variant.get(key))}" for key in sorted(keys))
                for keys in (apart, own[method])
            )
            candidate = ", ".join(f"{key}={_text(run.variant.get(key))}" for key in choose)
            variants[setting, rest][candidate].append(run)
        for (setting, rest), candidates in variants.items():
            words = ", ".join(filter(None, (setting, rest)))
            row = f"{method} [{words}]" if words else method
            best, note = _choose(candidates)
            planned = seeds.get((task, k, method))
            cells.append(
                Cell(
                    task,
                    k,
                    row,
                    setting,
                    tuple(sorted(candidates[best], key=lambda run: run.seed)),
                    planned or seen[k],
                    note,
                )
            )
    return sorted(cells, key=lambda cell: (k_order(cell.k), row_order(cell.row), task_order(cell.task)))


def _choose(candidates: Mapping[str, Sequence[Run]]) -> tuple[str, str]:
    """The candidate with the best mean dev score over the seeds that all have, and a sentence about it."""
    if len(candidates) == 1:
        return next(iter(candidates)), ""
    common = frozenset.intersection(*(frozenset(run.seed for run in runs) for runs in candidates.values()))
    means = {}
    for name, runs in sorted(candidates.items(), key=lambda item: item[0]):
        over = [run.dev for run in runs if run.seed in common] or [run.dev for run in runs]
        means[name] = statistics.fmean(over)
    best = largest(means)
    tried = "; ".join(f"{name}: {100 * mean:.2f}" for name, mean in means.items())
    over_what = f"the {len(common)} seeds that all have" if common else "different seeds, as none is in all"
    return best, f"{best} of {len(means)} candidates by mean dev score over {over_what} ({tried})"


def pick_on_dev(cells: Sequence[Cell]) -> list[Cell]:
    """For each task and setting that has all the candidates, the run with the best dev score of each seed.

    The cost of a score is that of all the candidates, each trained once.
    """
    groups: dict[tuple[str, int | None, str], dict[str, Cell]] = defaultdict(dict)
    for cell in sorted(cells, key=lambda cell: -len(cell.runs)):
        if cell.method in CANDIDATES:
            groups[cell.task, cell.k, cell.setting].setdefault(cell.method, cell)
    found = []
    for (task, k, setting), singles in groups.items():
        if len(singles) < len(CANDIDATES):
            continue
        by_seed = [{run.seed: run for run in singles[method].runs} for method in CANDIDATES]
        shared = sorted(set.intersection(*({*runs} for runs in by_seed)))
        if not shared:
            continue
        chosen = tuple(max((runs[seed] for runs in by_seed), key=lambda run: run.dev) for seed in shared)
        seconds = statistics.fmean(sum(runs[seed].record["seconds"]["total"] for runs in by_seed) for seed in shared)
        expected = frozenset.union(*(cell.expected for cell in singles.values()))
        row = f"{PICKED} [{setting}]" if setting else PICKED
        found.append(
            Cell(task, k, row, setting, chosen, expected, picked=CANDIDATES, seconds_of_all=seconds),
        )
    return found


def row_order(row: str) -> tuple[int, str]:
    """Rows by the order of the paper's tables: single methods, then combinations."""
    base = row.partition(" [")[0].partition(",")[0]
    known = (*_ORDER, None, *_COMBINED)
    return (known.index(base) if base in known else (known.index(None) if "unipelt" not in base else len(known)), row)


def task_order(task: str) -> tuple[int, str]:
    """Tasks by the order of the paper's tables, others after them."""
    return (TASKS.index(task) if task in TASKS else len(TASKS), task)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
