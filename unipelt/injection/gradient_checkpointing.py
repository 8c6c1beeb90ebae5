"""What reentrant gradient checkpointing needs of a stack whose embeddings are frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unipelt.injection.hooks import hook
from unipelt.submodules.forward_pass import replace_arguments


@hook("enter")
def wake_input(
    owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Let the input of a stack require a gradient, which reentrant gradient checkpointing needs.

    Frozen embeddings give none. A stack is given states, embeddings, or token ids that it embeds itself; Transformers
    wakes the embedding module when checkpointing is switched on, and this hook sees the first two.
    """
    if not _checkpoints_reentrantly(owner):
        return None
    return (
        replace_arguments(args, (*map(_awake, args[:1]), *args[1:])),
        {name: _awake(value) if name in STATES else value for name, value in kwargs.items()},
    )


def _checkpoints_reentrantly(module: Any) -> bool:
    layer = module.unipelt_layer[0]
    if not (torch.is_grad_enabled() and layer.training and getattr(layer, "gradient_checkpointing", False)):
        return False
    return getattr(layer._gradient_checkpointing_func, "keywords", {}).get("use_reentrant", True)


STATES = ("hidden_states", "inputs_embeds")
"""What a stack calls its input, where that is not token ids."""


def _awake(value: Any) -> Any:
    """The same numbers, requiring a gradient."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.requires_grad:
        return value
    return value.detach().requires_grad_(True)
