"""Replace gates by constants: merge the constants into weights, and remove the modules that are no longer computed.

Shapes: W prefix width, L prefix length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unipelt.files.messages import show
from unipelt.gates.measure import FoldError, GateTarget, find_gates
from unipelt.injection.hooks import hook, put
from unipelt.injection.parameters import kept_names, unfrozen_names
from unipelt.injection.state import Folded, Injection, injection_inside
from unipelt.injection.wire import rewire_layer, rewire_stacks
from unipelt.submodules.gate import Gates
from unipelt.submodules.lora import LoRA, low_rank_factors
from unipelt.submodules.outputs import OutputSlice
from unipelt.submodules.peft_term import PeftTerm
from unipelt.submodules.prefix import NETWORK_NAMES, Prefix, PrefixNetwork
from unipelt.submodules.prompt import Prompt
from unipelt.submodules.room import (
    PlacedTerm,
    SubmoduleSet,
    layer_sets,
    own_buffers,
    own_parameters,
    placed_terms,
    rooms,
)

Constants = Mapping[str, Mapping[str, float | None]]
"""Path of an `Entry` -> name of one of its gates -> the gate's constant, or None where its submodule is dropped."""

FOLDABLE = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def fold_constants(model: PreTrainedModel, constants: Constants) -> int:
    """Fold gates to given constants, in place: `fold` without the measurement. Loading a folded model calls this too.

    Args:
        model: an injected model that is not folded.
        constants: constants of the gates to fold; the other gates are kept.

    Returns:
        The number of low-rank terms that were merged into weights.

    Raises:
        FoldError: a gate does not exist, a constant is not above 0 and at most 1, or a case of `fold`. The model is
            unchanged.
    """
    injection = injection_inside(model)
    check_gates(model)
    gates = find_gates(model)
    settled = _settle(model, gates, constants)
    _check_weights(model, settled)
    with torch.no_grad(), _without_autocast(model):
        prefixes = _deployed_prefixes(model)
        merged, count = _merged_weights(model, settled)
        injection.folded = _remember(model, injection, constants, prefixes, merged)
        for name, weight in merged.items():
            model.get_parameter(name).copy_(weight)
        for path, both in prefixes.items():
            prefix: Any = model.get_submodule(path)
            prefix.deploy(both)
        _drop_networks(model)
        for module in model.modules():
            constant = settled.get(module)
            if isinstance(module, Prompt) and constant is not None:
                module.scale_by(constant)
        for _, layer, part in list(layer_sets(model)):
            _fold_set(part, settled)
            rewire_layer(layer)
        rewire_stacks(model)
    injection.deployed = True
    for parameter in model.parameters():
        parameter.grad = None
        parameter.requires_grad_(False)
    put(model, refuse_training)
    model.eval()
    return count


@hook("input")
def refuse_training(model: Any, args: tuple[Any, ...]) -> None:
    """Raise `RuntimeError` if a folded model runs in training mode with gradients."""
    if model.training and torch.is_grad_enabled():
        raise RuntimeError(
            "a folded model does not train: its gates are constants and its low-rank terms are in the weights; call "
            "model.eval() to use it, or train the model that it was folded from"
        )


def check_gates(model: nn.Module) -> None:
    """Raise `FoldError` for gates that cannot be replaced by a constant between 0 and 1 for one submodule."""
    gate = injection_inside(model).config.gate
    has_gates = any(isinstance(module, Gates) for module in model.modules())
    if has_gates and (gate.shared or gate.activation != "sigmoid"):
        raise FoldError("shared gates, and gates that are not between 0 and 1, are not folded")


