"""The device that a run computes on, and the precision that it computes in."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch

from unipelt.runs.errors import RunError


def find_device(wanted: str) -> str:
    """The device that a run computes on, `cpu` or `cuda`.

    Args:
        wanted: `auto`, `cpu` or `cuda`.

    Raises:
        RunError: that device is not here, or this is one of several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError(
            "a run trains in one process, and WORLD_SIZE is above 1; start it with python, and several runs side by "
            "side with one GPU each (CUDA_VISIBLE_DEVICES)"
        )
    if wanted == "cuda" and not torch.cuda.is_available():
        raise RunError("device is cuda, and PyTorch finds no GPU; use --device cpu")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def precision_of(device: str, precision: str) -> contextlib.AbstractContextManager[Any]:
    """A context in which a run computes: bfloat16 autocast with `bf16`, float32 with `fp32`."""
    if precision == "bf16":
        return torch.autocast(device, torch.bfloat16)
    return contextlib.nullcontext()
