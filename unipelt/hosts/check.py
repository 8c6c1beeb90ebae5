"""Check of a description that a caller registered: an error is raised at injection, not in a forward pass."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from unipelt.hosts.describe import DescribeError
from unipelt.hosts.description import Family, Stack
from unipelt.hosts.families import layers_at
from unipelt.hosts.probe import Pass, text_batch, watch
from unipelt.hosts.shrink import CannotShrink, small_model


def check_adapted(model: PreTrainedModel, family: Family) -> None:
    """Check in a pass of a small model that each norm before an adapter (post-LN) reads and returns one tensor.

    The small model has the same type. A type without a small model that can be built and run is not checked.

    Raises:
        DescribeError: the norm returns more than one tensor, or reads more than one.
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
            _check_layer(layer, stack, found)


def _check_layer(layer: nn.Module, stack: Stack, found: Pass) -> None:
    path = stack.norm or stack.output
    try:
        adapted = layer.get_submodule(path)
    except AttributeError:
        return  # `find_stacks` reports the missing module
    name = type(adapted).__name__
    for call in found.calls:
        if call.module is not adapted:
            continue
        if stack.norm and not call.alone:
            raise DescribeError(f"{path} is a {name}, which gives more than one tensor, and a norm gives one")
        if stack.norm and len(call.inputs) != 1:
            raise DescribeError(f"{path} is a {name}, which is given {len(call.inputs)} tensors, and a norm reads one")
