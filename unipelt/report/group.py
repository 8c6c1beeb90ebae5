"""Group runs into cells, and pick the single method that is best on dev for each task and seed."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from unipelt.report.cells import Cell, Run, k_order, largest
from unipelt.report.chosen import variant_of, without_chosen
from unipelt.report.paper import TASKS

PICKED = "picked on dev"
"""The row of the single method with the best dev score for each task and seed."""
CANDIDATES = ("adapter", "bitfit", "lora")
"""The methods from which that single method is picked. Of equal dev scores, the first one counts."""
_ORDER = ("fine-tuning", "bitfit", "adapter", "prefix", "lora", PICKED)
_COMBINED = ("unipelt-ap-nogate", "unipelt-ap", "unipelt-apl")
_OF_THE_METHOD = ("learning_rate", "method_config", "select")
"""Settings in which methods may differ and still be compared. A method with one submodule has nothing to select."""


def group_runs(
    runs: Sequence[Run],
    choose: Sequence[str],
    seeds: Mapping[tuple[str, int | None, str], frozenset[tuple[int, int]]],
) -> list[Cell]:
    """Group runs by task, K, method and all other values that distinguish them. Of candidates, keep the best on dev.

    Args:
        runs: the runs, without duplicates.
        choose: the settings whose values are candidates.
        seeds: the planned seeds by task, K and the method's name, if there is a plan.
    """
    groups: dict[tuple[str, int | None, str], list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.task, run.k, without_chosen(run.method, choose)].append(run)
    variants_of = {id(run): variant_of(run, choose) for run in runs}
    seen = {k: frozenset(run.seed for run in runs if run.k == k) for k in {run.k for run in runs}}
    # A value that differs between runs of one task, K and method is named in every row, so that rows can be compared.
    # A value that belongs to a method is named only in the rows of that method.
    apart: set[str] = set()
    own: dict[str, set[str]] = defaultdict(set)
    for (_, _, method), alike in groups.items():
        for key in set().union(*(variants_of[id(run)] for run in alike)) - set(choose):
            if len({_text(variants_of[id(run)].get(key)) for run in alike}) > 1:
                (own[method] if key in _OF_THE_METHOD else apart).add(key)
    models = {(run.variant["model"], run.variant["model_sha256"]) for run in runs}
    if "model" in apart and len(models) == len({name for name, _ in models}):
        apart.discard("model_sha256")  # the names of the models are enough
    cells = []
    for (task, k, method), alike in groups.items():
        variants: dict[tuple[str, str], dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
        for run in alike:
            setting, rest = (
                ", ".join(f"{key}={_text(variants_of[id(run)].get(key))}" for key in sorted(keys))
                for keys in (apart, own[method])
            )
            candidate = ", ".join(f"{key}={_text(variants_of[id(run)].get(key))}" for key in choose)
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
    """Return the candidate with the best mean dev score over the seeds that all have, and a sentence about it."""
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
    """Return a cell for each task and setting with all candidates: for each seed, the run with the best dev score.

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
    """Return the sort key of a row: single methods, then combinations, in the order of the paper's tables."""
    base = row.partition(" [")[0].partition(",")[0]
    known = (*_ORDER, None, *_COMBINED)
    return (known.index(base) if base in known else (known.index(None) if "unipelt" not in base else len(known)), row)


def task_order(task: str) -> tuple[int, str]:
    """Return the sort key of a task: the order of the paper's tables, then other tasks."""
    return (TASKS.index(task) if task in TASKS else len(TASKS), task)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
