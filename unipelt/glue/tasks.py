"""The GLUE tasks of the paper: text columns, labels, metrics and official sizes.

Source: Wang et al., "GLUE" (ICLR 2019), for the tasks; UniPELT (Mao et al., ACL 2022, section 4.1) for the
primary metric of each task. WNLI is left out, as in the paper. The order of the labels is the order in the hub's
`nyu-mll/glue`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from unipelt.files.messages import show, suggest

CLASSIFICATION_METRICS = ("accuracy", "f1", "f1_macro", "matthews_correlation")
REGRESSION_METRICS = ("spearman", "pearson")


@dataclass(frozen=True)
class Task:
    """Definition of a task: its text columns, its labels and its metrics.

    Attributes:
        name: Short name, such as `"sst2"`. For GLUE, it is the name of the hub's configuration.
        columns: The one or two text columns, in the order of the model's input.
        label_names: Name of each class, in the order of the ids; empty for a regression task.
        metrics: Names of the metrics to report (`CLASSIFICATION_METRICS` or `REGRESSION_METRICS`).
        primary: The main metric of the task, one of `metrics`. It chooses the best checkpoint.
        folder: Name of the folder in GLUE's download, and of the leaderboard's file; empty outside GLUE.
        label_column: Name of the label column.
        file_labels: Label of each class in GLUE's files, in the order of the ids (`"0"`, `"1"` or the names).
        score_range: Lowest and highest possible score of a regression task, or None.
        official_rows: Number of rows of each official split (`train`, `dev`, `test`, `test_mismatched`).

    Raises:
        ValueError: The fields contradict each other.
    """

    name: str
    columns: tuple[str, ...]
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    primary: str
    folder: str
    label_column: str = "label"
    file_labels: tuple[str, ...] = ()
    score_range: tuple[float, float] | None = None
    official_rows: Mapping[str, int] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if len(self.columns) not in (1, 2) or len(set(self.columns)) != len(self.columns):
            raise ValueError(f"task {self.name!r} has the text columns {list(self.columns)}; name one or two different")
        if self.label_column in self.columns:
            raise ValueError(
                f"task {self.name!r} uses the column {self.label_column!r} both as text and as label; "
                "name different columns"
            )
        if len(self.label_names) == 1 or len(set(self.label_names)) != len(self.label_names):
            raise ValueError(
                f"task {self.name!r} has the labels {list(self.label_names)}; "
                "name at least two different ones, or none for regression"
            )
        allowed = REGRESSION_METRICS if self.is_regression else CLASSIFICATION_METRICS
        unknown = [metric for metric in self.metrics if metric not in allowed]
        if unknown or not self.metrics:
            raise ValueError(
                f"task {self.name!r} has the metrics {list(self.metrics)}; choose among {', '.join(allowed)}"
            )
        if "f1" in self.metrics and self.num_labels != 2:
            raise ValueError(
                f"task {self.name!r} has {self.num_labels} labels, and f1 is for two; use f1_macro instead"
            )
        if self.primary not in self.metrics:
            raise ValueError(
                f"task {self.name!r} is judged by {self.primary!r}, which is not among its metrics "
                f"{list(self.metrics)}; add it"
            )

    @property
    def is_regression(self) -> bool:
        """Whether the task has scores instead of classes."""
        return not self.label_names

    @property
    def num_labels(self) -> int:
        """The number of outputs of the head: the number of classes, or 1 for regression."""
        return len(self.label_names) or 1


_BINARY = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="cola",
            columns=("sentence",),
            label_names=("unacceptable", "acceptable"),
            metrics=("matthews_correlation",),
            primary="matthews_correlation",
            folder="CoLA",
            file_labels=_BINARY,
            official_rows={"train": 8551, "dev": 1043, "test": 1063},
        ),
        Task(
            name="sst2",
            columns=("sentence",),
            label_names=("negative", "positive"),
            metrics=("accuracy",),
            primary="accuracy",
            folder="SST-2",
            file_labels=_BINARY,
            official_rows={"train": 67349, "dev": 872, "test": 1821},
        ),
        Task(
            name="mrpc",
            columns=("sentence1", "sentence2"),
            label_names=("not_equivalent", "equivalent"),
            metrics=("f1", "accuracy"),
            primary="f1",
            folder="MRPC",
            file_labels=_BINARY,
            official_rows={"train": 3668, "dev": 408, "test": 1725},
        ),
        Task(
            name="qqp",
            columns=("question1", "question2"),
            label_names=("not_duplicate", "duplicate"),
            metrics=("f1", "accuracy"),
            primary="f1",
            folder="QQP",
            file_labels=_BINARY,
            official_rows={"train": 363846, "dev": 40430, "test": 390965},
        ),
        Task(
            name="stsb",
            columns=("sentence1", "sentence2"),
            label_names=(),
            metrics=("spearman", "pearson"),
            primary="spearman",
            folder="STS-B",
            score_range=(0.0, 5.0),
            official_rows={"train": 5749, "dev": 1500, "test": 1379},
        ),
        Task(
            name="mnli",
            columns=("premise", "hypothesis"),
            label_names=("entailment", "neutral", "contradiction"),
            metrics=("accuracy",),
            primary="accuracy",
            folder="MNLI",
            file_labels=("entailment", "neutral", "contradiction"),
            official_rows={"train": 392702, "dev": 9815, "test": 9796, "test_mismatched": 9847},
        ),
        Task(
            name="qnli",
            columns=("question", "sentence"),
            label_names=_ENTAILMENT,
            metrics=("accuracy",),
            primary="accuracy",
            folder="QNLI",
            file_labels=_ENTAILMENT,
            official_rows={"train": 104743, "dev": 5463, "test": 5463},
        ),
        Task(
            name="rte",
            columns=("sentence1", "sentence2"),
            label_names=_ENTAILMENT,
            metrics=("accuracy",),
            primary="accuracy",
            folder="RTE",
            file_labels=_ENTAILMENT,
            official_rows={"train": 2490, "dev": 277, "test": 3000},
        ),
    )
}


def shorten_name(name: str) -> str:
    """Return the short form of a name of a task or folder, for comparison: `"SST-2"` becomes `"sst2"`."""
    return re.sub(r"[-_ ]", "", name).lower()


def get_task(name: str) -> Task:
    """Return the GLUE task of a name. Case and hyphens do not matter (`"SST-2"`, `"sts-b"`, `"MNLI"`).

    Raises:
        ValueError: The task is unknown, or is WNLI, which is left out as in the paper.
    """
    short = shorten_name(name)
    known = ", ".join(TASKS)
    if short == "wnli":
        raise ValueError(f"WNLI is left out, as in the paper; choose one of {known}")
    if short not in TASKS:
        raise ValueError(f"unknown task {show(name)}; {suggest(short, TASKS, f'choose one of {known}')}")
    return TASKS[short]
