"""The arguments of Trainer for a run."""

from __future__ import annotations

import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments, get_scheduler

from unipelt.config.schema import ConfigError
from unipelt.files.messages import shorten
from unipelt.runs import processes
from unipelt.runs.errors import RunError
from unipelt.runs.folder import CHECKPOINTS
from unipelt.runs.job import Training
from unipelt.runs.settings import SettingsError
from unipelt.runs.trainer_options import check_joint, check_trackers, step_options

Arguments = TypeVar("Arguments", bound=TrainingArguments)


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
        "save_total_limit": None,  # `Marker` removes a checkpoint only after the next one is complete
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
