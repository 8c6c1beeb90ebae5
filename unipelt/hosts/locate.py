"""Find the places where submodules attach; every place is found and checked before the model changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from unipelt.config.methods import UniPELTConfig
from unipelt.config.parts import AnyPlace, LoRAConfig, Place
from unipelt.config.submodule import SubmoduleConfig
from unipelt.hosts.attention_interface import check_back_end, uses_interface
from unipelt.hosts.check import check_description
from unipelt.hosts.describe import DescribeError
from unipelt.hosts.description import OTHER_WIDTH, WITHOUT_ATTENTION, Attention, Stack
from unipelt.hosts.families import family_of, has, is_complete, is_registered, layers_at
from unipelt.hosts.norms import find_norms
from unipelt.hosts.rows import rows_of, width_of
from unipelt.hosts.targets import (
    ENTRY_PLACES,
    IN_ATTENTION,
    AttentionTargets,
    LayerTargets,
    Projection,
    StackTargets,
    TermTarget,
)
from unipelt.submodules.outputs import OutputSlice
from unipelt.submodules.room import ROOM

logger = logging.get_logger(__name__)


class InjectionError(ValueError):
    """Error for a model that cannot take these submodules; the model has not changed."""


_NAMED = {"adapter": "an adapter", "prefix": "a prefix", "lora": "LoRA"}


def find_stacks(model: PreTrainedModel, config: UniPELTConfig) -> list[StackTargets]:
    """Find the targets of a configuration in the chosen layers of each stack. Raises `InjectionError`."""
    kind = model.config.model_type
    try:
        family = family_of(model)
    except DescribeError as error:
        raise InjectionError(str(error)) from error
    if is_registered(kind):
        try:
            check_description(model, family, config.adapter is not None)
        except DescribeError as error:
            raise InjectionError(f"the description of {kind!r} models cannot work: {error}") from error
    for name, reason in family.refused.items():
        if config.part(name) is not None:
            instead = "; take a method without one, such as the preset unipelt-al" if name == "prefix" else ""
            raise InjectionError(f"{kind!r} models cannot take {_NAMED.get(name, name)}: {reason}{instead}")
    if config.prompt is not None and len(family.stacks) > 1:
        raise InjectionError(
            f"{kind!r} models cannot take a prompt: a decoder would read the encoder's states of it too, which is not "
            "here yet; a prefix goes there"
        )
    if config.prefix is not None and config.prefix.softmax != "own":
        check_back_end(model.config._attn_implementation)
    # a model may have only a part of its architecture, such as T5's encoder or BART's decoder
    stacks = [(stack, list(layers_at(model.base_model, stack.layers))) for stack in family.stacks]
    # an adapter has no place in cross-attention
    in_attention = any(place in IN_ATTENTION for part in config.more for place in part.places)
    crossing = config.cross and (config.prefix is not None or config.lora is not None or in_attention)
    present = [(stack, layers) for stack, layers in stacks if layers]
    if not present:
        raise _built_otherwise(model, f"it has no layers at {family.stacks[0].layers!r}")
    deepest = max(len(layers) for _, layers in present)
    if outside := [index for index in config.layers or () if index >= deepest]:
        raise InjectionError(f"layers names {outside[0]}, but the model's {deepest} layers are 0 to {deepest - 1}")
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
        indices = list(_choose(model, layers, stack, config)) if own else list(range(len(layers)))
        indices = [index for index in indices if config.layers is None or index in config.layers]
        if len({id(layers[index]) for index in indices}) < len(indices):
            raise _built_otherwise(model, "layers that share modules cannot take submodules, and two are one module")
        try:
            found = {index: _find_layer(layers[index], stack, model, config, own, cross) for index in indices}
        except AttributeError as error:
            raise _built_otherwise(model, str(error)) from error
        if config.lora is not None and config.lora.is_all_linear:
            _report_left_out(found, stack)
        if any(own or layer.cross for layer in found.values()):
            owner = model.base_model.get_submodule(stack.layers.partition(".*")[0].rpartition(".")[0])
            chosen.append(StackTargets(stack, owner, found, causal, label))
    if not chosen:
        raise InjectionError(
            f"encoder={config.encoder}, decoder={config.decoder}, cross={config.cross} leave nothing of this "
            f"{type(model).__name__} to add submodules to"
        )
    return chosen


def _report_left_out(found: Mapping[int, LayerTargets], stack: Stack) -> None:
    """Log the projections of layers that have no place, so that `all-linear` does not change them."""
    left: dict[str, None] = {}
    for layer in found.values():
        reached = {term.projection.path for term in layer.low_rank}
        for attention in (layer.attention, layer.cross):
            reached |= {attention.query.path, attention.value.path} if attention is not None else set()
        for path, module in layer.module.named_modules():
            crossing = stack.cross is not None and path.startswith(f"{stack.cross.path}.")
            wanted = (layer.cross if crossing else layer.attention) is not None and not path.startswith(f"{ROOM}.")
            if wanted and isinstance(module, (nn.Linear, Conv1D)) and path not in reached:
                left[path] = None
    if left:
        logger.warning(
            f"lora.places: all-linear leaves out {', '.join(left)}, for which there is no place (unipelt.config.Place)"
        )


def _choose(model: PreTrainedModel, layers: Sequence[nn.Module], stack: Stack, config: UniPELTConfig) -> Sequence[int]:
    """Return the indices of the layers that have the described attention, and log the others.

    Raises `InjectionError` if the configuration names one of the others.
    """
    complete = [index for index, layer in enumerate(layers) if is_complete(layer, stack)]
    without = [index for index in range(len(layers)) if index not in complete]
    if not complete or not without:
        return range(len(layers))  # if no layer has it, `_find_layer` reports the missing part
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
) -> LayerTargets:
    attention = crossing = None
    if own and stack.attention != WITHOUT_ATTENTION:
        attention = _find_attention(layer, stack.attention, model, config)
    if cross and stack.cross is not None and has(layer, stack.cross.path):
        crossing = _find_attention(layer, stack.cross, model, config, crosses=True)
    adapted = layer.get_submodule(stack.norm or stack.output) if own and not stack.unjoined else None
    if isinstance(adapted, nn.Sequential):
        raise InjectionError(
            f"{stack.norm or stack.output} is a Sequential, which would run an adapter as one more of its steps; "
            f"describe its last one instead: '{stack.norm or stack.output}.{len(adapted) - 1}'"
        )
    found: list[tuple[TermTarget, ...]] = []
    for wanted in (_wanted_terms(config), _wanted_low_rank(config.lora, layer, stack)):
        terms = list(_find_terms(layer, stack, stack.attention, model, wanted)) if own else []
        if crossing and stack.cross:
            terms += _find_terms(layer, stack, stack.cross, model, wanted, in_cross=True)
        found.append(tuple(terms))
    width = width_of(layer.get_submodule(stack.width)) if own and stack.width else None
    width = width or (attention.query.inputs if attention is not None else 0)
    sized = attention.value if attention is not None else _projection(layer, stack.width) if own else None
    return LayerTargets(layer, attention, crossing, adapted, stack.norm or stack.output, width, sized, *found)


Wanted = Sequence[tuple[SubmoduleConfig | LoRAConfig, Sequence[AnyPlace]]]


def _wanted_terms(config: UniPELTConfig) -> Wanted:
    return [(part, part.places) for part in config.more]


def _wanted_low_rank(lora: LoRAConfig | None, layer: nn.Module, stack: Stack) -> Wanted:
    """Return LoRA's places: all for DoRA and mixtures; for plain LoRA those besides queries and values.

    Plain terms of queries and values belong to `AttentionTargets`.
    """
    if lora is None:
        return []
    places = [place for place in lora.projections if lora.is_function or place not in ENTRY_PLACES]
    if lora.is_all_linear and not _has_gate(layer, stack):
        places.remove("gate")
    return [(lora, places)]


def _has_gate(layer: nn.Module, stack: Stack) -> bool:
    """Return whether a layer's feed-forward network has a gate projection beside the first projection."""
    return bool(stack.gate) and has(layer, _alternative(layer, stack.gate))


