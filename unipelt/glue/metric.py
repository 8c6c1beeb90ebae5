"""GLUE's metrics as one `evaluate.Metric`, computed with scipy and scikit-learn and without any download."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import evaluate
import numpy as np
from datasets import Features, Value
from scipy import stats
from sklearn import metrics as sk
from transformers import EvalPrediction

from unipelt.glue.tasks import Task
from unipelt.runs.errors import Diverged

_CITATION = """\
@inproceedings{wang2019glue,
  title = {{GLUE}: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding},
  author = {Wang, Alex and Singh, Amanpreet and Michael, Julian and Hill, Felix and Levy, Omer
            and Bowman, Samuel R.},
  booktitle = {ICLR},
  year = {2019},
}"""

_INPUTS = """
Args:
    predictions: class ids, or scores for regression.
    references: class ids, or scores for regression.
Returns:
    A dict from the name of each of the task's metrics to its value, a fraction (not percent).
"""


class GlueMetric(evaluate.Metric):
    """The metrics of a task, for `compute(predictions=..., references=...)` or `add_batch` and then `compute()`.

    Everything is kept in memory. No folder is made, and nothing is downloaded. Any number of instances can be used at
    the same time without an `experiment_id`. The values are the values of `score`.

    Args:
        task: The task.
    """

    def __init__(self, task: Task) -> None:
        self.task = task  # super().__init__ calls _info, which needs the task
        super().__init__(config_name=task.name, keep_in_memory=True)

    def _build_data_dir(self) -> str:
        # The parent makes this folder under the user's home even when everything is kept in memory.
        return os.path.join(self._data_dir_root, self.name, self.config_name)

    def _info(self) -> evaluate.MetricInfo:
        value = Value("float64" if self.task.is_regression else "int64")
        return evaluate.MetricInfo(
            description=f"The metrics of {self.task.name}: {', '.join(self.task.metrics)}.",
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=Features({"predictions": value, "references": value}),
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add a batch, (rows,) each. Raise `ValueError` and add nothing if the batch does not fit the task."""
        guesses, truths = _check(self.task, predictions, references)
        super().add_batch(predictions=guesses, references=truths, **kwargs)

    def _finalize(self) -> None:
        if self.writer is None:
            raise ValueError("there is nothing to compute; give predictions and references, or add batches first")
        super()._finalize()

    def _compute(self, *, predictions: Any = None, references: Any = None, **_: Any) -> dict[str, float]:
        return score(self.task, predictions, references)


def glue_metric(task: Task) -> GlueMetric:
    """Return the metric object of a task."""
    return GlueMetric(task)


def score(task: Task, predictions: Any, references: Any) -> dict[str, float]:
    """Compute the metrics of a task, as fractions.

    - `accuracy`: the share of equal class ids.
    - `f1`: the F1 of class 1 against class 0; 0.0 if neither side holds a 1.
    - `f1_macro`: the unweighted mean of the F1 of the classes among predictions or references.
    - `matthews_correlation`: 0.0 if either side is constant.
    - `spearman`, `pearson`: undefined if either side is constant, and set to 0.0 here without a warning.

    Args:
        task: The task, which names its metrics.
        predictions: (rows,) class ids, or scores for regression.
        references: (rows,) true class ids, or true scores.

    Returns:
        The value of each metric by name, in the order of `task.metrics`.

    Raises:
        ValueError: There are no rows, the lengths differ, a value is not finite, or the task does not have an id.
    """
    guesses, truths = _check(task, predictions, references)
    return {name: _METRICS[name](truths, guesses) for name in task.metrics}


