"""Metrics against values worked by hand, against scikit-learn and scipy, and at their edges."""

from __future__ import annotations

import math
from pathlib import Path

import evaluate
import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk
from transformers import EvalPrediction

from unipelt.glue.metric import GlueMetric, compute_metrics_for, glue_metric, majority_score, score
from unipelt.glue.tasks import TASKS, Task

THREE = Task("three", ("text",), ("a", "b", "c"), ("accuracy", "f1_macro"), "accuracy", "")
GUESSES, TRUTHS = (
    [1, 1, 0, 1, 0, 0, 1, 0],
    [1, 0, 0, 1, 1, 0, 1, 0],
)  # 3 hits of each class, 1 miss of each kind


def test_classification_by_hand() -> None:
    # Precision and recall of class 1 are 3/4; Matthews is (3*3 - 1*1) / sqrt(4*4*4*4) = 8/16.
    assert score(TASKS["mrpc"], GUESSES, TRUTHS) == {"f1": 0.75, "accuracy": 0.75}
    assert score(TASKS["cola"], GUESSES, TRUTHS) == {"matthews_correlation": pytest.approx(0.5)}
    assert score(TASKS["sst2"], GUESSES, TRUTHS) == {"accuracy": 0.75}


def test_f1_is_of_class_one() -> None:
    # One true positive, one false positive, two misses: precision 1/2, recall 1/3, F1 = 2/5. Of class 0 it is 4/7.
    assert score(TASKS["qqp"], [1, 1, 0, 0, 0, 0], [1, 0, 1, 1, 0, 0])["f1"] == pytest.approx(0.4)


def test_correlations_by_hand() -> None:
    # Ranks 1 2 3 4 against 1 3 2 4: 1 - 6 * (1 + 1) / (4 * 15) = 0.8.
    # Deviations -2 -1 0 3 against -1 1 -1 1: 2 - 1 + 3 = 4, over sqrt(14 * 4).
    result = score(TASKS["stsb"], [0.0, 1.0, 2.0, 5.0], [1.0, 3.0, 2.0, 4.0])
    assert list(result) == ["spearman", "pearson"]
    assert result["spearman"] == pytest.approx(0.8)
    assert score(TASKS["stsb"], [0, 1, 2, 5], [1, 3, 1, 3])["pearson"] == pytest.approx(4 / math.sqrt(56))


def test_macro_f1_by_hand() -> None:
    # F1 of a: 2/3, of b: 2/3, of c: 0; class c has one row, which is missed.
    result = score(THREE, [0, 0, 1, 1], [0, 2, 1, 0])
    assert result == {"accuracy": 0.5, "f1_macro": pytest.approx((0.5 + 2 / 3 + 0) / 3)}


def test_against_scikit_learn_and_scipy() -> None:
    rng = np.random.default_rng(0)
    truths, guesses = rng.integers(0, 2, 500), rng.integers(0, 2, 500)
    assert score(TASKS["mrpc"], guesses, truths) == {
        "f1": pytest.approx(sk.f1_score(truths, guesses)),
        "accuracy": pytest.approx(sk.accuracy_score(truths, guesses)),
    }
    assert score(TASKS["cola"], guesses, truths)["matthews_correlation"] == pytest.approx(
        np.corrcoef(truths, guesses)[0, 1]  # Matthews is Pearson's correlation of two binary variables
    )
    scores = rng.normal(size=500)
    outputs = (scores + rng.normal(size=500)).astype(np.float32)
    assert score(TASKS["stsb"], outputs, scores) == {
        "spearman": pytest.approx(stats.spearmanr(scores, outputs).statistic),
        "pearson": pytest.approx(stats.pearsonr(scores, outputs).statistic),
    }
    classes, found = rng.integers(0, 3, 500), rng.integers(0, 3, 500)
    assert score(THREE, found, classes)["f1_macro"] == pytest.approx(sk.f1_score(classes, found, average="macro"))


@pytest.mark.parametrize(("guesses", "truths"), [([1, 1, 1], [0, 1, 1]), ([0, 1, 1], [1, 1, 1]), ([0], [0])])
def test_constants_have_no_correlation(guesses: list[int], truths: list[int]) -> None:
    assert score(TASKS["cola"], guesses, truths) == {"matthews_correlation": 0.0}
    assert score(TASKS["stsb"], guesses, truths) == {"spearman": 0.0, "pearson": 0.0}


def test_f1_without_any_positive_is_zero() -> None:
    assert score(TASKS["mrpc"], [0, 0], [0, 0]) == {"f1": 0.0, "accuracy": 1.0}


@pytest.mark.parametrize("step", [1e-12, 1e-200])
def test_a_nearly_constant_output_correlates_without_a_warning(step: float) -> None:
    start = 2.5 if step > 1e-15 else 0.0
    outputs = start + step * np.arange(4)
    assert score(TASKS["stsb"], outputs, [0, 1, 2, 3])["pearson"] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "guesses", "truths", "message"),
    [
        ("sst2", [1, 0], [1], "2 predictions and 1 references"),
        ("sst2", [], [], "predictions are empty"),
        ("sst2", [1, 2], [1, 0], r"predictions hold 2 in row 1.*sst2's class ids 0 to 1"),
        ("sst2", [1, 0], [1, -1], "references hold -1 in row 1"),
        ("sst2", [0.2, 1.0], [1, 0], "predictions hold 0.2 in row 0"),
        ("sst2", [float("nan"), 1.0], [1, 0], "predictions hold nan in row 0"),
        ("sst2", [[0.1, 0.9]], [1], "shape"),
        ("sst2", [True, True, True], [1, 1, 2], "references hold 2 in row 2"),
        ("sst2", ["1"], [1], "type"),
        ("stsb", [1.0, float("nan")], [1.0, 2.0], r"predictions hold nan in row 1.*finite"),
        ("stsb", [1.0, 2.0], [1.0, float("inf")], "references hold inf in row 1"),
    ],
)
def test_what_does_not_fit_is_refused_everywhere(name: str, guesses: list, truths: list, message: str) -> None:
    task = TASKS[name]
    with pytest.raises(ValueError, match=message):
        score(task, guesses, truths)
    metric = glue_metric(task)
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=guesses, references=truths)
    # A refused batch leaves nothing behind.
    assert metric.compute(predictions=[0, 1], references=[0, 1])[task.primary] == pytest.approx(1.0)


