"""Finished runs brought together: cells over seeds, the paper's numbers beside them, the tests between methods.

Scores are fractions, as the records hold them; the paper's numbers are percent, as printed. A standard deviation is
that of a sample (n - 1); the paper does not say which it prints.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from unipelt.glue.result import RESULT, ResultError, read_result

PLAN = "sweep.json"
FAILURE = "failure.json"
RESAMPLES = 10_000

TASKS = ("sst2", "mrpc", "cola", "rte", "qnli", "stsb", "mnli", "qqp")  # the order of the paper's tables
PARTS = ("adapter", "prefix", "lora")
_ORDER = ("fine-tuning", "bitfit", "adapter", "prefix", "lora", "unipelt-ap-nogate", "unipelt-ap", "unipelt-apl")
# What a number on the axis of a curve may be: the paper's Figures 2 and 3, and their like for the prefix.
_SIZES = ("adapter.bottleneck", "lora.alpha", "lora.rank", "prefix.length")
# Settings that say where and how a run was carried out, or that have a place of their own in a cell's name.
_NOT_A_VARIANT = {
    *("task", "train_samples", "seed", "data_seed", "method", "learning_rate"),
    *("output_dir", "overwrite", "keep_checkpoints", "device", "num_workers", "threads", "do_predict"),
    *("glue_dir", "train_file", "dev_file", "test_file", "model_sha256"),
}

_OF_THE_METHOD = ("learning_rate", "method_config")


class ReportError(ValueError):
    """There is nothing to report on; the message says why."""


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
class Printed:
    """A number of the paper, in percent; `std` is None where it prints none."""

    table: int
    metric: str
    mean: float
    std: float | None


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
        return sorted({cell.k for cell in self.cells}, key=lambda k: math.inf if k is None else k)

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
class Paired:
    """A combination against the best single method over pairs of task and seed.

    Attributes:
        single: the method that adds one kind of submodule and has the best mean over `tasks`.
        among: the methods that it is the best of.
        difference: mean of combination minus single, a fraction.
        low, high: its 95 % interval by bootstrap over pairs.
        t, wilcoxon: p values, two-sided; None where they are not defined.
    """

    row: str
    single: str
    among: tuple[str, ...]
    tasks: tuple[str, ...]
    pairs: int
    difference: float
    low: float
    high: float
    t: float | None
    wilcoxon: float | None


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


def read_results(folder: str | Path) -> Results:
    """Read `folder/result.json` and every `folder/*/result.json`, and the sweep's plan where there is one.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder at {folder}")
    runs: list[Run] = []
    left_out: list[tuple[str, str]] = []
    paths = [path for path in (folder / RESULT, *sorted(folder.glob(f"*/{RESULT}"))) if path.exists()]
    first: dict[Any, str] = {}
    for path in paths:
        name = str(path.relative_to(folder))
        try:
            record = read_result(path)
        except (ResultError, OSError) as error:
            left_out.append((name, str(error).replace(str(path), "it", 1)))
            continue
        run = Run(path.parent.name if path.parent != folder else ".", record)
        problem = _problem(record)
        if problem is None:
            # the second: the same run on another machine, where the data lie elsewhere
            same = (run.task, run.k, run.method, run.seed, json.dumps(run.variant, sort_keys=True))
            other = first.setdefault(record["digest"], name), first.setdefault(same, name)
            problem = next((f"it is the same run as {seen}" for seen in other if seen != name), None)
        if problem is not None:
            left_out.append((name, problem))
            continue
        runs.append(run)

    done = {path.parent for path in paths}
    failures = []
    for path in sorted(folder.glob(f"*/{FAILURE}")):
        if path.parent not in done:
            failures.append((path.parent.name, _failure(path)))
    plan = _read_plan(folder, left_out)
    absent = _absent(plan, runs, {name for name, _ in failures})
    seeds: dict[tuple[str, int | None, str], set[tuple[int, int]]] = defaultdict(set)
    for item in plan.get("runs", ()):
        if key := _planned(item):
            seeds[key[0]].add(key[1])
    chosen = plan.get("chosen", ())
    if isinstance(chosen, Mapping):
        chosen = list(chosen)
    return Results(
        runs=tuple(runs),
        left_out=tuple(left_out),
        failures=tuple(failures),
        absent=tuple(absent),
        seeds={key: frozenset(value) for key, value in seeds.items()},
        choose=tuple(item for item in chosen if isinstance(item, str)) if isinstance(chosen, list) else (),
        plan=str(plan.get("sweep", PLAN)) if plan else None,
    )


