"""PEFT's files of LoRA, as far as writing and reading agree on them."""

from __future__ import annotations

import torch
from torch import Tensor

from unipelt.lora import Rows

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
PREFIX = "base_model.model."
"""What PEFT puts before the name that a parameter has in the model."""


def scaled(tensor: Tensor, scale: float) -> Tensor:
    """In float32 at least, and rounded once."""
    kind = torch.promote_types(tensor.dtype, torch.float32)
    return (tensor.to(kind) * scale).to(tensor.dtype)


def outputs_of(tensor: Tensor, rows: Rows) -> Tensor:
    """A view of a projection's rows among those of its module, (groups, size, ...)."""
    return tensor.unflatten(0, (rows.groups, -1)).narrow(1, rows.start, rows.size)