@pytest.mark.parametrize("name", list(TASKS))
def test_the_metric_object_of_every_task(name: str) -> None:
    task = TASKS[name]
    metric = glue_metric(task)
    assert isinstance(metric, GlueMetric)
    assert isinstance(metric, evaluate.Metric)
    result = metric.compute(predictions=[0, 1, 1, 0], references=[0, 1, 0, 0])
    assert result == score(task, [0, 1, 1, 0], [0, 1, 0, 0])
    assert list(result) == list(task.metrics)
    assert metric.inputs_description.rstrip().endswith("a fraction (not percent).")


def test_batches_add_up_and_are_used_once() -> None:
    metric = glue_metric(TASKS["cola"])
    for start in (0, 3, 6):
        metric.add_batch(predictions=GUESSES[start : start + 3], references=np.array(TRUTHS[start : start + 3]))
    assert metric.compute() == {"matthews_correlation": pytest.approx(0.5)}
    with pytest.raises(ValueError, match="nothing to compute"):
        metric.compute()
    metric.add(prediction=1, reference=1)
    metric.add(prediction=0, reference=0)
    assert metric.compute() == {"matthews_correlation": pytest.approx(1.0)}


def test_two_metrics_at_once_need_no_experiment_id() -> None:
    first, second = glue_metric(TASKS["sst2"]), glue_metric(TASKS["sst2"])
    first.add_batch(predictions=[1, 1], references=[1, 1])
    second.add_batch(predictions=[1, 1], references=[0, 0])
    assert (first.compute(), second.compute()) == ({"accuracy": 1.0}, {"accuracy": 0.0})


def test_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    assert glue_metric(TASKS["rte"]).compute(predictions=[1], references=[1]) == {"accuracy": 1.0}
    assert not list(tmp_path.iterdir())


def test_logits_become_classes() -> None:
    logits = np.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [0.0, 1.0, 9.0], [5.0, 0.0, 1.0]])
    compute = compute_metrics_for(TASKS["mnli"])
    assert compute(EvalPrediction(logits, np.array([0, 1, 2, 2]))) == {"accuracy": 0.75}
    with_hidden_states = (logits, np.zeros((4, 7)))
    evaluation = EvalPrediction(with_hidden_states, np.array([0, 1, 2, 2]))  # type: ignore[arg-type]
    assert compute(evaluation) == {"accuracy": 0.75}


@pytest.mark.parametrize("shape", [(4, 1), (4,)])
def test_regression_outputs_are_squeezed(shape: tuple[int, ...]) -> None:
    outputs = np.array([0.0, 1.0, 2.0, 5.0], dtype=np.float32).reshape(shape)
    result = compute_metrics_for(TASKS["stsb"])(EvalPrediction(outputs, np.array([1.0, 3.0, 2.0, 4.0])))
    assert result["spearman"] == pytest.approx(0.8)


def test_outputs_that_do_not_fit_are_refused() -> None:
    labels = np.array([0, 1])
    with pytest.raises(ValueError, match="NaN: training has diverged"):
        compute_metrics_for(TASKS["sst2"])(EvalPrediction(np.array([[0.0, np.nan], [0.0, 1.0]]), labels))
    with pytest.raises(ValueError, match=r"\(2, 2\), mnli needs \(rows, 3\).*num_labels=3"):
        compute_metrics_for(TASKS["mnli"])(EvalPrediction(np.zeros((2, 2)), labels))
    with pytest.raises(ValueError, match="shape"):
        compute_metrics_for(TASKS["stsb"])(EvalPrediction(np.zeros((2, 2)), labels))


def test_the_majority_of_the_train_labels() -> None:
    # Always 1 on two rows of 1 and one of 0: precision 2/3, recall 1, F1 4/5.
    assert majority_score(TASKS["mrpc"], [1, 1, 0], [1, 0, 1]) == pytest.approx(0.8)
    assert majority_score(TASKS["mrpc"], [0, 0, 1], [1, 0, 1]) == 0.0
    assert majority_score(TASKS["mnli"], [2, 2, 0, 1], [2, 1, 2, 2]) == 0.75
    assert majority_score(TASKS["rte"], [1, 0], [0, 0, 1, 0]) == 0.75  # a tie: the lowest id
    assert majority_score(TASKS["cola"], [1, 1, 0], [1, 0]) == 0.0
    assert majority_score(TASKS["stsb"], [1.0, 2.5, 5.0], [0.5, 4.0]) == 0.0
    with pytest.raises(ValueError, match="references hold 3"):
        majority_score(TASKS["mrpc"], [1, 1], [3])
    with pytest.raises(ValueError, match="train_labels are empty"):
        majority_score(TASKS["mrpc"], [], [1])
