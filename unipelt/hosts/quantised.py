"""Frozen bases with quantised weights: which those are, what stands beside them, and what cannot be done with them.

No quantiser is imported here: a quantised weight is told by what it is, so that it does not matter which one made it.
Submodules add to what a projection gives, and that is in ordinary numbers whatever its weight is kept in.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from unipelt.config.methods import UniPELTConfig

ORDINARY = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def is_quantised(parameter: Tensor) -> bool:
    """Whether a weight is kept in other numbers than it stands for: whole or 8-bit ones, or packed into several."""
    if parameter.dtype not in ORDINARY:
        return True
    return is_traceable_wrapper_subclass(parameter) and not hasattr(parameter, "full_tensor")  # a DTensor is a part


def describe_numbers(parameter: Tensor) -> str:
    """What a parameter is kept in, in a word: `float32`, or how its quantiser calls it."""
    if is_quantised(parameter) and type(parameter) is not nn.Parameter:
        return type(parameter).__name__
    return str(parameter.dtype).removeprefix("torch.")


def template_for(weight: Tensor, dtype: torch.dtype, wanted: Literal["float32", "base"] = "float32") -> Tensor:
    """Return a tensor of the type and on the device that submodules beside a weight are made in.

    Args:
        weight: of a projection.
        dtype: the type that the model computes in.
        wanted: `float32` for at least float32, so that small steps are not rounded away; `base` for the model's type.
    """
    kind = dtype if is_quantised(weight) else weight.dtype
    if wanted == "float32" and kind in (torch.float16, torch.bfloat16):
        kind = torch.float32
    return weight if kind == weight.dtype else torch.empty(0, dtype=kind, device=weight.device)


def find_obstacle(model: nn.Module, config: UniPELTConfig, head: Collection[str]) -> str | None:
    """Why this cannot be done to a model with quantised weights, or None.

    Args:
        model: not injected yet.
        config: what is to be added.
        head: names of parameters that train and are saved.
    """
    for name, parameter in model.named_parameters():
        if not is_quantised(parameter):
            continue
        if name in head:
            return (
                f"{name} is quantised ({describe_numbers(parameter)}), and it is a part of the head, or of what the "
                "checkpoint did not hold, which trains and is saved; leave that module out when you quantise "
                "(llm_int8_skip_modules, modules_to_not_convert, filter_fn)"
            )
        if config.train_base:
            return (
                f"this method trains the base, and {name} is quantised ({describe_numbers(parameter)}); it takes a "
                "base of plain weights"
            )
    return None
