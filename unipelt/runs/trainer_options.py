"""The options for `transformers.Trainer` that the settings of a run accept (`trainer: {...}`), and their check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from unipelt.config.schema import ConfigError
from unipelt.files.messages import show, suggest

OURS = {
    "output_dir": "output_dir",
    "overwrite_output_dir": "overwrite",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "learning_rate": "learning_rate",
    "weight_decay": "weight_decay",
    "warmup_ratio": "warmup_ratio",
    "max_grad_norm": "max_grad_norm",
    "seed": "seed",
    "bf16": "precision",
    "use_cpu": "device",
    "no_cuda": "device",
    "dataloader_num_workers": "num_workers",
    "do_predict": "do_predict",
    "generation_max_length": "max_target_length",
    "generation_num_beams": "beams",
    **dict.fromkeys(("gradient_checkpointing", "gradient_checkpointing_kwargs"), "gradient_checkpointing"),
    **dict.fromkeys(("activation_checkpointing", "activation_checkpointing_kwargs"), "gradient_checkpointing"),
}
"""Options of Trainer that are settings of a run, with the names of these settings."""

_CHECKPOINTS = "a run writes a checkpoint at every evaluation; trainer.eval_steps says when that is"
_BEST = "a run keeps the checkpoint with the best dev score of its task"
_ALIKE = "a run that goes on after a stop must end as one that was not stopped"
_SCORES = "a run computes its scores over the whole dev set"
_COLUMNS = "a run makes the columns of its data itself"
_ONE = "a run shares its batches among its processes itself"
FIXED = {
    **dict.fromkeys(("do_train", "do_eval"), "a run always trains and evaluates"),
    "resume_from_checkpoint": "a run goes on from its last checkpoint when the same command is given again",
    **dict.fromkeys(("save_strategy", "save_steps", "save_total_limit", "save_only_model"), _CHECKPOINTS),
    **dict.fromkeys(("save_on_each_node", "enable_jit_checkpoint"), _CHECKPOINTS),
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), _BEST),
    "eval_delay": _BEST,
    **dict.fromkeys(("restore_callback_states_from_checkpoint", "ignore_data_skip"), _ALIKE),
    **dict.fromkeys(("prediction_loss_only", "batch_eval_metrics", "include_for_metrics"), _SCORES),
    **dict.fromkeys(("eval_do_concat_batches", "eval_use_gather_object", "predict_with_generate"), _SCORES),
    "generation_config": "beams and max_target_length say how a translation is searched for",
    **dict.fromkeys(("remove_unused_columns", "label_names"), _COLUMNS),
    "logging_nan_inf_filter": "a run stops at the first loss that is not finite",
    "auto_find_batch_size": "the record must hold the batch size that was trained with",
    "hub_token": "the record would hold the token; log in with `hf auth login` instead",
    **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed", "parallelism_config", "local_rank", "ddp_timeout"), _ONE),
    **dict.fromkeys(("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"), _ONE),
    **dict.fromkeys(("ddp_static_graph", "ddp_backend", "average_tokens_across_devices"), _ONE),
}
"""Options of Trainer that a run sets itself, with the reasons."""

PUBLISHING = (
    "report_to",
    "push_to_hub",
    *(f"hub_{name}" for name in ("model_id", "strategy", "private_repo", "always_push", "revision")),
)
"""Options of Trainer that send data elsewhere and change no number. A rerun leaves them out."""

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", dict: "a mapping"}
_KINDS |= {list: "a list"}


def check_options(options: Any, kind: str) -> dict[str, Any] | None:
    """Check options for Trainer by name, type and choice.

    Trainer's arguments are not made. Transformers is imported only if there are options.

    Args:
        options: a mapping from names of `TrainingArguments` to plain values, or None. An option with the value None has
            its default.
        kind: the name of the class of Trainer's arguments in `transformers`.

    Returns:
        The options that have a value; None if there are none.

    Raises:
        ConfigError: a name is unknown or is set by the run, or a value has the wrong type.
    """
    if options is None:
        return None
    if not isinstance(options, Mapping):
        raise ConfigError(f"trainer must be a mapping of options for Trainer to values, not {show(options)}")
    options = {name: value for name, value in options.items() if value is not None}
    if not options:
        return None
    import transformers

    arguments = getattr(transformers, kind)
    hints = get_type_hints(arguments)
    known = [item.name for item in fields(arguments)]
    for name, value in options.items():
        if name in OURS:
            raise ConfigError(f"trainer.{name} is the setting {OURS[name]} of a run; give {OURS[name]} instead")
        if name in FIXED:
            raise ConfigError(f"trainer.{name} is set by the run itself: {FIXED[name]}; leave it out")
        if name not in known:
            raise ConfigError(f"unknown option {show(f'trainer.{name}')}; {_guess(str(name), known)}")
        _check_value(name, value, hints[name])
    _check_together(options)
    return options


def step_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that set when Trainer logs, evaluates and writes checkpoints.

    This is after each epoch, or at the steps that the options name.

    Args:
        options: the options that `check_options` returns.
    """
    evaluate = options.get("eval_strategy") or ("steps" if options.get("eval_steps") else "epoch")
    log = "steps" if options.get("logging_steps") else evaluate
    found = {"eval_strategy": evaluate, "save_strategy": evaluate, "logging_strategy": log}
    if evaluate == "steps":
        found["save_steps"] = options["eval_steps"]
        if log == "steps" and "logging_steps" not in options:
            found["logging_steps"] = options["eval_steps"]
    return found


