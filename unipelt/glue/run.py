"""One run from settings to record: data, model, training with `transformers.Trainer`, one test, one `result.json`.

A run may be killed at any moment and started again. The run then continues from its last complete checkpoint, and ends
as if it had not been killed. A checkpoint is complete if it holds a marker, which is written last.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    DataCollatorWithPadding,
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
from unipelt.gates.plot import plot_gates
from unipelt.gates.record import record_gates
from unipelt.glue.job import Job, prepare
from unipelt.glue.leaderboard import write_predictions
from unipelt.glue.metric import compute_metrics_for
from unipelt.glue.settings import RunSettings
from unipelt.records.record import (
    read_result,
    write_result,
)
from unipelt.runs import folder as place
from unipelt.runs import processes
from unipelt.runs.batches import Batches, default_tokens, materialize, pack_rows, pack_tokens, text_lengths
from unipelt.runs.folder import MODEL, PICTURE, PREDICTIONS, Progress
from unipelt.runs.joint_trainer import join_rows
from unipelt.runs.pretrained import tokenizer_sha256
from unipelt.runs.settings import SettingsError
from unipelt.runs.trainer import BatchTrainer
from unipelt.runs.trainer_arguments import training_arguments
from unipelt.runs.training import common_record, header, run_in_folder, train
from unipelt.submodules.gate import Gates


def run(
    settings: RunSettings, log: Callable[[str], None] = say, check: Callable[[Job], None] | None = None
) -> dict[str, Any]:
    """Do a run, continue a run that was killed, or return the record of a run that has finished.

    Args:
        settings: the settings of the run.
        log: function that takes the lines for the reader.
        check: function that is called with the loaded run before anything is written or trained. An error in it ends
            the run.

    Returns:
        The record, as `read_result` returns it.

    Raises:
        ValueError, OSError: the input is bad. Nothing was trained, and no file of an earlier run was changed.
        RunFailed: the run failed after its start, for example because training diverged or the disk is full. Its
            checkpoints are kept. (Errors of other kinds are mistakes in the code.)
    """
    log = processes.only_first(log)

    def load() -> Job:
        job = prepare(settings)
        _arguments(job, Path(str(settings.output_dir)))  # raises Trainer's errors before anything is written
        if check is not None:
            check(job)
        return job

    def execute(job: Job, folder: Path, progress: Progress, begun: float) -> dict[str, Any]:
        return _execute(job, folder, progress, begun, log)

    return run_in_folder(settings, load, execute, log)


def _arguments(job: Job, folder: Path) -> TrainingArguments:
    if job.task.is_regression and (job.settings.trainer or {}).get("label_smoothing_factor"):
        raise SettingsError("trainer.label_smoothing_factor is for classes, and this task has scores; leave it out")
    # 1 for Trainer, because its dataset of evaluation holds batches
    return training_arguments(job, folder, TrainingArguments, per_device_eval_batch_size=1)


def evaluated(job: Job, name: str) -> Batches:
    """Return the batches in which a split is evaluated. They are collated when they are read."""
    settings, split = job.settings, job.splits[name]
    if settings.eval_tokens == 0:
        rows = pack_rows(len(split), settings.eval_batch_size)
    else:
        tokens = settings.eval_tokens or default_tokens(job.device)
        rows = pack_tokens(text_lengths(split), tokens)
    return Batches(split, rows, DataCollatorWithPadding(job.tokenizer), job.model)


def _execute(job: Job, folder: Path, progress: Progress, begun: float, log: Callable[[str], None]) -> dict[str, Any]:
    """Train, or continue training, and finish the run. Return the record."""
    for line in header(job, job.settings.model, job.task.name, job.labels):
        log(line)

    def make(callbacks: list[TrainerCallback]) -> Trainer:
        return make_trainer(job, folder, materialize(evaluated(job, "dev"), job.device), callbacks)

    trainer, state, spend, final = train(job, folder, progress, begun, log, make, lambda trainer: scores(trainer, job))
    return finish(trainer, job, folder, state, progress, spend, log, **final)


def make_trainer(job: Job, folder: Path, dev: Any, callbacks: Sequence[TrainerCallback] = ()) -> Trainer:
    """Return the trainer of a run. It also orders the examples, tests and predicts.

    Args:
        job: the loaded run.
        folder: the folder of the run.
        dev: the dev set in batches.
        callbacks: further callbacks of the trainer.
    """
    trainer = BatchTrainer(
        model=job.model,
        args=_arguments(job, folder),
        # a bound method, because Trainer saves the tokenizer of a collator with every checkpoint
        data_collator=DataCollatorWithPadding(job.tokenizer).__call__,
        train_dataset=job.splits["train"],
        eval_dataset=dev,
        compute_metrics=compute_metrics_for(job.task),
        # some models also return hidden states, which need memory
        preprocess_logits_for_metrics=lambda outputs, labels: outputs[0] if isinstance(outputs, tuple) else outputs,
        callbacks=list(callbacks),
        train_tokens=job.settings.train_tokens,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def finish(
    trainer: Trainer,
    job: Job,
    folder: Path,
    state: TrainerState,
    progress: Progress,
    spend: Callable[..., None],
    log: Callable[[str], None],
    **notes: Any,
) -> dict[str, Any]:
    """Finish a run after training: test the model once, then write everything, the record last.

    Args:
        trainer: the trainer that `make_trainer` returns.
        job: the loaded run. Its model has the weights of the best epoch.
        folder: the folder of the run.
        state: the state at the end of training.
        progress: the progress of the run.
        spend: function that adds the seconds since its last call to the kinds of time that it is called with.
        log: function that takes the lines for the reader.
        notes: further entries of the record.

    Returns:
        The record.
    """
    settings = job.settings
    spend()
    test, gates = _test(trainer, job)
    spend("evaluation")

    predicted = {name: _predict(trainer, job, name) for name in job.splits if name.startswith("predict:")}

    def write() -> dict[str, Any]:
        files: dict[str, Any] = {"model": MODEL, "gates": None, "predictions": []}
        save(job.model, folder / MODEL)
        if gates:
            files["gates"] = _draw(gates, folder, job, log)
        for name, values in predicted.items():
            path = _write_predictions(job, name, values, folder / PREDICTIONS)
            files["predictions"].append(str(path.relative_to(folder)))
        spend()

        record = _record(job, state, test, gates, progress, files, folder) | notes
        write_result(record, folder)
        if not settings.keep_checkpoints:
            place.clean(folder)
        return read_result(folder)

    return processes.on_first(write)


def _test(trainer: Trainer, job: Job) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Evaluate the test set once. Return loss and metrics, and the values of every gate (examples, layers)."""
    has_gates = any(isinstance(module, Gates) for module in job.model.modules())
    recording: Any = record_gates(job.model) if has_gates else contextlib.nullcontext({})
    batches = evaluated(job, "test")
    with recording as gates:
        test = scores(trainer, job)
    return test, {name: join_rows(values.float().cpu(), batches.sizes) for name, values in gates.items()}


