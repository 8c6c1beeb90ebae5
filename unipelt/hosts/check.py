"""Check of a description that a caller registered: an error is raised at injection, not in a forward pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from unipelt.hosts.describe import DescribeError
from unipelt.hosts.description import Family, Stack
from unipelt.hosts.families import layers_at
from unipelt.hosts.inputs import text_batch
from unipelt.hosts.probe import Call, Pass, watch
from unipelt.hosts.rows import width_of
from unipelt.hosts.shrink import CannotShrink, small_model


def check_description(model: PreTrainedModel, family: Family, adapter: bool) -> None:
    """Check a description in a pass of a small model of the same type.

    The projections of queries and values must read what the description says. Each norm before an adapter (post-LN)
    must read and return one tensor, and an adapter must be as wide as the states that it reads. A type without a small
    model that can be built and run is not checked.

    Args:
        model: the model.
        family: its description.
        adapter: whether an adapter is added.

    Raises:
        DescribeError: the description says something else than the pass.
    """
    try:
        small = small_model(model)
    except CannotShrink:
        return
    try:
        found = watch(small, text_batch(small))
    except Exception:
        return
    for stack in family.stacks:
        for layer in layers_at(small.base_model, stack.layers):
            _check_projections(layer, stack, found)
            if adapter and not stack.unjoined:
                _check_adapted(layer, stack, found)


def _call(layer: nn.Module, path: str, found: Pass) -> Call | None:
    """Return the first call of a layer's module; None without one (`find_stacks` reports a missing module)."""
    try:
        module = layer.get_submodule(path)
    except AttributeError:
        return None
    return next((call for call in found.calls if call.module is module), None)


def _input(layer: nn.Module, path: str, found: Pass) -> Tensor | None:
    call = _call(layer, path, found)
    return None if call is None else next(iter(call.inputs.values()), None)


def _check_projections(layer: nn.Module, stack: Stack, found: Pass) -> None:
    described = stack.attention
    start = f"{described.path}." if described.path else ""
    query = _input(layer, start + described.query, found)
    value = _input(layer, start + described.value, found)
    if query is None or value is None or described.value_apart:
        return
    if query.shape != value.shape or not torch.equal(query, value):
        raise DescribeError(
            f"{start}{described.query} and {start}{described.value} read different tensors; describe the attention "
            "with value_apart=True"
        )


def _check_adapted(layer: nn.Module, stack: Stack, found: Pass) -> None:
    path = stack.norm or stack.output
    call = _call(layer, path, found)
    if call is None:
        return
    name = type(call.module).__name__
    if stack.norm and not call.alone:
        raise DescribeError(f"{path} is a {name}, which gives more than one tensor, and a norm gives one")
    if stack.norm and len(call.inputs) != 1:
        raise DescribeError(f"{path} is a {name}, which is given {len(call.inputs)} tensors, and a norm reads one")
    start = f"{stack.attention.path}." if stack.attention.path else ""
    sized = _call(layer, stack.width, found) if stack.width else None
    read = _input(layer, start + stack.attention.query, found)
    width = width_of(sized.module) if sized is not None else None if read is None else read.shape[-1]
    if width is not None and call.output is not None and call.output.shape[-1] != width:
        raise DescribeError(
            f"{path} is a {name}, whose outputs are {call.output.shape[-1]} wide in a small model, and the adapter "
            f"would be {width} wide; give the Stack's `width` the path of a Linear or a norm as wide as these outputs"
        )
