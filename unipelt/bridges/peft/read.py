"""Load LoRA, DoRA, (IA)3, LayerNorm tuning and prompts from a folder of PEFT.

Shapes: r rank, I inputs and O outputs of a module.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load as load_tensors
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from unipelt.bridges.peft.files import CONFIG, PICKLE, PREFIX, WEIGHTS, outputs_of, scaled
from unipelt.bridges.peft.ia3 import plan_factors
from unipelt.bridges.peft.norms import plan_norms
from unipelt.bridges.peft.plan import (
    IGNORED,
    Plan,
    check_saved,
    check_tensor,
    find_places,
    place_exactly,
    possible_slots,
)
from unipelt.bridges.peft.prompts import plan_prompt
from unipelt.checkpoint.bind import bind
from unipelt.checkpoint.manifest import CheckpointError
from unipelt.config.parts import LINEAR, LoRAConfig
from unipelt.config.schema import LARGEST, ConfigError, read_mapping
from unipelt.files.messages import shorten, show, show_path
from unipelt.files.strict import read_bytes
from unipelt.hosts.locate import InjectionError
from unipelt.hosts.quantised import is_quantised
from unipelt.hosts.targets import Projection
from unipelt.injection.inject import inject_as, remove
from unipelt.injection.parameters import head_names
from unipelt.injection.state import injection_of
from unipelt.submodules.outputs import own_rows

_PAIR = re.compile(r"(.+)\.lora_(A|B)\.weight")
_NAME = re.compile(r"[\w.]+")
_IGNORED = IGNORED | {
    # places (they follow from the tensors' names too), training and execution
    *("layers_to_transform", "layers_pattern", "eva_config", "corda_config", "lora_ga_config"),
    *("loftq_config", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
}
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that do not change the base's weights."""
_READ = frozenset(
    {"peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "init_lora_weights"}
    | {"lora_dropout"}
)
_MAGNITUDE = ".lora_magnitude_vector"

logger = logging.get_logger(__name__)


def load_peft(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """Inject the LoRA, DoRA, (IA)3, LayerNorm tuning or prompt of a folder that PEFT or `save_peft` wrote, in place.

    The modules of the folder must be projections of some layers, the same projections in each of these layers. Scales
    `alpha / r`, rank-stabilised scales, other ranks and scales for some modules (`rank_pattern`, `alpha_pattern`) and
    fused projections give the same product up to rounding. Any other field that changes the output raises an error.
    `lora_dropout` is kept for further training.

    Args:
        model: the base model of the training, with the same head class and without submodules.
        folder: a folder with `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        The same model. The modules of `modules_to_save` are its head, and train.

    Raises:
        FileNotFoundError: there is no such folder.
        CheckpointError: the folder is damaged, belongs to another model, or holds a method that `unipelt` does not
            compute.
        InjectionError: the model carries submodules already, or cannot take these. After any error the model is
            unchanged.
    """
    if not isinstance(model, PreTrainedModel):
        raise InjectionError(f"load_peft takes a PreTrainedModel of transformers, not {type(model).__name__}")
    if getattr(model, "unipelt_injection", None) is not None:
        raise InjectionError("this model carries submodules already; call unipelt.remove(model) first")
    folder = Path(folder)
    values, tensors = _read(folder)
    try:
        kind = values.get("peft_type")
        if not isinstance(kind, str) or kind not in _PLANS:
            raise CheckpointError(
                f"peft_type is {show(kind)}, and unipelt reads {', '.join(_PLANS)}; other methods cannot be taken over"
            )
        plan = _PLANS[kind](model, values, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{show_path(folder)} cannot be loaded: {error}") from error
    bind(inject_as(model, plan.config, deployed=False, head=head_names(model) | plan.saved.keys()))
    try:
        places = find_places(model)
        with torch.no_grad():
            for name, tensor in plan.values.items():
                # a term with fewer ranks than others keeps B = 0 in the further ranks
                places[name][tuple(slice(size) for size in tensor.shape)] = tensor
            for name, tensor in plan.saved.items():
                model.get_parameter(name).copy_(tensor)
    except BaseException:
        remove(model)
        raise
    if left := sorted(injection_of(model).head - plan.saved.keys()):
        logger.warning(
            f"{folder} holds no head ({', '.join(left[:3])}{', …' if len(left) > 3 else ''}): the model's own is kept"
        )
    return model


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read configuration and tensors. Raises `FileNotFoundError` or `CheckpointError`."""
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{show_path(folder)} is not a folder of PEFT's: it has no {CONFIG}")
    if not (folder / WEIGHTS).is_file():
        if (folder / PICKLE).is_file():
            raise CheckpointError(
                f"{show_path(folder)} holds {PICKLE}, a pickle, which is not read; save it from PEFT again, with "
                "safe_serialization=True (the default)"
            )
        raise FileNotFoundError(f"{show_path(folder)} is not a folder of PEFT's: it has no {WEIGHTS}")
    try:
        values = read_mapping(folder / CONFIG)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    try:
        return values, dict(sorted(load_tensors(read_bytes(folder / WEIGHTS)).items()))  # the order in a file varies
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder / WEIGHTS} is not a valid safetensors file: {shorten(error)}") from error


def _plan_low_rank(model: PreTrainedModel, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Plan:
    """Return the plan for a folder of LoRA. Raises `CheckpointError`; `InjectionError` if the model takes no LoRA."""
    _check_values(values)
    decomposed = bool(values.get("use_dora"))
    pairs, lengths, saved = _sort(tensors, decomposed)
    check_saved(model, saved)
    found = possible_slots(model, LoRAConfig(gate=False), LINEAR, least=("query", "value"))
    if unknown := sorted(pairs.keys() - {slot.path for slot in found}):
        ends = sorted({slot.path.rpartition(".")[2] for slot in found})
        raise CheckpointError(
            f"it has LoRA on {show(unknown[0])}{f' and {len(unknown) - 1} more' if len(unknown) > 1 else ''}; in this "
            f"{type(model).__name__} LoRA goes to the projections of its layers alone ({', '.join(ends)})"
        )
    terms: dict[str, tuple[Tensor, Tensor]] = {}
    magnitudes: dict[str, Tensor] = {}
    scales: dict[str, float] = {}
    for path, (low, high) in pairs.items():
        own = {slot.name: slot.projection for slot in found if slot.path == path}
        leaf: Any = model.get_submodule(path)
        outputs = leaf.nf if isinstance(leaf, Conv1D) else leaf.out_features
        rank = _pattern(values, "rank_pattern", path, values["r"])
        check_tensor(f"{path}.lora_A", low, (rank, next(iter(own.values())).inputs))
        check_tensor(f"{path}.lora_B", high, (outputs, rank))
        touched = high.any(dim=1)
        if decomposed:
            check_tensor(f"{path}{_MAGNITUDE}", lengths[path], (outputs,))
            touched = touched | _moved(path, leaf, lengths[path])
        for name, both in _apart(path, low, high, touched, own).items():
            terms[f"{path}.{name}"] = both
            if decomposed:
                magnitudes[f"{path}.{name}"] = own_rows(lengths[path], own[name].rows)
            scales[f"{path}.{name}"] = _scale(values, path, rank)
    if not terms:
        raise CheckpointError("all its terms are zero: there is nothing to load")
    scale = next(iter(scales.values()))
    terms = {
        path: (low, high if scales[path] == scale else scaled(high, scales[path] / scale))
        for path, (low, high) in terms.items()
    }
    rank = max(1, *(len(low) for low, _ in terms.values()))
    try:
        places = {path.rpartition(".lora_")[2] for path in terms}
        lora = LoRAConfig(
            rank,
            scale * rank,
            gate=False,
            places=tuple(places),  # type: ignore[arg-type]
            decomposed=decomposed,
            dropout=values.get("lora_dropout") or 0.0,
        )
    except ConfigError as error:
        raise CheckpointError(f"its LoRA cannot be meant: {error}") from error
    inner = "function." if decomposed else ""
    parts = {
        f"{path}.{inner}{half}": side for path, both in terms.items() for half, side in zip("AB", both, strict=True)
    }
    parts |= {f"{path}.function.magnitude": length for path, length in magnitudes.items()}
    return Plan(place_exactly(model, lora, terms.keys(), "LoRA"), parts, saved)


_PLANS: Mapping[str, Callable[[PreTrainedModel, Mapping[str, Any], Mapping[str, Tensor]], Plan]] = {
    "IA3": plan_factors,
    "LN_TUNING": plan_norms,
    "LORA": _plan_low_rank,
    "PROMPT_TUNING": plan_prompt,
}
"""The function that plans a folder, by PEFT's `peft_type`."""


def _check_values(values: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` for a field with a value that is not plain LoRA or DoRA."""
    start = values.get("init_lora_weights")
    if not (start is None or isinstance(start, (bool, str))) or start not in _STARTS:
        raise CheckpointError(
            f"init_lora_weights is {show(start)}, a start that changes the base's own weights too; save it from PEFT "
            "as plain LoRA (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for name, value in values.items():
        if name not in _IGNORED and name not in _READ and value and not (name == "bias" and value == "none"):
            raise CheckpointError(f"{show(name)} is {show(value)}, which is no plain LoRA")
    for name, kind in (("r", int), ("lora_alpha", (int, float))):
        value = values.get(name)
        if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value <= LARGEST:
            raise CheckpointError(f"{name} must be a number above 0 and at most {LARGEST:,}, not {show(value)}")
    dropout = values.get("lora_dropout") or 0.0
    if not isinstance(dropout, (int, float)) or isinstance(dropout, bool) or not 0 <= dropout < 1:
        raise CheckpointError(f"lora_dropout must be a number of at least 0 and below 1, not {show(dropout)}")
    for name in ("use_rslora", "use_dora"):
        if not isinstance(values.get(name, False), bool):
            raise CheckpointError(f"{name} must be true or false, not {show(values[name])}")
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = values.get(name) or {}
        if not isinstance(pattern, Mapping):
            raise CheckpointError(f"{name} must be a mapping, not {show(pattern)}")
        for key, value in pattern.items():
            if not _NAME.fullmatch(key.removeprefix("^")):
                raise CheckpointError(f"{name} names {show(key)}, which is no plain name but a pattern")
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= LARGEST:
                raise CheckpointError(
                    f"{name}: {show(key)} must be a number above 0 and at most {LARGEST:,}, not {show(value)}"
                )


def _sort(
    tensors: Mapping[str, Tensor], decomposed: bool
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor], dict[str, Tensor]]:
    """Return (A, B) and DoRA's magnitudes by the path of a module, and the other tensors by their names in the model.

    A is (r, I), B is (O, r), a magnitude is (O,).
    """
    halves: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    lengths, saved = {}, {}
    for name, tensor in tensors.items():
        if not name.startswith(PREFIX):
            raise CheckpointError(f"the tensor {show(name)} is none of PEFT's, whose names start with {PREFIX}")
        inner = name.removeprefix(PREFIX)
        if match := _PAIR.fullmatch(inner):
            halves[match[2]][match[1]] = tensor
        elif decomposed and inner.endswith(_MAGNITUDE):
            lengths[inner.removesuffix(_MAGNITUDE)] = tensor
        elif ".lora_" in inner:
            raise CheckpointError(f"the tensor {show(inner)} belongs to no such LoRA (an embedding, a bias, DoRA)")
        else:
            saved[inner] = tensor
    if alone := sorted(halves["A"].keys() ^ halves["B"].keys()):
        raise CheckpointError(f"{show(alone[0])} has one of lora_A and lora_B, and not the other")
    if not halves["A"]:
        raise CheckpointError("it holds no lora_A and lora_B")
    if decomposed and (odd := sorted(halves["A"].keys() ^ lengths.keys())):
        raise CheckpointError(f"{show(odd[0])} has one of lora_A and lora_magnitude_vector, and not the other")
    return {path: (low, halves["B"][path]) for path, low in halves["A"].items()}, lengths, saved


def _moved(path: str, leaf: Any, length: Tensor) -> Tensor:
    """Return which rows of a module DoRA's magnitudes change, (O,), beyond rounding."""
    if is_quantised(leaf.weight):
        raise CheckpointError(f"{show(path)} is quantised, and DoRA needs its weight's numbers")
    own = (leaf.weight.t() if isinstance(leaf, Conv1D) else leaf.weight).detach().cpu().norm(dim=1).to(length.dtype)
    return ~torch.isclose(length, own, rtol=4 * torch.finfo(length.dtype).eps, atol=0)


def _pattern(values: Mapping[str, Any], name: str, path: str, default: Any) -> Any:
    """Return the value of the first entry that matches a module's path, or the default.

    An entry matches the end of the path, or, after a `^`, the whole path.
    """
    for key, value in (values.get(name) or {}).items():
        if path == key.removeprefix("^") or (not key.startswith("^") and path.endswith(f".{key}")):
            return value
    return default


def _scale(values: Mapping[str, Any], path: str, rank: int) -> float:
    alpha: float = _pattern(values, "alpha_pattern", path, values["lora_alpha"])
    return alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)


def _apart(
    path: str, low: Tensor, high: Tensor, touched: Tensor, own: Mapping[str, Projection]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the terms of one module by name, without unused ranks: A (r, I) and B (outputs of the term, r).

    `touched`, (O,), marks the rows that the module's pair changes.
    """
    rest = touched.clone()
    for projection in own.values():
        outputs_of(rest, projection.rows).zero_()
    if rest.any():
        raise CheckpointError(
            f"its LoRA on {show(path)} changes more than {' and '.join(own)} of what that module computes, where LoRA "
            "does not go"
        )
    shares = {name: outputs_of(high, projection.rows).flatten(0, 1) for name, projection in own.items()}
    if len(own) > 1:  # fused projection: unchanged parts get no term
        there = {name: share for name, share in shares.items() if own_rows(touched, own[name].rows).any()}
        shares = there or dict([next(iter(shares.items()))])
    # `save_peft` gives each term of a module separate ranks
    ranks = len(low) // len(shares)
    spans = [slice(place * ranks, (place + 1) * ranks) for place in range(len(shares))]
    disjoint = len(low) == ranks * len(shares) and all(
        not share[:, other].any()
        for place, share in enumerate(shares.values())
        for index, other in enumerate(spans)
        if index != place
    )
    apart = {}
    for span, (name, share) in zip(spans, shares.items(), strict=True):
        own_low, own_high = (low[span], share[:, span]) if disjoint else (low, share)
        used = own_low.any(dim=1) | own_high.any(dim=0)  # the other ranks are zero, as filling
        apart[name] = (own_low[used], own_high[:, used])
    return apart
