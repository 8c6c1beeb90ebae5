"""Data classes for the description of an architecture, and reasons that several architectures share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Attention:
    """An attention module, and the paths of its projections.

    The module gets the hidden states that its query projection reads as the first argument, or as the argument
    `hidden`. For a prefix without `bias`, the module must pass queries, keys and values to Transformers' attention
    interface (`ALL_ATTENTION_FUNCTIONS`), by the name in its own `config._attn_implementation`.

    Attributes:
        path: path of the module, from a layer.
        query, value: paths of the projections, from the attention; equal if one module computes both.
        key: path of the key projection, from the attention. An empty path means the path `value` if that projection is
            fused; otherwise nothing can be added to the keys.
        output: path of the projection that ends the attention, from the layer. With an empty path, nothing can be added
            there.
        fused: layout of the outputs of the module at `value`; empty if these are values alone. `qkv`: queries, keys and
            values side by side; `kv`: keys and values; `heads`: queries, keys and values of one head, then of the next;
            `groups`: for each head of keys, the queries of all heads that share the keys, then the keys and the values;
            `latent`: first the outputs from which both keys and values are computed, then those for keys alone.
        bias: name of the argument that is added to the logits besides the mask. Only for an attention that does not use
            the interface, and that gets all positions by this argument. A prefix then makes the text longer.
        hidden: name of the argument with the hidden states.
        mask: name of the argument with the mask.
        query_serves_positions: whether a pass calls the projections of queries and keys again, on relative positions.
            A gated term skips that call, because its gate belongs to a text.
        mask_is_truth_values: whether the attention reads a floating-point mask as booleans, and does not add the mask
            to the logits.
        mask_is_added: whether the attention adds a mask with 2 dimensions to the logits, and does not read it as
            booleans.
        value_apart: whether the projection of values reads another argument than that of queries, for the same text.
            Its gate reads the input of the projection of queries.
        tokens_first: whether the projections of queries, keys and values read and return tensors with the tokens in
            front of the examples.
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
    mask_is_added: bool = False
    value_apart: bool = False
    tokens_first: bool = False


WITHOUT_ATTENTION = Attention("", "", "")
"""The attention of a stack whose layers have none, such as a state-space model. Only an adapter goes there."""


@dataclass(frozen=True)
class Stack:
    """A stack of Transformer layers, and the paths of the modules that submodules attach to.

    A stack has exactly one of `norm`, `output` and `unjoined`.

    Attributes:
        layers: path of the list of layers, from the base model; `*` stands for every item of a list.
        attention: the self-attention, or `WITHOUT_ATTENTION`.
        norm: path of the normalisation whose input is the feed-forward network's output plus the residual (post-LN),
            from a layer.
        output: path of the module whose output the feed-forward network adds to the residual (pre-LN), from a layer.
        up, down: paths of the first and the last projection of the feed-forward network, from a layer; `|` separates
            paths of which a layer has one. With an empty path, nothing can be added there.
        causal: whether a token attends only to itself and earlier tokens.
        cross: the attention to another stack's output, or None.
        gate: path of the projection whose activation scales the output of `up`, written as `up` is.
        unjoined: the reason why an adapter has no place.
        missing: name of a part (`up`, `down`) -> the reason why some or all layers do not have the part.
        width: path of a module, from a layer, whose outputs are as wide as the states that an adapter reads; empty if
            these are as wide as the input of the attention's projections.
        adapted: what the module at `output` ends. In a layer without a feed-forward network it is `attention`, or
            `mixer` for a state-space layer beside the attention.
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
    width: str = ""
    adapted: Literal["feed_forward", "attention", "mixer"] = "feed_forward"

    def __post_init__(self) -> None:
        if bool(self.norm) + bool(self.output) + bool(self.unjoined) != 1:
            raise ValueError("a Stack has either norm (post-LN) or output (pre-LN), not both and not neither")
        if self.attention == WITHOUT_ATTENTION and not (self.output and self.width):
            raise ValueError("a Stack without attention has an output, and a width that says how wide an adapter is")


@dataclass(frozen=True)
class Family:
    """An architecture.

    Attributes:
        stacks: one stack, or an encoder and then a decoder.
        refused: submodule (`adapter`, `prefix`, `lora`) -> the reason why this architecture cannot take the submodule.
    """

    stacks: tuple[Stack, ...]
    refused: Mapping[str, str] = field(default_factory=dict)


NO_ATTENTION = "its layers have no attention"
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
NO_NETWORK = "its layers with attention have no feed-forward network"
DISENTANGLED = (
    "disentangled attention scores every key by its relative position to the query, and a prefix has no position"
)
