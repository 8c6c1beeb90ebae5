"""Settings of a run on GLUE, or on a classification or regression of your own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from unipelt.glue.tasks import get_task
from unipelt.runs.settings import FILES, SettingsError, TrainingSettings, option

GLUE_DIR = "UNIPELT_GLUE_DIR"
"""Environment variable with the default of `glue_dir`."""


MOVED = ("model", "glue_dir", *FILES)
"""Fields that name the place of a model or of data. A rerun may use another place."""
CARRIED = ("device", "threads", "num_workers", "eval_tokens")
"""Fields that set how a run is carried out, which a rerun may change. All but `num_workers` change rounding errors."""


@dataclass(frozen=True)
class RunSettings(TrainingSettings):
    """Settings of one run on GLUE, or on a classification or regression of your own.

    Raises:
        As `TrainingSettings`.
    """

    alias_needs: ClassVar[Mapping[str, str]] = {"max_eval_samples": "train_samples"}

    task: str | None = option(None, "GLUE task: cola, sst2, mrpc, qqp, stsb, mnli, qnli or rte")
    glue_dir: str | None = option(
        None,
        f"Folder with GLUE data. Default: the folder in the variable {GLUE_DIR}, or nyu-mll/glue on the hub",
    )
    train_file: str | None = option(
        None, "Your own training data, in place of a task: .tsv, .csv, .json, .jsonl or .parquet"
    )
    dev_file: str | None = option(
        None,
        "Your own dev data. With train_samples the dev set is cut from the train file, and this file is the test data",
    )
    test_file: str | None = option(
        None, "Your own test data. Without labels it serves do_predict alone. Default: the dev data"
    )
    text_columns: tuple[str, ...] | None = option(
        None, "One or two text columns of your own files. Default: the columns with a usual name"
    )
    label_column: str = option("label", "Label column of your own files")
    regression: bool | None = option(
        None, "Labels of your own files are scores (true) or classes (false). Default: read from the labels"
    )
    train_samples: int | None = option(
        None, "K, the number of training examples: the first K of the shuffled train data. Default: all"
    )
    dev_samples: int = option(
        1000, "Number of examples in the dev set, taken behind the first K. This needs train_samples"
    )
    train_tokens: int | None = option(
        None,
        "Largest number of tokens that pass through the model at once in training, padding included. A batch is cut "
        "into parts of texts of like length, and its step stays that of the whole batch. This saves padding and "
        "memory, and draws other dropout. Default: whole batches",
    )
    pad_to_max_length: bool = option(
        False,
        "Every text is padded to max_length, in training and in evaluation, as in the authors' program. This costs "
        "time. It changes scores only where gates average over padding (gate.pooling mean)",
    )
    eval_tokens: int | None = option(
        None,
        "Number of tokens in a batch of evaluation, padding included. 0 means eval_batch_size examples. Default: 1024 "
        "on a CPU and 8192 on a GPU",
    )
    eval_batch_size: int = option(64, "Number of examples in a batch of evaluation. This needs eval_tokens 0")
    do_predict: bool = option(
        False, "Predictions on the unlabelled test data are written too. For GLUE they are the files of the leaderboard"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_tokens is not None and self.config.gate.pooling == "mean":
            raise SettingsError(
                "train_tokens changes how texts are padded, and with gate.pooling mean a gate averages over padding; "
                "leave train_tokens out, or take gate.pooling masked_mean"
            )
        if self.train_tokens is not None and self.pad_to_max_length:
            raise SettingsError("train_tokens saves padding, and pad_to_max_length adds it; leave one of them out")

    def _check_data(self) -> None:
        """Check that the fields that name data do not contradict each other. The data are not read."""
        if self.task is not None:
            try:
                object.__setattr__(self, "task", get_task(self.task).name)
            except ValueError as error:
                raise SettingsError(str(error)) from None
            for name in (*FILES, "text_columns", "regression"):
                if getattr(self, name) is not None:
                    raise SettingsError(f"task and {name} exclude each other; set one of them to null")
            if self.glue_dir is None and os.environ.get(GLUE_DIR):
                object.__setattr__(self, "glue_dir", os.environ[GLUE_DIR])
            return
        if self.train_file is None:
            raise SettingsError("there is nothing to train on: name a task (--task rte) or a train_file")
        if self.glue_dir is not None:
            raise SettingsError("glue_dir goes with a task, not with a train_file; leave it out")
        if self.dev_file is None and (self.train_samples is None or self.test_file is None):
            wanted = "dev_file or test_file" if self.train_samples else "dev_file"
            raise SettingsError(f"there is nothing to test on: give a {wanted} beside the train_file")
