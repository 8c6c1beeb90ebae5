"""Write LoRA, DoRA, (IA)3, LayerNorm tuning, prompts and tuners of PEFT into a folder of PEFT.

Shapes: r rank, I inputs and O outputs of a module.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as dump_tensors
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unipelt.bridges.peft.files import CONFIG, PREFIX, WEIGHTS, join, name_modules, outputs_of, scaled, task_of
from unipelt.bridges.peft.ia3 import write_factors
from unipelt.bridges.peft.norms import write_norms
from unipelt.bridges.peft.prompts import write_prompt
from unipelt.bridges.peft.tuner import write_tuner
from unipelt.checkpoint.manifest import CheckpointError
from unipelt.config.methods import UniPELTConfig
from unipelt.config.peft import PeftTermConfig
from unipelt.config.presets import PRESETS
from unipelt.files.atomic import write_whole
from unipelt.gates.measure import find_gates
from unipelt.hosts.targets import ENTRY_PLACES
from unipelt.injection.inject import inject_as
from unipelt.injection.parameters import is_sharded, kept_names
from unipelt.injection.state import Folded, Injection, injection_of
from unipelt.submodules.lora import LoRA, low_rank_factors
from unipelt.submodules.mixture import MixtureTerm
from unipelt.submodules.outputs import OutputSlice
from unipelt.submodules.room import PlacedTerm, layer_sets, own_parameters, own_parts, placed_terms

_ALSO_SAVED = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Modules that PEFT adds to `modules_to_save` by itself, by task."""


def save_peft(model: PreTrainedModel, folder: str | Path, *, base: str | None = None) -> Path:
    """Write a model's LoRA, DoRA, (IA)3, LayerNorm tuning, prompt or PEFT tuner as a folder of PEFT.

    `PeftModel.from_pretrained` and other programs read it. Terms without a gate are written unchanged; LoRA that does
    not start at zero is written as a pair of twice the rank. If `unipelt.fold` replaced a gate by a constant c, then c
    stands in for `alpha / r`: `c B` is written. The head, and parts of the base that its checkpoint did not hold, are
    written as `modules_to_save`.

    Args:
        model: an injected model, folded or not, that carries no other submodule.
        folder: created if absent; other files in the folder are left alone. A failed write leaves no partial file. The
            configuration is written last.
        base: name or path of the base model for PEFT; by default the location from which the base was loaded.

    Returns:
        The folder.

    Raises:
        CheckpointError: the model carries or trains parameters that such a folder cannot hold; the message names them
            and a remedy. Nothing was written.
        ValueError: the model carries no submodules.
        OSError: the folder cannot be written.
    """
    injection = injection_of(model)
    if sharded := [name for name, parameter in model.named_parameters() if is_sharded(parameter)]:
        raise CheckpointError(
            f"each process holds only a part of {sharded[0]!r}; save it with unipelt.save, load that in one process, "
            "and save_peft there"
        )
    method, called, kept = _method(injection.config)
    _check_travels(model, injection, called, kept)
    part = injection.config.part(kept)
    if isinstance(part, PeftTermConfig):
        fields, tensors = write_tuner(model, part)
    elif method == "LORA":
        fields, tensors = _pairs(model, _terms(model, injection))
        assert injection.config.lora is not None
        fields["lora_dropout"] = injection.config.lora.dropout
    else:
        fields, tensors = {"IA3": write_factors, "LN_TUNING": write_norms, "PROMPT_TUNING": write_prompt}[method](model)
    task = task_of(model)
    saved = _saved_modules(model, injection.head, task)
    for path in saved:
        tensors |= {f"{PREFIX}{path}.{name}": tensor for name, tensor in model.get_submodule(path).state_dict().items()}
    config = {
        **fields,
        "peft_type": method,
        "task_type": task,
        "base_model_name_or_path": base if base is not None else model.config._name_or_path or None,
        "revision": None if base is not None else getattr(model.config, "_commit_hash", None),
        "inference_mode": True,
        "modules_to_save": saved or None,
    }
    folder = Path(folder)
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file; save_peft needs a folder")
    weights = dump_tensors(
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, {"format": "pt"}
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)  # or an interrupted write leaves it beside new weights
    write_whole(folder / WEIGHTS, weights)
    write_whole(folder / CONFIG, f"{json.dumps(config, indent=2)}\n".encode())
    return folder


@dataclass(frozen=True)
class _Term:
    """A low-rank term to write: `scale * B A`, added to `rows` of a projection; for DoRA, also the rows' magnitudes.

    Shapes: A (r, I), B (outputs of the term, r), magnitude (outputs of the term,).
    """

    projection: str
    rows: OutputSlice
    A: Tensor
    B: Tensor
    scale: float
    magnitude: Tensor | None = None