def scores(trainer: Trainer, job: Job) -> dict[str, Any]:
    """Return loss and metrics of the present model on the test set."""
    metrics = trainer.predict(evaluated(job, "test")).metrics or {}
    return {"loss": metrics["test_loss"], "metrics": {name: metrics[f"test_{name}"] for name in job.task.metrics}}


def _predict(trainer: Trainer, job: Job, name: str) -> np.ndarray:
    """Return the prediction for each row of a split, in the order of the rows, (rows,)."""
    output = trainer.predict(evaluated(job, name))
    logits = np.asarray(output.predictions)
    values = logits.squeeze(-1) if job.task.is_regression else logits.argmax(-1)
    in_order = np.empty_like(values)
    in_order[job.order[name]] = values
    return in_order


def _write_predictions(job: Job, name: str, in_order: np.ndarray, folder: Path) -> Path:
    """Write the predictions for a split, and return the path of the file."""
    split = name.removeprefix("predict:")
    if job.settings.task is not None:
        return write_predictions(job.task, in_order, folder, split)
    words = [f"{value:.6g}" if job.task.is_regression else job.task.label_names[value] for value in in_order]
    text = "".join(f"{index}\t{word}\n" for index, word in enumerate(words))
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"{split}.tsv", f"index\tprediction\n{text}".encode())
    return folder / f"{split}.tsv"


def _layers(job: Job, gates: Mapping[str, torch.Tensor]) -> list[int]:
    """Return the layer of each column. If layers are shared, a column is one pass through the layer."""
    count, chosen = max(values.shape[1] for values in gates.values()), job.settings.config.layers
    return list(chosen if chosen is not None and len(chosen) == count else range(count))


def _draw(gates: Mapping[str, torch.Tensor], folder: Path, job: Job, log: Callable[[str], None]) -> str | None:
    title = f"{job.task.name} · {job.settings.method_name}"
    try:
        plot_gates(gates, folder / PICTURE, layers=_layers(job, gates), title=title)
    except ImportError as error:
        log(f"no {PICTURE}: {error}")
        return None
    return PICTURE


def _record(
    job: Job,
    state: TrainerState,
    test: Mapping[str, Any],
    gates: Mapping[str, torch.Tensor],
    progress: Progress,
    files: Mapping[str, Any],
    folder: Path,
) -> dict[str, Any]:
    """Return the record of a run, with everything that the score depends on."""
    settings, task = job.settings, job.task
    base = json.loads((folder / MODEL / MANIFEST).read_text(encoding="utf-8"))["base"]
    means = None
    if gates:
        means = {
            "layers": _layers(job, gates),
            "examples": len(job.splits["test"]),
            "values": {
                name: {
                    "mean": values.double().mean(dim=0).tolist(),
                    "std": values.double().std(dim=0, correction=0).tolist(),
                }
                for name, values in gates.items()
            },
        }
    return {
        **common_record(job, state, task.metrics, progress),
        "task": {
            "name": task.name,
            "columns": list(task.columns),
            "labels": list(task.label_names),
            "metrics": list(task.metrics),
            "primary": task.primary,
            "notes": job.notes,
        },
        "test": dict(test),
        "majority": job.majority,
        "majority_of": "test",  # older records hold the score of the train set's most frequent class
        "data": job.data,
        "model": {
            "name": settings.model,
            "class": type(job.model).__name__,
            "sha256": job.model_sha256,
            "fingerprint": base["fingerprint"],
            "config": base["config"],
            "tokenizer": tokenizer_sha256(job.tokenizer),
        },
        "gates": means,
        "files": dict(files),
    }
