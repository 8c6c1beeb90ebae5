"""One run, and one cell of a table: the runs of a task, K and method, which differ in their seeds only.

Scores are fractions, as the records hold them; the paper's numbers are percent, as printed. A standard deviation is
that of a sample (n - 1); the paper does not say which it prints.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath
from typing import Any

from unipelt.report.paper import Printed, paper
from unipelt.report.significance import mean_effect
from unipelt.runs.settings import FILES, INCIDENTAL, INNER, LATER

PARTS = ("adapter", "prefix", "lora")
"""The paper's submodules, in its order."""
_NO_PARTS = ("gate",)  # mappings in a method's configuration that are no submodule
_DULL = ("train", "training", "data")  # names of files that say nothing about a task
# Settings that say where and how a run was carried out, or that have a place of their own in a cell's name.
_NOT_A_VARIANT = {
    *("task", "train_samples", "seed", "data_seed", "method", "learning_rate"),
    *(*INCIDENTAL, *FILES, "do_predict", "glue_dir", "model_sha256"),
}


def flat_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A record's settings, those that are mappings of options with one key for each option: `trainer.NAME`."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        inner = key in INNER and isinstance(value, Mapping)
        found |= {f"{key}.{name}": option for name, option in value.items()} if inner else {key: value}
    return found


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
        """The task's name; a task of the user's own files has that of its training file."""
        settings = self.record["settings"]
        file = settings.get("train_file")
        if settings.get("task") is not None or not isinstance(file, str):
            return self.record["task"]["name"]
        path = PurePath(file)
        return path.parent.name if path.stem in _DULL and path.parent.name else path.stem

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
            **{
                key: value
                for key, value in flat_settings(settings).items()
                if key not in _NOT_A_VARIANT and not (key in LATER and value == LATER[key])
            },
            "learning_rate": self.record["method"]["learning_rate"],
            "model": self.record["model"]["name"],
            "model_sha256": short_digest(self.record["model"]["sha256"]),
            "test_data": short_digest(rows.get("sha256")) if isinstance(rows, Mapping) else None,
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
        picked: the methods among which each run is the best on dev; empty for a cell of one method.
        seconds_of_all: of a cell that is picked, what training all candidates took, a mean over the seeds.
    """

    task: str
    k: int | None
    row: str
    setting: str
    runs: tuple[Run, ...]
    expected: frozenset[tuple[int, int]]
    chosen: str = ""
    picked: tuple[str, ...] = ()
    seconds_of_all: float | None = None

    @property
    def method(self) -> str:
        """The method's name."""
        return self.row.partition(" [")[0] if self.picked else self.runs[0].method

    @property
    def seconds(self) -> float:
        """What one score took, in seconds: the run, or all the runs that it was picked from."""
        if self.seconds_of_all is not None:
            return self.seconds_of_all
        return self.average(lambda run: run.record["seconds"]["total"])

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

    def at_chance(self, level: float) -> bool:
        """Whether the mean is not clearly above a level, such as the score of a constant answer.

        It is clear where the 95 % t interval over seeds is above the level. Of fewer than three seeds, which make an
        interval too wide to be of use, the mean must be two standard errors of the test set above it.
        """
        effect = mean_effect([score - level for score in self.scores.values()])
        if effect.count > 2 and effect.low is not None:
            return effect.low <= 0
        test = self.runs[0].record["data"].get("test")
        rows = test.get("rows") if isinstance(test, Mapping) else None
        spread = math.sqrt(level * (1 - level)) if 0 < level < 1 else 1.0  # of a proportion, else of a correlation
        error = spread / math.sqrt(rows) if isinstance(rows, int) and rows > 0 else 0.0
        return effect.mean <= 2 * error


def kinds(config: Mapping[str, Any]) -> list[str]:
    """The parts that a method adds: every submodule of its configuration, and BitFit; of fine-tuning, none.

    A configuration holds each submodule as a mapping under its name, so that submodules which were registered in
    another program count as well. The paper's come first.
    """
    if config.get("train_base"):
        return []
    parts = {name for name, value in config.items() if isinstance(value, Mapping) and name not in _NO_PARTS}
    known = [part for part in PARTS if part in parts]
    return [*known, *sorted(parts - set(PARTS)), *(["bitfit"] if config.get("bitfit") else [])]


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


def short_digest(digest: Any) -> str | None:
    """The first digits of a SHA-256; None of anything else."""
    return digest[:8] if isinstance(digest, str) else None
