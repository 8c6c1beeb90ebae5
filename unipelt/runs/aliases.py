"""Option names of Transformers' scripts, and the settings of a run that they stand for.

A usual option, below, is an option of these scripts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from unipelt.config.schema import ConfigError
from unipelt.files.messages import show
from unipelt.files.strict import PlainError, parse_yaml

SAME = (
    *("train_file", "test_file", "pad_to_max_length", "output_dir", "do_predict", "learning_rate", "weight_decay"),
    *("max_grad_norm", "warmup_ratio", "seed", "gradient_checkpointing"),
)
"""Usual options that are settings of a run with the same name."""

ALIASES = {
    "model_name_or_path": "model",
    "task_name": "task",
    "max_seq_length": "max_length",
    "max_train_samples": "train_samples",
    "max_eval_samples": "dev_samples",
    "validation_file": "dev_file",
    "overwrite_output_dir": "overwrite",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "dataloader_num_workers": "num_workers",
}
"""Usual options that are settings of a run with another name."""

TRAINERS = (
    *("gradient_accumulation_steps", "lr_scheduler_type", "warmup_steps", "label_smoothing_factor", "optim"),
    *("logging_steps", "eval_strategy", "eval_steps", "report_to", "run_name", "push_to_hub", "hub_model_id"),
    *("torch_compile", "fp16"),
)
"""Usual options that go to Trainer as `trainer.NAME`."""


@dataclass(frozen=True)
class Switch:
    """A usual option that is true or false.

    Attributes:
        setting: the setting of a run that the option stands for; None if a run always does what the option says.
        on: the value of that setting if the option is true.
        off: the value of that setting if the option is false.
        reason: the reason why the option cannot be false; empty if it can.
    """

    setting: str | None
    on: str | None = None
    off: str | None = None
    reason: str = ""


SWITCHES = {
    "do_train": Switch(None, reason="a run always trains; `unipelt.from_pretrained` loads what an earlier one left"),
    "do_eval": Switch(None, reason="a run needs its evaluations on the dev set to choose the best checkpoint"),
    "bf16": Switch("precision", "bf16", "fp32"),
    "use_cpu": Switch("device", "cpu", "auto"),
}
"""Usual options that are true or false. Each stands for a value of a setting."""

NOT_TAKEN = {
    "dataset_name": "name a GLUE task, or give train_file and dev_file",
    "dataset_config_name": "name a GLUE task, or give train_file and dev_file",
    "overwrite_cache": "texts are made into tokens anew in every run, and nothing is kept",
    "max_predict_samples": "do_predict predicts every row; test_samples limits the rows that are tested",
    "config_name": "the configuration is that of the model",
    "tokenizer_name": "the tokenizer is that of the model",
    "cache_dir": "set the variable HF_HOME",
    "use_fast_tokenizer": "a run takes the fast tokenizer of the model",
    "model_revision": "download that revision, and give its folder as model",
    "token": "log in with `hf auth login`",
    "trust_remote_code": "code from the hub is never run",
    "ignore_mismatched_sizes": "a run makes a new head for its task where the model has none that fits",
    "save_strategy": "a checkpoint is written at every evaluation; eval_steps says when that is",
    "save_steps": "a checkpoint is written at every evaluation; eval_steps says when that is",
    "save_total_limit": "a run keeps its last and its best checkpoint while it trains",
    "load_best_model_at_end": "a run always takes its best checkpoint",
    "metric_for_best_model": "the first metric of the task chooses the best checkpoint",
}
"""Usual options that are not accepted, and the remedy for each."""


def names_of(kind: type[Any]) -> dict[str, str]:
    """Return the name of the setting of this class for each usual option.

    An option of Trainer has the name `trainer.NAME`. The name is empty if a run always does what the option says.
    Options without a setting in this class are left out.
    """
    known = {item.name for item in fields(kind)}
    found = {name: setting for name, setting in ALIASES.items() if setting in known}
    found |= {name: f"trainer.{name}" for name in TRAINERS}
    return found | {name: switch.setting or "" for name, switch in SWITCHES.items()}


def own_names(values: Mapping[str, Any], kind: type[Any]) -> dict[str, Any]:
    """Return values under the names of a run's settings.

    Args:
        values: the values of a file or of the command line, by name. An option of Trainer has the name `trainer.NAME`.
        kind: the class of the settings.

    Raises:
        ConfigError: two names of one setting are given, or a switch has an invalid value.
    """
    names = names_of(kind)
    found: dict[str, Any] = {}
    from_: dict[str, str] = {}
    inside = values.get("trainer")
    for name, value in values.items():
        own = names.get(name, name)
        if name in SWITCHES:
            value = _switched(name, value)
        if name in names and own.startswith("trainer.") and isinstance(inside, Mapping) and name in inside:
            raise ConfigError(f"{name} is another name of {own}, and both are given; leave one of them out")
        if own in from_:
            one, other = sorted((from_[own], name), key=lambda each: each == own)
            raise ConfigError(f"{one} is another name of {other}, and both are given; leave one of them out")
        if own or name not in names:  # a run always does the rest, so no setting holds it
            found[own], from_[own] = value, name
    return found


def refuse_usual(name: str) -> None:
    """Raise `ConfigError` if this name is a usual option that is not accepted."""
    if name in NOT_TAKEN:
        raise ConfigError(f"{name} is not taken: {NOT_TAKEN[name]}")


def check_needs(names: Iterable[str], values: Mapping[str, Any], kind: type[Any]) -> None:
    """Raise `ConfigError` if a usual option was given that has no effect with these settings.

    Args:
        names: the names of the options, as given.
        values: the values of the settings, by name.
        kind: the class of the settings.
    """
    for name, needed in getattr(kind, "alias_needs", {}).items():
        if name in names and values.get(needed) is None:
            own = ALIASES[name]
            raise ConfigError(
                f"{name} is {own} here, which has no effect without {needed}: the whole dev data are evaluated; give "
                f"{needed} too, or leave {name} out"
            )


def _switched(name: str, value: Any) -> Any:
    switch = SWITCHES[name]
    if isinstance(value, str):
        try:
            value = parse_yaml(value)
        except PlainError:
            value = None
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, not {show(value)}")
    if not value and switch.reason:
        raise ConfigError(f"{name} cannot be false: {switch.reason}; leave it out")
    return switch.on if value else switch.off
