"""Convert an injected model into a plain model of Transformers by merging submodules into its weights.

Shapes: I inputs and O outputs of a projection.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unipelt.hosts.quantised import is_quantised
from unipelt.injection.inject import strip
from unipelt.injection.state import injection_of
from unipelt.submodules.lora import LoRA, low_rank_factors
from unipelt.submodules.mixture import MixtureTerm
from unipelt.submodules.outputs import OutputSlice
from unipelt.submodules.peft_term import PeftTerm
from unipelt.submodules.room import PlacedTerm, layer_sets, own_parts, placed_terms
from unipelt.submodules.token_rows import TokenRows


class MergeError(ValueError):
    """A model cannot become a plain model; the message gives the reason. The model is unchanged."""


def merge(model: PreTrainedModel) -> PreTrainedModel:
    """Merge the submodules into the weights, in place, and return the plain model of Transformers.

        plain = unipelt.merge(model)
        plain.save_pretrained("plain")  # AutoModel, pipelines and converters read it

    LoRA of every kind (DoRA, PiSSA), IA3 and RED are merged if they have no gate, and so are tuners of PEFT's that PEFT
    can merge. `unipelt.fold` replaces gates that hardly vary by constants, and merges their LoRA. Trained tokens become
    rows of the vocabulary. Trained biases and the head are already in the model; a head that trained in float32 gets
    the dtype of its base again. Sums are computed in float32 and rounded once to the type of the weight.

    Merging cannot be undone: to keep the submodules, save the model with `unipelt.save` first.

    Returns:
        The same model, in evaluation mode, without submodules; its parameters have the `requires_grad` flags from
        before `inject`.

    Raises:
        MergeError: a part cannot be merged: an adapter, a prefix, a prompt, a gate that varies, a quantised weight.
            The message names the first such part. The model is unchanged.
        ValueError: the model carries no submodules.
    """
    injection = injection_of(model)
    terms: dict[str, list[PlacedTerm]] = {}
    for placed in placed_terms(model):
        terms.setdefault(placed.path, []).append(placed)
    if problem := _obstacle(model, terms):
        raise MergeError(f"this model cannot become a plain one: {problem}")
    with torch.no_grad():
        merged = {path: _merged(group) for path, group in terms.items()}
        for path, (weight, bias) in merged.items():
            host: Any = model.get_submodule(path)
            host.weight.copy_(weight)
            if bias is not None:
                host.bias.copy_(bias)
        table: Any = model.get_input_embeddings()
        for rows in (module for module in model.modules() if isinstance(module, TokenRows)):
            table.weight[rows.ids] = rows.embedding.to(table.weight)
    flags, before = injection.required_grad, injection.originals
    strip(model)
    for name, parameter in model.named_parameters():
        if name in before:  # a head of a model in half precision trained in float32
            parameter.data = parameter.data.to(before[name].dtype)
        parameter.grad = None
        parameter.requires_grad_(flags.get(name, parameter.requires_grad))
    return model.eval()


def _obstacle(model: PreTrainedModel, terms: dict[str, list[PlacedTerm]]) -> str | None:
    """Return a message on the first part that cannot be merged, or None."""
    for path, _, part in layer_sets(model):
        if part.prefix is not None:
            return f"{path} has a prefix, which no weight can hold; train a method without one"
    if any(own.part.kind == "prompt" for own in own_parts(model)):
        return "it has a prompt, which no weight can hold; train a method without one"
    holders = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    for path, group in terms.items():
        for placed in group:
            term = placed.term
            if term.gate_name:
                return (
                    f"the gate of {term.name} at {path} depends on the text; unipelt.fold(model, batches) makes gates "
                    "that hardly vary constants"
                )
            if isinstance(term, MixtureTerm) and term.function.config.router == "random":
                return f"{term.name} at {path} is a mixture of experts; call unipelt.merge_experts(model) first"
            if isinstance(term, PeftTerm) and not term.can_merge:
                return f"PEFT cannot merge its {term.tuner} ({term.name} at {path}); train a method without it"
            if not isinstance(term, (LoRA, PeftTerm)) and not hasattr(getattr(term, "function", None), "merged"):
                return f"{term.name} at {path} is no linear function of a projection; train a method without it"
        weight = group[0].host._parameters.get("weight")
        if weight is None or weight.is_meta or is_quantised(weight):
            return f"{path}.weight is not in memory as plain numbers (offloaded or quantised)"
        if holders[id(weight)] > 1:
            return f"{path}.weight is shared with another module"
    return None


def _merged(group: list[PlacedTerm]) -> tuple[Tensor, Tensor | None]:
    """Return a projection's weight and bias with all its terms merged.

    The weight is (O, I), or (I, O) for a `Conv1D`; the bias is (O,) or None.
    """
    host = group[0].host
    kind = torch.promote_types(host.weight.dtype, torch.float32)
    is_conv = isinstance(host, Conv1D)
    weight: Tensor = host.weight.detach().to(kind, copy=True)
    weight = weight.t().contiguous() if is_conv else weight
    bias = None if getattr(host, "bias", None) is None else host.bias.detach().to(kind, copy=True)
    before, bias_before = weight.clone(), None if bias is None else bias.clone()
    for placed in group:
        term, own = placed.term, placed.term.outputs
        if term.name.endswith("_activation"):
            weight = term.function.merged_input(weight)
            continue
        rows, row_bias = _rows(weight, own), None if bias is None else _rows(bias, own)
        if isinstance(term, LoRA):
            low, high = (side.to(weight) for side in low_rank_factors(placed.factors()))
            changed, changed_bias = rows + term.scale * high @ low, None
        elif isinstance(term, PeftTerm):  # its layer reads the weight of the host, without the other terms
            update, shift = term.update(_rows(before, own), None if bias_before is None else _rows(bias_before, own))
            changed = rows + update
            changed_bias = None if row_bias is None or shift is None else row_bias + shift
        else:
            changed, changed_bias = term.function.merged(rows, row_bias)
        _write(weight, own, changed)
        if changed_bias is not None and changed_bias is not row_bias:
            if bias is None:
                raise MergeError(f"{term.name} at {placed.path} shifts the output, and the projection has no bias")
            _write(bias, own, changed_bias)
    return weight.t() if is_conv else weight, bias


def _rows(tensor: Tensor, own: OutputSlice) -> Tensor:
    return tensor.unflatten(0, (own.groups, -1)).narrow(1, own.start, own.size).flatten(0, 1)


def _write(tensor: Tensor, own: OutputSlice, rows: Tensor) -> None:
    tensor.unflatten(0, (own.groups, -1)).narrow(1, own.start, own.size).copy_(
        rows.unflatten(0, (own.groups, own.size))
    )
