"""The device and the precision of a run."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch

from unipelt.runs.errors import RunError


def find_device(wanted: str) -> str:
    """Return the device of a run, `cpu` or `cuda`.

    Args:
        wanted: `auto`, `cpu` or `cuda`.

    Raises:
        RunError: the device is not available.
    """
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1"):  # Trainer then computes on the CPU
        if wanted == "cuda":
            raise RunError("device is cuda, and accelerate's configuration asks for the CPU; change one of the two")
        return "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise RunError("device is cuda, and PyTorch finds no GPU; use --device cpu")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def precision_of(device: str, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Return the context of a run's computation: bfloat16 autocast for `bf16`, float32 for `fp32`."""
    if precision == "bf16":
        return torch.autocast(device, torch.bfloat16)
    return contextlib.nullcontext()


def describe_precision(device: str, precision: str) -> list[str]:
    """Return a line of a run's header that warns of a slow precision, or nothing.

    PyTorch multiplies bf16 matrices slowly on a CPU without AVX-512 or other instructions for it.
    """
    if device == "cpu" and precision == "bf16" and not _fast_bf16():
        return ["        warning: bf16 is many times slower than fp32 on this CPU, which lacks instructions for it"]
    return []


def _fast_bf16() -> bool:
    # PyTorch has no public name for it; a version without this one is not warned of
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is None or bool(supported())
