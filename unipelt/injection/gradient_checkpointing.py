"""A hook for reentrant gradient checkpointing of a stack with frozen embeddings."""

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
    """Make the input of a stack require a gradient, as reentrant gradient checkpointing needs.

    The output of frozen embeddings requires none. The input of a stack is hidden states, embeddings or token ids. This
    hook handles hidden states and embeddings. For token ids, Transformers makes the embedding module's output require a
    gradient when checkpointing is switched on.
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
"""Names of a stack's argument with hidden states or embeddings."""


def _awake(value: Any) -> Any:
    """Return the same numbers in a tensor that requires a gradient; return other values unchanged."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.requires_grad:
        return value
    return value.detach().requires_grad_(True)
