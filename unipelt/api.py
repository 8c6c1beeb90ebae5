"""Put submodules into a pretrained model and take them out again: select, attach, count, freeze."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from unipelt.checkpoint.bind import bind
from unipelt.config.methods import UniPELTConfig
from unipelt.config.presets import resolve
from unipelt.injection.inject import check_memory, inject_as, start_from_weights


def inject(
    model: PreTrainedModel, config: str | Path | Mapping[str, Any] | UniPELTConfig = "unipelt-apl"
) -> PreTrainedModel:
    """Add gated Adapter, Prefix and LoRA modules to a pretrained model, in place, and freeze what does not train.

    The model stays the same `PreTrainedModel`: its own parameters keep their names, and `Trainer`, pipelines,
    accelerate and `copy.deepcopy` work as before. `model.save_pretrained` then writes what `unipelt.save` writes, and
    `model.push_to_hub` uploads what `unipelt.push_to_hub` uploads.

    Args:
        model: a model of Transformers, or of your own (`unipelt.register_family`), with or without a head. A part
            that its checkpoint did not hold (a pooler that starts at random) trains with the head; the head of a
            language model, tied to its embeddings or not, belongs to what was pretrained and is frozen.
        config: a preset's name (`unipelt.PRESETS`), a `UniPELTConfig`, a dict, or a path to JSON or YAML.

    Returns:
        The same model.

    Raises:
        ConfigError: the configuration cannot be meant.
        InjectionError: the model carries submodules already, is of an architecture that is not described, or cannot
            take one of them; the message says why.
    """
    resolved = resolve(config)
    if isinstance(model, PreTrainedModel):
        check_memory(model)
    inject_as(model, resolved, deployed=False, head=None)
    bind(model)
    if resolved.lora is not None and resolved.lora.start == "pissa":
        start_from_weights(model, resolved.lora)
    return model
