"""Callbacks of Trainer for a run: marks of complete checkpoints, a watch on losses, and lines for the reader."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import has_length

from unipelt.files.progress import Progress as Shown
from unipelt.files.progress import above_bars
from unipelt.runs import folder as place
from unipelt.runs import processes
from unipelt.runs.errors import check_losses
from unipelt.runs.folder import Progress
from unipelt.runs.moment import TrainingProgress


class Marker(TrainerCallback):
    """Callback that marks complete checkpoints, removes those that are no longer needed, and measures time."""

    def __init__(self, folder: Path, digest: str, progress: Progress, begun: float) -> None:
        self.folder = folder
        self.digest = digest
        self.progress = progress
        self.clock = begun

    def spend(self, *kinds: str) -> None:
        """Add the seconds since the last call to `kinds` and to the total."""
        now = time.monotonic()
        for kind in (*kinds, "total"):
            self.progress.seconds[kind] += now - self.clock
        self.clock = now

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Point at the best checkpoint in the present folder."""
        if state.best_global_step:  # the folder may have moved since the checkpoint was written
            state.best_model_checkpoint = str(place.checkpoint_at(self.folder, state.best_global_step))

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Count the time before an epoch."""
        self.spend()

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Count the time of training."""
        self.spend("train")

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Count the time of an evaluation."""
        self.spend("evaluation")

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark the checkpoint as complete, and remove those that are no longer needed."""
        self.spend()
        processes.wait()  # each process has a file in the checkpoint
        if not processes.is_first():
            return
        self.progress.write(self.folder)
        place.mark(self.folder, state.global_step, self.digest, finished=control.should_training_stop)
        steps = (state.global_step, state.best_global_step)
        place.remove_checkpoints(self.folder, keep=tuple(place.checkpoint_at(self.folder, step) for step in steps))


class Watch(TrainerCallback):
    """Callback that stops training if a loss is not finite, before a checkpoint is written."""

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        """Check the training loss."""
        check_losses(train=event["logs"].get("loss", 0.0))

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        """Check the loss on the dev set."""
        check_losses(dev=event["metrics"].get("eval_loss", 0.0))


class Reporter(TrainerCallback):
    """Callback that shows the progress of training and of each evaluation, and logs one line for each evaluation."""

    def __init__(self, folder: Path, primary: str, log: Callable[[str], None]) -> None:
        self.folder = folder
        self.primary = primary
        self.log = log
        self.training: TrainingProgress | None = None
        self.evaluation: Shown | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Begin to show the progress of training."""
        if processes.is_first():
            steps, epochs = state.max_steps, state.num_train_epochs
            self.training = TrainingProgress(self.folder, state.global_step, steps, epochs, self._say)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Show one step more."""
        if self.training is not None:
            self.training.update(state.epoch or 0.0)

    def on_prediction_step(self, args: Any, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        """Show one batch of an evaluation more."""
        if not processes.is_first():
            return
        if self.evaluation is None:
            loader = event.get("eval_dataloader")
            total = len(loader) if has_length(loader) else None
            self.evaluation = Shown("evaluation", total, "batch", log=self._say)
        self.evaluation.update()

    def on_predict(self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any, **_: Any) -> None:
        """End the progress of predictions."""
        self._end_evaluation()

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        """Log one line for an evaluation."""
        self._end_evaluation()
        metrics = event["metrics"]
        loss = evaluations_of(state, ())[-1]["train_loss"]
        value = metrics[f"eval_{self.primary}"]
        better = state.best_metric is None or value > state.best_metric
        trained = "" if loss is None else f"train loss {loss:.4f}  "
        line = (
            f"{self._moment(args, state)}  {trained}dev loss {metrics['eval_loss']:.4f}  "
            f"{self.primary} {value:.3f}{'  best so far' if better else ''}"
        )
        self._say(line)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """End the progress of training."""
        if self.training is not None:
            self.training.close()

    def _end_evaluation(self) -> None:
        if self.evaluation is not None:
            self.evaluation.close()
        self.evaluation = None

    def _say(self, line: str) -> None:
        with above_bars():
            self.log(line)

    def _moment(self, args: Any, state: TrainerState) -> str:
        """Return the moment of an evaluation in words: its step or its epoch."""
        return f"step {state.global_step:>6}" if args.eval_strategy == "steps" else f"epoch {state.epoch:>3.0f}"


def evaluations_of(state: TrainerState, metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Return every evaluation on the dev set, in order.

    `train_loss` is the mean of the losses that were logged since the previous evaluation, weighted by steps. It is None
    if no loss was logged.
    """
    found: list[dict[str, Any]] = []
    losses: list[tuple[float, float]] = []  # number of steps, their mean loss
    logged = 0.0
    for entry in state.log_history:
        if "loss" in entry:
            losses.append((entry["step"] - logged, entry["loss"]))
            logged = entry["step"]
        elif "eval_loss" in entry:
            train = losses[0][1] if len(losses) == 1 else None
            if len(losses) > 1:
                train = sum(steps * loss for steps, loss in losses) / sum(steps for steps, _ in losses)
            found.append(
                {
                    "epoch": entry["epoch"],
                    "step": entry["step"],
                    "loss": entry["eval_loss"],
                    "train_loss": train,
                    "metrics": {name: entry[f"eval_{name}"] for name in metrics},
                }
            )
            losses = []
    return found
