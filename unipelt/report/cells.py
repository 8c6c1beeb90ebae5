"""Runs brought together: cells over seeds, in the order of the paper's tables, the paper's numbers beside them.

Scores are fractions, as the records hold them; the paper's numbers are percent, as printed. A standard deviation is
that of a sample (n - 1); the paper does not say which it prints.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from unipelt.report.paper import TASKS, Printed, paper
from unipelt.runs.settings import FILES, INCIDENTAL

PARTS = ("adapter", "prefix", "lora")
_ORDER = ("fine-tuning", "bitfit", "adapter", "prefix", "lora", "unipelt-ap-nogate", "unipelt-ap", "unipelt-apl")
# Settings that say where and how a run was carried out, or that have a place of their own in a cell's name.
_NOT_A_VARIANT = {
    *("task", "train_samples", "seed", "data_seed", "method", "learning_rate"),
    *(*INCIDENTAL, *FILES, "do_predict", "glue_dir", "model_sha256"),
}
_OF_THE_METHOD = ("learning_rate", "method_config")


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        name: the run's folder, relative to the folder that was read.
        record: its `result.json`, checked.
    """

    name: str
    record: Mapping[str, Any]

    @property
    def task(self) -> str:
        """The task's name."""
        return self.record["task"]["name"]

    @property
    def primary(self) -> str:
        """The metric that the task is judged by."""
        return self.record["task"]["primary"]

    @property
    def k(self) -> int | None:
        """Training examples; None: all."""
        return self.record["settings"].get("train_samples")

    @property
    def method(self) -> str:
        """The method's name."""
        return self.record["method"]["name"]

    @property
    def config(self) -> Mapping[str, Any]:
        """The method's configuration, as plain types."""
        return self.record["method"]["config"]

    @property
    def seed(self) -> tuple[int, int]:
        """The run's and the data's."""
        return self.record["seeds"]["run"], self.record["seeds"]["data"]

    @property
    def score(self) -> float:
        """On the test data, a fraction."""
        return self.record["test"]["metrics"][self.primary]

    @property
    def dev(self) -> float:
        """The best on the dev data, a fraction."""
        return self.record["dev"]["metrics"][self.primary]

    @cached_property
    def variant(self) -> Mapping[str, Any]:
        """What must agree between two runs for their scores to be averaged, beside task, K and method's name."""
        settings = self.record["settings"]
        rows = self.record["data"].get("test")
        config = json.dumps(self.config, sort_keys=True)
        return {
            **{key: value for key, value in settings.items() if key not in _NOT_A_VARIANT},
            "learning_rate": self.record["method"]["learning_rate"],
            "model": self.record["model"]["name"],
            "model_sha256": _short(self.record["model"]["sha256"]),
            "test_data": _short(rows.get("sha256")) if isinstance(rows, Mapping) else None,
            "method_config": hashlib.sha256(config.encode()).hexdigest()[:8],
        }


@dataclass(frozen=True)
class Cell:
    """The runs of one task, K and method, which differ in their seeds only.

    Attributes:
        row: the method's name, and in brackets what else sets it apart from others of that name.
        setting: of that, what rows of different methods must share to be compared: all but the learning rate.
        expected: the seeds that should be there.
        chosen: where there were candidates, what was chosen on dev, from what.
    """

    task: str
    k: int | None
    row: str
    setting: str
    runs: tuple[Run, ...]
    expected: frozenset[tuple[int, int]]
    chosen: str = ""

    @property
    def method(self) -> str:
        """The method's name."""
        return self.runs[0].method

    @property
    def scores(self) -> dict[tuple[int, int], float]:
        """By seed."""
        return {run.seed: run.score for run in self.runs}

    @property
    def mean(self) -> float:
        """Over the seeds, a fraction."""
        return statistics.fmean(self.scores.values())

    @property
    def std(self) -> float | None:
        """Of the sample; None where there is one run."""
        return sample_std(self.scores.values())

    @property
    def missing(self) -> list[tuple[int, int]]:
        """Expected seeds without a run."""
        return sorted(self.expected - set(self.scores))

    @property
    def paper(self) -> Printed | None:
        """The paper's number, whatever the model; None where it has none or judges the task by another metric."""
        printed = paper().get((self.k, self.method, self.task))
        return printed if printed and printed.metric == self.runs[0].primary else None

    def average(self, value: Callable[[Run], float]) -> float:
        """Mean over the runs of something that each has."""
        return statistics.fmean(value(run) for run in self.runs)


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
        return tuple(_cells(self))

    @property
    def ks(self) -> list[int | None]:
        """Each K once, all data last."""
        return sorted({cell.k for cell in self.cells}, key=k_order)

    def table(self, k: int | None) -> Table:
        """The cells of one K."""
        cells = {(cell.row, cell.task): cell for cell in self.cells if cell.k == k}
        return Table(k, cells)


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
        return sorted({task for _, task in self.cells}, key=_task_order)

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

    def _adds(self, row: str) -> int:
        return len(kinds(self.first(row).runs[0].config))