def _method(config: UniPELTConfig) -> tuple[str, str, str]:
    """Return PEFT's name of the method to write, its name in messages, and its kind of submodule here.

    Raises `CheckpointError` if the model carries none.
    """
    for method, (called, kept) in _METHODS.items():
        if config.part(kept) is not None:
            return method, called, kept
    for part in config.more:
        if isinstance(part, PeftTermConfig):
            return part.type, f"PEFT's {part.type}", part.name
    raise CheckpointError(
        "this model carries no LoRA, no (IA)3, no LayerNorm tuning, no prompt and no tuner of PEFT's, which is what a "
        "PEFT folder holds; see unipelt.save"
    )


_METHODS = {
    "LORA": ("LoRA", "lora"),
    "IA3": ("(IA)3", "ia3"),
    "PROMPT_TUNING": ("a prompt", "prompt"),
    "LN_TUNING": ("LayerNorm tuning", "ln_tuning"),
}
"""By PEFT's name of a method: its name in messages, and its kind of submodule in this package."""
_OTHERS = {"adapter": "an adapter", "prefix": "a prefix", "prompt": "a prompt", "tokens": "trained tokens"}
"""Names in messages of the other kinds; a kind that is not listed keeps its name."""


def _check_travels(model: PreTrainedModel, injection: Injection, called: str, kept: str) -> None:
    """Raise `CheckpointError` for the first part of a model that a folder of this method cannot hold.

    Args:
        model: an injected model.
        injection: its record.
        called: the name of the method in messages.
        kept: the kind of submodule that the folder holds.
    """
    for path, kind, module in _added(model):
        if kind != kept:
            raise CheckpointError(
                f"{path} is {_OTHERS.get(kind, kind)}, which a PEFT folder of {called} cannot hold; train without it "
                + (f"(the preset {kept!r}), " if kept in PRESETS else "(the tuner alone), ")
                + "or keep the model whole with unipelt.save"
            )
        if isinstance(module, MixtureTerm):
            raise CheckpointError(
                f"{path} is a mixture of experts, which a PEFT folder of {called} cannot hold; unipelt.merge_experts "
                "makes one submodule of a mixture with the router random, or keep the model whole with unipelt.save"
            )
        if not module.gate_name:
            continue
        if module.folds_to == "constant":
            raise CheckpointError(
                f"{path} has a gate, and PEFT has none; unipelt.fold(model, batches) makes it a constant, which can "
                "travel, or keep the model whole with unipelt.save"
            )
        if isinstance(module, LoRA):
            advice = (
                "unipelt.fold(model, batches) makes gates that hardly vary constants, which can travel"
                if injection.folded is None
                else "it varied by more than the tolerance of unipelt.fold; fold the model from before with a larger "
                "one, which moves the logits, or keep it whole with unipelt.save"
            )
            raise CheckpointError(f"the gate of {path} depends on the text, and PEFT's LoRA has no gates: {advice}")
        raise CheckpointError(
            f"the gate of {path} depends on the text, and PEFT has no gates; train without (gate: false), or keep "
            "the model whole with unipelt.save"
        )
    ours = own_parameters(model).keys()
    if others := [name for name in kept_names(model) if name not in ours and name not in injection.head]:
        raise CheckpointError(
            f"this model trains parameters of its base too ({others[0]} and {len(others) - 1} more), which a PEFT "
            f"folder of {called} cannot hold; keep it whole with unipelt.save"
        )


def _added(model: PreTrainedModel) -> list[tuple[str, str, Any]]:
    """Return every submodule of a model in the order of the hosts: path of host and name, kind, and module."""
    order: dict[str, int] = {}  # for each path, the index of its last submodule
    for index, (path, _) in enumerate(model.named_modules()):
        names = path.split(".")
        order |= {join(*names[:depth]): index for depth in range(len(names) + 1)}
    found = [(placed.path, placed.term.name, placed.term.kind, placed.term) for placed in _placed(model)]
    for layer, _, part in layer_sets(model):
        if part.prefix is not None:
            found.append((join(layer, part.wiring.attention), "prefix", "prefix", part.prefix))
    for own in own_parts(model):
        if own.part.kind in ("prompt", "tokens"):
            found.append((own.room.rpartition(".")[0], own.part.kind, own.part.kind, model.get_submodule(own.path)))
    found.sort(key=lambda one: order[one[0]])
    return [(join(host, name), kind, module) for host, name, kind, module in found]


def _placed(model: PreTrainedModel) -> list[PlacedTerm]:
    """Return every term; plain LoRA of queries and values comes last.

    In a folder, the ranks of keys stand before those of queries and values, and this order must not change.
    """
    last = [f"lora_{place}" for place in ENTRY_PLACES]
    return sorted(placed_terms(model), key=lambda placed: isinstance(placed.term, LoRA) and placed.term.name in last)


