"""The files of a leaderboard submission."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest

from unipelt.glue.leaderboard import write_predictions
from unipelt.glue.tasks import TASKS, Task


@pytest.mark.parametrize(
    ("name", "split", "file", "predictions", "words"),
    [
        ("cola", "test", "CoLA.tsv", [1, 0], ["1", "0"]),
        ("sst2", "test", "SST-2.tsv", [0, 1], ["0", "1"]),
        ("mrpc", "test", "MRPC.tsv", [1, 1], ["1", "1"]),
        ("qqp", "test", "QQP.tsv", [0, 1], ["0", "1"]),
        ("stsb", "test", "STS-B.tsv", [5.4, -0.2, 2.34567, -0.0], ["5.000", "0.000", "2.346", "0.000"]),
        ("mnli", "test", "MNLI-m.tsv", [0, 1, 2], ["entailment", "neutral", "contradiction"]),
        ("mnli", "test_mismatched", "MNLI-mm.tsv", [2, 0], ["contradiction", "entailment"]),
        ("qnli", "test", "QNLI.tsv", [0, 1], ["entailment", "not_entailment"]),
        ("rte", "test", "RTE.tsv", [1, 0], ["not_entailment", "entailment"]),
    ],
)
def test_every_file(
    tmp_path: Path, name: str, split: str, file: str, predictions: list[float], words: list[str]
) -> None:
    path = write_predictions(TASKS[name], np.array(predictions), tmp_path / "new" / "inner", split)
    assert path == tmp_path / "new" / "inner" / file
    rows = "".join(f"{index}\t{word}\n" for index, word in enumerate(words))
    assert path.read_bytes().decode() == f"index\tprediction\n{rows}"
    assert [entry.name for entry in path.parent.iterdir()] == [file]


def test_a_subset_is_written_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        write_predictions(TASKS["rte"], [0, 1], tmp_path)
    assert "rte test: a subset: 2 of 3,000 rows" in caplog.text
    assert [record.name for record in caplog.records] == ["unipelt.glue.leaderboard"], "and not of the root logger"
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        write_predictions(TASKS["rte"], [0] * 3000, tmp_path)
    assert not caplog.text


@pytest.mark.parametrize(
    ("name", "predictions", "message"),
    [
        ("rte", [0, 2], "prediction 1 is 2; rte has the class ids 0 to 1"),
        ("rte", [-1], "prediction 0 is -1"),
        ("rte", [0.5], "prediction 0 is 0.5"),
        ("rte", [], "shape"),
        ("rte", [[0.1, 0.9]], "logits reduced"),
        ("rte", ["entailment"], "finite number"),
        ("stsb", [1.0, float("nan")], "finite number"),
    ],
)
def test_predictions_that_do_not_fit_are_refused(tmp_path: Path, name: str, predictions: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_predictions(TASKS[name], predictions, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_unknown_splits_and_tasks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'dev'; choose test or test_mismatched"):
        write_predictions(TASKS["mnli"], [0], tmp_path, "dev")
    with pytest.raises(ValueError, match="'test_mismatched'; choose test"):
        write_predictions(TASKS["rte"], [0], tmp_path, "test_mismatched")
    own = Task("mine", ("text",), ("a", "b"), ("accuracy",), "accuracy", "")
    with pytest.raises(ValueError, match="'mine' is not on GLUE's leaderboard"):
        write_predictions(own, [0], tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_predictions(TASKS["rte"], [0], tmp_path)
    before = path.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_predictions(TASKS["rte"], [1, 1], tmp_path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