def kinds(config: Mapping[str, Any]) -> list[str]:
    """The kinds of submodule that a method's configuration adds; of fine-tuning, none."""
    if config.get("train_base"):
        return []
    return [part for part in PARTS if config.get(part) is not None] + (["bitfit"] if config.get("bitfit") else [])


def sample_std(values: Iterable[float]) -> float | None:
    """Standard deviation with n - 1; None of fewer than two."""
    values = list(values)
    return statistics.stdev(values) if len(values) > 1 else None


def largest(values: Mapping[str, float]) -> str:
    """The name of the largest value; of equal ones, the first."""
    return max(values, key=lambda name: values[name])


def k_order(k: int | None) -> float:
    """What to sort by: all data come last."""
    return math.inf if k is None else k


def _cells(results: Results) -> Iterable[Cell]:
    """Runs by task, K, method and whatever else sets them apart; of candidates, the best on dev."""
    groups: dict[tuple[str, int | None, str], list[Run]] = defaultdict(list)
    for run in results.runs:
        groups[run.task, run.k, run.method].append(run)
    seen = {k: frozenset(run.seed for run in results.runs if run.k == k) for k in {run.k for run in results.runs}}
    # What sets runs of one task, K and method apart is named in every row, so that rows can be compared by it; but
    # what belongs to a method in the rows of that method only.
    apart: set[str] = set()
    own: dict[str, set[str]] = defaultdict(set)
    for (_, _, method), runs in groups.items():
        for key in set().union(*(run.variant for run in runs)) - set(results.choose):
            if len({_text(run.variant.get(key)) for run in runs}) > 1:
                (own[method] if key in _OF_THE_METHOD else apart).add(key)
    models = {(run.variant["model"], run.variant["model_sha256"]) for run in results.runs}
    if "model" in apart and len(models) == len({name for name, _ in models}):
        apart.discard("model_sha256")  # the names tell them apart
    cells = []
    for (task, k, method), runs in groups.items():
        variants: dict[tuple[str, str], dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
        for run in runs:
            setting, rest = (
                ", ".join(f"{key}={_text(run.variant.get(key))}" for key in sorted(keys))
                for keys in (apart, own[method])
            )
            candidate = ", ".join(f"{key}={_text(run.variant.get(key))}" for key in results.choose)
            variants[setting, rest][candidate].append(run)
        for (setting, rest), candidates in variants.items():
            words = ", ".join(filter(None, (setting, rest)))
            row = f"{method} [{words}]" if words else method
            best, note = _choose(candidates)
            planned = results.seeds.get((task, k, method))
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
    return sorted(cells, key=lambda cell: (k_order(cell.k), _row_order(cell.row), _task_order(cell.task)))


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


def _row_order(row: str) -> tuple[int, str]:
    base = row.partition(" [")[0].partition(",")[0]
    return (_ORDER.index(base) if base in _ORDER else len(_ORDER), row)


def _task_order(task: str) -> tuple[int, str]:
    return (TASKS.index(task) if task in TASKS else len(TASKS), task)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _short(digest: Any) -> str | None:
    return digest[:8] if isinstance(digest, str) else None
