"""Put submodules into the places that were found, and take them out again: modules, hooks, and nothing else.

Which parameters train and what a caller is told are `unipelt.inject`'s.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from unipelt.adapter import Adapter, adapt_norm, adapt_output
from unipelt.attention import (
    Argument,
    Site,
    enter_attention,
    insert_prefix,
    leave_attention,
    redirect,
)
from unipelt.config import GateConfig, LoRAConfig, PromptConfig, UniPELTConfig
from unipelt.gate import Gates, Slot
from unipelt.lora import ENTRY, NAMES, LoRA, add_low_rank
from unipelt.places import (
    IN_ATTENTION,
    AttentionPlace,
    InjectionError,
    LayerPlaces,
    Projection,
    StackPlaces,
    TermPlace,
)
from unipelt.prefix import NETWORKS, Prefix, PrefixNetwork, enter_stack, leave_stack
from unipelt.prompt import Prompt, embeds_text, enter_prompt, leave_prompt
from unipelt.quantised import is_quantised, like_beside
from unipelt.term import MODULES, Shared, Spot, Term, add_terms, add_to_input, enter_shared, hand_on, leave_shared


def attach(model: PreTrainedModel, found: StackPlaces, config: UniPELTConfig, deployed: bool) -> None:
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
                like_beside(first.module.weight, model.dtype),
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
        terms: list[tuple[TermPlace, Term | LoRA]] = [
            (spot, _make_term(spot, config, found, shared, model.dtype)) for spot in layer.terms
        ]
        terms += [(spot, _make_low_rank(spot, config, found, model.dtype)) for spot in layer.low_rank]
        for spot, term in terms:
            _add_term(spot, term)
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
    _watch_checkpointing(owner, next(iter(layers)).module)


def _central(
    layer: LayerPlaces, found: StackPlaces, config: UniPELTConfig, terms: Sequence[tuple[TermPlace, Term | LoRA]]
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
    place: AttentionPlace,
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
    attention, like = place.module, like_beside(place.value.module.weight, dtype)
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
        for name, projection in zip(ENTRY, (place.query, place.value), strict=True):
            if name.removeprefix("lora_") not in config.lora.places:
                continue
            leaf = projection.module
            _check_start(projection, config.lora)
            gates = None
            if config.lora.gate and crosses and name == "lora_value":
                # it reads the other stack's output, which this attention's own input says nothing about
                gates = Gates(projection.inputs, (f"{label}{name}",), config.gate, like, causal=True)
            elif config.lora.gate:
                gated[f"{label}{name}"] = (*projection.path.split("."), name)
            term = LoRA(projection.inputs, projection.rows, config.lora, like_beside(leaf.weight, dtype), gates)
            term.crosses = gates is not None
            term.skips_ungated_calls = place.described.query_serves_positions and name == "lora_query"
            _hold(leaf, name, term)
    if not (gated or others or tokens or inside or config.prefix):
        return
    signature = inspect.signature(attention.forward).parameters

    def argument(name: str) -> Argument:
        if name in signature:
            return Argument(name, list(signature).index(name))
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.values()):
            return Argument(name, None)  # where it is passed through, that it is there is checked at every call
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
    layer: LayerPlaces,
    found: StackPlaces,
    config: UniPELTConfig,
    tokens: Slot | None,
    central: Slot | None,
    dtype: torch.dtype,
) -> None:
    assert config.adapter is not None
    assert layer.attention is not None
    hidden, like = layer.attention.query.inputs, like_beside(layer.attention.value.module.weight, dtype)
    gates = None
    if config.adapter.gate and central is None:
        gates = Gates(hidden, (f"{found.label}adapter",), config.gate, like, causal=found.causal)
        _keep_whole(layer)
    layer.adapted.adapter = Adapter(hidden, config.adapter, like, gates, tokens)
    layer.adapted.adapter.gate = central
    layer.adapted.register_forward_hook(adapt_norm if found.stack.norm else adapt_output)


def _keep_whole(layer: LayerPlaces) -> None:
    """A gate averages over all of a text, so its feed-forward block is not cut; that changes no other number."""
    if getattr(layer.module, "chunk_size_feed_forward", None):
        layer.module.unipelt_chunk_size = layer.module.chunk_size_feed_forward
        layer.module.chunk_size_feed_forward = 0


def find_entry(model: PreTrainedModel, found: StackPlaces) -> Any:
    """What embeds a model's text, which a prompt enters; a head may pass by the base model (OPT's does), but not by it.

    Raises `InjectionError` if there is none.
    """
    entry = next((part for part in (found.owner, model.base_model) if embeds_text(part)), None)
    if entry is None:
        raise InjectionError(f"a prompt cannot enter {type(model.base_model).__name__}: it takes no inputs_embeds")
    return entry


def attach_prompt(model: PreTrainedModel, found: StackPlaces, config: PromptConfig, gate: GateConfig) -> None:
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


def count_term(place: TermPlace) -> int:
    """How many parameters a term needs there, those that it shares with others included, found without memory."""
    weight = place.projection.module.weight
    shared = Shared(place.config.name)
    spot = Spot(
        place.place,
        place.inputs,
        place.projection.rows.count,
        torch.empty(weight.shape, dtype=like_beside(weight, torch.float32).dtype, device="meta"),
        shared,
        place.projection.module,
        place.projection.rows,
    )
    function = MODULES[type(place.config)](place.config, spot)
    return sum(parameter.numel() for module in (function, shared) for parameter in module.parameters())


def _own_gates(place: TermPlace, config: UniPELTConfig, found: StackPlaces, dtype: torch.dtype) -> Gates | None:
    """The gate of a term that computes it from what it reads."""
    if not place.config.gate or (config.gate.shared and not place.in_cross):
        return None
    label = found.cross_label if place.in_cross else found.label
    like = like_beside(place.projection.module.weight, dtype)
    causal = found.causal or place.crosses
    return Gates(place.inputs, (f"{label}{place.name}",), config.gate, like, causal=causal)


def _own_tokens(gates: Gates | None) -> Slot | None:
    return Slot() if gates is not None and gates.pooling in ("masked_mean", "mean", "text") else None


def _make_term(
    place: TermPlace, config: UniPELTConfig, found: StackPlaces, shared: Mapping[str, Shared], dtype: torch.dtype
) -> Term:
    part, projection = place.config, place.projection
    weight = like_beside(projection.module.weight, dtype).detach()
    spot = Spot(
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


def _make_low_rank(place: TermPlace, config: UniPELTConfig, found: StackPlaces, dtype: torch.dtype) -> Term | LoRA:
    lora = place.config
    assert isinstance(lora, LoRAConfig)
    if lora.decomposed:
        if is_quantised(place.projection.module.weight):
            raise InjectionError(
                f"{place.projection.path} is quantised, and decomposed LoRA needs its weight's numbers"
            )
        return _make_term(place, config, found, {"lora": Shared("lora")}, dtype)
    _check_start(place.projection, lora)
    projection, gates = place.projection, _own_gates(place, config, found, dtype)
    term = LoRA(projection.inputs, projection.rows, lora, like_beside(projection.module.weight, dtype), gates)
    term.tokens = _own_tokens(gates)
    term.crosses = place.crosses
    term.skips_ungated_calls = place.serves_positions
    return term


def _check_start(projection: Projection, lora: LoRAConfig) -> None:
    """Raise `InjectionError` where a term cannot start from the projection's weight."""
    if lora.start == "zero":
        return
    if is_quantised(projection.module.weight):
        raise InjectionError(f"{projection.path} is quantised, and the start {lora.start} needs its weight's numbers")
    if lora.rank > (most := min(projection.inputs, projection.rows.count)):
        raise InjectionError(
            f"{projection.path} has {most} singular values, and the start {lora.start} takes {lora.rank} of them; "
            "take a smaller lora.rank"
        )


