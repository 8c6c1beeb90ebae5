"""The size of a model's vocabulary compared with that of its base, and the parameters that hold the vocabulary."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from unipelt.hosts.quantised import is_quantised

_FIELDS = ("vocab_size", "decoder_vocab_size")


def vocabulary_sizes(config: PreTrainedConfig) -> dict[str, int]:
    """Return the vocabulary sizes of a configuration, in rows, by field."""
    text: Any = config.get_text_config()
    found = {name: getattr(text, name, None) for name in _FIELDS}
    return {name: size for name, size in found.items() if type(size) is int}


def base_vocabulary_sizes(config: PreTrainedConfig, name: str, **options: Any) -> dict[str, int] | None:
    """Return the vocabulary sizes of a pretrained base, in rows, from its own `config.json`.

    Args:
        config: configuration of the same class as the base's.
        name: a folder, or a model on the hub.
        options: arguments for the configuration's `from_pretrained` (`revision`, `token`, `local_files_only`, …).

    Returns:
        The sizes by field; None if the file cannot be read.
    """
    try:
        values, _ = type(config).get_config_dict(name, **options)
        if not any(field in values for field in ("model_type", *_FIELDS)):
            return None  # a folder without the file, such as one of a GGUF file, gives an empty mapping
        return vocabulary_sizes(type(config).from_pretrained(name, **options))
    except Exception:  # no file, no network, or a file of another class
        return None


def resized_vocabulary(model: PreTrainedModel) -> frozenset[str]:
    """Return the names of the parameters that hold a vocabulary with more or fewer rows than that of the base.

    These are parameters of the input embedding and the output head that are not quantised. The size of the base's
    vocabulary is read from its `config.json`, in its folder or in the hub's local cache, never over the network. The
    set is empty if that file cannot be read.
    """
    name = model.config._name_or_path
    here = vocabulary_sizes(model.config)
    if not name or not here:
        return frozenset()
    revision = getattr(model.config, "_commit_hash", None) or "main"
    there = base_vocabulary_sizes(model.config, name, revision=revision, local_files_only=True)
    if there is None or there == here:
        return frozenset()
    holders = (model.get_input_embeddings(), model.get_output_embeddings())
    held = {id(parameter) for one in holders if isinstance(one, nn.Module) for parameter in one.parameters()}
    return frozenset(
        name for name, parameter in model.named_parameters() if id(parameter) in held and not is_quantised(parameter)
    )
