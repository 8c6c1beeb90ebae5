"""One run from settings to record: data, model, training with `transformers.Trainer`, one test, one `result.json`.

A run may be killed at any moment and started again: it goes on from its last complete checkpoint and ends as if
nothing had happened. A checkpoint is complete once it holds a marker, which is written last.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import (
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import unipelt
from unipelt.checkpoint import MANIFEST, WEIGHTS, write_whole
from unipelt.gate import Gates
from unipelt.glue import folder as place
from unipelt.glue.batches import Batches, default_tokens, hold, pack_rows, pack_tokens, text_lengths
from unipelt.glue.failure import Diverged, RunFailed, check_losses, explain
from unipelt.glue.folder import CHECKPOINTS, MODEL, PICTURE, PREDICTIONS, Progress
from unipelt.glue.job import Job, prepare, tokenizer_sha256
from unipelt.glue.leaderboard import write_predictions
from unipelt.glue.metric import compute_metrics_for
from unipelt.glue.result import (
    FORMAT,
    RESULT,
    describe_code,
    describe_hardware,
    describe_packages,
    peak_memory,
    read_result,
    summary,
    write_result,
)
from unipelt.glue.settings import RunSettings
from unipelt.glue.tasks import Task
from unipelt.glue.trainer import BatchTrainer
from unipelt.plot import plot_gates


def run(
    settings: RunSettings, say: Callable[[str], None] = print, check: Callable[[Job], None] | None = None
) -> dict[str, Any]:
    """Do a run, or go on with one that was killed, or return the record of one that has finished.

    Args:
        settings: what to run, and where.
        say: takes the lines for the reader.
        check: called with what was loaded, before anything is written or trained; what it raises ends the run.

    Returns:
        The record, as `read_result` returns it.

    Raises:
        ValueError, OSError: bad input; nothing was trained and nothing of an earlier run was touched.
        RunFailed: the run failed after it had begun, because training diverged, say, or the disk is full; its
            checkpoints are kept. (Errors of other kinds are mistakes in the code.)
    """
    begun = time.monotonic()
    folder = Path(str(settings.output_dir))
    record = place.find_finished(settings, folder)
    if record is not None:
        if not record["settings"]["keep_checkpoints"]:
            place.clean(folder)  # in case it was killed while it did so
        say(summary(record, folder / RESULT))
        say("(this run had finished before; --overwrite runs it again)")
        return record
    threads = torch.get_num_threads()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    try:
        job = prepare(settings)
        if check is not None:
            check(job)
        with place.locked(folder):
            record = place.find_finished(settings, folder)  # another process may have been faster
            if record is None:
                progress = place.begin(settings, folder)
                try:
                    record = _execute(job, folder, progress, begun, say)
                except Exception as error:
                    if (reason := explain(error)) is None:
                        raise
                    raise RunFailed(f"the run failed after it had begun: {reason}") from error
    finally:
        torch.set_num_threads(threads)
    say(summary(record, folder / RESULT))
    return record


class _Marker(TrainerCallback):
    """Marks each checkpoint once it is complete, then removes those that are no longer needed; keeps time."""

    def __init__(self, folder: Path, digest: str, progress: Progress, begun: float) -> None:
        self.folder = folder
        self.digest = digest
        self.progress = progress
        self.clock = begun

    def spend(self, *kinds: str) -> None:
        """Count the seconds since the last call as spent on `kinds`."""
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
        self.progress.write(self.folder)
        place.mark(self.folder, state.global_step, self.digest, finished=control.should_training_stop)
        steps = (state.global_step, state.best_global_step)
        place.remove_checkpoints(self.folder, keep=tuple(place.checkpoint_at(self.folder, step) for step in steps))


class _Watch(TrainerCallback):
    """Stops training once a loss is not finite, before a checkpoint is written of it."""

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        check_losses(train=event["logs"].get("loss", 0.0))

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        check_losses(dev=event["metrics"].get("eval_loss", 0.0))


class _Reporter(TrainerCallback):
    """A bar over the steps, and a line for each evaluation."""

    def __init__(self, primary: str, say: Callable[[str], None]) -> None:
        self.primary = primary
        self.say = say
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # disable=None: no bar where nobody watches, in a log file, say
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", disable=None, dynamic_ncols=True)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.update()

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        metrics = event["metrics"]
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        value = metrics[f"eval_{self.primary}"]
        better = state.best_metric is None or value > state.best_metric
        line = (
            f"epoch {state.epoch:>3.0f}  train loss {losses[-1]:.4f}  dev loss {metrics['eval_loss']:.4f}  "
            f"{self.primary} {value:.3f}{'  best so far' if better else ''}"
        )
        with tqdm.external_write_mode():
            self.say(line)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.close()


def _arguments(job: Job, folder: Path) -> TrainingArguments:
    settings = job.settings
    options: dict[str, Any] = {}
    if settings.gradient_checkpointing:
        known = {item.name for item in fields(TrainingArguments)}  # the option got a new name in 5.x
        name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
        options = {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    arguments = TrainingArguments(
        output_dir=str(folder / CHECKPOINTS),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=1,  # to Trainer; its batches of evaluation come ready made
        learning_rate=float(settings.learning_rate or 0.0),
        lr_scheduler_type="linear",
        warmup_steps=settings.warmup_ratio,  # below 1 it is a fraction of all steps
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch",  # the default depends on PyTorch's version
        seed=settings.seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        logging_nan_inf_filter=False,  # it would put the mean of the others in the place of a loss that is NaN
        save_total_limit=None,  # _Marker removes checkpoints, and only after the next one is complete
        load_best_model_at_end=True,
        metric_for_best_model=job.task.primary,
        greater_is_better=True,
        restore_callback_states_from_checkpoint=True,
        bf16=settings.precision == "bf16",
        use_cpu=job.device == "cpu",
        dataloader_num_workers=settings.num_workers,
        dataloader_pin_memory=job.device == "cuda",
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # batch_size is that of a step: no DataParallel over whatever GPUs there are
    return arguments


def evaluated(job: Job, name: str) -> Batches:
    """The batches in which a split is evaluated, none of them made yet."""
    settings, split = job.settings, job.splits[name]
    if settings.eval_tokens == 0:
        rows = pack_rows(len(split), settings.eval_batch_size)
    else:
        tokens = settings.eval_tokens or default_tokens(job.device)
        rows = pack_tokens(text_lengths(split), tokens)
    return Batches(split, rows, DataCollatorWithPadding(job.tokenizer), job.model)


def _execute(job: Job, folder: Path, progress: Progress, begun: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Train, or go on training; then `finish`."""
    settings = job.settings
    if job.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if settings.num_workers:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or every worker that is forked warns
    for line in _header(job):
        say(line)
    marker = _Marker(folder, job.digest, progress, begun)
    callbacks: list[TrainerCallback] = [_Watch(), marker, _Reporter(job.task.primary, say)]
    if settings.patience is not None:
        callbacks.append(EarlyStoppingCallback(settings.patience))
    trainer = make_trainer(job, folder, hold(evaluated(job, "dev"), job.device), callbacks)
    last = _train(trainer, job, folder, say)

    state = TrainerState.load_from_json(str(last / "trainer_state.json"))
    _load_weights(job.model, place.checkpoint_at(folder, state.best_global_step))
    return finish(trainer, job, folder, state, progress, marker.spend, say)


