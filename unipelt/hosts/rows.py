"""Layouts of fused projections (the outputs that are queries, keys or values), and widths of modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from unipelt.hosts.description import Attention
from unipelt.submodules.outputs import OutputSlice


def rows_of(described: Attention, place: str, outputs: int, config: PreTrainedConfig) -> OutputSlice:
    """Return which outputs of a module are the queries, the keys or the values.

    Args:
        described: description of the attention.
        place: `query`, `key` or `value`.
        outputs: number of outputs of the module.
        config: configuration of the model; its numbers of heads divide the outputs.
    """
    path = {"query": described.query, "value": described.value, "key": described.key or described.value}[place]
    if not described.fused or path != described.value:
        return OutputSlice(1, 0, outputs)
    config = config.get_text_config()
    if described.fused == "latent":
        both = min(outputs, getattr(config, "kv_lora_rank", None) or outputs)
        return OutputSlice(1, 0, both if place == "value" else outputs)
    heads, order = config.num_attention_heads, ("query", "key", "value").index(place)
    of_keys = key_heads(config)
    if described.fused == "heads":
        size = outputs // (3 * heads)
        return OutputSlice(heads, order * size, size)
    if described.fused == "groups":
        size = outputs // (heads + 2 * of_keys)
        queries = heads // of_keys * size
        if place == "query":
            return OutputSlice(of_keys, 0, queries)
        return OutputSlice(of_keys, queries + (order - 1) * size, size)
    # `qkv` and `kv`: the heads of queries (in `qkv` alone), then all heads of keys, then all heads of values
    before = heads if described.fused == "qkv" else 0
    size = outputs // (before + 2 * of_keys)
    if place == "query":
        return OutputSlice(1, 0, heads * size)
    return OutputSlice(1, (before + (order - 1) * of_keys) * size, of_keys * size)


def width_of(module: nn.Module) -> int | None:
    """Return the number of outputs of a projection or a norm; None for any other module."""
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, Conv1D):
        return int(module.nf)
    weight = getattr(module, "weight", None)
    return len(weight) if isinstance(weight, Tensor) and weight.dim() == 1 else None


def key_heads(config: Any) -> int:
    """Return the number of heads of keys and values in a model: 1 in multi-query attention."""
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    named = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None)
    named = named or getattr(getattr(config, "attn_config", None), "kv_n_heads", None)
    return int(named or config.num_attention_heads)
