"""Read and write LayerNorm tuning in PEFT's folders. PEFT too keeps a trained copy of each norm.

Shapes: D width of the states.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from unipelt.bridges.peft.files import PREFIX, name_modules
from unipelt.bridges.peft.plan import IGNORED, Plan, alone, check_saved, check_tensor, find_slots, place_exactly
from unipelt.checkpoint.manifest import CheckpointError
from unipelt.config.further import LNTuningConfig
from unipelt.files.messages import show
from unipelt.submodules.room import placed_terms

_PART = re.compile(r"(.+)\.ln_tuning_layers\.(\w+)")


def write_norms(model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return PEFT's fields and tensors for the trained norms of a model."""
    tensors: dict[str, Tensor] = {}
    paths = []
    for placed in placed_terms(model):
        paths.append(placed.path)
        for name, parameter in placed.term.function.norm.named_parameters():
            tensors[f"{PREFIX}{placed.path}.ln_tuning_layers.{name}"] = parameter
    return {"target_modules": name_modules(model, paths)}, tensors


def plan_norms(model: PreTrainedModel, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Plan:
    """Return the plan for a folder of LayerNorm tuning.

    Raises `CheckpointError` for a tensor or field without a place, and `InjectionError` if the model takes no such
    submodule.
    """
    for field, value in values.items():
        if field not in IGNORED and field != "peft_type" and value:
            raise CheckpointError(f"{show(field)} is {show(value)}, which is no plain LayerNorm tuning")
    norms, saved = _sort(tensors)
    check_saved(model, saved)
    part = LNTuningConfig(gate=False)
    slots = {slot.path: slot for slot in find_slots(model, alone(part))}
    found: dict[str, Tensor] = {}
    for path, parts in norms.items():
        if path not in slots:
            raise CheckpointError(
                f"it tunes {show(path)}, and here LayerNorm tuning is for the norms of the layers' states alone; save "
                "it from PEFT with target_modules that name these"
            )
        own = dict(model.get_submodule(path).named_parameters())
        if odd := sorted(own.keys() ^ parts.keys()):
            raise CheckpointError(f"{show(path)} has {', '.join(own)} here, and {show(odd[0])} is missing or beside it")
        for name, tensor in parts.items():
            check_tensor(f"{path}.{name}", tensor, tuple(own[name].shape))
            found[f"{path}.{slots[path].name}.function.norm.{name}"] = tensor
    terms = {f"{path}.{slots[path].name}" for path in norms}
    return Plan(place_exactly(model, part, terms, "LayerNorm tuning"), found, saved)


def _sort(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Return weight and bias, each (D,), by the path of their norm, and the other tensors by their names."""
    norms: dict[str, dict[str, Tensor]] = {}
    saved = {}
    for name, tensor in tensors.items():
        if not name.startswith(PREFIX):
            raise CheckpointError(f"the tensor {show(name)} is none of PEFT's, whose names start with {PREFIX}")
        inner = name.removeprefix(PREFIX)
        if match := _PART.fullmatch(inner):
            norms.setdefault(match[1], {})[match[2]] = tensor
        else:
            saved[inner] = tensor
    if not norms:
        raise CheckpointError("it holds no ln_tuning_layers")
    return norms, saved