def _hold(leaf: Any, name: str, term: LoRA) -> None:
    """Put a low-rank term into its projection."""
    if not any(hasattr(leaf, other) for other in NAMES):
        # before all other terms, which so read the same when this one is merged into the weight
        leaf.register_forward_hook(add_low_rank, prepend=True)
    setattr(leaf, name, term)


def _add_term(place: TermPlace, term: Term | LoRA) -> None:
    """Put a term into its host: hosts hold the names of their terms, and the slots of those who read what they read."""
    host = place.projection.module
    if isinstance(term, LoRA):
        _hold(host, place.name, term)
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


def _watch_checkpointing(owner: Any, layer: nn.Module) -> None:
    """Reentrant gradient checkpointing needs an input that requires a gradient, and frozen embeddings give none.

    A stack is given states, embeddings, or token ids that it embeds itself. What embeds them is woken by Transformers,
    when checkpointing is switched on; the first two are seen by a hook of the stack.
    """
    owner.unipelt_layer = (layer,)  # a reference, not a part
    owner.register_forward_pre_hook(_wake_input, with_kwargs=True)


def _wake_input(
    owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if not _checkpoints_reentrantly(owner):
        return None
    return (
        tuple(_awake(value) if place == 0 else value for place, value in enumerate(args)),
        {name: _awake(value) if name in STATES else value for name, value in kwargs.items()},
    )


def _checkpoints_reentrantly(module: Any) -> bool:
    layer = module.unipelt_layer[0]
    if not (torch.is_grad_enabled() and layer.training and getattr(layer, "gradient_checkpointing", False)):
        return False
    return getattr(layer._gradient_checkpointing_func, "keywords", {}).get("use_reentrant", True)


STATES = ("hidden_states", "inputs_embeds")
"""What a stack calls its input, where that is not token ids."""


def _awake(value: Any) -> Any:
    """The same numbers, requiring a gradient."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.requires_grad:
        return value
    return value.detach().requires_grad_(True)


def refuse_training(model: Any, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of a folded model."""
    if model.training and torch.is_grad_enabled():
        raise RuntimeError(
            "a folded model does not train: its gates are constants and its low-rank terms are in the weights; call "
            "model.eval() to use it, or train the model that it was folded from"
        )


def drop_hooks(module: Any, dropped: Collection[Callable[..., Any]]) -> None:
    """Take those hooks off a module's forward."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in dropped]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)


HOOKS = (
    enter_attention,
    add_low_rank,
    insert_prefix,
    leave_attention,
    adapt_norm,
    adapt_output,
    add_terms,
    add_to_input,
    hand_on,
    enter_shared,
    leave_shared,
    enter_stack,
    leave_stack,
    enter_prompt,
    leave_prompt,
    refuse_training,
    _wake_input,
)
PLACED = (
    *("unipelt_rows", "unipelt_layer", "unipelt_terms", "unipelt_inputs", "unipelt_readers"),
    *("unipelt_prompt", "unipelt_prompt_length"),
)
"""What hooks find at modules of the host's, sites and chunk sizes apart."""
OURS = (Adapter, Gates, LoRA, Prefix, PrefixNetwork, Prompt, Shared, Term)


def detach(model: nn.Module) -> None:
    """Undo `attach` wherever it got to; the parameters' values and flags are the caller's."""
    module: Any
    for module in list(model.modules()):
        if isinstance(module, OURS):
            continue
        drop_hooks(module, HOOKS)
        for name in [name for name, child in module._modules.items() if isinstance(child, OURS)]:
            delattr(module, name)
        site: Site | None = module.__dict__.pop("unipelt_site", None)
        if site is not None:
            if site.config is not None:
                module.config = site.config
            for name in ("gates", "prefix"):
                if hasattr(module, name):
                    delattr(module, name)
        for name in PLACED:
            module.__dict__.pop(name, None)
        if "unipelt_chunk_size" in module.__dict__:
            module.chunk_size_feed_forward = module.__dict__.pop("unipelt_chunk_size")


def check_counts(model: PreTrainedModel, config: UniPELTConfig, stacks: list[StackPlaces]) -> None:
    """Count what was added, and fail if it is wrong."""
    found = Counter(type(module) for module in model.modules())
    layers = [layer for stack in stacks for layer in stack.layers.values()]
    own = sum(layer.attention is not None for layer in layers)
    cross = sum(layer.cross is not None for layer in layers)
    terms = [place for layer in layers for place in (*layer.terms, *layer.low_rank)]
    plain = sum(isinstance(place.config, LoRAConfig) and not place.config.decomposed for place in terms)
    entry = [] if config.lora is None or config.lora.decomposed else [f"lora_{place}" for place in config.lora.places]
    entry = [name for name in entry if name in ENTRY]
    lora_gate = bool(config.lora and config.lora.gate)
    prefix_gate = bool(config.prefix and config.prefix.gate)
    attention_gates = prefix_gate or (lora_gate and bool(entry))
    # in cross-attention the values' have one of their own
    crossing_gates = (prefix_gate or (lora_gate and ENTRY[0] in entry)) + (lora_gate and ENTRY[1] in entry)
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
