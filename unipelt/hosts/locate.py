"""Find where submodules attach: every place is located and checked before anything is changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from unipelt.config.methods import LoRAConfig, Place, SubmoduleConfig, UniPELTConfig
from unipelt.hosts.check import check_adapted
from unipelt.hosts.describe import DescribeError
from unipelt.hosts.description import Attention, Stack
from unipelt.hosts.families import family_of, has, is_complete, is_registered, layers_at
from unipelt.hosts.rows import rows_of
from unipelt.injection.attention_hooks import check_back_end, uses_interface
from unipelt.submodules.lora import ENTRY, NAMES, Rows

logger = logging.get_logger(__name__)


class InjectionError(ValueError):
    """A model that cannot take these submodules; the model is as it was."""


@dataclass(frozen=True)
class Projection:
    """A projection: the module, and which of its outputs are meant. Host modules take attributes, hence `Any`."""

    module: Any
    path: str
    inputs: int
    rows: Rows


@dataclass(frozen=True)
class TermPlace:
    """Where a further submodule adds a term.

    Attributes:
        config: of the submodule.
        place: its name.
        projection: whose output the term is added to; at `activation`, whose input.
        inputs: width of what the term reads.
        reader: where that is what another projection reads, that projection; else None.
        crosses: whether it reads the other stack's output in an attention whose own input says nothing about it.
        in_cross: whether it is in a decoder's attention to the encoder.
        serves_positions: whether the projection is also called on relative positions.
    """

    config: SubmoduleConfig | LoRAConfig
    place: Place
    projection: Projection
    inputs: int
    reader: Any = None
    crosses: bool = False
    in_cross: bool = False
    serves_positions: bool = False

    @property
    def name(self) -> str:
        """The attribute of the projection that holds the term; with a prefix, the name of its gate."""
        return f"{self.config.name}_{self.place}"


@dataclass(frozen=True)
class AttentionPlace:
    """One attention's places, found and checked before anything is changed."""

    module: Any
    described: Attention
    query: Projection
    value: Projection
    key: Any = None


@dataclass(frozen=True)
class LayerPlaces:
    """One layer's places, found and checked before anything is changed; None for what the configuration leaves out.

    `terms` are of further submodules, `low_rank` those of LoRA beyond plain ones of queries and values. `adapted` is
    the norm after the feed-forward network (post-LN) or what the network adds to its residual (pre-LN).
    """

    module: Any
    attention: AttentionPlace | None
    cross: AttentionPlace | None
    adapted: Any
    terms: tuple[TermPlace, ...] = ()
    low_rank: tuple[TermPlace, ...] = ()


@dataclass(frozen=True)
class StackPlaces:
    """A stack, as it was found in a model.

    Attributes:
        owner: the module that owns the list of layers; it owns the networks of their prefixes too.
        layers: those that carry submodules, by index.
        causal: whether a token sees only those before it.
        label, cross_label: what the names of gates start with.
    """

    stack: Stack
    owner: Any
    layers: Mapping[int, LayerPlaces]
    causal: bool
    label: str
    cross_label: str = "cross."


_NAMED = {"adapter": "an adapter", "prefix": "a prefix", "lora": "LoRA"}
IN_ATTENTION = ("query", "key", "value", "attention")
"""Places of terms that an attention, one to an encoder too, has."""


