"""Where things live in each architecture: data only, and the only file that knows architecture names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stack:
    """A stack of Transformer layers, and where each layer keeps what submodules attach to.

    Attributes:
        layers: path of the list of layers, from the base model.
        attention: path of the self-attention, from a layer; it is called with the states that its projections read,
            and calls Transformers' attention interface.
        query, value: names of the projections, in the attention.
        norm: path of the LayerNorm after the feed-forward network, from a layer; its input is output plus residual.
    """

    layers: str
    attention: str
    query: str
    value: str
    norm: str


_BERT = Stack("encoder.layer", "attention.self", "query", "value", "output.LayerNorm")

FAMILIES: dict[str, Stack] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
}
"""By `config.model_type`."""
