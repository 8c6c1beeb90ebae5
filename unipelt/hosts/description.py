"""What a description of an architecture says: data classes, and reasons that several architectures share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Attention:
    """An attention module, and where it keeps its projections.

    It is called with the states that its query projection reads, as the first argument or by the name `hidden`, and,
    where a prefix is to enter, hands queries, keys and values to Transformers' attention interface
    (`ALL_ATTENTION_FUNCTIONS`), by the name that its own `config._attn_implementation` gives.

    Attributes:
        path: from a layer.
        query, value: paths of the projections, from the attention; equal where one module holds both.
        key: likewise; where it is not given, the name of `value` where that is fused, and else nothing that reads
            keys can be added.
        output: path of the projection that ends the attention, from the layer; where it is not given, nothing can be
            added there.
        fused: what the module at `value` computes, if more than values. `qkv`: queries, keys and values side by side;
            `kv`: keys and values; `heads`: queries, keys and values of one head, then of the next; `groups`: for each
            head of keys, the queries of all heads that share it, its keys and its values; `latent`: what keys and
            values are both computed from, and then what only keys are.
        bias: for an attention that does not use the interface and whose logits know positions only by what it is
            given: the argument that is added to them besides the mask. A prefix then makes its text longer.
        hidden: name of the argument with the states.
        mask: name of the argument with the mask.
        mask_is_truth_values: the attention reads a floating-point mask as truth values, and adds it to nothing.
        query_serves_positions: the projections of queries and keys are called again in a pass, on relative positions;
            what is gated, which belongs to a text, keeps out of that.
    """

    path: str
    query: str
    value: str
    fused: Literal["", "qkv", "kv", "heads", "groups", "latent"] = ""
    key: str = ""
    output: str = ""
    bias: str = ""
    hidden: str = "hidden_states"
    mask: str = "attention_mask"
    query_serves_positions: bool = False
    mask_is_truth_values: bool = False


@dataclass(frozen=True)
class Stack:
    """A stack of Transformer layers, and where each layer keeps what submodules attach to.

    Attributes:
        layers: path of the list of layers, from the base model; `*` stands for every item of a list.
        attention: the self-attention.
        norm: path of the normalisation whose input is the feed-forward network's output plus its residual, from a
            layer (post-LN); or
        output: path of the module whose output the feed-forward network adds to its residual (pre-LN).
        up, down: paths of the first and last projection of the feed-forward network, from a layer; `|` stands between
            names of which a layer has one. Where they are not given, nothing can be added there.
        gate: likewise, the projection whose activation scales what `up` gives.
        unjoined: in place of `norm` and `output`, why there is no place for an adapter.
        missing: name of a part (`up`, `down`) -> why some layers, or all, do not have it.
        causal: whether a token sees only those before it.
        cross: the attention to another stack's output, if there is one.
    """

    layers: str
    attention: Attention
    norm: str = ""
    output: str = ""
    up: str = ""
    down: str = ""
    causal: bool = False
    cross: Attention | None = None
    gate: str = ""
    unjoined: str = ""
    missing: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if bool(self.norm) + bool(self.output) + bool(self.unjoined) != 1:
            raise ValueError("a Stack has either norm (post-LN) or output (pre-LN), not both and not neither")


@dataclass(frozen=True)
class Family:
    """An architecture.

    Attributes:
        stacks: one, or an encoder and then a decoder.
        refused: submodule (`adapter`, `prefix`, `lora`) -> why this architecture cannot take it.
    """

    stacks: tuple[Stack, ...]
    refused: Mapping[str, str] = field(default_factory=dict)


OWN_ATTENTION = (
    "this attention computes its own softmax rather than through Transformers' attention interface, so there is no "
    "place at which a prefix could enter"
)
TWO_WIDTHS = "the heads of its keys and of its values are not as wide, and a prefix has one width for both"
KEYS_REPEATED = (
    "its attention is given other keys and values than the projection of the values has, and a prefix as wide as that "
    "projection does not fit them"
)
IN_PARTS = "its attention calls the attention interface for parts of its values, and a prefix has no such parts"
LAYERS_DIFFER = "the keys and values of its layers are of several widths, and one network makes the prefixes of all"
UNJOINED = (
    "no module gives what the feed-forward network of a layer with attention adds to the residual, and no norm reads "
    "that sum"
)
OTHER_WIDTH = "its attention reads states of another width than its feed-forward network adds to the residual"
CALLED_TWICE = "its attention computes values of two texts by one projection, and a gate belongs to one of them"
EXPERTS = "the experts of a layer keep their weights in one tensor, which is no Linear"
DISENTANGLED = (
    "disentangled attention scores every key by its relative position to the query, and a prefix has no position"
)
