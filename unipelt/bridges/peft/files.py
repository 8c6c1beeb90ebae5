"""Names and helpers for PEFT's files, shared by reading and writing."""

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
"""PEFT's prefix before a parameter's name in the model."""
_TASKS = (
    ("SEQ_CLS", transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
    ("TOKEN_CLS", transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING),
    ("QUESTION_ANS", transformers.MODEL_FOR_QUESTION_ANSWERING_MAPPING),
    ("SEQ_2_SEQ_LM", transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING),
    ("CAUSAL_LM", transformers.MODEL_FOR_CAUSAL_LM_MAPPING),
    ("FEATURE_EXTRACTION", transformers.MODEL_MAPPING),
)


def scaled(tensor: Tensor, scale: float) -> Tensor:
    """Return `scale * tensor`, computed in float32 at least, and rounded once to the tensor's type."""
    kind = torch.promote_types(tensor.dtype, torch.float32)
    return (tensor.to(kind) * scale).to(tensor.dtype)


def outputs_of(tensor: Tensor, rows: OutputSlice) -> Tensor:
    """Return a view of a projection's rows among those of its module, (groups, size, ...)."""
    return tensor.unflatten(0, (rows.groups, -1)).narrow(1, rows.start, rows.size)


def join(*parts: str) -> str:
    """Return the path of these parts; empty parts are left out."""
    return ".".join(part for part in parts if part)


def name_modules(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Return the last parts of the modules' names, if they match no other module; else the whole names."""
    paths = set(paths)
    short = sorted({path.rpartition(".")[2] for path in paths})
    meant = {path for path, _ in model.named_modules() if path.rpartition(".")[2] in short}
    return short if meant == paths else sorted(paths)


def task_of(model: PreTrainedModel) -> str | None:
    """Return PEFT's name of the model's task, or None."""
    kind = type(model.config)
    for name, mapping in _TASKS:
        classes: Any = mapping.get(kind, ())
        if isinstance(model, classes):
            return name
    return None