@contextmanager
def _without_autocast(model: PreTrainedModel) -> Iterator[None]:
    """Switch autocast off, so that folding computes in its own precision."""
    with ExitStack() as stack:
        for kind in {"cpu", model.device.type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _settle(model: nn.Module, gates: list[GateTarget], constants: Constants) -> dict[nn.Module, float | None]:
    """Return the constants of submodules: of those that lose their gate (None: dropped), and of LoRA without a gate."""
    known = {(gate.path, gate.name): gate.target for gate in gates}
    settled: dict[nn.Module, float | None] = {}
    for path, named in constants.items():
        for name, constant in named.items():
            if (path, name) not in known:
                raise FoldError(f"the model has no gate {show(name)} at {show(path)}")
            target = known[path, name]
            if not target.folds_to:
                raise FoldError(
                    f"{name!r} at {path!r}: only adapters, prefixes, prompts, LoRA, and tuners that PEFT can merge are "
                    "folded, and the last two only where no tuner of PEFT's is beside another term"
                )
            if constant is None and target.takes_attention:
                what = "a prompt" if isinstance(target, Prompt) else "a prefix under scale gating"
                raise FoldError(f"{name!r} at {path!r}: {what} takes attention and is not dropped")
            if constant is not None and not 0 < constant <= 1:
                raise FoldError(f"{name!r} at {path!r}: a gate is above 0 and at most 1, not {constant!r}")
            if constant is not None and getattr(target, "once", False):
                raise FoldError(f"{name!r} at {path!r}: this term serves one of two uses of a weight: it is not merged")
            scale = target.gated_scale if isinstance(target, LoRA) else 1.0
            settled[target] = None if constant is None else constant * scale
    for placed in placed_terms(model):
        if placed.term.folds_to == "merged" and not placed.term.gate_name:
            settled[placed.term] = placed.term.scale if isinstance(placed.term, LoRA) else 1.0
    return settled


def _check_weights(model: nn.Module, settled: Mapping[nn.Module, float | None]) -> None:
    """Raise `FoldError` for a weight into which a low-rank term is to be merged but cannot be."""
    holders = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    for path, terms in _merged_terms(model, settled).items():
        weight: Any = terms[0][0].host._parameters.get("weight")
        if weight is None:
            problem = "is no parameter of its own (a parametrization, perhaps)"
        elif weight.is_meta:
            problem = "is not in memory (offloaded)"
        elif type(weight) is not nn.Parameter or weight.dtype not in FOLDABLE:
            kind = type(weight).__name__ if type(weight) is not nn.Parameter else weight.dtype
            problem = f"is {kind} (quantised or sharded)"
        elif holders[id(weight)] > 1:
            problem = "is shared with another module"
        else:
            continue
        raise FoldError(f"nothing can be merged into {path}.weight: it {problem}; fold a model of plain weights")


def _merged_terms(
    model: nn.Module, settled: Mapping[nn.Module, float | None]
) -> dict[str, list[tuple[PlacedTerm, float]]]:
    """Return the terms to merge into weights, each with its constant, by the path of their projection."""
    found: dict[str, list[tuple[PlacedTerm, float]]] = {}
    for placed in placed_terms(model):
        constant = settled.get(placed.term)
        if placed.term.folds_to == "merged" and constant is not None:
            found.setdefault(placed.path, []).append((placed, constant))
    return found


def _merged_weights(model: nn.Module, settled: Mapping[nn.Module, float | None]) -> tuple[dict[str, Tensor], int]:
    """Return `W + sum of c B A` by the weight's name, and the number of terms.

    The biases that a tuner of PEFT's changes are returned too. All sums are computed on the CPU, so that every machine
    rounds alike.
    """
    merged = {}
    count = 0
    for path, terms in _merged_terms(model, settled).items():
        host = terms[0][0].host
        kind = torch.promote_types(host.weight.dtype, torch.float32)
        weight = host.weight.detach().to("cpu", kind, copy=True)
        bias = None if host.bias is None else host.bias.detach().to("cpu", kind, copy=True)
        outputs = weight.t() if isinstance(host, Conv1D) else weight
        for placed, constant in terms:
            rows = _rows(outputs, placed.term.outputs)
            if isinstance(placed.term, PeftTerm):
                shifts = None if bias is None else _rows(bias, placed.term.outputs)
                update, shift = placed.term.update(rows.flatten(0, 1), None if shifts is None else shifts.flatten())
                rows += constant * update.view_as(rows)
                if shifts is not None and shift is not None:
                    shifts += constant * shift.view_as(shifts)
            else:
                low, high = (side.detach().to("cpu", kind) for side in low_rank_factors(placed.factors()))
                rows += (constant * (high @ low)).view_as(rows)
        merged[f"{path}.weight"] = weight.to(host.weight.dtype)
        if bias is not None and any(isinstance(placed.term, PeftTerm) for placed, _ in terms):
            merged[f"{path}.bias"] = bias.to(host.bias.dtype)
        count += len(terms)
    return merged, count


def _rows(outputs: Tensor, meant: OutputSlice) -> Tensor:
    """Return a view of the rows of a projection among those of its module, (groups, size, ...)."""
    return outputs.unflatten(0, (meant.groups, -1)).narrow(1, meant.start, meant.size)


def _deployed_prefixes(model: nn.Module) -> dict[str, Tensor]:
    """Return the keys and values, (2, L, W), of every prefix that a network computes, by the path of the prefix."""
    shared = {module: module() for module in model.modules() if isinstance(module, PrefixNetwork)}
    return {
        path: shared[network][module.index].clone(memory_format=torch.contiguous_format)
        for path, module in model.named_modules()
        for network in (module.network if isinstance(module, Prefix) else ())
    }


def _remember(
    model: PreTrainedModel,
    injection: Injection,
    constants: Constants,
    prefixes: Mapping[str, Tensor],
    merged: Mapping[str, Tensor],
) -> Folded:
    """Return the record that saving, loading and removing a folded model need."""
    networks = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, PrefixNetwork))
    ours = {name for name in own_parameters(model) if not name.startswith(networks)}
    trained = merged.keys() & set(kept_names(model))
    tensors = {name: weight for name, weight in model.named_parameters() if name in ours or name in trained}
    tensors |= {f"{path}.keys_values": nn.Parameter(both) for path, both in prefixes.items()}
    kept = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
    return Folded(
        constants={path: dict(named) for path, named in constants.items()},
        tensors=kept | {name: buffer.to("cpu", copy=True) for name, buffer in own_buffers(model).items()},
        weights={name: model.get_parameter(name).detach().to("cpu", copy=True) for name in merged},
        unfrozen=frozenset(unfrozen_names(model)),
    )


