"""Write one of PEFT's tuners as a folder of PEFT, with the names and the configuration that PEFT itself gives it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from unipelt.checkpoint.manifest import CheckpointError
from unipelt.config.peft import PeftTermConfig
from unipelt.config.peft_types import import_peft, peft_config
from unipelt.injection.peft_layers import ADAPTER, Place, ends_by_place, make_skeleton
from unipelt.submodules.room import ROOM, placed_terms


def write_tuner(model: PreTrainedModel, part: PeftTermConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return PEFT's fields and tensors for the only tuner of a model.

    PEFT builds the tuner again, around stand-ins for the projections, gets the numbers, and names them.

    Raises:
        CheckpointError: PEFT would give another model than this one; the message gives the reason.
        ImportError: PEFT is not installed.
    """
    peft = import_peft()
    terms = {placed.path: placed for placed in placed_terms(model)}
    if not terms:
        raise CheckpointError(
            f"{part.name} was folded into the weights, so none is left to write; unipelt.merge gives the plain model"
        )
    places = {}
    for path, placed in terms.items():
        own = placed.term.outputs
        if not isinstance(placed.host, nn.Linear) or own.count != placed.host.out_features:
            raise CheckpointError(
                f"{placed.term.name} at {path} is at a part of a projection, or at a Conv1D, where PEFT's {part.type} "
                "computes other numbers; keep the model whole with unipelt.save"
            )
        places[path] = Place(placed.layer, placed.term.name.removeprefix(f"{part.name}_"), placed.host, own)
    _check_one_stack(model, part, places)
    ends = ends_by_place(places)
    config = peft_config(part, ends)
    _check_targets(model, config.target_modules, places)
    skeleton, _ = make_skeleton(places)
    theirs: Any = peft.PeftModel(skeleton, config, ADAPTER)
    with torch.no_grad():
        for path, placed in terms.items():
            layer: Any = skeleton.get_submodule(path)
            mine = dict([*placed.term.layer.named_parameters(), *placed.term.layer.named_buffers()])
            for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
                if not name.startswith("base_layer."):
                    tensor.copy_(mine[name])
    state = peft.get_peft_model_state_dict(theirs, adapter_name=ADAPTER)
    fields = {name: _plain(value) for name, value in config.to_dict().items()}
    return fields, {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _check_one_stack(model: PreTrainedModel, part: PeftTermConfig, places: dict[str, Place]) -> None:
    stacks = {place.layer.rpartition(".")[0] for place in places.values()}
    if len(stacks) > 1:
        raise CheckpointError(
            f"{part.name} has numbers of its own for each stack ({', '.join(sorted(stacks))}), and PEFT may share them "
            "between all; keep the model whole with unipelt.save"
        )


def _check_targets(model: PreTrainedModel, ends: Any, places: dict[str, Place]) -> None:
    """Raise `CheckpointError` if PEFT would find other projections by these ends of names."""
    found = {
        path
        for path, _ in model.named_modules()
        if ROOM not in path.split(".") and any(path.endswith(f".{end}") for end in ends)
    }
    if odd := sorted(found - places.keys()):
        raise CheckpointError(
            f"PEFT would add its layer to {odd[0]} too, which has none here (layers leaves it out); keep the model "
            "whole with unipelt.save"
        )


def _plain(value: Any) -> Any:
    """Return a value of a configuration as JSON has it: a set as a sorted list."""
    return sorted(value) if isinstance(value, (set, frozenset)) else value
