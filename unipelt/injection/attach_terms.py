"""Build one term for its target: the term's parameters, and its own gate if it has one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from unipelt.config.methods import UniPELTConfig
from unipelt.config.parts import LoRAConfig
from unipelt.config.peft import PeftTermConfig
from unipelt.hosts.locate import InjectionError
from unipelt.hosts.quantised import is_quantised, template_for
from unipelt.hosts.targets import AttentionTargets, LayerTargets, Projection, StackTargets, TermTarget
from unipelt.injection.peft_layers import PeftTerms
from unipelt.submodules.adapter import Adapter
from unipelt.submodules.entry import Entry, Rows, shares_product
from unipelt.submodules.lora import LoRA
from unipelt.submodules.mixture import Mixture, MixtureTerm
from unipelt.submodules.outputs import OutputSlice
from unipelt.submodules.peft_term import PeftTerm
from unipelt.submodules.prefix import PrefixNetwork
from unipelt.submodules.register import MODULES, TargetInfo
from unipelt.submodules.term import FunctionTerm, SharedParameters, Term

OwnTerm = TypeVar("OwnTerm", bound=Term)


@dataclass(frozen=True)
class Plan:
    """All that is needed to build the sets of one stack.

    Attributes:
        found: the targets in the stack.
        config: configuration of the submodules.
        dtype: the dtype that the model computes in.
        networks: the prefix networks by name; none in the deployed form.
        shared: the parameters that all terms of one submodule share, by the submodule's name.
        peft: the terms of PEFT's tuners, by host and name.
        device: device of the parameters; None for the device of the projections.
    """

    found: StackTargets
    config: UniPELTConfig
    dtype: torch.dtype
    networks: Mapping[str, PrefixNetwork]
    shared: Mapping[str, SharedParameters]
    peft: PeftTerms
    device: torch.device | str | int | None = None

    def like(self, projection: Projection) -> Tensor:
        """Return a tensor that has the dtype and the device of the submodules at a projection."""
        like = template_for(projection.beside.weight, self.dtype, self.config.dtype)
        device = self.device
        if device is None and like.is_meta:  # accelerate loads the weight for each pass
            hook = getattr(projection.beside, "_hf_hook", None)
            device = None if hook is None else hook.execution_device or "cpu"
        return like if device is None else torch.empty(like.shape, dtype=like.dtype, device=device)


def build_term(target: TermTarget, plan: Plan) -> FunctionTerm | PeftTerm:
    """Build the term of a further submodule, of decomposed LoRA (DoRA), or of a mixture of LoRA."""
    part, projection = target.config, target.projection
    if isinstance(part, PeftTermConfig):
        return _settle(plan.peft[projection.module, target.name], target, plan, _own_entry(target, plan))
    info = TargetInfo(
        target.place,
        target.inputs,
        projection.rows.count,
        plan.like(projection).detach(),
        plan.shared.get(part.name) or SharedParameters(part.name),
        projection.module,
        projection.rows,
    )
    if target.in_cross and part.mixture is not None and part.mixture.balance:
        raise InjectionError(
            f"{part.name}.mixture.balance counts real tokens, and a term in cross-attention does not know the padding "
            "of its text; take cross: false, or balance: 0"
        )
    entry = _own_entry(target, plan)
    causal = plan.found.causal or target.crosses
    return _settle(_function_term(target.name, part.name, part, info, causal), target, plan, entry)


def _function_term(name: str, kind: str, part: Any, info: TargetInfo, causal: bool) -> FunctionTerm:
    """Build the term of one function, or of a mixture of functions, without its gate."""
    make = MODULES[type(part)]
    if part.mixture is None:
        return FunctionTerm(name, kind, info.rows, make(part, info))
    experts = [make(part, info) for _ in range(part.mixture.experts)]
    mixture = Mixture(experts, part.mixture, info.inputs, info.outputs, info.weight, causal)
    return MixtureTerm(name, kind, info.rows, mixture)


def build_low_rank(target: TermTarget, plan: Plan) -> Term:
    """Build a LoRA term, except the plain ones of queries and values. Raises `InjectionError`."""
    lora, projection = target.config, target.projection
    assert isinstance(lora, LoRAConfig)
    if lora.is_function:
        if lora.decomposed and is_quantised(projection.module.weight):
            raise InjectionError(f"{projection.path} is quantised, and decomposed LoRA needs its weight's numbers")
        return build_term(target, plan)
    _check_start(projection, lora)
    like = plan.like(projection)
    fused = shares_product(plan.config.gate) and lora.shares_entry
    entry = _own_entry(target, plan, rows=lora.rank if fused else 0)
    term = LoRA(target.name, projection.rows, lora)
    down = LoRA.initial_down(target.inputs, lora, like)
    keep = entry is None or not entry.row_names
    term.set_up(down, like, has_start=lora.start != "zero", keep_down=keep)
    if entry is not None and not keep:
        entry.start_rows(entry.row_names[0], down)
    return _settle(term, target, plan, entry)


def build_entry_low_rank(
    target: AttentionTargets, plan: Plan, label: str, *, in_cross: bool
) -> tuple[list[tuple[TermTarget, LoRA]], tuple[Rows, ...]]:
    """Build the plain low-rank terms of queries and values, and their rows in the attention's entry."""
    config = plan.config
    lora = config.lora
    if lora is None or lora.is_function:
        return [], ()
    built: list[tuple[TermTarget, LoRA]] = []
    rows: list[Rows] = []
    fused = lora.gate and lora.shares_entry and shares_product(config.gate)
    for place, projection in (("query", target.query), ("value", target.value)):
        if place not in lora.projections:
            continue
        _check_start(projection, lora)
        where = target.term(lora, place, projection, in_cross=in_cross)
        # cross-attention computes values from the other stack's output, so the gate of values reads that output too
        entry = _own_entry(where, plan, rows=lora.rank if fused else 0) if lora.gate and where.crosses else None
        term = LoRA(where.name, projection.rows, lora)
        like = plan.like(projection)
        down = LoRA.initial_down(projection.inputs, lora, like)
        # values that read another tensor than queries have a first projection of their own
        in_entry = fused and entry is None and not (place == "value" and target.described.value_apart)
        keep = not in_entry and (entry is None or not entry.row_names)
        term.set_up(down, like, has_start=lora.start != "zero", keep_down=keep)
        term.gate_name = f"{label}{where.name}" if lora.gate else ""
        term.in_attention = True
        term.in_entry = in_entry
        term.entry = entry
        term.crosses = where.crosses
        term.once = where.serves_positions
        if in_entry:
            rows.append(Rows(term.gate_name, f"{term.name}.A", "lora", down))
        elif entry is not None and entry.row_names:
            entry.start_rows(entry.row_names[0], down)
        built.append((where, term))
    return built, tuple(rows)