def _drop_networks(model: nn.Module) -> None:
    for _, room in rooms(model):
        for name in room:
            for source in NETWORK_NAMES:
                room[name]._modules.pop(source, None)


def _fold_set(part: SubmoduleSet, settled: Mapping[nn.Module, float | None]) -> None:
    """Fold the gates of one attention, and of the layer parts that belong to the same set."""
    gone = set()
    left = {term.gate_name for term in part.terms.values() if term.gate_name and term not in settled}
    prefix = part.prefix
    if prefix is not None and prefix.gate_name and prefix not in settled:
        left.add(prefix.gate_name)
    if part.entry is not None and not left.issuperset(part.entry.gates.names):
        part.entry.keep(left)
        if not part.entry.gates.names:
            part.entry = None
    for name, term in part.terms.items():
        if term not in settled:
            continue
        constant = settled[term]
        if constant is None or term.folds_to == "merged":
            gone.add(name)
            del part._modules[name]
        else:
            scaled: Any = term
            scaled.scale_by(constant)
    if prefix is not None and prefix in settled:
        if settled[prefix] is None:
            part.prefix = None
        else:
            prefix.scale_by(settled[prefix])
    part.wiring = part.wiring.without(
        gone, averages=part.averages, has_entry=part.entry is not None, lengthens=part.prefix is not None
    )
