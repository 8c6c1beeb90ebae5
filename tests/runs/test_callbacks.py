"""The callbacks of a run: the losses of its evaluations, its lines, its times and its marks."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from unipelt.runs import callbacks, folder, processes
from unipelt.runs.callbacks import Marker, Reporter, Watch, evaluations_of
from unipelt.runs.errors import Diverged
from unipelt.runs.folder import CHECKPOINTS, Progress, checkpoint_at, newest_checkpoint

CONTROL = TrainerControl()


def evaluated(step: int, loss: float, accuracy: float) -> dict[str, Any]:
    return {"step": step, "epoch": step / 10, "eval_loss": loss, "eval_accuracy": accuracy}


def state(*history: dict[str, Any], **values: Any) -> TrainerState:
    return TrainerState(log_history=[*history], **values)


def test_the_losses_of_evaluations_are_means_over_steps() -> None:
    found = evaluations_of(
        state(
            evaluated(0, 0.9, 0.1),
            {"step": 3, "loss": 0.1},
            evaluated(3, 0.8, 0.2),
            {"step": 4, "loss": 4.0},
            {"step": 7, "loss": 2.0},
            {"step": 7, "train_runtime": 1.0},
            evaluated(7, 0.7, 0.3),
            {"step": 10, "loss": 1.0},
        ),
        ["accuracy"],
    )
    assert [item["train_loss"] for item in found] == [None, 0.1, (1 * 4.0 + 3 * 2.0) / 4]
    assert found[2] == {"epoch": 0.7, "step": 7, "loss": 0.7, "train_loss": 2.5, "metrics": {"accuracy": 0.3}}
    assert [item["loss"] for item in found] == [0.9, 0.8, 0.7]


def test_a_watch_stops_at_a_loss_that_is_not_finite() -> None:
    args, nan = SimpleNamespace(), float("nan")
    Watch().on_log(args, state(), CONTROL, logs={"loss": 1.0})
    Watch().on_log(args, state(), CONTROL, logs={"train_runtime": nan})
    Watch().on_evaluate(args, state(), CONTROL, metrics={"eval_loss": 1.0})
    with pytest.raises(Diverged, match="the train loss is nan"):
        Watch().on_log(args, state(), CONTROL, logs={"loss": nan})
    with pytest.raises(Diverged, match="the dev loss is nan"):
        Watch().on_evaluate(args, state(), CONTROL, metrics={"eval_loss": nan})


def test_one_line_for_each_evaluation(tmp_path: Path) -> None:
    lines: list[str] = []
    reporter = Reporter(tmp_path, "accuracy", lines.append)
    first, second = evaluated(10, 0.8, 0.25), evaluated(20, 0.7, 0.125)
    epochs, steps = SimpleNamespace(eval_strategy="epoch"), SimpleNamespace(eval_strategy="steps")
    reporter.on_evaluate(epochs, state(first, epoch=1.0), CONTROL, metrics=first)
    history = (first, {"step": 20, "loss": 0.5}, second)
    reporter.on_evaluate(epochs, state(*history, epoch=2.0, best_metric=0.25), CONTROL, metrics=second)
    reporter.on_evaluate(steps, state(first, global_step=10, best_metric=0.25), CONTROL, metrics=first)
    reporter.on_evaluate(steps, state(first, global_step=10, best_metric=0.2), CONTROL, metrics=first)
    assert lines == [
        "epoch   1  dev loss 0.8000  accuracy 0.250  best so far",
        "epoch   2  train loss 0.5000  dev loss 0.7000  accuracy 0.125",
        "step     10  dev loss 0.8000  accuracy 0.250",
        "step     10  dev loss 0.8000  accuracy 0.250  best so far",
    ]


def test_the_progress_of_a_training_and_of_its_evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tick is a line, where there is no terminal."""
    monkeypatch.setattr("unipelt.files.progress.LINE_SECONDS", -1.0)
    args, lines = SimpleNamespace(eval_strategy="epoch"), list[str]()
    reporter = Reporter(tmp_path, "accuracy", lines.append)
    here = state(evaluated(3, 0.8, 0.5), epoch=1.0, global_step=3, max_steps=8, num_train_epochs=2)
    reporter.on_train_begin(args, here, CONTROL)
    reporter.on_step_end(args, here, CONTROL)
    reporter.on_prediction_step(args, here, CONTROL, eval_dataloader=[1, 2, 3])
    reporter.on_prediction_step(args, here, CONTROL, eval_dataloader=[1, 2, 3])
    reporter.on_evaluate(args, here, CONTROL, metrics=evaluated(3, 0.8, 0.5))
    reporter.on_prediction_step(args, here, CONTROL, eval_dataloader=iter([1]))
    reporter.on_predict(args, here, CONTROL, metrics={})
    assert reporter.evaluation is None
    reporter.on_prediction_step(args, here, CONTROL)
    reporter.on_train_end(args, here, CONTROL)
    shown = [line.partition(",")[0] for line in lines if not line.startswith("epoch")]
    batches = ["evaluation: 1 of 3 batches", "evaluation: 2 of 3 batches", "evaluation: 1 batch", "evaluation: 1 batch"]
    assert shown == ["training: 4 of 8 steps", *batches]


def test_only_the_first_process_shows_its_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "is_first", lambda: False)
    reporter = Reporter(tmp_path, "accuracy", lambda line: None)
    reporter.on_train_begin(SimpleNamespace(), state(max_steps=8), CONTROL)
    reporter.on_step_end(SimpleNamespace(), state(), CONTROL)
    reporter.on_prediction_step(SimpleNamespace(), state(), CONTROL, eval_dataloader=[1])
    reporter.on_train_end(SimpleNamespace(), state(), CONTROL)
    assert (reporter.training, reporter.evaluation) == (None, None)


def test_seconds_by_kind_and_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args, progress = SimpleNamespace(), Progress("digest")
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: 0.0)
    marker = Marker(tmp_path, "digest", progress, begun=-1.0)

    def after(seconds: float) -> None:
        now = time.monotonic() + seconds
        monkeypatch.setattr(callbacks.time, "monotonic", lambda: now)

    for step in (1, 2, 3):
        checkpoint_at(tmp_path, step).mkdir(parents=True)
    here = state(global_step=3, best_global_step=2, best_model_checkpoint="elsewhere/checkpoint-2")
    marker.on_train_begin(args, here, CONTROL)
    assert here.best_model_checkpoint == str(tmp_path / CHECKPOINTS / "checkpoint-2"), "the folder may have moved"
    marker.on_epoch_begin(args, here, CONTROL)  # 1 s before it
    after(10)
    marker.on_epoch_end(args, here, CONTROL)
    after(100)
    marker.on_evaluate(args, here, CONTROL)
    after(1000)
    control = TrainerControl(should_training_stop=True)
    monkeypatch.setattr(processes, "is_first", lambda: False)
    marker.on_save(args, here, control)
    assert newest_checkpoint(tmp_path, "digest") is None, "the first process alone marks it"
    monkeypatch.setattr(processes, "is_first", lambda: True)
    marker.on_save(args, here, control)
    assert progress.seconds == {"train": 10.0, "evaluation": 100.0, "total": 1111.0}
    assert '"total": 1111.0' in (tmp_path / CHECKPOINTS / "progress.json").read_text()
    newest = newest_checkpoint(tmp_path, "digest")
    assert newest == checkpoint_at(tmp_path, 3)
    assert folder.is_final(newest)
    assert {path.name for path in (tmp_path / CHECKPOINTS).glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}
