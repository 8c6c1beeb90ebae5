"""Training with `transformers.Trainer` in the folder of a run, for every task.

A run may be killed at any moment and started again. The run then continues from its last complete checkpoint, and ends
as if it had not been killed. A checkpoint is complete if it holds a marker, which is written last.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainerCallback, TrainerState
from transformers.integrations import TensorBoardCallback

from unipelt.checkpoint.manifest import WEIGHTS
from unipelt.files.atomic import failed_write
from unipelt.injection.parameter_groups import parameter_groups
from unipelt.injection.parameters import parameter_counts
from unipelt.records.record import FORMAT, RESULT, summary
from unipelt.runs import folder as place
from unipelt.runs import processes
from unipelt.runs.averages import AverageCallback, WeightAverage, read_average
from unipelt.runs.callbacks import Marker, Reporter, Watch, evaluations_of
from unipelt.runs.device import describe_precision, find_device
from unipelt.runs.errors import Diverged, RunError, RunFailed, explain
from unipelt.runs.final import finalize
from unipelt.runs.folder import LOGS, Progress
from unipelt.runs.job import Training
from unipelt.runs.machine import describe_code, describe_hardware, describe_packages, peak_memory
from unipelt.runs.settings import TrainingSettings

MakeTrainer = Callable[[list[TrainerCallback]], Trainer]


Job = TypeVar("Job", bound=Training)


def run_in_folder(
    settings: TrainingSettings,
    load: Callable[[], Job],
    execute: Callable[[Job, Path, Progress, float], dict[str, Any]],
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Do a run in its folder, continue a run that was killed, or return the record of a run that has finished.

    Args:
        settings: the settings of the run.
        load: function that loads and checks everything that the run needs. It writes nothing.
        execute: function of the loaded run, the folder, the progress of earlier attempts, and the start of this attempt
            (seconds of `time.monotonic`). It trains and tests the model, and writes and returns the record.
        log: function that takes the lines for the reader.

    Returns:
        The record.

    Raises:
        ValueError, OSError, RunFailed: as `unipelt.glue.run.run`.
    """
    begun = time.monotonic()
    folder = Path(str(settings.output_dir))
    processes.check_launcher(settings.precision, settings.trainer or {})
    processes.check_batch_size(settings.batch_size)
    processes.join(find_device(settings.device))
    record = processes.on_first(lambda: place.find_finished(settings, folder))
    if record is not None:
        if not record["settings"]["keep_checkpoints"]:
            processes.on_first(lambda: place.clean(folder))  # the run may have been killed before this was done
        log(summary(record, folder / RESULT))
        log("(this run had finished before; --overwrite runs it again)")
        return record
    threads = torch.get_num_threads()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    try:
        job = processes.first_then_others(load)
        if len(set(processes.gather(job.digest))) > 1:
            raise RunError("the processes have loaded different data or weights; give every machine the same files")
        with contextlib.ExitStack() as stack:
            processes.on_first(lambda: stack.enter_context(place.locked(folder)))
            # another process may have finished the run
            record = processes.on_first(lambda: place.find_finished(settings, folder))
            if record is None:
                progress = processes.on_first(lambda: place.begin(settings, folder))
                try:
                    record = execute(job, folder, progress, begun)
                except Exception as error:
                    if (reason := explain(failed_write(error, folder) or error)) is None:
                        raise
                    raise RunFailed(f"the run failed after it had begun: {reason}") from error
    finally:
        torch.set_num_threads(threads)
    log(summary(record, folder / RESULT))
    return record


def train(
    job: Training,
    folder: Path,
    progress: Progress,
    begun: float,
    log: Callable[[str], None],
    make: MakeTrainer,
    test: Callable[[Trainer], Mapping[str, Any]],
) -> tuple[Trainer, TrainerState, Callable[..., None], dict[str, Any]]:
    """Train to the end, load the weights of the best checkpoint, and make the last choices of the run.

    Training continues from the last complete checkpoint, if there is one.

    Args:
        job: the loaded run.
        folder: the folder of the run.
        progress: the progress of the run.
        begun: the start of this attempt, in seconds of `time.monotonic`.
        log: function that takes the lines for the reader.
        make: function that makes the trainer with the given callbacks.
        test: function that tests the present model with the trainer, and returns loss and metrics.

    Returns:
        The trainer; the state at the end of training; a function that adds the seconds since its last call to the
        kinds of time that it is called with; and the entries of the record that `finalize` returns.

    Raises:
        Diverged: a loss is no longer finite.
    """
    settings = job.settings
    if job.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if settings.num_workers:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # otherwise every forked worker prints a warning
    marker = Marker(folder, job.digest, progress, begun)
    average = WeightAverage(settings.average) if settings.average else None
    callbacks: list[TrainerCallback] = [Watch(), marker, Reporter(folder, job.primary, log)]
    if average is not None:
        callbacks.insert(0, AverageCallback(average, job.model, folder))  # before the checkpoint is marked as complete
    if settings.patience is not None:
        callbacks.append(EarlyStoppingCallback(settings.patience))
    trainer = make(callbacks)
    if settings.rates:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(trainer.args, job.model)
        common = {"lr": trainer.args.learning_rate, "weight_decay": trainer.args.weight_decay}
        groups = parameter_groups(job.model, **common, **settings.rates)
        trainer.optimizer_cls_and_kwargs = (kind, {**options, "params": groups})
    if trainer.args.gradient_accumulation_steps > 1:
        # these models return the mean loss of their batch, even if they accept a count of items
        trainer.model_accepts_loss_kwargs = False
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder / LOGS)
    last = _train(trainer, job.digest, folder, progress, log)

    state = TrainerState.load_from_json(str(last / "trainer_state.json"))
    _load_weights(job.model, place.checkpoint_at(folder, state.best_global_step))
    if average is not None:
        average.restore(read_average(last))
    marker.spend()
    final = finalize(trainer, job, state, average, log, lambda: test(trainer))
    marker.spend("evaluation")
    return trainer, state, marker.spend, final


