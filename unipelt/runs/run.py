"""One run of a task other than GLUE, from settings to record.

The loaded run is a `TaskJob`, which makes its trainer and does its test. Everything else is the same for every task,
such as the lock on the folder and the continuation of a run that was killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from unipelt.checkpoint.manifest import MANIFEST
from unipelt.checkpoint.save import save
from unipelt.files.atomic import write_whole
from unipelt.files.messages import say
from unipelt.records.record import read_result, write_result
from unipelt.runs import folder as place
from unipelt.runs import processes
from unipelt.runs.folder import MODEL, PREDICTIONS, Progress
from unipelt.runs.pretrained import tokenizer_sha256
from unipelt.runs.settings import TrainingSettings
from unipelt.runs.training import common_record, header, run_in_folder, train


@dataclass(frozen=True)
class Outcome:
    """Result of the one test at the end of a run.

    Attributes:
        loss: the mean loss over examples.
        metrics: the value of each metric, a fraction.
        files: the predictions, as the content of each file by the name of the file.
        notes: further entries of the record.
        lines: lines for the reader.
    """

    loss: float
    metrics: dict[str, float]
    files: Mapping[str, bytes]
    notes: Mapping[str, Any]
    lines: tuple[str, ...] = ()


@dataclass
class TaskJob(ABC):
    """A loaded and checked run. Nothing is written yet.

    Attributes:
        settings: the settings of the run.
        model: the model with the method injected.
        tokenizer: the tokenizer of the model.
        data: the number of rows and the fingerprint of each dataset split.
        notes: the notes that a reader of the score must know.
        floor: the score of a prediction without a model, and the name of that prediction.
        device: the device, `cpu` or `cuda`.
        model_sha256: the SHA-256 of the file with the base's weights, or None.
    """

    settings: TrainingSettings
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: dict[str, dict[str, Any]]
    notes: list[str]
    floor: tuple[float, str]
    device: str
    model_sha256: str | None

    metrics: ClassVar[tuple[str, ...]]

    @property
    def primary(self) -> str:
        """The metric that chooses the best checkpoint."""
        return self.metrics[0]

    @property
    def base(self) -> str:
        """The name of the base model."""
        return self.settings.model

    @property
    def digest(self) -> str:
        """The SHA-256 of everything that determines the outcome, including data and weights."""
        everything = [self.settings.digest(), self.data, self.model_sha256]
        return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()

    @abstractmethod
    def arguments(self, folder: Path) -> TrainingArguments:
        """Return Trainer's arguments for a run in that folder, and write nothing. Raise as `training_arguments`."""

    @abstractmethod
    def make_trainer(self, folder: Path, callbacks: list[TrainerCallback]) -> Trainer:
        """Return the trainer, which evaluates on the dev set."""

    @abstractmethod
    def test(self, trainer: Trainer) -> Outcome:
        """Test the model with its present weights."""

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the trained weights, and return the description of the base for the record."""
        save(self.model, folder)
        base = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["base"]
        return {"fingerprint": base["fingerprint"], "config": base["config"]}


@contextlib.contextmanager
def scored_by(trainer: Trainer, compute_metrics: Callable[[EvalPrediction], dict[str, float]]) -> Iterator[None]:
    """Let a trainer, which scores the dev set, score another split for a while."""
    of_dev, trainer.compute_metrics = trainer.compute_metrics, compute_metrics
    try:
        yield
    finally:
        trainer.compute_metrics = of_dev


Settings = TypeVar("Settings", bound=TrainingSettings)


def run(settings: Settings, prepare: Callable[[Settings], TaskJob], log: Callable[[str], None] = say) -> dict[str, Any]:
    """Do a run, continue a run that was killed, or return the record of a run that has finished.

    Args:
        settings: the settings of the run.
        prepare: function that loads and checks everything that the run needs. It writes nothing.
        log: function that takes the lines for the reader.

    Returns:
        The record, as `unipelt.records.record.read_result` returns it.

    Raises:
        ValueError, OSError: the input is bad. Nothing was trained, and no file of an earlier run was changed.
        RunFailed: the run failed after its start. Its checkpoints are kept.
    """
    log = processes.only_first(log)

    def load() -> TaskJob:
        job = prepare(settings)
        job.arguments(Path(str(settings.output_dir)))  # raises Trainer's errors before anything is written
        return job

    def execute(job: TaskJob, folder: Path, progress: Progress, begun: float) -> dict[str, Any]:
        return _execute(job, folder, progress, begun, log)

    return run_in_folder(settings, load, execute, log)


def _execute(
    job: TaskJob, folder: Path, progress: Progress, begun: float, log: Callable[[str], None]
) -> dict[str, Any]:
    for line in header(job, job.base, job.settings.task or "custom"):
        log(line)

    def make(callbacks: list[TrainerCallback]) -> Trainer:
        trainer = job.make_trainer(folder, callbacks)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def scores(trainer: Trainer) -> dict[str, Any]:
        outcome = job.test(trainer)
        return {"loss": outcome.loss, "metrics": outcome.metrics}

    trainer, state, spend, final = train(job, folder, progress, begun, log, make, scores)
    spend()
    test = job.test(trainer)
    spend("evaluation")
    for line in test.lines:
        log(line)
    return processes.on_first(lambda: _write(job, folder, progress, state, test, final, spend))


def _write(
    job: TaskJob,
    folder: Path,
    progress: Progress,
    state: TrainerState,
    test: Outcome,
    final: Mapping[str, Any],
    spend: Callable[..., None],
) -> dict[str, Any]:
    """Write the model, the predictions and the record, which has the entries of `final` too. Return the record."""
    described = job.save(folder / MODEL)
    (folder / PREDICTIONS).mkdir(exist_ok=True)
    for name, content in test.files.items():
        write_whole(folder / PREDICTIONS / name, content)
    spend()

    settings = job.settings
    record = {
        **common_record(job, state, job.metrics, progress),
        "task": {
            "name": settings.task or "custom",
            "columns": [],
            "labels": [],
            "metrics": list(job.metrics),
            "primary": job.primary,
            "notes": job.notes,
        },
        "test": {"loss": test.loss, "metrics": test.metrics},
        "majority": job.floor[0],
        "floor": job.floor[1],
        "data": job.data,
        "model": {
            "name": job.base,
            "class": type(job.model).__name__,
            "sha256": job.model_sha256,
            "tokenizer": tokenizer_sha256(job.tokenizer),
            **described,
        },
        "gates": None,
        "files": {"model": MODEL, "gates": None, "predictions": [f"{PREDICTIONS}/{name}" for name in test.files]},
        **test.notes,
        **final,
    }
    write_result(record, folder)
    if not settings.keep_checkpoints:
        place.clean(folder)
    return read_result(folder)