def _terms(model: PreTrainedModel, injection: Injection) -> list[_Term]:
    """Return every low-rank term with its scale.

    For a folded model, the terms come from the record that folding left.
    """
    host = model
    scales: dict[Any, float | None] = {}
    if injection.folded is not None:
        host = _before_folding(model, injection, injection.folded)
        for gate in find_gates(host):
            constant = injection.folded.constants.get(gate.path, {}).get(gate.name)
            if constant is not None and gate.target.folds_to == "merged":
                constant *= gate.target.gated_scale
            scales[gate.target] = constant
    found = []
    for placed in _placed(host):
        term = placed.term
        if term.kind != "lora":
            continue
        factors = {name: tensor.cpu() for name, tensor in placed.factors().items()}
        magnitude = factors.get("function.magnitude")  # DoRA, which folding does not change
        if magnitude is None:
            scale = scales.get(term, term.scale)
            low, high = low_rank_factors(factors)
        else:
            scale, low, high = term.function.scale, factors["function.A"], factors["function.B"]
        if scale is not None:  # a term with a closed gate was dropped
            found.append(_Term(placed.path, term.outputs, low, high, scale, magnitude))
    if not found:
        raise CheckpointError("every gate of this model's LoRA was closed, and the terms dropped: none is left")
    return found


def _before_folding(model: PreTrainedModel, injection: Injection, folded: Folded) -> PreTrainedModel:
    """Return the model from before folding: the injected parameters with their values, on a base on the meta device."""
    kind: Any = type(model)
    with torch.device("meta"):
        host: PreTrainedModel = kind(copy.deepcopy(model.config))
    inject_as(host, injection.config, deployed=True, head=injection.head)
    host.load_state_dict(folded.tensors, strict=False, assign=True)
    return host


def _pairs(model: PreTrainedModel, terms: list[_Term]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return PEFT's fields and tensors for all terms, with one rank and one scale, as other readers (vLLM) need."""
    decomposed = terms[0].magnitude is not None
    by_projection: dict[str, list[_Term]] = {}
    for term in terms:
        by_projection.setdefault(term.projection, []).append(term)
    rank = max(sum(len(term.A) for term in group) for group in by_projection.values())
    alpha = terms[0].scale * rank
    if any(term.scale != terms[0].scale for term in terms) or not alpha.is_integer():
        terms = []  # PEFT has one alpha, a whole number, so the scales are multiplied into B
        alpha = float(rank)
        by_projection = {
            path: [replace(term, B=scaled(term.B, term.scale)) for term in group]
            for path, group in by_projection.items()
        }
    tensors: dict[str, Tensor] = {}
    leaves: list[Any] = [model.get_submodule(path) for path in by_projection]
    for (path, group), leaf in zip(by_projection.items(), leaves, strict=True):
        inputs, outputs = (leaf.nx, leaf.nf) if isinstance(leaf, Conv1D) else (leaf.in_features, leaf.out_features)
        low, high = group[0].A.new_zeros(rank, inputs), group[0].B.new_zeros(outputs, rank)
        first = 0
        for term in group:
            ranks = len(term.A)
            low[first : first + ranks] = term.A
            outputs_of(high, term.rows)[..., first : first + ranks] = term.B.unflatten(
                0, (term.rows.groups, term.rows.size)
            )
            first += ranks
        tensors |= {f"{PREFIX}{path}.lora_A.weight": low, f"{PREFIX}{path}.lora_B.weight": high}
        if decomposed:
            weight = leaf.weight.t() if isinstance(leaf, Conv1D) else leaf.weight
            length = weight.detach().cpu().norm(dim=1).to(high)  # rows without a term keep their length
            for term in group:
                assert term.magnitude is not None
                outputs_of(length, term.rows).copy_(term.magnitude.unflatten(0, (term.rows.groups, term.rows.size)))
            tensors[f"{PREFIX}{path}.lora_magnitude_vector"] = length
    fields = {
        "r": rank,
        "lora_alpha": int(alpha),
        "target_modules": name_modules(model, by_projection),
        "fan_in_fan_out": all(isinstance(leaf, Conv1D) for leaf in leaves),
        "bias": "none",
        "init_lora_weights": True,
        **({"use_dora": True} if decomposed else {}),
    }
    return fields, tensors


def _saved_modules(model: PreTrainedModel, head: frozenset[str], task: str | None) -> list[str]:
    """Return the paths of the largest modules that hold only parameters of the head: PEFT's `modules_to_save`."""
    chosen: list[str] = []
    held: set[str] = set()
    for path, module in model.named_modules():
        names = {f"{path}.{name}" for name, _ in module.named_parameters()}
        if path and names and names <= head and not names <= held:
            chosen.append(path)
            held |= names
    if head - held:
        raise CheckpointError(f"the head's parameter {sorted(head - held)[0]!r} is in no module that PEFT could save")
    # PEFT matches the ends of module names
    ends = (*chosen, *_ALSO_SAVED.get(task or "", ()))
    for path, _ in model.named_modules():
        if path.endswith(ends) and not any(f"{path}.".startswith(f"{other}.") for other in chosen):
            raise CheckpointError(
                f"PEFT would take {path} for a part of the head, as its name ends like that of one; "
                "it cannot save this head"
            )
    return chosen