@cache
def paper() -> dict[tuple[int | None, str, str], Printed]:
    """The paper's Tables 1 and 3, by K (None: all data), method and task; the task `average` is its last column."""
    return {
        (None if row["k"] == "all" else int(row["k"]), row["method"], row["task"]): Printed(
            int(row["table"]), row["metric"], float(row["mean"]), float(row["std"]) if row["std"] else None
        )
        for row in _paper_rows()
        if row["table"] in "13"
    }


@cache
def paper_upper_bound() -> dict[tuple[int, str], tuple[float, float]]:
    """The paper's Table 2, by K and method: the best single submodules', and the method's."""
    found: dict[tuple[int, str], dict[str, float]] = defaultdict(dict)
    for row in _paper_rows():
        if row["table"] == "2":
            found[int(row["k"]), row["method"]][row["metric"]] = float(row["mean"])
    return {key: (value["best_single"], value["mean"]) for key, value in found.items()}


@cache
def paper_costs() -> dict[tuple[str, str], str]:
    """The paper's Table 4, as printed, by method and by what it is the cost of."""
    return {(row["method"], row["metric"]): row["mean"] for row in _paper_rows() if row["table"] == "4"}


def _paper_rows() -> list[dict[str, str]]:
    return list(csv.DictReader(files("unipelt").joinpath("paper.csv").read_text(encoding="utf-8").splitlines()))


def sample_std(values: Iterable[float]) -> float | None:
    """Standard deviation with n - 1; None of fewer than two."""
    values = list(values)
    return statistics.stdev(values) if len(values) > 1 else None


def kinds(config: Mapping[str, Any]) -> list[str]:
    """The kinds of submodule that a method's configuration adds; of fine-tuning, none."""
    if config.get("train_base"):
        return []
    return [part for part in PARTS if config.get(part) is not None] + (["bitfit"] if config.get("bitfit") else [])


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
        chosen = {task: _largest({part: cell[task].mean for part, cell in singles.items()}) for task in tasks}
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
    found = []
    for row in table.combined():
        cells = table.row(row)
        everyone = table.singles(table.first(row).setting)
        singles = [name for name in everyone if all(task in table.row(name) for task in cells)] or everyone
        tasks = [task for task in cells if all(task in table.row(single) for single in singles)]
        if not singles or not tasks:
            continue
        best = _largest({name: statistics.fmean(table.row(name)[task].mean for task in tasks) for name in singles})
        other = table.row(best)
        differences = [
            cells[task].scores[seed] - other[task].scores[seed]
            for task in tasks
            for seed in sorted(cells[task].scores)
            if seed in other[task].scores
        ]
        if len(differences) > 1:
            test = paired_test(differences)
            found.append(Paired(row, best, tuple(singles), tuple(tasks), len(differences), *test))
    return found


