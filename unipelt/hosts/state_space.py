"""Describe a model whose layers have no attention but a module that mixes tokens in one direction (Mamba)."""

from __future__ import annotations

from torch import nn

from unipelt.hosts.description import NO_ATTENTION, WITHOUT_ATTENTION, Family, Stack
from unipelt.hosts.feed_forward import Joined, find_added, find_mixer
from unipelt.hosts.probe import Call, Pass, is_causal

NO_PLACE = {"prefix": NO_ATTENTION, "lora": NO_ATTENTION}


def describe_state_space(base: nn.Module, found: Pass) -> Family | None:
    """Return the description of a model without attention, or None if no adapter has a place in it.

    Every layer of the model's one list must add the output of a module that mixes tokens to its residual. The layers
    must be causal: a gate that averages over a text would need an attention's mask.
    """
    layers = [call for call in found.calls if _is_layer(base, call.path)]
    lists = {call.path.rpartition(".")[0] for call in layers}
    places = [_place(layer, found) for layer in layers]
    if len(lists) != 1 or not all(is_causal(layer) for layer in layers):
        return None
    joined = [place for place in places if place is not None and place.sized]
    if len(joined) < len(places) or len({(place.output, place.sized) for place in joined}) != 1:
        return None
    place = joined[0]
    stack = Stack(
        lists.pop(),
        WITHOUT_ATTENTION,
        output=place.output,
        causal=True,
        missing={"up": NO_ATTENTION, "down": NO_ATTENTION},
        width=place.sized,
        adapted="mixer",
    )
    return Family((stack,), NO_PLACE)


def _place(layer: Call, found: Pass) -> Joined | None:
    inside = [call for call in found.calls if layer.contains(call)]
    added = None if layer.output is None else find_added(layer.output, [c for c in inside if c.output is not None])
    return None if added is None else find_mixer(layer, added, inside)


def _is_layer(base: nn.Module, path: str) -> bool:
    """Return whether a module is an item of an outermost list."""
    names, owner = path.split("."), base
    for index, name in enumerate(names):
        if isinstance(owner, nn.ModuleList):
            return index == len(names) - 1
        owner = owner.get_submodule(name)
    return False
