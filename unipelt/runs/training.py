"""Training with `transformers.Trainer` in the folder of a run, for every task.

A run may be killed at any moment and started again. The run then continues from its last complete checkpoint, and ends
as if it had not been killed. A checkpoint is complete if it holds a marker, which is written last.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors.torch import load_file
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    get_scheduler,
)
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import has_length

from unipelt.checkpoint.manifest import WEIGHTS
from unipelt.config.schema import ConfigError
from unipelt.files.atomic import failed_write
from unipelt.files.messages import shorten
from unipelt.files.progress import Progress as Shown
from unipelt.files.progress import above_bars
from unipelt.injection.parameter_groups import parameter_groups
from unipelt.injection.parameters import parameter_counts
from unipelt.records.record import FORMAT, RESULT, summary
from unipelt.runs import folder as place
from unipelt.runs import processes
from unipelt.runs.averages import AverageCallback, WeightAverage, read_average
from unipelt.runs.device import find_device
from unipelt.runs.errors import Diverged, RunError, RunFailed, check_losses, explain
from unipelt.runs.final import finalize
from unipelt.runs.folder import CHECKPOINTS, LOGS, Progress
from unipelt.runs.machine import describe_code, describe_hardware, describe_packages, peak_memory
from unipelt.runs.moment import TrainingProgress
from unipelt.runs.settings import SettingsError, TrainingSettings
from unipelt.runs.trainer_options import check_joint, check_trackers, step_options

Arguments = TypeVar("Arguments", bound=TrainingArguments)
MakeTrainer = Callable[[list[TrainerCallback]], Trainer]


class Training(Protocol):
    """The parts of a loaded run that training needs."""

    @property
    def settings(self) -> TrainingSettings:
        """The settings of the run."""

    @property
    def model(self) -> PreTrainedModel:
        """The model to train."""

    @property
    def primary(self) -> str:
        """The metric that chooses the best checkpoint. Larger is better."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics of the task."""

    @property
    def data(self) -> dict[str, dict[str, Any]]:
        """The number of rows and the fingerprint of each dataset split."""

    @property
    def notes(self) -> list[str]:
        """The notes that a reader of the score must know."""

    @property
    def device(self) -> str:
        """The device, `cpu` or `cuda`."""

    @property
    def digest(self) -> str:
        """The SHA-256 of everything that determines the outcome, including data and weights."""


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


class _Marker(TrainerCallback):
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
        if state.best_global_step:  # the folder may have moved since the checkpoint was written
            state.best_model_checkpoint = str(place.checkpoint_at(self.folder, state.best_global_step))

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.spend()

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.spend("train")

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.spend("evaluation")

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.spend()
        processes.wait()  # each process has a file in the checkpoint
        if not processes.is_first():
            return
        self.progress.write(self.folder)
        place.mark(self.folder, state.global_step, self.digest, finished=control.should_training_stop)
        steps = (state.global_step, state.best_global_step)
        place.remove_checkpoints(self.folder, keep=tuple(place.checkpoint_at(self.folder, step) for step in steps))


class _Watch(TrainerCallback):
    """Callback that stops training if a loss is not finite, before a checkpoint is written."""

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        check_losses(train=event["logs"].get("loss", 0.0))

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        check_losses(dev=event["metrics"].get("eval_loss", 0.0))