def paired_test(
    differences: Sequence[float], resamples: int = RESAMPLES
) -> tuple[float, float, float, float | None, float | None]:
    """Mean difference, its 95 % bootstrap interval (seeded), and p of the paired t-test and of Wilcoxon's.

    Args:
        differences: one for each pair.
        resamples: of the bootstrap.
    """
    from scipy import stats  # slow to import

    values = np.asarray(differences, dtype=np.float64)
    generator = np.random.default_rng(0)
    means = values[generator.integers(len(values), size=(resamples, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    # identical differences have no spread for t, and differences of 0 no rank for Wilcoxon
    t = None if np.ptp(values) < 1e-12 else float(stats.ttest_1samp(values, 0.0).pvalue)
    moved = values[np.abs(values) > 1e-12]
    rank = float(stats.wilcoxon(np.round(moved, 12)).pvalue) if len(moved) else None
    return float(values.mean()), float(low), float(high), t, rank


def curves(results: Results) -> list[Curve]:
    """Cells that differ in one number of their method only, at least two of them."""
    found: dict[tuple[Any, ...], dict[float, Cell]] = defaultdict(dict)
    for cell in results.cells:
        flat = _flatten(cell.runs[0].config)
        for key in _SIZES:
            size = flat.get(key)
            if isinstance(size, (int, float)) and not isinstance(size, bool):
                rest = json.dumps({name: value for name, value in flat.items() if name != key}, sort_keys=True)
                found[key, cell.task, _k_order(cell.k), rest, cell.row.removeprefix(cell.method)].setdefault(
                    float(size), cell
                )
    return [
        Curve(group[0], next(iter(cells.values())).method.partition(",")[0] + group[4], dict(sorted(cells.items())))
        for group, cells in found.items()
        if len(cells) > 1
    ]


def costs(table: Table) -> list[dict[str, Any]]:
    """A line for each row: parameters, seconds, and what they are relative to fine-tuning on the same tasks.

    Runs end early at different epochs, so training is compared by the second a step; inference by the second an
    evaluated example, on dev and test data.
    """
    lines = []
    for row in table.rows:
        cells = table.row(row)
        runs = [run for cell in cells.values() for run in cell.runs]
        base = table.named("fine-tuning", table.first(row).setting)
        lines.append(
            {
                "row": row,
                "method": runs[0].method,
                **{
                    name: sorted({run.record["parameters"][name] for run in runs})
                    for name in ("trained", "deployed", "head")
                },
                "base": max(run.record["parameters"]["base"] for run in runs),
                "seconds": statistics.fmean(run.record["seconds"]["total"] for run in runs),
                "training": _relative(_seconds_a_step, cells, base),
                "inference": _relative(_seconds_an_example, cells, base),
            }
        )
    return lines


def _relative(
    value: Callable[[Run], float | None], cells: Mapping[str, Cell], base: Mapping[str, Cell]
) -> float | None:
    """Mean over common tasks of the ratio of two rows' mean values; None where there are none."""
    ratios = []
    for task in cells.keys() & base.keys():
        ours, theirs = ([found for run in row[task].runs if (found := value(run))] for row in (cells, base))
        if ours and theirs:
            ratios.append(statistics.fmean(ours) / statistics.fmean(theirs))
    return statistics.fmean(ratios) if ratios else None


def _seconds_a_step(run: Run) -> float | None:
    steps = run.record["evaluations"][-1]["step"]
    return run.record["seconds"]["train"] / steps if steps > 0 else None


def _seconds_an_example(run: Run) -> float | None:
    parts = [run.record["data"].get(name) for name in ("dev", "test")]
    dev, test = (part.get("rows") if isinstance(part, Mapping) else None for part in parts)
    if not isinstance(dev, int) or not isinstance(test, int) or dev + test <= 0:
        return None
    return run.record["seconds"]["evaluation"] / (len(run.record["evaluations"]) * dev + test)


def _largest(values: Mapping[str, float]) -> str:
    """The name of the largest value; of equal ones, the first."""
    return max(values, key=lambda name: values[name])


# Reading


def _problem(record: Mapping[str, Any]) -> str | None:
    """Why a whole record is still not to be averaged, or None."""
    if record["status"] != "finished":
        return f"its status is {record['status']!r}"
    k = record["settings"].get("train_samples")
    if k is not None and (not isinstance(k, int) or isinstance(k, bool) or k < 1):
        return f"settings.train_samples is {k!r:.60}"
    primary = record["task"]["primary"]
    scores = [(part, record[part]["metrics"].get(primary)) for part in ("dev", "test")]
    scores += [(f"evaluations[{i}]", item["metrics"].get(primary)) for i, item in enumerate(record["evaluations"])]
    for where, score in scores:
        number = isinstance(score, (int, float)) and not isinstance(score, bool)
        if not number or not -1 <= score <= 1:  # NaN is not between them either
            return f"{where}.metrics.{primary} is {score!r:.60}, not a fraction"
    times = [record["seconds"][name] for name in ("train", "evaluation", "total")]
    if not all(math.isfinite(value) and value >= 0 for value in times):
        return f"its seconds are {times}"
    gates = record["gates"]
    if gates is not None and not _are_gates(gates):
        return "its gates are not layers by submodules"
    return None


def _are_gates(gates: Mapping[str, Any]) -> bool:
    values = gates.get("values")
    if not isinstance(values, Mapping) or not values or not isinstance(gates.get("layers"), list):
        return False
    means = [item.get("mean") if isinstance(item, Mapping) else None for item in values.values()]
    return all(
        isinstance(mean, list) and mean and all(isinstance(x, (int, float)) and 0 <= x <= 1 for x in mean)
        for mean in means
    )


def _failure(path: Path) -> str:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return str(found["error"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"its {FAILURE} cannot be read"


def _read_plan(folder: Path, left_out: list[tuple[str, str]]) -> dict[str, Any]:
    """The sweep's plan; empty where there is none. One that cannot be read is named in `left_out`."""
    path = folder / PLAN
    if not path.exists():
        return {}
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        left_out.append((PLAN, f"it is not valid JSON: {error}"))
        return {}
    if not isinstance(plan, dict) or not isinstance(plan.get("runs", []), list):
        left_out.append((PLAN, "it is not the plan of a sweep"))
        return {}
    return plan


def _planned(item: Any) -> tuple[tuple[str, int | None, str], tuple[int, int]] | None:
    """Task, K and method's name, and the seeds, of a planned run; None where the plan does not say them."""
    if not isinstance(item, Mapping):
        return None
    inner = item.get("settings")
    settings = {**(inner if isinstance(inner, Mapping) else {}), **item}
    task, k, seed = (settings.get(name) for name in ("task", "train_samples", "seed"))
    method = settings.get("method_name", settings.get("method"))
    if isinstance(method, Mapping):
        method = _method_name(method)
    data_seed = settings.get("data_seed")
    data_seed = seed if data_seed is None else data_seed
    if not isinstance(task, str) or not isinstance(method, str) or not isinstance(seed, int):
        return None
    if not isinstance(data_seed, int) or not isinstance(k, (int, type(None))):
        return None
    return (task, k, method), (seed, data_seed)


def _method_name(method: Mapping[str, Any]) -> str | None:
    from unipelt.glue.settings import RunSettings

    try:
        return RunSettings(task="rte", method=method).method_name
    except (ValueError, OSError):
        return None


def _absent(plan: Mapping[str, Any], runs: Sequence[Run], failed: set[str]) -> list[str]:
    """Planned runs that left neither result nor failure."""
    digests, names = {run.record["digest"] for run in runs}, {run.name for run in runs}
    absent = []
    for item in plan.get("runs", ()):
        about = {"folder": item} if isinstance(item, str) else item
        if not isinstance(about, Mapping):
            continue
        name = next((str(about[key]) for key in ("folder", "name", "digest") if about.get(key)), None)
        if name is None or about.get("digest") in digests or name in names or name in failed:
            continue
        absent.append(name)
    return absent


# Cells


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
    return sorted(cells, key=lambda cell: (_k_order(cell.k), _row_order(cell.row), _task_order(cell.task)))


def _choose(candidates: Mapping[str, Sequence[Run]]) -> tuple[str, str]:
    """The candidate with the best mean dev score over the seeds that all have, and a sentence about it."""
    if len(candidates) == 1:
        return next(iter(candidates)), ""
    common = frozenset.intersection(*(frozenset(run.seed for run in runs) for runs in candidates.values()))
    means = {}
    for name, runs in sorted(candidates.items(), key=lambda item: item[0]):
        over = [run.dev for run in runs if run.seed in common] or [run.dev for run in runs]
        means[name] = statistics.fmean(over)
    best = _largest(means)
    tried = "; ".join(f"{name}: {100 * mean:.2f}" for name, mean in means.items())
    over_what = f"the {len(common)} seeds that all have" if common else "different seeds, as none is in all"
    return best, f"{best} of {len(means)} candidates by mean dev score over {over_what} ({tried})"


def _row_order(row: str) -> tuple[int, str]:
    base = row.partition(" [")[0].partition(",")[0]
    return (_ORDER.index(base) if base in _ORDER else len(_ORDER), row)


def _task_order(task: str) -> tuple[int, str]:
    return (TASKS.index(task) if task in TASKS else len(TASKS), task)


def _k_order(k: int | None) -> float:
    return math.inf if k is None else k


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _short(digest: Any) -> str | None:
    return digest[:8] if isinstance(digest, str) else None


def _flatten(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{where}{key}.") if isinstance(value, Mapping) else {f"{where}{key}": value}
    return flat
