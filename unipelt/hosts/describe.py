"""Describe an architecture by inspection: where a model's layers, attentions and feed-forward networks are.

Nothing is taken from names alone. A small random model of the same type is run once and watched (`probe.py`), and
what each module is follows from what its output does there.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unipelt.hosts.families import OWN_ATTENTION, Attention, Family, Stack
from unipelt.hosts.feed_forward import Joined, find_joined
from unipelt.hosts.probe import Call, Pass, Softmax, gradients, random_like, text_batch, watch
from unipelt.hosts.projections import FoundAttention, find_attentions
from unipelt.hosts.shrink import CannotShrink, build_small


class DescribeError(ValueError):
    """A model of which a description could not be found; the message says what is missing."""


@dataclass
class _Layer:
    """One layer of the pass, with what was found in it."""

    call: Call
    attentions: list[FoundAttention]
    joined: Joined | None


def describe(model: PreTrainedModel) -> Family:
    """Find where the parts of a model are, and check it on a small random model of the same type.

    The small model has the class and the configuration of the model, with fewer and narrower layers; the model itself
    is only read. Its description is good for `unipelt.register_family`.

    Args:
        model: any `PreTrainedModel` that reads text, on any device.

    Returns:
        The description.

    Raises:
        DescribeError: something could not be found; the message says what.
    """
    return describe_class(type(model), model.config)


def describe_class(cls: Any, config: PreTrainedConfig, changes: dict[str, Any] | None = None) -> Family:
    """`describe`, of a class (or an `AutoModelFor...`) and a configuration.

    Args:
        cls: class of the model.
        config: of a model of any size.
        changes: of the small model's configuration, by name.
    """
    try:
        small = build_small(cls, config, changes)
    except CannotShrink as error:
        raise DescribeError(str(error)) from error
    crossing = bool(getattr(small.config.get_text_config(), "add_cross_attention", False))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            found = watch(small, text_batch(small, crossing=crossing))
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise DescribeError(f"a small {type(small).__name__} does not run: {type(error).__name__}: {reason}") from error
    return _describe(small, found)


def _describe(model: PreTrainedModel, found: Pass) -> Family:
    name = type(model).__name__
    if not found.attentions:
        raise DescribeError(f"{name} has no attention: no softmax over tokens was found in its layers")
    layers = _layers(model, found)
    lists: dict[str, list[_Layer]] = {}
    for layer in layers:
        lists.setdefault(_starred(model.base_model, layer.call.path), []).append(layer)
    if not lists:
        raise DescribeError(f"{name} has no list of layers with attention")
    if len(lists) > 2 or (len(lists) == 2 and not model.config.is_encoder_decoder):
        raise DescribeError(f"the text of {name} passes several lists of layers: {', '.join(lists)}")
    described = [_stack(model, path, members) for path, members in lists.items()]
    refused: dict[str, str] = {}
    for _, reason in described:
        if reason:
            refused["prefix"] = reason
    return Family(tuple(stack for stack, _ in described), refused)


def _layers(model: PreTrainedModel, found: Pass) -> list[_Layer]:
    """The layers: of the list items around an attention, the smallest with more than that attention in it."""
    base = model.base_model
    chosen: dict[int, Call] = {}
    for attention in found.attentions:
        around = [call for call in found.calls if call.contains(attention) and _is_item(base, call.path)]
        whole = [call for call in around if _has_more(call.module, attention, found)]
        if around:
            layer = (whole or around[:1])[-1]
            first = next(call for call in found.calls if call.module is layer.module)
            chosen.setdefault(id(layer.module), first)
    layers = []
    for call in sorted(chosen.values(), key=lambda call: call.start):
        inside = [other for other in found.calls if call.contains(other)]
        softmaxes = [attention for attention in found.attentions if call.contains(attention)]
        attentions = find_attentions(call, inside, softmaxes)
        layers.append(_Layer(call, attentions, find_joined(call, inside, attentions)))
    return layers


def _is_item(base: nn.Module, path: str) -> bool:
    owner = base.get_submodule(path.rpartition(".")[0])
    return isinstance(owner, nn.ModuleList)


def _has_more(layer: nn.Module, attention: Softmax, found: Pass) -> bool:
    """Whether a list item has matrices outside the attention, as a layer with a feed-forward network has."""
    around = [call.module for call in found.calls if call.contains(attention)]
    position = next(index for index, module in enumerate(around) if module is layer)
    inside = around[position + 1 :]
    if not inside:
        return False
    own = {id(parameter) for parameter in inside[0].parameters()}
    return any(
        parameter.dim() > 1 and id(parameter) not in own for parameter in layer.parameters()
    )


def _starred(base: nn.Module, path: str) -> str:
    """Path of the list that a layer is in; a star stands for every item of an outer list."""
    names, owner = path.split("."), base
    for index, name in enumerate(names):
        if isinstance(owner, nn.ModuleList):
            names[index] = "*"
        owner = owner.get_submodule(name)
    return ".".join(names[:-1])


def _stack(model: PreTrainedModel, path: str, layers: list[_Layer]) -> tuple[Stack, str]:
    """A stack, and why it cannot take a prefix ("" where it can)."""
    name = type(model).__name__
    usable = [layer for layer in layers if any(not found.crosses for found in layer.attentions)]
    if not usable:
        raise DescribeError(f"no attention of {name} has projections of queries and values that read its input")
    kinds = Counter(_own(layer).attention for layer in usable)
    attention = kinds.most_common(1)[0][0]
    usable = [layer for layer in usable if _own(layer).attention == attention]
    prefixes = [_own(layer).no_prefix for layer in usable]
    crossing = [found for layer in layers for found in layer.attentions if found.crosses]
    cross = crossing[0].attention if crossing else None
    if crossing:
        prefixes.append(crossing[0].no_prefix)
    joined = [layer.joined for layer in usable if layer.joined]
    if not joined:
        raise DescribeError(
            f"in a layer of {name} no module gives what its feed-forward network adds to the residual, and no norm "
            "reads that sum"
        )
    ends = Counter((found.norm, found.output) for found in joined)
    norm, output = ends.most_common(1)[0][0]
    stack = Stack(
        path,
        attention,
        norm=norm,
        output=output,
        up="|".join(dict.fromkeys(found.up for found in joined if found.up)),
        down="|".join(dict.fromkeys(found.down for found in joined if found.down)),
        causal=all(_is_causal(layer.call) for layer in layers),
        cross=cross,
    )
    return stack, next((reason for reason in prefixes if reason), "")


def _own(layer: _Layer) -> FoundAttention:
    return next(found for found in layer.attentions if not found.crosses)


def _is_causal(layer: Call) -> bool:
    """Whether no token of a layer's output has a gradient at a later token of its input."""
    given = next((value for value in layer.inputs.values() if value.is_floating_point() and value.dim() >= 3), None)
    if given is None or layer.output is None:
        return False
    middle = given.shape[1] // 2
    direction = random_like(layer.output)
    direction[:, middle:] = 0
    gradient = gradients(layer.output, [given], direction)[0]
    return gradient is not None and not bool(gradient[:, middle:].any())
