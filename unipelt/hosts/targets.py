"""The targets of submodules in a model: projections, and the places of terms, in its attentions, layers and stacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unipelt.config.parts import AnyPlace, LoRAConfig, Place
from unipelt.config.submodule import SubmoduleConfig
from unipelt.hosts.description import Attention, Stack
from unipelt.submodules.outputs import OutputSlice

ENTRY_PLACES = ("query", "value")
"""Places whose plain low-rank terms read the attention's input, and share the matrix product of its entry."""
IN_ATTENTION = ("query", "key", "value", "attention")
"""Places of terms inside an attention, also inside cross-attention."""


@dataclass(frozen=True)
class Projection:
    """A projection of a layer, one of its norms, or the whole layer.

    Attributes:
        module: the module that computes the projection.
        path: path of the module, from the layer; empty for the layer itself.
        inputs: width of the module's input.
        rows: which outputs of the module are the projection's.
        template: a module in the layer whose weight has the type and the device of new parameters, if `module` has no
            weight of its own; else None.
    """

    module: Any
    path: str
    inputs: int
    rows: OutputSlice
    template: Any = None

    @property
    def beside(self) -> Any:
        """The module whose weight has the type and the device of new parameters."""
        return self.module if self.template is None else self.template


@dataclass(frozen=True)
class TermTarget:
    """The place where a submodule adds a term.

    Attributes:
        config: configuration of the submodule.
        place: name of the place.
        projection: the projection to whose output the term is added; at the place `activation`, to whose input.
        inputs: width of the tensor that the term reads.
        reader: path of another projection whose input the term reads; empty if the term reads that of `projection`.
        crosses: whether the term reads the other stack's output, and not the input of its attention.
        in_cross: whether the term is in a decoder's attention to the encoder.
        serves_positions: whether the projection is also called on relative positions.
        number: the number of the target in the layer, from 1, at a place of which a layer may have several; else 0.
    """

    config: SubmoduleConfig | LoRAConfig
    place: AnyPlace
    projection: Projection
    inputs: int
    reader: str = ""
    crosses: bool = False
    in_cross: bool = False
    serves_positions: bool = False
    number: int = 0

    @property
    def name(self) -> str:
        """The name of the term in its set; the stack's label and this name make the name of its gate."""
        return f"{self.config.name}_{self.place}{self.number or ''}"

    @property
    def in_attention(self) -> bool:
        """Whether the term is inside an attention."""
        return self.place in IN_ATTENTION


@dataclass(frozen=True)
class AttentionTargets:
    """The targets in one attention, found and checked before the model changes.

    Attributes:
        module: the attention.
        described: description of the attention, with the paths of its parts.
        query, value: the projections of queries and of values.
        readers: paths of the projections that read the attention's input, from the layer; the query's is first.
        key_path: path of the key projection, from the layer, if a prefix lengthens the text; else empty.
    """

    module: Any
    described: Attention
    query: Projection
    value: Projection
    readers: tuple[str, ...]
    key_path: str = ""

    def term(self, lora: LoRAConfig, place: Place, projection: Projection, *, in_cross: bool) -> TermTarget:
        """Return the target of a low-rank term of queries or values."""
        return TermTarget(
            lora,
            place,
            projection,
            projection.inputs,
            crosses=in_cross and place == "value",
            in_cross=in_cross,
            serves_positions=self.described.query_serves_positions and place == "query",
        )


@dataclass(frozen=True)
class LayerTargets:
    """The targets in one layer, found and checked before the model changes; None for parts that take no submodule.

    Attributes:
        module: the layer.
        attention: targets in the self-attention.
        cross: targets in the cross-attention.
        adapted: the norm after the feed-forward network (post-LN), or the module whose output is added to the residual
            (pre-LN).
        adapted_path: path of that module, from the layer.
        width: width of the states that an adapter reads.
        sized: a projection whose dtype and device the adapter takes.
        terms: targets of further submodules.
        low_rank: targets of LoRA, except the plain terms of queries and values.
    """

    module: Any
    attention: AttentionTargets | None
    cross: AttentionTargets | None
    adapted: Any
    adapted_path: str
    width: int
    sized: Projection | None
    terms: tuple[TermTarget, ...] = ()
    low_rank: tuple[TermTarget, ...] = ()


@dataclass(frozen=True)
class StackTargets:
    """A stack of a model, with its targets.

    Attributes:
        stack: description of the stack.
        owner: the module that owns the list of layers, and later the networks of the layers' prefixes.
        layers: targets of the layers that get submodules, by index.
        causal: whether a token attends only to itself and earlier tokens.
        label, cross_label: start of the names of gates; the second is for gates in cross-attention.
    """

    stack: Stack
    owner: Any
    layers: Mapping[int, LayerTargets]
    causal: bool
    label: str
    cross_label: str = "cross."
