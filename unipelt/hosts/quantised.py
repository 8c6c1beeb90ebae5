"""Frozen bases with quantised weights: how to recognise them, the dtype of submodules beside them, and their limits.

No quantiser is imported here. The dtype and the class of a weight show whether it is quantised, so every quantiser
works. Submodules add to the output of a projection, which is in floating point for every storage of the weight.
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
    """Return whether a weight is stored in another dtype than those of `ORDINARY`, or in a quantiser's tensor class."""
    if parameter.dtype not in ORDINARY:
        return True
    # a DTensor (it has `full_tensor`) holds a part of an ordinary weight
    return is_traceable_wrapper_subclass(parameter) and not hasattr(parameter, "full_tensor")


def describe_numbers(parameter: Tensor) -> str:
    """Return the storage of a parameter in one word: a dtype such as `float32`, or the quantiser's tensor class."""
    if is_quantised(parameter) and type(parameter) is not nn.Parameter:
        return type(parameter).__name__
    return str(parameter.dtype).removeprefix("torch.")


def template_for(weight: Tensor, dtype: torch.dtype, wanted: Literal["float32", "base"] = "float32") -> Tensor:
    """Return a tensor that has the dtype and the device of submodules beside a weight.

    Args:
        weight: the weight of a projection.
        dtype: the dtype that the model computes in.
        wanted: `float32` for at least float32, so that small steps are not rounded away; `base` for the model's dtype.

    Returns:
        The weight itself if it is an ordinary one of that dtype, else an empty tensor, (0,): a quantiser's tensor class
        makes no new tensors.
    """
    kind = dtype if is_quantised(weight) else weight.dtype
    if wanted == "float32" and kind in (torch.float16, torch.bfloat16):
        kind = torch.float32
    if kind == weight.dtype and not is_quantised(weight):
        return weight
    return torch.empty(0, dtype=kind, device=weight.device)


def find_obstacle(model: nn.Module, config: UniPELTConfig, head: Collection[str]) -> str | None:
    """Return the reason why a model with quantised weights cannot take a configuration; None if it can.

    Args:
        model: a model that is not injected yet.
        config: the configuration of the submodules.
        head: names of the head's parameters, which train and are saved.
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
