"""Describe an architecture by inspection: the paths of a model's layers, attentions and feed-forward networks.

Names alone decide nothing. A small random model of the same type runs once, and the pass is recorded (`probe.py`). The
role of each module follows from the effect of its output in that pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from unipelt.hosts.description import EXPERTS, LAYERS_DIFFER, NO_NETWORK, OTHER_WIDTH, UNJOINED, Family, Stack
from unipelt.hosts.feed_forward import Joined, find_joined
from unipelt.hosts.inputs import SOURCE_TOKENS, TOKENS, text_batch
from unipelt.hosts.probe import Call, Pass, Softmax, is_causal, watch
from unipelt.hosts.projections import FoundAttention, find_attentions
from unipelt.hosts.rows import rows_of
from unipelt.hosts.shrink import CannotShrink, build_small
from unipelt.hosts.state_space import describe_state_space
from unipelt.hosts.unrecorded import attentions_without_softmax


class DescribeError(ValueError):
    """Error for a model without a description that inspection can find; the message names the missing part."""


@dataclass
class _Layer:
    """One layer of the pass, with the attentions and the feed-forward network that were found in it."""

    call: Call
    attentions: list[FoundAttention]
    joined: Joined | None


def describe(model: PreTrainedModel) -> Family:
    """Find the paths of the parts of a model, in a pass of a small random model of the same type.

    The small model has the class and the configuration of the model, with fewer and narrower layers. The model itself
    does not change. `unipelt.register_family` takes the stacks of the description.

    Args:
        model: any `PreTrainedModel` that reads text, on any device.

    Returns:
        The description.

    Raises:
        DescribeError: a part could not be found; the message names the part.
    """
    return describe_class(type(model), model.config)


def describe_class(cls: Any, config: PreTrainedConfig, changes: dict[str, Any] | None = None) -> Family:
    """Return the description of a model class and a configuration, as `describe` does for a model.

    Args:
        cls: class of the model, or an `AutoModelFor...`.
        config: configuration of a model of any size.
        changes: values for the small model's configuration, by name.
    """
    try:
        small = build_small(cls, config, changes)
    except CannotShrink as error:
        raise DescribeError(str(error)) from error
    return describe_small(small)


def describe_small(small: PreTrainedModel) -> Family:
    """Return the description of a model that is already small (from `build_small`), as `describe` does."""
    config = small.config.get_text_config()
    crossing = bool(getattr(config, "add_cross_attention", False)) and not small.config.is_encoder_decoder
    # some encoder-decoder classifiers build the decoder's text themselves, and some heads need inputs besides text
    ways: list[tuple[Any, dict[str, bool]]] = [
        (small, {}),
        (small, {"two": False}),
        (small.base_model, {}),
        (small, {"images": True}),
    ]
    first: Exception | None = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for part, options in ways:
            try:
                found = watch(part, text_batch(part, crossing=crossing, **options))
            except Exception as error:
                first = first or error
            else:
                return _describe(small, found, only_text="images" in options)
    reason = f"{type(first).__name__}: {' '.join(str(first).split())[:200]}"
    raise DescribeError(f"a small {type(small).__name__} does not run: {reason}") from first


def _describe(model: PreTrainedModel, found: Pass, only_text: bool = False) -> Family:
    """Describe a model from its pass. With `only_text`, the layers that read images are left out."""
    name = type(model).__name__
    if not found.attentions:
        found.attentions = attentions_without_softmax(found)
    if not found.attentions and (without := describe_state_space(model.base_model, found)) is not None:
        return without
    if not found.attentions:
        raise DescribeError(f"{name} has no attention: no softmax over tokens was found in its layers")
    layers = [layer for layer in _layers(model, found) if not only_text or _reads_text(layer.call)]
    lists: dict[str, list[_Layer]] = {}
    for layer in layers:
        lists.setdefault(_starred(model.base_model, layer.call.path), []).append(layer)
    if not lists:
        raise DescribeError(f"{name} has no list of layers with attention")
    if len(lists) > 2 or (len(lists) == 2 and not model.config.is_encoder_decoder):
        raise DescribeError(f"the text of {name} passes several lists of layers: {', '.join(lists)}")
    described = [_stack(model, path, members) for path, members in lists.items()]
    refused: dict[str, str] = {}
    for stack, reasons in described:
        refused |= reasons
        if stack.unjoined:
            refused["adapter"] = stack.unjoined
    return Family(tuple(stack for stack, _ in described), refused)


def _layers(model: PreTrainedModel, found: Pass) -> list[_Layer]:
    """Return the layers: for each attention, the smallest list item around it that holds other matrices too."""
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


def _reads_text(layer: Call) -> bool:
    """Return whether a layer's states have as many tokens as the text."""
    given = next((value for value in layer.inputs.values() if value.is_floating_point() and value.dim() == 3), None)
    return given is not None and given.shape[1] in (TOKENS, SOURCE_TOKENS)


def _is_item(base: nn.Module, path: str) -> bool:
    owner = base.get_submodule(path.rpartition(".")[0])
    return isinstance(owner, nn.ModuleList)


