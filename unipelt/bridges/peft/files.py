"""PEFT's files, as far as writing and reading agree on them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from unipelt.submodules.outputs import OutputSlice

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
PREFIX = "base_model.model."
"""What PEFT puts before the name that a parameter has in the model."""
_TASKS = (
    ("SEQ_CLS", transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
    ("TOKEN_CLS", transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING),
    ("QUESTION_ANS", transformers.MODEL_FOR_QUESTION_ANSWERING_MAPPING),
    ("SEQ_2_SEQ_LM", transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING),
    ("CAUSAL_LM", transformers.MODEL_FOR_CAUSAL_LM_MAPPING),
    ("FEATURE_EXTRACTION", transformers.MODEL_MAPPING),
)


def scaled(tensor: Tensor, scale: float) -> Tensor:
    """In float32 at least, and rounded once."""
    kind = torch.promote_types(tensor.dtype, torch.float32)
    return (tensor.to(kind) * scale).to(tensor.dtype)


def outputs_of(tensor: Tensor, rows: OutputSlice) -> Tensor:
    """A view of a projection's rows among those of its module, (groups, size, ...)."""
    return tensor.unflatten(0, (rows.groups, -1)).narrow(1, rows.start, rows.size)


def join(*parts: str) -> str:
    """Return a path of these parts, the empty ones left out."""
    return ".".join(part for part in parts if part)


def name_modules(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Modules by the last part of their names, as is usual, if that means no other module; else whole."""
    paths = set(paths)
    short = sorted({path.rpartition(".")[2] for path in paths})
    meant = {path for path, _ in model.named_modules() if path.rpartition(".")[2] in short}
    return short if meant == paths else sorted(paths)


def task_of(model: PreTrainedModel) -> str | None:
    """PEFT's name for what the model is for, None if it has none."""
    kind = type(model.config)
    for name, mapping in _TASKS:
        classes: Any = mapping.get(kind, ())
        if isinstance(model, classes):
            return name
    return None