def _find_terms(
    layer: nn.Module,
    stack: Stack,
    described: Attention,
    model: PreTrainedModel,
    wanted: Wanted,
    in_cross: bool = False,
) -> Iterator[TermTarget]:
    """Yield the targets in one attention of a layer and, except for cross-attention, in the feed-forward network."""
    for part, places in wanted:
        for place in places:
            if place in IN_ATTENTION:
                found = _find_in_attention(layer, described, place, model)
                crosses = in_cross and place in ("key", "value")
                positions = described.query_serves_positions and place in ("query", "key")
                term = TermTarget(
                    part, place, found, found.inputs, crosses=crosses, in_cross=in_cross, serves_positions=positions
                )
            elif in_cross:
                continue
            elif place == "norm" or place == "layer":
                yield from _find_around(layer, stack, part, place, model)
                continue
            else:
                term = _find_in_feed_forward(layer, stack, part, place)
            yield term


def _find_around(
    layer: nn.Module, stack: Stack, part: SubmoduleConfig | LoRAConfig, place: AnyPlace, model: PreTrainedModel
) -> Iterator[TermTarget]:
    """Yield the norms of a layer's states (`norm`), or the layer itself (`layer`). Raises `InjectionError`."""
    if stack.attention == WITHOUT_ATTENTION:
        raise InjectionError(f"{part.name} cannot be in a {type(layer).__name__}: the layer has no attention")
    query = _find_projection(layer, stack.attention, "query", model)
    if stack.unjoined == OTHER_WIDTH:
        raise InjectionError(f"{part.name} cannot be in a {type(layer).__name__}: {OTHER_WIDTH}")
    rows = OutputSlice(1, 0, query.inputs)
    if place == "layer":
        yield TermTarget(part, place, Projection(layer, "", query.inputs, rows, query.module), query.inputs)
        return
    norms = find_norms(layer, query.inputs)
    if not norms:
        raise InjectionError(f"this {type(layer).__name__} has no norm with a weight as wide as its states")
    for number, (path, norm) in enumerate(norms.items(), start=1):
        yield TermTarget(part, place, Projection(norm, path, query.inputs, rows), query.inputs, number=number)