def build_adapter(layer: LayerTargets, plan: Plan) -> Adapter | FunctionTerm:
    """Build a layer's adapter, or its mixture of adapters."""
    config, found = plan.config, plan.found
    assert config.adapter is not None
    assert layer.sized is not None
    hidden, like = layer.width, plan.like(layer.sized)
    adapter: Adapter | FunctionTerm = Adapter("adapter", hidden)
    if config.adapter.mixture is not None:
        rows_of_all = OutputSlice(1, 0, hidden)
        shared = SharedParameters("adapter")
        info = TargetInfo("adapter", hidden, hidden, like.detach(), shared, layer.adapted, rows_of_all)
        adapter = _function_term("adapter", "adapter", config.adapter, info, found.causal)
        adapter.reads_output = True
    name = f"{found.label}adapter"
    if config.adapter.gate:
        adapter.gate_name = name
        if not config.gate.shared:
            rows = _blank_rows(name, "adapter.down", "adapter", config.adapter.bottleneck, hidden, like, bias=True)
            fused = rows if shares_product(config.gate) and isinstance(adapter, Adapter) else ()
            adapter.entry = Entry(hidden, (name,), config.gate, like, causal=found.causal, rows=fused)
    if isinstance(adapter, Adapter):
        adapter.set_up(config.adapter, like)
    return adapter


def _settle(term: OwnTerm, target: TermTarget, plan: Plan, entry: Entry | None) -> OwnTerm:
    label = plan.found.cross_label if target.in_cross else plan.found.label
    term.gate_name = f"{label}{target.name}" if target.config.gate else ""
    term.entry = entry
    term.in_attention = target.in_attention
    term.crosses = target.crosses
    term.once = target.serves_positions
    return term


def _own_entry(target: TermTarget, plan: Plan, rows: int = 0) -> Entry | None:
    """Build the entry of a term whose gate reads the term's input, with `rows` rows for the term's first projection.

    Returns None for a term without a gate, or with its gate in the entry of the layer's attention.
    """
    if not target.config.gate or (plan.config.gate.shared and not target.in_cross):
        return None
    name = f"{plan.found.cross_label if target.in_cross else plan.found.label}{target.name}"
    like = plan.like(target.projection)
    fused = _blank_rows(name, f"{target.name}.A", "lora", rows, target.inputs, like) if rows else ()
    causal = plan.found.causal or target.crosses
    return Entry(target.inputs, (name,), plan.config.gate, like, causal=causal, rows=fused)


def _blank_rows(
    name: str, part: str, kind: str, count: int, inputs: int, like: Tensor, *, bias: bool = False
) -> tuple[Rows, ...]:
    weight = torch.zeros(count, inputs, dtype=like.dtype, device=like.device)
    return (Rows(name, part, kind, weight, weight.new_zeros(count) if bias else None),)


def _check_start(projection: Projection, lora: LoRAConfig) -> None:
    """Raise `InjectionError` if a low-rank term cannot start from the projection's weight."""
    if lora.start == "zero":
        return
    if is_quantised(projection.module.weight):
        raise InjectionError(f"{projection.path} is quantised, and the start {lora.start} needs its weight's numbers")
    if lora.rank > (most := min(projection.inputs, projection.rows.count)):
        raise InjectionError(
            f"{projection.path} has {most} singular values, and the start {lora.start} takes {lora.rank} of them; "
            "take a smaller lora.rank"
        )
