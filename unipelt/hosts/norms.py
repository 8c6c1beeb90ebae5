"""The norms of a layer's states, found by their class and by the width of their weight."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from unipelt.submodules.room import ROOM

_OF_ATTENTION = re.compile(r"(q|k|query|key)_?(a_)?(norm|layer_?norm|ln)", re.IGNORECASE)
"""Names of the norms of queries and keys, which are no states of the layer."""


def is_norm(module: Any) -> bool:
    """Return whether a module is a norm: its class says so, and its weight has one dimension."""
    weight = module._parameters.get("weight")
    return "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.dim() == 1


def find_norms(layer: nn.Module, width: int) -> dict[str, Any]:
    """Return the norms of a layer's states by their path from the layer, in the order of the layer's modules.

    Args:
        layer: the layer.
        width: the width of the states. Norms of another width, such as those of single heads, are left out.
    """
    return {
        path: module
        for path, module in layer.named_modules()
        if is_norm(module)
        and module.weight.numel() == width
        and not path.startswith(f"{ROOM}.")
        and not _OF_ATTENTION.fullmatch(path.rpartition(".")[2])
    }
