"""One term in one projection: made for its place, put into it, and counted without being made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from unipelt.config.methods import LoRAConfig, UniPELTConfig
from unipelt.hosts.locate import InjectionError, Projection, StackTargets, TermTarget
from unipelt.hosts.quantised import is_quantised, template_for
from unipelt.submodules.forward_pass import Shared, Slot
from unipelt.submodules.gate import Gates
from unipelt.submodules.lora import LORA_ATTRIBUTES, LoRA, add_low_rank
from unipelt.submodules.register import MODULES, TargetInfo
from unipelt.submodules.term import Term, add_terms, add_to_input, hand_on


def count_term(place: TermTarget) -> int:
    """How many parameters a term needs there, those that it shares with others included, found without memory."""
    weight = place.projection.module.weight
    shared = Shared(place.config.name)
    spot = TargetInfo(
        place.place,
        place.inputs,
        place.projection.rows.count,
        torch.empty(weight.shape, dtype=template_for(weight, torch.float32).dtype, device="meta"),
        shared,
        place.projection.module,
        place.projection.rows,
    )
    function = MODULES[type(place.config)](place.config, spot)
    return sum(parameter.numel() for module in (function, shared) for parameter in module.parameters())


def _own_gates(place: TermTarget, config: UniPELTConfig, found: StackTargets, dtype: torch.dtype) -> Gates | None:
    """The gate of a term that computes it from what it reads."""
    if not place.config.gate or (config.gate.shared and not place.in_cross):
        return None
    label = found.cross_label if place.in_cross else found.label
    like = template_for(place.projection.module.weight, dtype)
    causal = found.causal or place.crosses
    return Gates(place.inputs, (f"{label}{place.name}",), config.gate, like, causal=causal)


def _own_tokens(gates: Gates | None) -> Slot | None:
    return Slot() if gates is not None and gates.pooling in ("masked_mean", "mean", "text") else None


def make_term(
    place: TermTarget, config: UniPELTConfig, found: StackTargets, shared: Mapping[str, Shared], dtype: torch.dtype
) -> Term:
    """A term and, if it has one of its own, its gate; `shared` holds what terms of one name share, by their names."""
    part, projection = place.config, place.projection
    weight = template_for(projection.module.weight, dtype).detach()
    spot = TargetInfo(
        place.place,
        place.inputs,
        projection.rows.count,
        weight,
        shared[part.name],
        projection.module,
        projection.rows,
    )
    gates = _own_gates(place, config, found, dtype)
    term = Term(
        part.name,
        MODULES[type(part)](part, spot),
        projection.rows,
        gates,
        tokens=_own_tokens(gates),
        source=None if place.reader is None else Slot(),
    )
    term.crosses = place.crosses
    term.skips_ungated_calls = place.serves_positions
    return term


def make_low_rank(place: TermTarget, config: UniPELTConfig, found: StackTargets, dtype: torch.dtype) -> Term | LoRA:
    """A low-rank term and its gate; a decomposed one (DoRA) is a `Term`. Raises `InjectionError` where it cannot be."""
    lora = place.config
    assert isinstance(lora, LoRAConfig)
    if lora.decomposed:
        if is_quantised(place.projection.module.weight):
            raise InjectionError(
                f"{place.projection.path} is quantised, and decomposed LoRA needs its weight's numbers"
            )
        return make_term(place, config, found, {"lora": Shared("lora")}, dtype)
    check_start(place.projection, lora)
    projection, gates = place.projection, _own_gates(place, config, found, dtype)
    term = LoRA(projection.inputs, projection.rows, lora, template_for(projection.module.weight, dtype), gates)
    term.tokens = _own_tokens(gates)
    term.crosses = place.crosses
    term.skips_ungated_calls = place.serves_positions
    return term


def check_start(projection: Projection, lora: LoRAConfig) -> None:
    """Raise `InjectionError` where a low-rank term cannot start from the projection's weight."""
    if lora.start == "zero":
        return
    if is_quantised(projection.module.weight):
        raise InjectionError(f"{projection.path} is quantised, and the start {lora.start} needs its weight's numbers")
    if lora.rank > (most := min(projection.inputs, projection.rows.count)):
        raise InjectionError(
            f"{projection.path} has {most} singular values, and the start {lora.start} takes {lora.rank} of them; "
            "take a smaller lora.rank"
        )


def hold(leaf: Any, name: str, term: LoRA) -> None:
    """Put a low-rank term into its projection."""
    if not any(hasattr(leaf, other) for other in LORA_ATTRIBUTES):
        # before all other terms, which so read the same when this one is merged into the weight
        leaf.register_forward_hook(add_low_rank, prepend=True)
    setattr(leaf, name, term)


def add_term(place: TermTarget, term: Term | LoRA) -> None:
    """Put a term into its host: hosts hold the names of their terms, and the slots of those who read what they read."""
    host = place.projection.module
    if isinstance(term, LoRA):
        hold(host, place.name, term)
        return
    names, hook = ("unipelt_inputs", add_to_input) if place.place == "activation" else ("unipelt_terms", add_terms)
    if names not in vars(host):
        setattr(host, names, ())
        if hook is add_terms:
            host.register_forward_hook(add_terms)
        else:
            host.register_forward_pre_hook(add_to_input)
    setattr(host, names, (*getattr(host, names), place.name))
    setattr(host, place.name, term)
    if place.reader is not None:
        assert term.source is not None
        if "unipelt_readers" not in vars(place.reader):
            place.reader.unipelt_readers = ()
            place.reader.register_forward_pre_hook(hand_on)
        place.reader.unipelt_readers = (*place.reader.unipelt_readers, term.source)
