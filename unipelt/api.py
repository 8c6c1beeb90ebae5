"""Inject submodules into a pretrained model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from unipelt.checkpoint.bind import bind
from unipelt.config.methods import UniPELTConfig
from unipelt.config.presets import resolve
from unipelt.config.schema import ConfigError
from unipelt.injection.inject import check_memory, inject_as, start_from_weights


def inject(
    model: PreTrainedModel, config: str | Path | Mapping[str, Any] | UniPELTConfig = "unipelt-apl"
) -> PreTrainedModel:
    """Add gated Adapter, Prefix and LoRA modules to a pretrained model, in place, and set which parameters train.

    The model stays the same `PreTrainedModel`: its own parameters keep their names, and `Trainer`, pipelines,
    accelerate and `copy.deepcopy` work as before. `model.save_pretrained` then writes the checkpoint of `unipelt.save`,
    and `model.push_to_hub` uploads the files of `unipelt.push_to_hub`.

    Args:
        model: a model of Transformers, or of your own (`unipelt.register_family`), with or without a head. A part that
            its checkpoint did not hold (a pooler with random initial values) trains with the head. The head of a
            language model, tied to its embeddings or not, is pretrained and is frozen.
        config: a preset's name (`unipelt.PRESETS`), a `UniPELTConfig`, a dict, or a path to JSON or YAML.

    Returns:
        The same model. The parameters that do not train are frozen.

    Raises:
        ConfigError: the configuration is not valid.
        InjectionError: the model carries submodules already, has an architecture without a description, or cannot take
            one of the submodules; the message gives the reason.
    """
    resolved = resolve(config)
    if isinstance(model, PreTrainedModel):
        check_memory(model)
    check_experts(resolved)
    inject_as(model, resolved, deployed=False, head=None)
    bind(model)
    if resolved.lora is not None and resolved.lora.start == "pissa":
        start_from_weights(model, resolved.lora)
    return model


def check_experts(config: UniPELTConfig) -> None:
    """Raise `ConfigError` for a mixture whose frozen experts must come from trained tasks."""
    for name, part in (("adapter", config.adapter), ("lora", config.lora), *((one.name, one) for one in config.more)):
        if part is not None and part.mixture is not None and part.mixture.router == "attention":
            raise ConfigError(
                f"{name}.mixture.router: attention is over trained submodules, which are frozen; call "
                "unipelt.fuse_tasks with the tasks that have them"
            )
