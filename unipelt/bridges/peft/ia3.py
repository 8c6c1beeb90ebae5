"""Read and write (IA)3 in PEFT's folders. The tensor `ia3_l` holds the factor l; a term in this package holds `l - 1`.

Shapes: I inputs, O outputs of a module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unipelt.bridges.peft.files import PREFIX, name_modules, outputs_of
from unipelt.bridges.peft.plan import IGNORED, Plan, Slot, check_saved, check_tensor, place_exactly, possible_slots
from unipelt.checkpoint.manifest import CheckpointError
from unipelt.config.further import IA3Config
from unipelt.config.parts import Place
from unipelt.files.messages import show
from unipelt.submodules.outputs import own_rows
from unipelt.submodules.room import placed_terms

_FACTOR = re.compile(r"(.+)\.ia3_l")
_IGNORED = IGNORED | {"feedforward_modules", "init_ia3_weights"}  # shapes give feedforward_modules
_PLACES: tuple[Place, ...] = tuple(place for place in get_args(Place) if place != "feed_forward")  # its module: down


def write_factors(model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return PEFT's fields and tensors for all factors of a model.

    Raises `CheckpointError` for factors that PEFT has no place for.
    """
    factors: dict[str, Tensor] = {}
    inputs: set[str] = set()
    for placed in placed_terms(model):
        host, offset = placed.path, placed.factors()["function.offset"]
        reads = placed.term.name == "ia3_activation"
        if host in factors and reads != (host in inputs):
            raise CheckpointError(
                f"PEFT's (IA)3 multiplies what {host} is given or what it gives, and this model both; choose other "
                "places, or keep the model whole with unipelt.save"
            )
        width = _widths(placed.host)[0 if reads else 1]
        factor = factors.setdefault(host, offset.new_ones(width, device="cpu"))
        rows = outputs_of(factor, placed.term.outputs)
        rows *= 1 + offset.cpu().view(rows.shape)
        if reads:
            inputs.add(host)
    leaves = [model.get_submodule(path) for path in factors]
    targets = name_modules(model, factors)
    ends = sorted({path.rpartition(".")[2] for path in inputs})
    if targets != sorted({path.rpartition(".")[2] for path in factors}) or (
        inputs != {path for path in factors if path.endswith(tuple(ends))}  # PEFT matches the ends of names
    ):
        targets, ends = sorted(factors), sorted(inputs)
    fields = {
        "target_modules": targets,
        "feedforward_modules": ends,
        "fan_in_fan_out": all(isinstance(leaf, Conv1D) for leaf in leaves),
        "init_ia3_weights": True,
    }
    return fields, {
        f"{PREFIX}{path}.ia3_l": factor[None] if path in inputs else factor[:, None] for path, factor in factors.items()
    }


def plan_factors(model: PreTrainedModel, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Plan:
    """Return the plan for a folder of (IA)3. Raises `CheckpointError` for a tensor or field without a place."""
    for field, value in values.items():
        if field not in _IGNORED and field != "peft_type" and value:
            raise CheckpointError(f"{show(field)} is {show(value)}, which is no plain (IA)3")
    factors, saved = _sort(tensors)
    check_saved(model, saved)
    slots = possible_slots(model, IA3Config(gate=False), _PLACES, least=("value",))
    found: dict[str, Tensor] = {}  # factor l by the path of a term
    contexts: list[tuple[str, Tensor]] = []
    for path, factor in factors.items():
        own = [slot for slot in slots if slot.path == path]
        if not own:
            ends = sorted({slot.path.rpartition(".")[2] for slot in slots})
            raise CheckpointError(
                f"it has (IA)3 on {show(path)}; in this {type(model).__name__} (IA)3 goes to the projections of its "
                f"layers alone ({', '.join(ends)})"
            )
        read, given = _widths(model.get_submodule(path))
        of_input = tuple(factor.shape) == (1, read)
        check_tensor(f"{path}.ia3_l", factor, (1, read) if of_input else (given, 1))
        places = {slot.name: slot for slot in own}
        if not of_input:
            found |= _outputs(
                path, factor.flatten(), {name: s for name, s in places.items() if "activation" not in name}
            )
        elif "ia3_activation" in places:
            found[f"{path}.ia3_activation"] = factor.flatten()
        elif "ia3_attention" in places:
            contexts.append((path, factor.flatten()))
        else:
            raise CheckpointError(
                f"it multiplies what {show(path)} is given, which here goes for the last projections of attention and "
                "of the feed-forward network alone"
            )
    for path, factor in contexts:
        value = _value_before(path, slots, len(factor))
        found[value] = found[value] * factor if value in found else factor
    places_of = {path.rpartition(".ia3_")[2] for path in found}
    part = IA3Config(gate=False, places=tuple(place for place in _PLACES if place in places_of))
    config = place_exactly(model, part, found.keys(), "(IA)3")
    return Plan(config, {f"{path}.function.offset": _less_one(factor) for path, factor in found.items()}, saved)


def _widths(leaf: Any) -> tuple[int, int]:
    """Return the numbers of inputs and outputs, (I, O), of a module."""
    return (leaf.nx, leaf.nf) if isinstance(leaf, Conv1D) else (leaf.in_features, leaf.out_features)


def _less_one(factor: Tensor) -> Tensor:
    return (factor.to(torch.promote_types(factor.dtype, torch.float32)) - 1).to(factor.dtype)


def _sort(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the factors by the path of their module, and the other tensors by their names in the model."""
    factors, saved = {}, {}
    for name, tensor in tensors.items():
        if not name.startswith(PREFIX):
            raise CheckpointError(f"the tensor {show(name)} is none of PEFT's, whose names start with {PREFIX}")
        inner = name.removeprefix(PREFIX)
        if match := _FACTOR.fullmatch(inner):
            factors[match[1]] = tensor
        else:
            saved[inner] = tensor
    if not factors:
        raise CheckpointError("it holds no ia3_l")
    return factors, saved


def _outputs(path: str, factor: Tensor, own: Mapping[str, Slot]) -> dict[str, Tensor]:
    """Return the factors of one module's outputs by the path of a term."""
    rest = factor.clone()
    for slot in own.values():
        outputs_of(rest, slot.projection.rows).fill_(1)
    if (rest != 1).any():
        raise CheckpointError(
            f"its (IA)3 on {show(path)} changes more than {' and '.join(own)} of what that module computes, where it "
            "does not go"
        )
    shares = {f"{path}.{name}": own_rows(factor, slot.projection.rows) for name, slot in own.items()}
    # in a fused projection, unchanged queries, keys or values get no term
    moved = {name: share for name, share in shares.items() if (share != 1).any()}
    return shares if len(shares) == 1 else moved or dict([next(iter(shares.items()))])


def _value_before(path: str, slots: list[Slot], width: int) -> str:
    """Return the path of the values' term that equals a factor on the input of the attention's last projection.

    This input is, for each head, a weighted mean of values, so a factor on its numbers is a factor on the values.
    """
    here = next(slot for slot in slots if slot.path == path)
    for slot in slots:
        if slot.name == "ia3_value" and (slot.part, slot.layer) == (here.part, here.layer):
            if slot.projection.rows.count == width:
                return f"{slot.path}.{slot.name}"
            break
    raise CheckpointError(
        f"it multiplies what {show(path)} is given, which is the values' place here, and several heads of queries "
        "share a head of those"
    )