def _has_more(layer: nn.Module, attention: Softmax, found: Pass) -> bool:
    """Return whether a list item has matrices outside the attention, as a layer with a feed-forward network has."""
    around = [call.module for call in found.calls if call.contains(attention)]
    position = next(index for index, module in enumerate(around) if module is layer)
    inside = around[position + 1 :]
    if not inside:
        return False
    own = {id(parameter) for parameter in inside[0].parameters()}
    return any(parameter.dim() > 1 and id(parameter) not in own for parameter in layer.parameters())


def _starred(base: nn.Module, path: str) -> str:
    """Return the path of the list that holds a layer; `*` stands for every item of an outer list."""
    names, owner = path.split("."), base
    for index, name in enumerate(names):
        if isinstance(owner, nn.ModuleList):
            names[index] = "*"
        owner = owner.get_submodule(name)
    return ".".join(names[:-1])


def _stack(model: PreTrainedModel, path: str, layers: list[_Layer]) -> tuple[Stack, dict[str, str]]:
    """Return a stack, and the reasons why the stack cannot take a prefix or LoRA, by submodule."""
    name = type(model).__name__
    usable = [layer for layer in layers if any(not found.crosses for found in layer.attentions)]
    if not usable:
        raise DescribeError(
            f"no attention of {name} has a mask, and projections of queries and values that both read its input"
        )
    kinds = Counter(_own(layer).attention for layer in usable)
    attention = kinds.most_common(1)[0][0]
    usable = [layer for layer in usable if _own(layer).attention == attention]
    prefixes = [_own(layer).no_prefix for layer in usable]
    crossing = [found for layer in layers for found in layer.attentions if found.crosses]
    cross = crossing[0].attention if crossing else None
    if crossing:
        prefixes.append(crossing[0].no_prefix)
    for layer in usable:
        _check_rows(model, _own(layer))
    for found in crossing:
        _check_rows(model, found)
    if len({int(found.kinds["value"].sum()) for found in map(_own, usable)}) > 1:
        prefixes.append(LAYERS_DIFFER)
    causal = all(is_causal(layer.call) for layer in layers)
    mask = _own(usable[0]).call.inputs.get(attention.mask)
    if not causal and mask is not None and mask.dim() not in (2, 4):
        raise DescribeError(f"the attention of {name} is given a mask of {mask.dim()} dimensions, not of 2 or 4")
    joined = [layer.joined for layer in usable if layer.joined]
    ends = Counter((found.norm, found.output) for found in joined)
    norm, output = ends.most_common(1)[0][0] if ends else ("", "")
    joined = [found for found in joined if (found.norm, found.output) == (norm, output)]
    given, width, unjoined = _own(usable[0]).width, "", UNJOINED
    if any(found.width != given for found in joined):
        width = joined[0].sized if len({found.width for found in joined}) == 1 else ""
        if not width:
            joined, unjoined, norm, output = [], OTHER_WIDTH, "", ""
    stack = Stack(
        path,
        attention,
        norm=norm,
        output=output,
        up=_alternatives(found.up for found in joined),
        down=_alternatives(found.down for found in joined),
        gate=_alternatives(found.gate for found in joined),
        causal=causal,
        cross=cross,
        unjoined="" if joined else unjoined,
        missing={
            part: EXPERTS if joined[0].adapted == "feed_forward" else NO_NETWORK
            for part in ("up", "down")
            if any(not getattr(found, part) for found in joined)
        },
        width=width,
        adapted=joined[0].adapted if joined else "feed_forward",
    )
    low_rank = [found.no_lora for found in (*map(_own, usable), *crossing)]
    reasons = {"prefix": next(filter(None, prefixes), ""), "lora": next(filter(None, low_rank), "")}
    return stack, {name: reason for name, reason in reasons.items() if reason}


def _alternatives(paths: Iterable[str]) -> str:
    """Join different paths by `|`, as a `Stack` writes paths of which a layer has one."""
    return "|".join(dict.fromkeys(path for path in paths if path))


def _check_rows(model: PreTrainedModel, found: FoundAttention) -> None:
    """Raise `DescribeError` unless the outputs that a description gives to a place are those of the pass."""
    for place, flags in found.kinds.items():
        if place == "key" and (found.attention.key or not flags.any()):
            continue
        rows = rows_of(found.attention, place, len(flags), model.config)
        meant = torch.zeros(rows.groups, len(flags) // rows.groups, dtype=torch.bool)
        meant[:, rows.start : rows.start + rows.size] = True
        plain = not found.attention.fused  # a query projection may also compute a gate of the query
        if flags.any() and not torch.equal(meant.flatten(), flags) and not (plain and place == "query"):
            raise DescribeError(
                f"{found.attention.value} of {type(found.call.module).__name__} computes its {place} in an order that "
                "a description cannot say"
            )


def _own(layer: _Layer) -> FoundAttention:
    return next(found for found in layer.attentions if not found.crosses)