class _Reporter(TrainerCallback):
    """Callback that shows the progress of training and of each evaluation, and logs one line for each evaluation."""

    def __init__(self, folder: Path, primary: str, log: Callable[[str], None]) -> None:
        self.folder = folder
        self.primary = primary
        self.log = log
        self.training: TrainingProgress | None = None
        self.evaluation: Shown | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if processes.is_first():
            steps, epochs = state.max_steps, state.num_train_epochs
            self.training = TrainingProgress(self.folder, state.global_step, steps, epochs, self._say)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.training is not None:
            self.training.update(state.epoch or 0.0)

    def on_prediction_step(self, args: Any, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        if not processes.is_first():
            return
        if self.evaluation is None:
            loader = event.get("eval_dataloader")
            total = len(loader) if has_length(loader) else None
            self.evaluation = Shown("evaluation", total, "batch", log=self._say)
        self.evaluation.update()

    def on_predict(self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any, **_: Any) -> None:
        self._end_evaluation()

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        self._end_evaluation()
        metrics = event["metrics"]
        loss = _evaluations(state, ())[-1]["train_loss"]
        value = metrics[f"eval_{self.primary}"]
        better = state.best_metric is None or value > state.best_metric
        trained = "" if loss is None else f"train loss {loss:.4f}  "
        line = (
            f"{self._moment(args, state)}  {trained}dev loss {metrics['eval_loss']:.4f}  "
            f"{self.primary} {value:.3f}{'  best so far' if better else ''}"
        )
        self._say(line)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
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


def training_arguments(job: Training, folder: Path, kind: type[Arguments], **options: Any) -> Arguments:
    """Return Trainer's arguments for a run.

    They come from the settings, from the options for Trainer in the settings, and from the needs of every run.

    Args:
        job: the loaded run.
        folder: the folder of the run.
        kind: the class of Trainer's arguments.
        options: further arguments.

    Raises:
        SettingsError: Trainer rejects its options, together or on this machine. Nothing was written.
    """
    settings = job.settings
    chosen = dict(settings.trainer or {})
    check_joint(chosen, processes.world_size())
    if processes.world_size() > 1 and (settings.average or settings.select):
        name = "average" if settings.average else "select"
        raise SettingsError(f"{name} is for a run of one process, and here are {processes.world_size()}; leave it out")
    known = {item.name for item in fields(kind)}
    if settings.gradient_checkpointing:
        # Transformers 5.x renamed the option
        name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
        options |= {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    if chosen.get("fp16") and job.device == "cpu":
        raise SettingsError("trainer.fp16 needs a GPU, and there is none here; leave it out, or take precision bf16")
    values: dict[str, Any] = {
        "output_dir": str(folder / CHECKPOINTS),
        "run_name": folder.name,
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": settings.batch_size,
        "learning_rate": float(settings.learning_rate or 0.0),
        "lr_scheduler_type": "linear",
        "warmup_steps": settings.warmup_ratio,  # a value below 1 is a fraction of all steps
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "optim": "adamw_torch",  # the default depends on PyTorch's version
        "seed": settings.seed,
        "logging_nan_inf_filter": False,  # the filter replaces a NaN loss by the mean of the others
        "save_total_limit": None,  # _Marker removes a checkpoint only after the next one is complete
        "load_best_model_at_end": True,
        "metric_for_best_model": job.primary,
        "greater_is_better": True,
        "restore_callback_states_from_checkpoint": True,
        "bf16": settings.precision == "bf16",
        "use_cpu": job.device == "cpu",
        "dataloader_num_workers": settings.num_workers,
        "dataloader_pin_memory": job.device == "cuda",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if processes.world_size() > 1:
        values["average_tokens_across_devices"] = False  # JointTrainer weights the losses itself
    try:
        arguments = kind(**{**values, **step_options(chosen), **options, **chosen})
        if chosen:
            _check_made(arguments, job.model)
    except (ValueError, TypeError, ImportError) as error:
        if not chosen:
            raise
        said = str(error) if isinstance(error, ConfigError) else f"trainer: {shorten(error)}"
        raise SettingsError(said) from error
    if arguments.world_size != processes.world_size():
        raise RunError(
            f"Transformers sees {arguments.world_size} processes, and WORLD_SIZE is {processes.world_size()}; start "
            "the run by torchrun"
        )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # batch_size is for a whole step, so DataParallel must not multiply it
    return arguments


def _check_made(arguments: TrainingArguments, model: PreTrainedModel) -> None:
    """Make Trainer's optimizer class and scheduler before a run starts, so that Trainer's errors are raised early."""
    check_trackers(arguments.report_to)  # type: ignore[arg-type]
    Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=arguments.learning_rate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_scheduler(
            arguments.lr_scheduler_type,
            optimizer,
            num_warmup_steps=arguments.get_warmup_steps(2),
            num_training_steps=2,
            scheduler_specific_kwargs=dict(arguments.lr_scheduler_kwargs or {}),  # type: ignore[arg-type]
        )


def train(
    job: Training, folder: Path, progress: Progress, begun: float, log: Callable[[str], None], make: MakeTrainer
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
    marker = _Marker(folder, job.digest, progress, begun)
    average = WeightAverage(settings.average) if settings.average else None
    callbacks: list[TrainerCallback] = [_Watch(), marker, _Reporter(folder, job.primary, log)]
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
    final = finalize(trainer, job, state, average, log)
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
        *([f"trainer {options}"] if options else []),
        *str(parameter_counts(job.model)).splitlines(),
    ]


def common_record(job: Training, state: TrainerState, metrics: Sequence[str], progress: Progress) -> dict[str, Any]:
    """Return the entries that the record of every task has."""
    settings = job.settings
    evaluations = _evaluations(state, metrics)
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


def _evaluations(state: TrainerState, metrics: Sequence[str]) -> list[dict[str, Any]]:
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
