"""The rows of a model's vocabulary: whether they are those of its base, and which parameters hold them."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from unipelt.hosts.quantised import is_quantised

_FIELDS = ("vocab_size", "decoder_vocab_size")


def vocabulary_sizes(config: PreTrainedConfig) -> dict[str, int]:
    """Return the numbers of rows that a configuration names, by field."""
    text: Any = config.get_text_config()
    found = {name: getattr(text, name, None) for name in _FIELDS}
    return {name: size for name, size in found.items() if type(size) is int}


def base_vocabulary_sizes(config: PreTrainedConfig, name: str, **options: Any) -> dict[str, int] | None:
    """Return the numbers of rows of a pretrained base, from its own `config.json`.

    Args:
        config: of a model of the same class.
        name: a folder, or a model on the hub.
        options: passed on to the configuration's `from_pretrained` (`revision`, `token`, `local_files_only`, …).

    Returns:
        None where the file is not to be had.
    """
    try:
        return vocabulary_sizes(type(config).from_pretrained(name, **options))
    except Exception:  # no file, no network, a file of another class: nothing is known then
        return None


def resized_vocabulary(model: PreTrainedModel) -> frozenset[str]:
    """Return the names of the parameters that hold a vocabulary with more or fewer rows than that of the base.

    These are the input embedding and the output head. The base is asked by its `config.json`, in its folder or in the
    hub's cache; the hub itself is not asked. The set is empty for a base of which no file is known.
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
    held = {id(parameter) for module in holders if module is not None for parameter in module.parameters()}
    return frozenset(
        name for name, parameter in model.named_parameters() if id(parameter) in held and not is_quantised(parameter)
    )