def compute_metrics_for(task: Task) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return the `compute_metrics` function for `transformers.Trainer`.

    Logits (rows, classes) become class ids by argmax. A regression output (rows, 1) is squeezed to (rows,). If a model
    returns more than logits, the first output is used.

    Raises (the returned function):
        ValueError: The output has the wrong shape.
        Diverged: The output holds NaN, because training has diverged.
    """

    def compute_metrics(evaluation: EvalPrediction) -> dict[str, float]:
        output = evaluation.predictions
        logits = np.asarray(output[0] if isinstance(output, (tuple, list)) else output)
        if np.isnan(logits).any():
            raise Diverged("the model's outputs hold NaN")
        if task.is_regression:
            if logits.ndim == 2 and logits.shape[1] == 1:
                logits = logits.squeeze(-1)
            return score(task, logits, evaluation.label_ids)
        if logits.ndim != 2 or logits.shape[1] != task.num_labels:
            raise ValueError(
                f"the model's outputs have the shape {logits.shape}, {task.name} needs "
                f"(rows, {task.num_labels}); load the model with num_labels={task.num_labels}"
            )
        return score(task, logits.argmax(-1), evaluation.label_ids)

    return compute_metrics


def majority_score(task: Task, train_labels: Sequence[float] | np.ndarray, references: Any) -> float:
    """Compute the primary metric of a constant prediction: the most frequent train class, or the mean train score.

    Args:
        task: The task.
        train_labels: (train rows,) labels. Among equally frequent classes, the lowest id is used.
        references: (rows,) the labels to predict.

    Returns:
        The metric as a fraction. Correlations are 0.0, because a constant has none.

    Raises:
        ValueError: The labels do not fit the task.
    """
    labels = _check_side(task, "train_labels", train_labels)
    truths = _check_side(task, "references", references)
    constant = labels.mean() if task.is_regression else np.bincount(labels).argmax()
    return score(task, np.full(len(truths), constant), truths)[task.primary]


def _check(task: Task, predictions: Any, references: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return both sides after `_check_side`. Raise `ValueError` if their lengths differ."""
    guesses = _check_side(task, "predictions", predictions)
    truths = _check_side(task, "references", references)
    if len(guesses) != len(truths):
        raise ValueError(
            f"there are {len(guesses)} predictions and {len(truths)} references; give one prediction for each reference"
        )
    return guesses, truths


def _check_side(task: Task, side: str, numbers: Any) -> np.ndarray:
    """Return one side as an array (rows,) of scores (float64) or class ids. Raise `ValueError` if it does not fit."""
    values = np.asarray(numbers)
    if values.size == 0:
        raise ValueError(f"{side} are empty; give at least one row")
    if values.ndim != 1 or values.dtype.kind not in "biuf":
        raise ValueError(f"{side} have the shape {values.shape} and the type {values.dtype}; give one number a row")
    bad = ~np.isfinite(values)
    wanted = "a finite number"
    if not task.is_regression:
        bad |= (values != np.floor(values)) | (values < 0) | (values >= task.num_labels)
        wanted = f"one of {task.name}'s class ids 0 to {task.num_labels - 1}"
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(f"{side} hold {values[row]} in row {row}; every one must be {wanted}")
    return values.astype(np.float64 if task.is_regression else np.int64)


def _is_constant(values: np.ndarray) -> bool:
    return bool((values == values[0]).all())


def _accuracy(truths: np.ndarray, guesses: np.ndarray) -> float:
    return float(sk.accuracy_score(truths, guesses))


def _f1(truths: np.ndarray, guesses: np.ndarray) -> float:
    return float(sk.f1_score(truths, guesses, pos_label=1, average="binary", zero_division=0.0))


def _f1_macro(truths: np.ndarray, guesses: np.ndarray) -> float:
    return float(sk.f1_score(truths, guesses, average="macro", zero_division=0.0))


def _matthews(truths: np.ndarray, guesses: np.ndarray) -> float:
    if _is_constant(truths) or _is_constant(guesses):
        return 0.0
    return float(sk.matthews_corrcoef(truths, guesses))


def _spearman(truths: np.ndarray, guesses: np.ndarray) -> float:
    if _is_constant(truths) or _is_constant(guesses):
        return 0.0
    return float(stats.spearmanr(truths, guesses).statistic)


def _pearson(truths: np.ndarray, guesses: np.ndarray) -> float:
    if _is_constant(truths) or _is_constant(guesses):
        return 0.0
    # scipy's pearsonr would warn about nearly constant outputs, which are common early in training.
    left, right = _direction(truths), _direction(guesses)
    return float(np.clip(left @ right, -1.0, 1.0))


def _direction(values: np.ndarray) -> np.ndarray:
    """Return the deviations from the mean as a vector of norm 1, (rows,). `values` must not be constant."""
    deviations = values - values.mean()
    deviations /= np.abs(deviations).max()  # otherwise the squares of tiny deviations round to zero
    return deviations / np.linalg.norm(deviations)


_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "f1_macro": _f1_macro,
    "matthews_correlation": _matthews,
    "spearman": _spearman,
    "pearson": _pearson,
}