def header(job: Training, model: str, task: str, data: Sequence[str] = ()) -> list[str]:
    """Return the lines that announce a run: model, task, method and counts of parameters.

    Args:
        job: the loaded run.
        model: the name of the base model.
        task: the name of the task.
        data: lines about the data.
    """
    settings, rows = job.settings, {name: split["rows"] for name, split in job.data.items()}
    rates = "".join(f", {name} {rate:g}" for name, rate in (settings.rates or {}).items())
    options = ", ".join(f"{name} {value}" for name, value in (settings.trainer or {}).items())
    stop = f", patience {settings.patience}" if settings.patience is not None else ""
    average = "".join(f"; average {kind} {value:g}" for kind, value in (settings.average or {}).items())
    select = "; select" if settings.select else ""
    return [
        f"model   {model} ({type(job.model).__name__})",
        f"task    {task}: {', '.join(f'{name} {count:,}' for name, count in rows.items())} rows",
        *(f"        {note}" for note in job.notes),
        *data,
        f"method  {settings.method_name}; learning rate {settings.learning_rate:g}{rates}, "
        f"batch {settings.batch_size}, at most {settings.epochs} epochs{stop}, seed {settings.seed}; "
        f"{settings.precision} on {job.device}{average}{select}",
        *describe_precision(job.device, settings.precision),
        *([f"trainer {options}"] if options else []),
        *str(parameter_counts(job.model)).splitlines(),
    ]


def common_record(job: Training, state: TrainerState, metrics: Sequence[str], progress: Progress) -> dict[str, Any]:
    """Return the entries that the record of every task has."""
    settings = job.settings
    evaluations = evaluations_of(state, metrics)
    best = next(item for item in evaluations if item["step"] == state.best_global_step)
    return {
        "format": FORMAT,
        "status": "finished",
        "settings": settings.to_dict(),
        "digest": settings.digest(),
        "method": {
            "name": settings.method_name,
            "config": settings.config.to_dict(),
            "learning_rate": settings.learning_rate,
        },
        "evaluations": evaluations,
        "best": {"epoch": best["epoch"], "step": best["step"]},
        "dev": {"loss": best["loss"], "metrics": best["metrics"]},
        "seeds": {"run": settings.seed, "data": settings.data_seed},
        "parameters": asdict(parameter_counts(job.model)),
        "seconds": dict(progress.seconds),
        "memory": peak_memory(job.device),
        "hardware": describe_hardware(job.device),
        "packages": describe_packages(),
        "code": describe_code(),
        "attempts": progress.attempts,
        **({"world_size": processes.world_size()} if processes.world_size() > 1 else {}),
    }


def _train(trainer: Trainer, digest: str, folder: Path, progress: Progress, log: Callable[[str], None]) -> Path:
    """Train, or continue training, and return the final checkpoint."""
    last = processes.on_first(lambda: place.newest_checkpoint(folder, digest))
    if reason := processes.on_first(lambda: place.reason_to_start_over(folder, progress, digest)):
        log(f"starting over: {reason}")
    processes.on_first(lambda: place.remove_checkpoints(folder, digest=digest))
    if last is not None:
        log(f"going on from {last}")
    # Trainer takes at least one step when it resumes, so a training that has ended must not be resumed
    if last is None or not place.is_final(last):
        try:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        except Diverged as error:
            now = trainer.state
            raise error.at(now.epoch or 0.0, now.global_step, trainer.args.learning_rate) from error
        last = processes.on_first(lambda: place.newest_checkpoint(folder, digest))
    assert last is not None, "training ends with a marked checkpoint"
    return last


def _load_weights(model: PreTrainedModel, checkpoint: Path) -> None:
    """Load the weights of a checkpoint of this run into the model."""
    found = model.load_state_dict(load_file(checkpoint / WEIGHTS), strict=False)
    assert not found.unexpected_keys, f"{checkpoint} is of another model"
