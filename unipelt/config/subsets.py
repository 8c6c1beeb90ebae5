"""Subsets of the submodules of a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from unipelt.config.methods import UniPELTConfig

_OF_LAYERS = ("adapter", "prefix", "lora")


def narrowed(config: UniPELTConfig, names: Sequence[str]) -> UniPELTConfig:
    """Return the configuration with only the submodules of these names."""
    more = tuple(part for part in config.more if part.name in names)
    # dropout is for the submodules of layers, and a configuration without any refuses it
    layered = more or any(name in names for name in _OF_LAYERS)
    return replace(
        config,
        adapter=config.adapter if "adapter" in names else None,
        prefix=config.prefix if "prefix" in names else None,
        lora=config.lora if "lora" in names else None,
        prompt=config.prompt if "prompt" in names else None,
        more=more,
        gate=config.gate if layered else replace(config.gate, dropout=0.0, dropout_by="batch"),
    )


def refusal_of_select(config: UniPELTConfig) -> str | None:
    """Return why `unipelt.select` cannot choose between the submodules of a configuration, or None if it can."""
    names = config.submodule_names
    if len(names) < 2:
        return f"select chooses between two submodules or more, and this method has {', '.join(names) or 'none'}"
    if config.gate.activation == "softmax":
        return (
            "select removes submodules, and with gate.activation: softmax that changes the gates of the others; take "
            "sigmoid or tanh"
        )
    return None
