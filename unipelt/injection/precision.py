"""Training of parts of a half-precision model in float32, where small steps are not rounded away."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from unipelt.injection.hooks import hook, put

HALF = (torch.float16, torch.bfloat16)


def widen(model: nn.Module, names: Collection[str]) -> None:
    """Convert the modules that hold these parameters from half precision to float32.

    A hook converts the input of such a module. Its output stays float32, because these modules are heads, and no part
    of the base follows a head.
    """
    for path, module in model.named_modules():
        own = {f"{path}.{name}" if path else name: parameter for name, parameter in module._parameters.items()}
        wide = [parameter for name, parameter in own.items() if name in names and parameter is not None]
        if not any(parameter.dtype in HALF for parameter in wide):
            continue
        for parameter in own.values():
            if parameter is not None and parameter.dtype in HALF:
                parameter.data = parameter.data.float()
        put(module, widen_input)


@hook("input")
def widen_input(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Convert the floating-point inputs of a module to the dtype of its parameters."""
    kind = next(parameter.dtype for parameter in module._parameters.values() if parameter is not None)
    return tuple(value.to(kind) if isinstance(value, Tensor) and value.is_floating_point() else value for value in args)