def _find_in_attention(layer: nn.Module, described: Attention, place: str, model: PreTrainedModel) -> Projection:
    if described == WITHOUT_ATTENTION:
        raise InjectionError(f"this {type(layer).__name__} has no attention, and so no place {place!r}")
    if place == "attention":
        return _projection(layer, _told(described.output, "output", "projection that ends the attention"))
    path = {"query": described.query, "value": described.value, "key": described.key}[place]
    if place == "key" and not path and described.fused:
        path = described.value
    found = _projection(layer, _inside(described, _told(path, "key", "projection of keys")))
    return replace(found, rows=rows_of(described, place, found.rows.count, model.config))


def _find_in_feed_forward(
    layer: nn.Module, stack: Stack, part: SubmoduleConfig | LoRAConfig, place: Place
) -> TermTarget:
    told = "projection of the feed-forward network"
    for name, path in (("up", stack.up), ("down", stack.down)):
        if name in stack.missing and not (path and has(layer, _alternative(layer, path))):
            raise InjectionError(f"this {type(layer).__name__} has no {told} at {name!r}: {stack.missing[name]}")
    up = _projection(layer, _alternative(layer, _told(stack.up, "up", f"first {told}")))
    down = _projection(layer, _alternative(layer, _told(stack.down, "down", f"last {told}")))
    if place == "up":
        return TermTarget(part, place, up, up.inputs)
    if place == "gate":
        if not _has_gate(layer, stack):
            raise InjectionError(_without_gate(layer, up, down))
        gate = _projection(layer, _alternative(layer, stack.gate))
        return TermTarget(part, place, gate, gate.inputs)
    if place == "activation":
        return TermTarget(part, place, replace(down, rows=OutputSlice(1, 0, down.inputs)), down.inputs)
    if place == "feed_forward":
        return TermTarget(part, place, down, up.inputs, reader=up.path)
    return TermTarget(part, place, down, down.inputs)


def _without_gate(layer: nn.Module, up: Projection, down: Projection) -> str:
    """Return the message for a layer that has no projection at the place `gate`."""
    if up.rows.count == 2 * down.inputs:
        return (
            f"this {type(layer).__name__} has no projection at 'gate' alone: {up.path} computes the gate of its "
            "feed-forward network too; take the place 'up', which is all of that module"
        )
    return (
        f"this {type(layer).__name__} has no projection of the feed-forward network at 'gate': nothing but {up.path} "
        "reads its input; leave 'gate' out of places"
    )


def _told(path: str, name: str, what: str) -> str:
    if not path:
        raise InjectionError(f"the description of this architecture does not say where its {what} is: give it {name!r}")
    return path


def _alternative(layer: nn.Module, paths: str) -> str:
    """Return the first of several paths that exists in a layer, or the last path if none exists."""
    *others, last = paths.split("|")
    return next((path for path in others if has(layer, path)), last)


def _find_attention(
    layer: nn.Module, described: Attention, model: PreTrainedModel, config: UniPELTConfig, *, crosses: bool = False
) -> AttentionTargets:
    attention = layer.get_submodule(described.path)
    if config.prefix is not None and not described.bias and not uses_interface(attention):
        raise InjectionError(
            f"a prefix cannot enter {type(attention).__name__}: in transformers {transformers.__version__} it does not "
            "go through the attention interface (ALL_ATTENTION_FUNCTIONS, by the name in its own config)"
        )
    query = _find_projection(layer, described, "query", model)
    value = _find_projection(layer, described, "value", model)
    apart = crosses or described.value_apart
    readers = [query.path] if apart else [query.path, value.path]
    if described.key and not apart:
        readers.append(_inside(described, described.key))
    if described.bias:
        layer.get_submodule(_inside(described, described.key))
    key_path = _inside(described, described.key) if described.bias else ""
    return AttentionTargets(attention, described, query, value, tuple(dict.fromkeys(readers)), key_path)


def _find_projection(layer: nn.Module, described: Attention, place: str, model: PreTrainedModel) -> Projection:
    path = described.query if place == "query" else described.value
    found = _projection(layer, _inside(described, path))
    return replace(found, rows=rows_of(described, place, found.rows.count, model.config))


def _inside(described: Attention, path: str) -> str:
    """Convert a path from an attention to a path from its layer."""
    return f"{described.path}.{path}" if described.path else path


def _projection(owner: nn.Module, path: str) -> Projection:
    """Return the projection at a path, with all its outputs. Raises `InjectionError` for any other module."""
    leaf: Any = owner.get_submodule(path)
    if isinstance(leaf, nn.Linear):
        return Projection(leaf, path, leaf.in_features, OutputSlice(1, 0, leaf.out_features))
    if isinstance(leaf, Conv1D):
        return Projection(leaf, path, leaf.nx, OutputSlice(1, 0, leaf.nf))
    raise InjectionError(f"{path} is a {type(leaf).__name__}; submodules attach to a Linear or Conv1D")