def make_trainer(job: Job, folder: Path, dev: Any, callbacks: Sequence[TrainerCallback] = ()) -> Trainer:
    """The trainer of a run in that folder, with its dev set in batches; it also orders examples, tests and predicts."""
    trainer = BatchTrainer(
        model=job.model,
        args=_arguments(job, folder),
        # a bound method, because a collator that shows its tokenizer has it saved with every checkpoint
        data_collator=DataCollatorWithPadding(job.tokenizer).__call__,
        train_dataset=job.splits["train"],
        eval_dataset=dev,
        compute_metrics=compute_metrics_for(job.task),
        # some models return hidden states besides the logits, and those need not be kept
        preprocess_logits_for_metrics=lambda outputs, labels: outputs[0] if isinstance(outputs, tuple) else outputs,
        callbacks=list(callbacks),
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
    say: Callable[[str], None],
    **notes: Any,
) -> dict[str, Any]:
    """What follows training: one test of the model as it is, then everything is written, the record last.

    Args:
        trainer: as `make_trainer` makes it.
        job: its model holds the weights of the best epoch.
        folder: of the run.
        state: of the training that has ended.
        progress: of the run.
        spend: called with kinds of seconds, counts what has passed since the last call as spent on them.
        say: takes the lines for the reader.
        notes: further entries of the record.

    Returns:
        The record.
    """
    settings = job.settings
    spend()
    test, gates = _test(trainer, job)
    spend("evaluation")

    files: dict[str, Any] = {"model": MODEL, "gates": None, "predictions": []}
    unipelt.save(job.model, folder / MODEL)
    if gates:
        files["gates"] = _draw(gates, folder, job, say)
    for name in [name for name in job.splits if name.startswith("predict:")]:
        path = _predict(trainer, job, name, folder / PREDICTIONS)
        files["predictions"].append(str(path.relative_to(folder)))
    spend()

    record = _record(job, state, test, gates, progress, files, folder) | notes
    write_result(record, folder)
    if not settings.keep_checkpoints:
        place.clean(folder)
    return read_result(folder)