def find_stacks(model: PreTrainedModel, config: UniPELTConfig) -> list[StackPlaces]:
    """The chosen layers of each stack, every place checked. Raises `InjectionError`."""
    kind = model.config.model_type
    try:
        family = family_of(model)
    except DescribeError as error:
        raise InjectionError(str(error)) from error
    if config.adapter is not None and is_registered(kind):
        try:
            check_adapted(model, family)
        except DescribeError as error:
            raise InjectionError(f"the description of {kind!r} models cannot work: {error}") from error
    for name, reason in family.refused.items():
        if config.part(name) is not None:
            raise InjectionError(f"{kind!r} models cannot take {_NAMED.get(name, name)}: {reason}")
    if config.prompt is not None and len(family.stacks) > 1:
        raise InjectionError(
            f"{kind!r} models cannot take a prompt: a decoder would read the encoder's states of it too, which is not "
            "here yet; a prefix goes there"
        )
    if config.prefix is not None:
        check_back_end(model.config._attn_implementation)
    # a model may be a part of its architecture: T5's encoder, BART's decoder
    stacks = [(stack, list(layers_at(model.base_model, stack.layers))) for stack in family.stacks]
    # there is no adapter in cross-attention
    in_attention = any(place in IN_ATTENTION for part in config.more for place in part.places)
    crossing = config.cross and (config.prefix is not None or config.lora is not None or in_attention)
    present = [(stack, layers) for stack, layers in stacks if layers]
    if not present:
        raise _built_otherwise(model, f"it has no layers at {family.stacks[0].layers!r}")
    chosen = []
    for stack, layers in present:
        if len(family.stacks) == 1:
            causal, label = stack.causal or getattr(model.config, "is_decoder", False), ""
        else:
            causal, label = stack.causal, "decoder." if stack.causal else ""
        own = config.decoder if causal else config.encoder
        cross = crossing and stack.cross is not None and (len(present) > 1 or len(family.stacks) == 1)
        if not own and not cross:
            continue
        if cross and not causal and any(stack.cross and has(layer, stack.cross.path) for layer in layers):
            raise InjectionError(
                "a stack that looks both ways cannot take submodules in cross-attention; say cross=False"
            )
        indices = _choose(model, layers, stack, config) if own else range(len(layers))
        indices = indices if config.layers is None else config.layers
        if outside := [index for index in indices if index >= len(layers)]:
            raise InjectionError(
                f"layers names {outside[0]}, but the {label.rstrip('.') or 'model'}'s {len(layers)} layers are "
                f"0 to {len(layers) - 1}"
            )
        try:
            found = {index: _find_layer(layers[index], stack, model, config, own, cross) for index in indices}
        except AttributeError as error:
            raise _built_otherwise(model, str(error)) from error
        if any(layer.attention or layer.cross for layer in found.values()):
            owner = model.base_model.get_submodule(stack.layers.partition(".*")[0].rpartition(".")[0])
            chosen.append(StackPlaces(stack, owner, found, causal, label))
    if not chosen:
        raise InjectionError(
            f"encoder={config.encoder}, decoder={config.decoder}, cross={config.cross} leave nothing of this "
            f"{type(model).__name__} to add submodules to"
        )
    return chosen


def _choose(model: PreTrainedModel, layers: Sequence[nn.Module], stack: Stack, config: UniPELTConfig) -> Sequence[int]:
    """The layers that have the attention that is described; which have not is logged, or refused where one was named.

    Raises `InjectionError`.
    """
    complete = [index for index, layer in enumerate(layers) if is_complete(layer, stack)]
    without = [index for index in range(len(layers)) if index not in complete]
    if not complete or not without:
        return range(len(layers))  # where none has it, the search says what is missing
    if config.layers is None:
        logger.warning(
            f"layers {', '.join(map(str, without))} of this {type(model).__name__} have no attention as its others "
            "have, and are left out"
        )
    elif named := [index for index in config.layers if index in without]:
        raise InjectionError(f"layers names {named[0]}, and layer {named[0]} has no attention as others have")
    return complete


def _built_otherwise(model: PreTrainedModel, what: str) -> InjectionError:
    kind = model.config.model_type
    return InjectionError(f"this {type(model).__name__} is not built as {kind!r} models are: {what}")


def _find_layer(
    layer: nn.Module, stack: Stack, model: PreTrainedModel, config: UniPELTConfig, own: bool, cross: bool
) -> LayerPlaces:
    attention = crossing = None
    if own:
        attention = _find_attention(layer, stack.attention, model, config)
    if cross and stack.cross is not None and has(layer, stack.cross.path):
        crossing = _find_attention(layer, stack.cross, model, config)
    adapted = layer.get_submodule(stack.norm or stack.output) if own and not stack.unjoined else None
    if isinstance(adapted, nn.Sequential):
        raise InjectionError(
            f"{stack.norm or stack.output} is a Sequential, which would run an adapter as one more of its steps; "
            f"describe its last one instead: '{stack.norm or stack.output}.{len(adapted) - 1}'"
        )
    if hasattr(adapted, "adapter"):
        raise InjectionError(f"{type(adapted).__name__} has an attribute 'adapter' of its own")
    found: list[tuple[TermPlace, ...]] = []
    for wanted in (_wanted_terms(config), _wanted_low_rank(config.lora)):
        terms = list(_find_terms(layer, stack, stack.attention, model, wanted)) if own else []
        if crossing and stack.cross:
            terms += _find_terms(layer, stack, stack.cross, model, wanted, in_cross=True)
        found.append(tuple(terms))
    return LayerPlaces(layer, attention, crossing, adapted, *found)


Wanted = Sequence[tuple[SubmoduleConfig | LoRAConfig, Sequence[Place]]]


def _wanted_terms(config: UniPELTConfig) -> Wanted:
    return [(part, part.places) for part in config.more]


def _wanted_low_rank(lora: LoRAConfig | None) -> Wanted:
    """All of DoRA's; of others, what is not of queries and values, which the attention itself serves."""
    if lora is None:
        return []
    return [(lora, [place for place in lora.places if lora.decomposed or f"lora_{place}" not in ENTRY])]


