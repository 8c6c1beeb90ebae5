"""Put submodules into the places that were found: modules, hooks, and nothing else.

Which parameters train and what a caller is told are `unipelt.inject`'s.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from unipelt.config.methods import GateConfig, LoRAConfig, PromptConfig, UniPELTConfig
from unipelt.hosts.attention_interface import redirect
from unipelt.hosts.locate import (
    IN_ATTENTION,
    AttentionTargets,
    InjectionError,
    LayerTargets,
    StackTargets,
    TermTarget,
)
from unipelt.hosts.quantised import is_quantised, template_for
from unipelt.injection.attach_terms import add_term, check_start, hold, make_low_rank, make_term
from unipelt.injection.attention_hooks import ForwardArgument, Site, enter_attention, insert_prefix, leave_attention
from unipelt.injection.detach import OURS
from unipelt.injection.gradient_checkpointing import watch_checkpointing
from unipelt.submodules.adapter import Adapter, adapt_norm, adapt_output
from unipelt.submodules.forward_pass import Shared, Slot, enter_shared, leave_shared
from unipelt.submodules.gate import Gates
from unipelt.submodules.lora import FUSED_WITH_GATES, LoRA
from unipelt.submodules.prefix import NETWORKS, Prefix, PrefixNetwork, enter_stack, leave_stack
from unipelt.submodules.prompt import Prompt, embeds_text, enter_prompt, leave_prompt
from unipelt.submodules.term import Term


def attach(model: PreTrainedModel, found: StackTargets, config: UniPELTConfig, deployed: bool) -> None:
    """Add everything to one stack."""
    owner, layers = found.owner, found.layers.values()
    own = [layer.attention for layer in layers if layer.attention is not None]
    cross = [layer.cross for layer in layers if layer.cross is not None]
    networks = {}
    for source, attentions in zip(NETWORKS, (own, cross), strict=True):
        if config.prefix is None or not attentions:
            continue
        if hasattr(owner, source):
            raise InjectionError(f"{type(owner).__name__} has an attribute {source!r} of its own")
        widths = {attention.value.rows.count for attention in attentions}
        if len(widths) > 1:
            raise InjectionError(f"a prefix needs layers of one width, and their values are {sorted(widths)} wide")
        if not deployed:
            first = attentions[0].value
            networks[source] = PrefixNetwork(
                first.inputs,
                widths.pop(),
                len(attentions),
                config.prefix,
                template_for(first.module.weight, model.dtype),
            )
            setattr(owner, source, networks[source])
    shared = {part.name: Shared(part.name) for part in config.more}
    if networks:
        owner.register_forward_pre_hook(enter_stack)
        owner.register_forward_hook(leave_stack, always_call=True)
    for layer in layers:
        masked = config.gate.pooling == "masked_mean" and not found.causal
        adapted = layer.adapted is not None and config.adapter is not None and config.adapter.gate
        tokens = Slot() if masked and adapted and not config.gate.shared else None
        terms: list[tuple[TermTarget, Term | LoRA]] = [
            (spot, make_term(spot, config, found, shared, model.dtype)) for spot in layer.terms
        ]
        terms += [(spot, make_low_rank(spot, config, found, model.dtype)) for spot in layer.low_rank]
        for spot, term in terms:
            add_term(spot, term)
        central = _central(layer, found, config, terms) if config.gate.shared and layer.attention is not None else {}
        for attention, source, label in (
            (layer.attention, NETWORKS[0], found.label),
            (layer.cross, NETWORKS[1], found.cross_label),
        ):
            if attention is not None:
                place = (own if attention is layer.attention else cross).index(attention)
                _add_to_attention(
                    attention,
                    config,
                    label,
                    partial(Prefix, place, source, network=networks.get(source)),
                    causal=found.causal,
                    masked=masked,
                    tokens=_slots(tokens, *(term.tokens for spot, term in terms if spot.place not in IN_ATTENTION))
                    if attention is layer.attention
                    else (),
                    others=central if attention is layer.attention else {},
                    inside=_slots(*(term.tokens for spot, term in terms if spot.place in IN_ATTENTION))
                    if attention is layer.attention
                    else (),
                    dtype=model.dtype,
                    crosses=attention is layer.cross,
                )
        if layer.adapted is not None and config.adapter is not None:
            slot = central.get(f"{found.label}adapter", (None, False))[0]
            _add_adapter(layer, found, config, tokens, slot, model.dtype)
        if any(spot.config.gate and spot.place not in IN_ATTENTION for spot, _ in terms):
            _keep_whole(layer)
    for name, common in shared.items():
        if common.has_parameters():
            if hasattr(owner, f"{name}_shared"):
                raise InjectionError(f"{type(owner).__name__} has an attribute '{name}_shared' of its own")
            setattr(owner, f"{name}_shared", common)
    if any(common.has_parameters() for common in shared.values()):
        owner.register_forward_pre_hook(enter_shared)
        owner.register_forward_hook(leave_shared, always_call=True)
    for module in owner.modules():
        if isinstance(module, OURS):
            module.train(model.training)
    watch_checkpointing(owner, next(iter(layers)).module)


def _central(
    layer: LayerTargets, found: StackTargets, config: UniPELTConfig, terms: Sequence[tuple[TermTarget, Term | LoRA]]
) -> dict[str, tuple[Slot, bool]]:
    """What takes the gates of a layer's central network to submodules that have none of their own, by their names.

    With each, whether its submodule is inside the attention.
    """
    slots = {}
    if layer.adapted is not None and config.adapter is not None and config.adapter.gate:
        slots[f"{found.label}adapter"] = (Slot(), False)
    for spot, term in terms:
        if spot.config.gate and not spot.in_cross:
            term.gate = Slot()
            if isinstance(term, LoRA):
                term.low = None
            slots[f"{found.label}{spot.name}"] = (term.gate, spot.place in IN_ATTENTION)
    return slots


def _slots(*slots: Slot | None) -> tuple[Slot, ...]:
    return tuple(slot for slot in slots if slot is not None)


def _add_to_attention(
    place: AttentionTargets,
    config: UniPELTConfig,
    label: str,
    make_prefix: Callable[..., Prefix],
    *,
    causal: bool,
    masked: bool,
    tokens: tuple[Slot, ...],
    others: Mapping[str, tuple[Slot, bool]],
    inside: tuple[Slot, ...],
    dtype: torch.dtype,
    crosses: bool,
) -> None:
    attention, like = place.module, template_for(place.value.module.weight, dtype)
    gated: dict[str, tuple[str, ...]] = {}  # gate -> path to what it scales
    if config.prefix is not None:
        by_query = causal or config.gate.pooling == "token"
        attention.prefix = make_prefix(width=place.value.rows.count, config=config.prefix, like=like, by_query=by_query)
        if config.prefix.gate and config.gate.activation == "tanh" and attention.prefix.gating == "mass":
            raise InjectionError(
                "a gate for every token acts on the prefix's mass by its logarithm, and tanh may be below 0; take "
                "activation sigmoid"
            )
        if config.prefix.gate:
            gated[f"{label}prefix"] = ("prefix",)
    if config.lora is not None and not config.lora.decomposed:
        for name, projection in zip(FUSED_WITH_GATES, (place.query, place.value), strict=True):
            if name.removeprefix("lora_") not in config.lora.places:
                continue
            leaf = projection.module
            check_start(projection, config.lora)
            gates = None
            if config.lora.gate and crosses and name == "lora_value":
                # it reads the other stack's output, which this attention's own input says nothing about
                gates = Gates(projection.inputs, (f"{label}{name}",), config.gate, like, causal=True)
            elif config.lora.gate:
                gated[f"{label}{name}"] = (*projection.path.split("."), name)
            term = LoRA(projection.inputs, projection.rows, config.lora, template_for(leaf.weight, dtype), gates)
            term.crosses = gates is not None
            term.skips_ungated_calls = place.described.query_serves_positions and name == "lora_query"
            hold(leaf, name, term)
    if not (gated or others or tokens or inside or config.prefix):
        return
    signature = inspect.signature(attention.forward).parameters

    def argument(name: str) -> ForwardArgument:
        if name in signature:
            return ForwardArgument(name, list(signature).index(name))
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.values()):
            return ForwardArgument(name, None)  # where it is passed through, that it is there is checked at every call
        raise InjectionError(f"the forward of {type(attention).__name__} has no argument {name!r}")

    inserts = (Slot(), Slot()) if place.key is not None and config.prefix is not None else ()
    if inserts and config.prefix is not None and config.prefix.softmax == "own":
        raise InjectionError(
            f"{type(attention).__name__} is outside Transformers' attention interface, where alone a prefix can have a "
            "softmax of its own; take prefix.softmax: shared"
        )
    names = (*gated, *others)
    starts = {f"{label}prefix": config.prefix.gate_start} if config.prefix is not None else {}
    attention.gates = (
        Gates(place.query.inputs, names, config.gate, like, causal=causal, starts=starts) if names else None
    )
    attention.unipelt_site = Site(
        targets=tuple(gated.values()),
        hidden=argument(place.described.hidden),
        mask=argument(place.described.mask),
        masked=masked and bool(names or tokens or inside),
        others=tuple(others.values()),
        tokens=tokens,
        inside=inside,
        config=redirect(attention) if config.prefix is not None and not inserts else None,
        bias=argument(place.described.bias) if inserts else None,
        inserts=inserts,
    )
    for slot, leaf in zip(inserts, (place.key, place.value.module), strict=False):
        leaf.unipelt_rows = slot
        leaf.register_forward_hook(insert_prefix)
    if inserts:
        attention.register_forward_hook(leave_attention)
    attention.register_forward_pre_hook(enter_attention, with_kwargs=True)


def _add_adapter(
    layer: LayerTargets,
    found: StackTargets,
    config: UniPELTConfig,
    tokens: Slot | None,
    central: Slot | None,
    dtype: torch.dtype,
) -> None:
    assert config.adapter is not None
    assert layer.attention is not None
    hidden, like = layer.attention.query.inputs, template_for(layer.attention.value.module.weight, dtype)
    gates = None
    if config.adapter.gate and central is None:
        gates = Gates(hidden, (f"{found.label}adapter",), config.gate, like, causal=found.causal)
        _keep_whole(layer)
    layer.adapted.adapter = Adapter(hidden, config.adapter, like, gates, tokens)
    layer.adapted.adapter.gate = central
    layer.adapted.register_forward_hook(adapt_norm if found.stack.norm else adapt_output)


def _keep_whole(layer: LayerTargets) -> None:
    """A gate averages over all of a text, so its feed-forward block is not cut; that changes no other number."""
    if getattr(layer.module, "chunk_size_feed_forward", None):
        layer.module.unipelt_chunk_size = layer.module.chunk_size_feed_forward
        layer.module.chunk_size_feed_forward = 0


def find_entry(model: PreTrainedModel, found: StackTargets) -> Any:
    """What embeds a model's text, which a prompt enters; a head may pass by the base model (OPT's does), but not by it.

    Raises `InjectionError` if there is none.
    """
    entry = next((part for part in (found.owner, model.base_model) if embeds_text(part)), None)
    if entry is None:
        raise InjectionError(f"a prompt cannot enter {type(model.base_model).__name__}: it takes no inputs_embeds")
    return entry


def attach_prompt(model: PreTrainedModel, found: StackTargets, config: PromptConfig, gate: GateConfig) -> None:
    """Put a prompt in front of all that the base model reads."""
    entry = find_entry(model, found)
    if hasattr(entry, "prompt"):
        raise InjectionError(f"{type(entry).__name__} has an attribute 'prompt' of its own")
    if is_quantised(entry.get_input_embeddings().weight):
        raise InjectionError("the embeddings are quantised, and a prompt starts from their numbers")
    if config.gate and found.causal and gate.pooling != "static":
        raise InjectionError(
            f"a prompt's gate with gate.pooling: {gate.pooling} averages over a text, and a causal "
            f"{type(entry).__name__} would see the future; take gate.pooling: static, or prompt.gate: false"
        )
    like = entry.get_input_embeddings().weight
    gates = Gates(like.shape[1], ("prompt",), gate, like, causal=False) if config.gate else None
    ends: list[Any] = [found.owner] if found.owner is entry else [found.owner, entry]
    slots = tuple(Slot() for _ in ends)
    entry.prompt = Prompt(entry, config, slots, gates).train(model.training)
    entry.register_forward_pre_hook(enter_prompt, with_kwargs=True)
    for end, slot in zip(ends, slots, strict=True):
        end.unipelt_prompt, end.unipelt_prompt_length = slot, config.length
        end.register_forward_hook(leave_prompt)


def check_counts(model: PreTrainedModel, config: UniPELTConfig, stacks: list[StackTargets]) -> None:
    """Count what was added, and fail if it is wrong."""
    found = Counter(type(module) for module in model.modules())
    layers = [layer for stack in stacks for layer in stack.layers.values()]
    own = sum(layer.attention is not None for layer in layers)
    cross = sum(layer.cross is not None for layer in layers)
    terms = [place for layer in layers for place in (*layer.terms, *layer.low_rank)]
    plain = sum(isinstance(place.config, LoRAConfig) and not place.config.decomposed for place in terms)
    entry = [] if config.lora is None or config.lora.decomposed else [f"lora_{place}" for place in config.lora.places]
    entry = [name for name in entry if name in FUSED_WITH_GATES]
    lora_gate = bool(config.lora and config.lora.gate)
    prefix_gate = bool(config.prefix and config.prefix.gate)
    attention_gates = prefix_gate or (lora_gate and bool(entry))
    # in cross-attention the values' have one of their own
    crossing_gates = (prefix_gate or (lora_gate and FUSED_WITH_GATES[0] in entry)) + (
        lora_gate and FUSED_WITH_GATES[1] in entry
    )
    adapter_gate = bool(config.adapter and config.adapter.gate)
    own_gates = attention_gates + adapter_gate
    gated = [place for place in terms if place.config.gate]
    if config.gate.shared:
        own_gates = bool(own_gates or any(not place.in_cross for place in gated))
        gated = [place for place in gated if place.in_cross]
    expected = {
        Adapter: own * bool(config.adapter),
        LoRA: len(entry) * (own + cross) + plain,
        Prefix: (own + cross) * bool(config.prefix),
        Prompt: int(config.prompt is not None),
        Term: len(terms) - plain,
        Gates: own * own_gates + cross * crossing_gates + len(gated) + bool(config.prompt and config.prompt.gate),
    }
    for kind, count in expected.items():
        if found[kind] != count:
            raise InjectionError(
                f"{len(layers)} layers should carry {count} {kind.__name__} modules, but {found[kind]} are there: "
                f"some layers of this {type(model).__name__} share modules or are built otherwise"
            )
