"""Checks of what several tasks on one base can share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from unipelt.config.methods import UniPELTConfig
from unipelt.hosts.locate import InjectionError
from unipelt.submodules.room import rooms


def check_bare(model: PreTrainedModel) -> None:
    """Raise `InjectionError` if a model carries submodules."""
    if getattr(model, "unipelt_injection", None) is not None or any(True for _ in rooms(model)):
        raise InjectionError(
            "this model carries submodules already; save them (unipelt.save), call unipelt.remove(model), and load "
            "them as a task"
        )


def changes_base(config: UniPELTConfig) -> str | None:
    """Return the reason why a method cannot share its base with other tasks, or None."""
    method = "train_base (fine-tuning)" if config.train_base else "bitfit" if config.bitfit else ""
    if method:
        return f"{method} changes parameters of the base; inject it into a model of its own"
    return None if config.has_submodules else "it adds no submodules; name some, or call the base model itself"


def check_mixed(model: PreTrainedModel, batch: Mapping[str, Any]) -> None:
    """Raise `ValueError` if a batch of several tasks needs a feature that it does not have."""
    for name in ("past_key_values", "use_cache", "output_attentions", "encoder_outputs", "cache_position"):
        if batch.get(name) is not None and batch[name] is not False:
            raise ValueError(f"a batch that mixes tasks takes no {name}; run one task at a time, tasks[name](...)")
    if batch.get("return_dict") is False or getattr(model.config, "return_dict", True) is False:
        raise ValueError("a batch that mixes tasks gives a MixedOutput; leave return_dict=False out")
    if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError(
            "gradient checkpointing computes layers again when rows' tasks are no longer known; switch it off "
            "(gradient_checkpointing_disable), or train with one task a batch"
        )