def _find_terms(
    layer: nn.Module,
    stack: Stack,
    described: Attention,
    model: PreTrainedModel,
    wanted: Wanted,
    in_cross: bool = False,
) -> Iterator[TermPlace]:
    """The places of submodules in one attention of a layer and, but for cross-attention, behind it."""
    for part, places in wanted:
        for place in places:
            if place in IN_ATTENTION:
                found = _find_in_attention(layer, described, place, model)
                crosses = in_cross and place in ("key", "value")
                positions = described.query_serves_positions and place in ("query", "key")
                term = TermPlace(
                    part, place, found, found.inputs, crosses=crosses, in_cross=in_cross, serves_positions=positions
                )
            elif in_cross:
                continue
            else:
                term = _find_in_feed_forward(layer, stack, part, place)
            if hasattr(term.projection.module, term.name):
                raise InjectionError(
                    f"{term.projection.path} has an attribute {term.name!r} of its own, which a submodule would replace"
                )
            yield term


def _find_in_attention(layer: nn.Module, described: Attention, place: str, model: PreTrainedModel) -> Projection:
    if place == "attention":
        return _projection(layer, _told(described.output, "output", "projection that ends the attention"))
    attention = layer.get_submodule(described.path)
    path = {"query": described.query, "value": described.value, "key": described.key}[place]
    if place == "key" and not path and described.fused:
        path = described.value
    found = _projection(attention, _told(path, "key", "projection of keys"))
    return replace(found, rows=rows_of(described, place, found.rows.count, model.config))


def _find_in_feed_forward(
    layer: nn.Module, stack: Stack, part: SubmoduleConfig | LoRAConfig, place: Place
) -> TermPlace:
    told = "projection of the feed-forward network"
    for name, path in (("up", stack.up), ("down", stack.down)):
        if name in stack.missing and not (path and has(layer, _alternative(layer, path))):
            raise InjectionError(f"this {type(layer).__name__} has no {told} at {name!r}: {stack.missing[name]}")
    up = _projection(layer, _alternative(layer, _told(stack.up, "up", f"first {told}")))
    down = _projection(layer, _alternative(layer, _told(stack.down, "down", f"last {told}")))
    if place == "up":
        return TermPlace(part, place, up, up.inputs)
    if place == "activation":
        return TermPlace(part, place, replace(down, rows=Rows(1, 0, down.inputs)), down.inputs)
    if place == "feed_forward":
        return TermPlace(part, place, down, up.inputs, reader=up.module)
    return TermPlace(part, place, down, down.inputs)


def _told(path: str, name: str, what: str) -> str:
    if not path:
        raise InjectionError(f"the description of this architecture does not say where its {what} is: give it {name!r}")
    return path


def _alternative(layer: nn.Module, paths: str) -> str:
    """The first of several paths that is there; the last, if none is."""
    *others, last = paths.split("|")
    return next((path for path in others if has(layer, path)), last)


def _find_attention(
    layer: nn.Module, described: Attention, model: PreTrainedModel, config: UniPELTConfig
) -> AttentionPlace:
    attention = layer.get_submodule(described.path)
    if taken := [name for name in ("gates", "prefix", "unipelt_site") if hasattr(attention, name)]:
        raise InjectionError(f"{type(attention).__name__} has an attribute {taken[0]!r} of its own")
    if config.prefix is not None and not described.bias and not uses_interface(attention):
        raise InjectionError(
            f"a prefix cannot enter {type(attention).__name__}: in transformers {transformers.__version__} it does not "
            "go through the attention interface (ALL_ATTENTION_FUNCTIONS, by the name in its own config)"
        )
    return AttentionPlace(
        attention,
        described,
        _find_projection(attention, described, "query", model),
        _find_projection(attention, described, "value", model),
        attention.get_submodule(described.key) if described.bias else None,
    )


def _find_projection(attention: Any, described: Attention, place: str, model: PreTrainedModel) -> Projection:
    found = _projection(attention, described.query if place == "query" else described.value)
    if taken := [name for name in (*NAMES, "unipelt_rows") if hasattr(found.module, name)]:
        raise InjectionError(f"{found.path} has an attribute {taken[0]!r} of its own")
    return replace(found, rows=rows_of(described, place, found.rows.count, model.config))


def _projection(owner: nn.Module, path: str) -> Projection:
    """A module of the host's with all its outputs. Raises `InjectionError` if it is no projection."""
    leaf: Any = owner.get_submodule(path)
    if isinstance(leaf, nn.Linear):
        return Projection(leaf, path, leaf.in_features, Rows(1, 0, leaf.out_features))
    if isinstance(leaf, Conv1D):
        return Projection(leaf, path, leaf.nx, Rows(1, 0, leaf.nf))
    raise InjectionError(f"{path} is a {type(leaf).__name__}; submodules attach to a Linear or Conv1D")