def _header(job: Job) -> list[str]:
    settings, rows = job.settings, {name: split["rows"] for name, split in job.data.items()}
    stop = f", patience {settings.patience}" if settings.patience is not None else ""
    return [
        f"model   {settings.model} ({type(job.model).__name__})",
        f"task    {job.task.name}: {', '.join(f'{name} {count:,}' for name, count in rows.items())} rows",
        *(f"        {note}" for note in job.notes),
        f"method  {settings.method_name}; learning rate {settings.learning_rate:g}, batch {settings.batch_size}, "
        f"at most {settings.epochs} epochs{stop}, seed {settings.seed}; {settings.precision} on {job.device}",
        *str(unipelt.parameter_counts(job.model)).splitlines(),
    ]


def _train(trainer: Trainer, job: Job, folder: Path, say: Callable[[str], None]) -> Path:
    """Train to the end, from the last complete checkpoint if there is one; returns the final checkpoint."""
    last = place.newest_checkpoint(folder, job.digest)
    place.remove_checkpoints(folder, digest=job.digest)
    if last is not None:
        say(f"going on from {last}")
    # Trainer takes at least one step when it resumes, so a run that had stopped must not be resumed
    if last is None or not place.is_final(last):
        try:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        except Diverged as error:
            now = trainer.state
            raise error.at(now.epoch or 0.0, now.global_step, float(job.settings.learning_rate or 0.0)) from error
        last = place.newest_checkpoint(folder, job.digest)
    assert last is not None, "training ends with a marked checkpoint"
    return last


def _load_weights(model: PreTrainedModel, checkpoint: Path) -> None:
    """Put what a checkpoint of this run holds onto the model."""
    found = model.load_state_dict(load_file(checkpoint / WEIGHTS), strict=False)
    assert not found.unexpected_keys, f"{checkpoint} is of another model"


def _test(trainer: Trainer, job: Job) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The one evaluation on the test set: loss and metrics, and every gate's values (examples, layers)."""
    has_gates = any(isinstance(module, Gates) for module in job.model.modules())
    recording: Any = unipelt.record_gates(job.model) if has_gates else contextlib.nullcontext({})
    with recording as gates:
        output = trainer.predict(evaluated(job, "test"))
    metrics = output.metrics or {}
    test = {
        "loss": metrics["test_loss"],
        "metrics": {name: metrics[f"test_{name}"] for name in job.task.metrics},
    }
    return test, {name: values.float().cpu() for name, values in gates.items()}


