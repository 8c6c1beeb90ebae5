"""One run, and one cell of a table: the runs of a task, K and method that differ only in their seeds.

Scores are fractions, as in the records. The paper's numbers are in percent, as printed. A standard deviation is that of
a sample (n - 1); the paper does not say which kind it prints.
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

from unipelt.config.peft import KEY, tuner_names
from unipelt.report.paper import Printed, paper
from unipelt.report.significance import mean_effect
from unipelt.runs.settings import FILES, INCIDENTAL, INNER, LATER

PARTS = ("adapter", "prefix", "lora")
"""The paper's submodules, in the paper's order."""
_NO_PARTS = ("gate",)  # mappings in a method's configuration that are not submodules
_DULL = ("train", "training", "data")  # file names that do not name a task
# Settings about where and how a run was done, and settings that have their own place in a cell's name.
_NOT_A_VARIANT = {
    *("task", "train_samples", "seed", "data_seed", "method", "learning_rate"),
    *(*INCIDENTAL, *FILES, "do_predict", "glue_dir", "model_sha256"),
}


def flat_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record's settings on one level: an option in a mapping such as `trainer` gets the key `trainer.NAME`."""
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
        record: the content of its `result.json`, checked.
    """

    name: str
    record: Mapping[str, Any]

    @property
    def task(self) -> str:
        """The name of the task.

        A task with the user's own files has the name of its training file. A file that is called `train`, `training` or
        `data` gives the name of its folder.
        """
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
        """The number of training examples; None means all."""
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
        """The seed of the run and the seed of the data."""
        return self.record["seeds"]["run"], self.record["seeds"]["data"]

    @property
    def score(self) -> float:
        """The score on the test data, a fraction."""
        return self.record["test"]["metrics"][self.primary]

    @property
    def dev(self) -> float:
        """The best score on the dev data, a fraction."""
        return self.record["dev"]["metrics"][self.primary]

    @property
    def tests(self) -> dict[str, float]:
        """The test scores before the last choices, fractions: of the `best_epoch`, and of an `average`.

        They are empty for a run without such choices.
        """
        return {name: found["metrics"][self.primary] for name, found in self.record.get("tests", {}).items()}

    @cached_property
    def variant(self) -> Mapping[str, Any]:
        """The values, besides task, K and method name, that two runs must share for their scores to be averaged."""
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
    """The runs of one task, K and method, which differ only in their seeds.

    Attributes:
        row: the method's name; in brackets, the other values that distinguish it from rows with the same name.
        setting: the part of these values that rows of different methods must share to be compared. The learning rate
            and the method's configuration are not part of it.
        expected: the seeds that the cell should have.
        chosen: if there were candidates, which one was chosen on dev, and from which ones.
        picked: the methods from which the run with the best dev score was picked for each seed; empty for a cell of one
            method.
        seconds_of_all: for a picked cell, the seconds of training all candidates, a mean over the seeds.
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
        """The mean seconds of one score: those of the run, or of all the runs from which the run was picked."""
        if self.seconds_of_all is not None:
            return self.seconds_of_all
        return self.average(lambda run: run.record["seconds"]["total"])

    @property
    def scores(self) -> dict[tuple[int, int], float]:
        """The test scores by seed, fractions."""
        return {run.seed: run.score for run in self.runs}

    @property
    def mean(self) -> float:
        """The mean test score over the seeds, a fraction."""
        return statistics.fmean(self.scores.values())

    @property
    def std(self) -> float | None:
        """The standard deviation of the sample, a fraction; None for one run."""
        return sample_std(self.scores.values())

    @property
    def missing(self) -> list[tuple[int, int]]:
        """The expected seeds that have no run."""
        return sorted(self.expected - set(self.scores))

    @property
    def paper(self) -> Printed | None:
        """The paper's number, for any model; None if the paper has none or judges the task by another metric."""
        printed = paper().get((self.k, self.method, self.task))
        return printed if printed and printed.metric == self.runs[0].primary else None

    def average(self, value: Callable[[Run], float]) -> float:
        """Return the mean of a value over the runs."""
        return statistics.fmean(value(run) for run in self.runs)

    def at_chance(self, level: float) -> bool:
        """Return whether the mean is not clearly above a level, such as the score of a constant answer.

        The mean is clearly above the level if the whole 95 % t interval over seeds is above the level. With fewer than
        three seeds, the interval is too wide to be useful. Then the mean must be more than two standard errors of the
        test set above the level.
        """
        effect = mean_effect([score - level for score in self.scores.values()])
        if effect.count > 2 and effect.low is not None:
            return effect.low <= 0
        test = self.runs[0].record["data"].get("test")
        rows = test.get("rows") if isinstance(test, Mapping) else None
        spread = math.sqrt(level * (1 - level)) if 0 < level < 1 else 1.0  # of a proportion, otherwise of a correlation
        error = spread / math.sqrt(rows) if isinstance(rows, int) and rows > 0 else 0.0
        return effect.mean <= 2 * error


def kinds(config: Mapping[str, Any]) -> list[str]:
    """Return the parts that a method adds: the submodules of its configuration, and BitFit. Fine-tuning adds none.

    A configuration holds each submodule as a mapping under its name. So submodules that another program registered
    count as well. A mixture of a submodule is another part: `lora-mixture`, not `lora`. Each tuner of PEFT has the name
    of its submodule, such as `peft_oft`. The paper's submodules come first.
    """
    if config.get("train_base"):
        return []
    parts = {name for name, value in config.items() if isinstance(value, Mapping) and name not in (*_NO_PARTS, KEY)}
    parts |= tuner_names(config.get(KEY))
    known = [part for part in PARTS if part in parts]
    named = [
        f"{part}-mixture" if config.get(part, {}).get("mixture") else part
        for part in (*known, *sorted(parts - {*PARTS}))
    ]
    return [*named, *(["bitfit"] if config.get("bitfit") else [])]


def sample_std(values: Iterable[float]) -> float | None:
    """Return the standard deviation with n - 1, or None for fewer than two values."""
    values = list(values)
    return statistics.stdev(values) if len(values) > 1 else None


def largest(values: Mapping[str, float]) -> str:
    """Return the name of the largest value. Of equal values, the first one counts."""
    return max(values, key=lambda name: values[name])


def k_order(k: int | None) -> float:
    """Return the sort key of a K. All data (None) come last."""
    return math.inf if k is None else k


def short_digest(digest: Any) -> str | None:
    """Return the first 8 digits of a SHA-256, or None for any other value."""
    return digest[:8] if isinstance(digest, str) else None