def check_joint(options: Mapping[str, Any], processes: int) -> None:
    """Check that a run of this number of processes can do what the options say.

    Raises:
        ConfigError: an option makes each process draw other batches.
    """
    if processes == 1:
        return
    strategy = str(options.get("train_sampling_strategy") or "random")
    refused = [name for name in ("group_by_length", "accelerator_config") if options.get(name)]
    if strategy not in ("random", "sequential"):
        refused.append("train_sampling_strategy")
    if refused:
        raise ConfigError(
            f"trainer.{refused[0]} is for a run of one process, and here are {processes}, which all draw the same "
            "batches; leave it out"
        )


def check_trackers(names: list[str]) -> None:
    """Check that the packages of these trackers are installed.

    Raises:
        ConfigError: a package is not installed.
    """
    if not names:
        return
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    ready = [*get_available_reporting_integrations(), "flyte"]  # Transformers' list never holds flyte
    for name in names:
        if name not in ready:
            command = f" (pip install {name})" if name in ("tensorboard", "wandb", "mlflow", "trackio") else ""
            raise ConfigError(
                f"trainer.report_to names {name}, whose package is not installed here; install it{command}, or leave "
                "the name out"
            )


def _check_value(name: str, value: Any, hint: Any) -> None:
    choices = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for choice in choices:
        if isinstance(choice, type) and issubclass(choice, Enum):
            values = [str(item.value) for item in choice]
            if value not in values:
                raise ConfigError(f"trainer.{name} is {show(value)}; {_guess(str(value), values)}")
            return
    kinds = [kind for kind in (get_origin(choice) or choice for choice in choices) if kind in _KINDS]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    meant = not number or abs(value) < 2**63  # false for NaN
    if not (meant and (type(value) in kinds or (number and float in kinds))):
        wanted = " or ".join(_KINDS[kind] for kind in kinds)
        raise ConfigError(f"trainer.{name} must be {wanted or 'left out'}, not {show(value)}")


def _check_together(options: Mapping[str, Any]) -> None:
    """Check the values and combinations of Trainer's options that their types do not exclude."""
    if options.get("eval_strategy") == "no":
        raise ConfigError(f"trainer.eval_strategy cannot be no: {_BEST}; take epoch or steps")
    if options.get("eval_strategy") == "steps" and not options.get("eval_steps"):
        raise ConfigError("trainer.eval_strategy steps needs trainer.eval_steps, the number of steps")
    if options.get("eval_strategy") == "epoch" and options.get("eval_steps"):
        raise ConfigError("trainer.eval_steps goes with trainer.eval_strategy steps, not epoch; leave one of them out")
    for name in ("eval_steps", "logging_steps", "gradient_accumulation_steps"):
        value = options.get(name, 1)
        if value is not None and value <= 0:
            raise ConfigError(f"trainer.{name} must be above 0, not {show(value)}")
    if not 0 <= options.get("label_smoothing_factor", 0) < 1:
        raise ConfigError(
            "trainer.label_smoothing_factor must be at least 0 and below 1, not "
            f"{show(options['label_smoothing_factor'])}"
        )
    if options.get("push_to_hub") and not options.get("hub_model_id"):
        raise ConfigError("trainer.push_to_hub needs trainer.hub_model_id, the name of the repository")
    if str(options.get("hub_strategy")) in ("checkpoint", "all_checkpoints"):
        raise ConfigError(
            "trainer.hub_strategy cannot upload checkpoints, because a run removes them while it trains; take "
            "every_save or end"
        )
    trackers = options.get("report_to") or []
    from transformers.integrations import integration_utils

    known = [*integration_utils.INTEGRATION_TO_CALLBACK, "all", "none"]
    for name in [trackers] if isinstance(trackers, str) else trackers:
        if name not in known:
            raise ConfigError(f"trainer.report_to names {show(name)}; {_guess(str(name), known)}")


def _guess(name: str, known: list[str]) -> str:
    if len(known) > 20:
        return suggest(name, known, "the options are those of transformers.TrainingArguments")
    return f"{suggest(name, known)} possible are {', '.join(known)}".lstrip()
