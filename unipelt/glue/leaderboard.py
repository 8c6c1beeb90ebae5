"""Files of predictions on GLUE's unlabelled test sets, in the format of https://gluebenchmark.com."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unipelt.files.atomic import write_whole
from unipelt.glue.data import split_note
from unipelt.glue.tasks import TASKS, Task

logger = logging.getLogger(__name__)

_MNLI_FILES = {"test": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv"}


def write_predictions(
    task: Task,
    predictions: Sequence[int] | Sequence[float] | np.ndarray,
    folder: str | Path,
    split: str = "test",
) -> Path:
    """Write the leaderboard file of one task. The file is written whole or not at all.

    The file has the columns `index` and `prediction`. A class is written as a word for MNLI, QNLI and RTE, and as 0 or
    1 for the other tasks. A score of STS-B is clipped to 0 to 5 and has three decimals. Predictions with more or fewer
    rows than the official test set are written too, with a warning in the log. `split_note(task, split,
    len(predictions))` returns the text of this warning. A full submission also holds the leaderboard's `WNLI.tsv` and
    `AX.tsv`.

    Args:
        task: One of GLUE's tasks.
        predictions: (rows,) class ids, or scores for regression, in the order of the test file.
        folder: The output folder. It is made if it does not exist.
        split: `"test"`, and for MNLI also `"test_mismatched"`.

    Returns:
        The path of the file, such as `folder/CoLA.tsv`.

    Raises:
        ValueError: The task is not a GLUE task, the split does not exist, or the predictions do not fit the task.
    """
    if task.name not in TASKS or task.folder != TASKS[task.name].folder:
        raise ValueError(f"task {task.name!r} is not on GLUE's leaderboard; choose one of {', '.join(TASKS)}")
    files = _MNLI_FILES if task.name == "mnli" else {"test": f"{task.folder}.tsv"}
    if split not in files:
        raise ValueError(f"{task.name} has no leaderboard file for split {split!r}; choose {' or '.join(files)}")
    words = _spell(task, predictions)

    note = split_note(task, split, len(words))
    if note:
        logger.warning("%s %s: %s; the leaderboard takes only the whole test set", task.name, split, note)
    path = Path(folder) / files[split]
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = "".join(f"{index}\t{word}\n" for index, word in enumerate(words))
    write_whole(path, f"index\tprediction\n{rows}".encode())
    return path


def _spell(task: Task, predictions: Sequence[int] | Sequence[float] | np.ndarray) -> list[str]:
    """Return the text of each prediction in the file. Raise `ValueError` if a prediction does not fit the task."""
    values = np.asarray(predictions)
    if values.ndim != 1 or not len(values):
        raise ValueError(
            f"predictions have the shape {values.shape}; give one number for each row, with logits reduced to class ids"
        )
    if values.dtype.kind not in "iuf" or not np.isfinite(values).all():
        raise ValueError("predictions hold something that is not a finite number; correct them")
    if task.is_regression:
        if task.score_range is not None:
            values = values.astype(np.float64).clip(*task.score_range)
        # + 0.0 turns a negative zero, which would be written "-0.000", into zero.
        return [f"{value + 0.0:.3f}" for value in values]
    ids = values.astype(np.int64)
    bad = (ids != values) | (ids < 0) | (ids >= task.num_labels)
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(f"prediction {row} is {values[row]}; {task.name} has the class ids 0 to {task.num_labels - 1}")
    return [task.file_labels[index] for index in ids]
