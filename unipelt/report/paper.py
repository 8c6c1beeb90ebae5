"""The paper's printed numbers, in percent."""

from __future__ import annotations

import csv
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

TASKS = ("sst2", "mrpc", "cola", "rte", "qnli", "stsb", "mnli", "qqp")  # the order of the paper's tables


@dataclass(frozen=True)
class Printed:
    """A number of the paper, in percent. `std` is None if the paper prints none."""

    table: int
    metric: str
    mean: float
    std: float | None


@cache
def paper() -> dict[tuple[int | None, str, str], Printed]:
    """Return the paper's Tables 1 and 3 by K (None: all data), method and task.

    The task `average` is the last column.
    """
    return {
        (None if row["k"] == "all" else int(row["k"]), row["method"], row["task"]): Printed(
            int(row["table"]), row["metric"], float(row["mean"]), float(row["std"]) if row["std"] else None
        )
        for row in _paper_rows()
        if row["table"] in ("1", "3")
    }


@cache
def paper_upper_bound() -> dict[tuple[int | None, str], tuple[float, float]]:
    """Return the paper's Table 2 by K and method, in percent.

    The two numbers are the mean of the best single submodules and the mean of the method.
    """
    found: dict[tuple[int | None, str], dict[str, float]] = defaultdict(dict)
    for row in _paper_rows():
        if row["table"] == "2":
            found[int(row["k"]), row["method"]][row["metric"]] = float(row["mean"])
    return {key: (value["best_single"], value["mean"]) for key, value in found.items()}


@cache
def paper_costs() -> dict[tuple[str, str], str]:
    """Return the paper's Table 4, as printed, by method and by kind of cost."""
    return {(row["method"], row["metric"]): row["mean"] for row in _paper_rows() if row["table"] == "4"}


def _paper_rows() -> list[dict[str, str]]:
    return list(csv.DictReader(files("unipelt.report").joinpath("paper.csv").read_text(encoding="utf-8").splitlines()))