def _predict(trainer: Trainer, job: Job, name: str, folder: Path) -> Path:
    """Predict one split and write the predictions in the order of the rows."""
    output = trainer.predict(evaluated(job, name))
    logits = np.asarray(output.predictions)
    values = logits.squeeze(-1) if job.task.is_regression else logits.argmax(-1)
    in_order = np.empty_like(values)
    in_order[job.order[name]] = values
    split = name.removeprefix("predict:")
    if job.settings.task is not None:
        return write_predictions(job.task, in_order, folder, split)
    words = [f"{value:.6g}" if job.task.is_regression else job.task.label_names[value] for value in in_order]
    text = "".join(f"{index}\t{word}\n" for index, word in enumerate(words))
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"{split}.tsv", f"index\tprediction\n{text}".encode())
    return folder / f"{split}.tsv"


def _layers(job: Job, gates: Mapping[str, torch.Tensor]) -> list[int]:
    """What the columns are; where layers are shared there is one for each pass, and an index says little."""
    count, chosen = max(values.shape[1] for values in gates.values()), job.settings.config.layers
    return list(chosen if chosen is not None and len(chosen) == count else range(count))


def _draw(gates: Mapping[str, torch.Tensor], folder: Path, job: Job, say: Callable[[str], None]) -> str | None:
    title = f"{job.task.name} · {job.settings.method_name}"
    try:
        plot_gates(gates, folder / PICTURE, layers=_layers(job, gates), title=title)
    except ImportError as error:
        say(f"no {PICTURE}: {error}")
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
    """Everything that is needed to trust the score."""
    settings, task = job.settings, job.task
    evaluations = _evaluations(state, task)
    best = next(item for item in evaluations if item["step"] == state.best_global_step)
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
        "format": FORMAT,
        "status": "finished",
        "settings": settings.to_dict(),
        "digest": settings.digest(),
        "method": {
            "name": settings.method_name,
            "config": settings.config.to_dict(),
            "learning_rate": settings.learning_rate,
        },
        "task": {
            "name": task.name,
            "columns": list(task.columns),
            "labels": list(task.label_names),
            "metrics": list(task.metrics),
            "primary": task.primary,
            "notes": job.notes,
        },
        "evaluations": evaluations,
        "best": {"epoch": best["epoch"], "step": best["step"]},
        "dev": {"loss": best["loss"], "metrics": best["metrics"]},
        "test": dict(test),
        "majority": job.majority,
        "seeds": {"run": settings.seed, "data": settings.data_seed},
        "data": job.data,
        "model": {
            "name": settings.model,
            "class": type(job.model).__name__,
            "sha256": job.model_sha256,
            "fingerprint": base["fingerprint"],
            "config": base["config"],
            "tokenizer": tokenizer_sha256(job.tokenizer),
        },
        "parameters": asdict(unipelt.parameter_counts(job.model)),
        "gates": means,
        "seconds": dict(progress.seconds),
        "memory": peak_memory(job.device),
        "hardware": describe_hardware(job.device),
        "packages": describe_packages(),
        "code": describe_code(),
        "attempts": progress.attempts,
        "files": dict(files),
    }


def _evaluations(state: TrainerState, task: Task) -> list[dict[str, Any]]:
    """Every evaluation on the dev set, in order, with the train loss of its epoch."""
    train = {entry["step"]: entry for entry in state.log_history if "loss" in entry}
    return [
        {
            "epoch": entry["epoch"],
            "step": entry["step"],
            "loss": entry["eval_loss"],
            "train_loss": train[entry["step"]]["loss"],
            "metrics": {name: entry[f"eval_{name}"] for name in task.metrics},
        }
        for entry in state.log_history
        if "eval_loss" in entry
    ]
