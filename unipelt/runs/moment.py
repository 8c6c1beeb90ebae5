"""The moment at which a run is: what it does now, in a small file that other processes read."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unipelt.files.atomic import write_whole
from unipelt.files.progress import Progress
from unipelt.files.strict import PlainError, read_plain
from unipelt.records.record import mismatch
from unipelt.runs.folder import CHECKPOINTS, NOW, newest_step

WRITE_SECONDS = 5.0
"""The least seconds between two writes of the file."""
_NUMBER = (int, float)
_SHAPE: dict[str, Any] = {
    **{"step": int, "steps": int, "epoch": _NUMBER, "epochs": _NUMBER},
    **{"left": (*_NUMBER, type(None)), "time": _NUMBER},
}


@dataclass(frozen=True)
class Moment:
    """The moment at which a run is.

    Attributes:
        step: the number of steps that are done.
        steps: the largest number of steps.
        epoch: the number of epochs that are done, with a fraction.
        epochs: the largest number of epochs.
        left: the estimated seconds of training that are left; None if unknown.
        time: the time of this moment, in seconds since 1970; 0 for a checkpoint.
    """

    step: int
    steps: int
    epoch: float
    epochs: float
    left: float | None = None
    time: float = 0.0

    def __str__(self) -> str:
        """Return the moment in words: its epoch and its step, of how many."""
        return f"epoch {self.epoch:.3g} of {self.epochs:g}, step {self.step:,} of {self.steps:,}"


class TrainingProgress:
    """The progress of a training: a bar or lines for the reader, and the file for other processes.

    Args:
        folder: the folder of the run.
        step: the number of steps that are done.
        steps: the largest number of steps.
        epochs: the largest number of epochs.
        log: function that takes the lines for the reader.
        bar: whether a terminal gets a bar.
    """

    def __init__(
        self, folder: Path, step: int, steps: int, epochs: float, log: Callable[[str], None], bar: bool = True
    ) -> None:
        self.folder, self.epochs = folder, epochs
        self.progress = Progress("training", steps, "step", done=step, log=log, bar=bar, keep=True)
        self._written = time.monotonic()

    def update(self, epoch: float) -> None:
        """Say that one more step is done, and which epoch it is in."""
        self.progress.update()
        if time.monotonic() - self._written < WRITE_SECONDS:
            return
        self._written = time.monotonic()
        steps = self.progress.total or 0
        now = Moment(self.progress.done, steps, epoch, self.epochs, self.progress.seconds_left, time.time())
        with contextlib.suppress(OSError):  # a run does not fail for this file; its checkpoint says that a disk is full
            write_whole(self.folder / CHECKPOINTS / NOW, json.dumps(asdict(now)).encode())

    def close(self) -> None:
        """End the bar."""
        self.progress.close()


def read_moment(folder: Path) -> Moment | None:
    """Return the last known moment of an unfinished run, or None if it has no checkpoint and says nothing."""
    found = [moment for moment in (_of_file(folder), of_checkpoint(folder)) if moment is not None]
    return max(found, key=lambda moment: moment.step, default=None)


def of_checkpoint(folder: Path) -> Moment | None:
    """Return the moment of the newest complete checkpoint of a run, from which the run would go on."""
    state = newest_step(folder)
    if state is None:
        return None
    return Moment(state["global_step"], state["max_steps"], state["epoch"], state["num_train_epochs"])


def _of_file(folder: Path) -> Moment | None:
    try:
        values = read_plain(folder / CHECKPOINTS / NOW)
    except (OSError, PlainError):
        return None
    if mismatch(values, _SHAPE, ""):
        return None
    return Moment(**{name: values[name] for name in _SHAPE})
