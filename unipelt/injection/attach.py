"""Build the set of each layer for the targets that were found, and put the set into the layer's room.

The file `inject.py` decides which parameters train, and has the interface for callers.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from unipelt.config.gate import GateConfig
from unipelt.config.methods import UniPELTConfig
from unipelt.config.parts import AdapterConfig, LoRAConfig, PromptConfig
from unipelt.config.submodule import SubmoduleConfig
from unipelt.hosts.locate import InjectionError
from unipelt.hosts.quantised import is_quantised, template_for
from unipelt.hosts.targets import AttentionTargets, LayerTargets, StackTargets
from unipelt.injection.attach_terms import Plan, build_adapter, build_entry_low_rank, build_low_rank, build_term
from unipelt.injection.hooks import put
from unipelt.injection.peft_layers import build_peft_terms
from unipelt.injection.prompt_hooks import end_prompt, enter_prompt, leave_prompt
from unipelt.injection.token_hooks import wire_tokens
from unipelt.injection.wire import wire_layer, wire_stack
from unipelt.submodules.drop import SubmoduleDropout, submodule_dropout
from unipelt.submodules.entry import Entry, Rows
from unipelt.submodules.forward_pass import Passes
from unipelt.submodules.lora import LoRA
from unipelt.submodules.peft_term import stand_together
from unipelt.submodules.prefix import NETWORK_NAMES, Prefix, PrefixNetwork
from unipelt.submodules.prompt import Prompt, embeds_text
from unipelt.submodules.room import DEFAULT, ROOM, ForwardArgument, Room, StackSet, SubmoduleSet, Wiring
from unipelt.submodules.term import SharedParameters, Term
from unipelt.submodules.token_rows import TokenRows


@dataclass(frozen=True)
class BuiltStack:
    """The sets that one method adds to a stack, before they are put into a model.

    Attributes:
        found: the targets in the stack.
        stack: the set of the stack itself.
        layers: the set of each layer, by index.
    """

    found: StackTargets
    stack: StackSet
    layers: dict[int, SubmoduleSet]


def build(
    model: PreTrainedModel, found: StackTargets, config: UniPELTConfig, deployed: bool, device: str | None = None
) -> BuiltStack:
    """Build the sets of a stack and of its layers; the model does not change.

    Args:
        model: the model.
        found: the targets in the stack.
        config: configuration of the submodules.
        deployed: whether prefixes are plain parameters, without the reparameterisation network, as after training.
        device: device of the parameters; None for the device of the projections. On `meta` they take no memory.

    Returns:
        The sets.

    Raises:
        InjectionError: a submodule does not fit its target.
    """
    _check_fit(model, found, config)
    own = [layer.attention for layer in found.layers.values() if layer.attention is not None]
    cross = [layer.cross for layer in found.layers.values() if layer.cross is not None]
    shared = {part.name: SharedParameters(part.name) for part in config.more}
    networks: dict[str, PrefixNetwork] = {}
    plan = Plan(found, config, model.dtype, networks, shared, build_peft_terms(model, found, config, device), device)
    for source, attentions in zip(NETWORK_NAMES, (own, cross), strict=True):
        if config.prefix is None or not attentions:
            continue
        widths = {attention.value.rows.count for attention in attentions}
        if len(widths) > 1:
            raise InjectionError(f"a prefix needs layers of one width, and their values are {sorted(widths)} wide")
        if config.prefix.reparameterize and not deployed:
            first = attentions[0].value
            networks[source] = PrefixNetwork(
                first.inputs, widths.pop(), len(attentions), config.prefix, plan.like(first)
            )
    layers = {index: _build_set(layer, plan, own, cross) for index, layer in found.layers.items()}
    stack = StackSet()
    stack.chooses_tokens = any(built.chooses_tokens for built in layers.values())
    for source, network in networks.items():
        stack.add_module(source, network)
    for part, module in shared.items():
        if module.has_parameters():
            stack.add_module(f"{part}_shared", module)
    return BuiltStack(found, stack, layers)


def _check_fit(model: PreTrainedModel, found: StackTargets, config: UniPELTConfig) -> None:
    """Raise `InjectionError` if a further submodule does not suit a stack."""
    if not any(layer.attention is not None for layer in found.layers.values()):
        return  # only the attention to the other stack gets submodules
    for part in config.more:
        generates = bool(model.can_generate())
        reason = part.misfit(config.gate, causal=found.causal, generates=generates, norm_first=not found.stack.norm)
        if reason:
            raise InjectionError(reason)


def install(model: PreTrainedModel, built: BuiltStack, config: UniPELTConfig, name: str = DEFAULT) -> None:
    """Put the sets of a stack into its rooms, under a name, and wire their host modules."""
    found = built.found
    passes = room_of(found.owner, None).passes
    room_of(found.owner, passes)[name] = built.stack.train(model.training)
    for index, layer in found.layers.items():
        room_of(layer.module, passes)[name] = built.layers[index].train(model.training)
    wire_stack(found.owner, next(iter(found.layers.values())).module)
    for index, layer in found.layers.items():
        wire_layer(layer.module, built.layers[index])
        if _averages_behind_attention(layer, config):
            _keep_whole(layer)


def room_of(host: Any, passes: Passes | None) -> Room:
    """Return the room of a layer or a stack; make the room if it does not exist."""
    if ROOM not in host._modules:
        host.add_module(ROOM, Room(passes or Passes()).train(host.training))
    room: Room = host._modules[ROOM]
    return room


def _build_set(
    layer: LayerTargets, plan: Plan, own: list[AttentionTargets], cross: list[AttentionTargets]
) -> SubmoduleSet:
    terms: list[Term] = [build_term(target, plan) for target in layer.terms]
    terms += [build_low_rank(target, plan) for target in layer.low_rank]
    mine = [(target, term) for target, term in zip((*layer.terms, *layer.low_rank), terms, strict=True)]
    built = SubmoduleSet(Wiring())
    if layer.attention is not None:
        inside = [pair for pair in mine if not pair[0].in_cross]
        _fill(built, layer.attention, layer, inside, plan, own.index(layer.attention), in_cross=False)
    elif layer.adapted is not None and plan.config.adapter is not None:
        if plan.config.adapter.gate and plan.config.gate.shared:
            raise InjectionError(
                f"gate.shared lets the adapter's gate read the attention's input, and {type(layer.module).__name__} "
                "has no attention; take gate.shared: false, or adapter.gate: false"
            )
        built.add_module("adapter", build_adapter(layer, plan))
        built.wiring = Wiring(outputs={layer.adapted_path: ("adapter",)})
        if built.averages:
            raise InjectionError(
                f"the adapter's gate averages over real tokens, which it knows from an attention's mask, and "
                f"{type(layer.module).__name__} has no attention; take gate.pooling: token, or adapter.gate: false"
            )
    if layer.cross is not None:
        built.cross = SubmoduleSet(Wiring())
        inside = [pair for pair in mine if pair[0].in_cross]
        _fill(built.cross, layer.cross, layer, inside, plan, cross.index(layer.cross), in_cross=True)
    return built


def _fill(
    built: SubmoduleSet,
    target: AttentionTargets,
    layer: LayerTargets,
    terms: list[tuple[Any, Term]],
    plan: Plan,
    index: int,
    *,
    in_cross: bool,
) -> None:
    """Put into a set the submodules of one attention and, for self-attention, of the feed-forward network after it."""
    config = plan.config
    label = plan.found.cross_label if in_cross else plan.found.label
    names: list[str] = []
    if config.prefix is not None:
        built.prefix = _build_prefix(target, plan, index, label, in_cross=in_cross)
        names += [built.prefix.gate_name] if built.prefix.gate_name else []
    low_rank, rows = build_entry_low_rank(target, plan, label, in_cross=in_cross)
    names += [term.gate_name for _, term in low_rank if term.gate_name and term.entry is None]
    has_adapter = not in_cross and layer.adapted is not None and config.adapter is not None
    if config.gate.shared and not in_cross:
        if has_adapter and config.adapter is not None and config.adapter.gate:
            names.append(f"{label}adapter")
        names += [term.gate_name for _, term in terms if term.gate_name]
    if names:
        built.entry = _build_entry(target, plan, tuple(names), label, rows)
    outputs: dict[str, list[str]] = {}
    inputs: dict[str, list[str]] = {}
    handed: dict[str, list[str]] = {}
    is_low_rank = [isinstance(term, LoRA) for _, term in terms]
    first = [pair for pair, low in zip(terms, is_low_rank, strict=True) if low]
    rest = [pair for pair, low in zip(terms, is_low_rank, strict=True) if not low]
    # low-rank terms come first, so that merging one into the weight does not change the input of the other terms
    for where, term in (*low_rank, *first, *rest):
        built.add_module(term.name, term)
        (inputs if where.place == "activation" else outputs).setdefault(where.projection.path, []).append(term.name)
        if where.reader:
            handed.setdefault(where.reader, []).append(term.name)
    stand_together([built.terms[name] for name in names] for names in outputs.values())
    norm = ""
    if has_adapter:
        built.add_module("adapter", build_adapter(layer, plan))
        if plan.found.stack.norm:
            norm = layer.adapted_path
        else:
            outputs.setdefault(layer.adapted_path, []).append("adapter")
    built.drop = _dropout(built, target, config.gate)
    built.wiring = _wiring(built, target, outputs, inputs, handed, norm)


def _dropout(built: SubmoduleSet, target: AttentionTargets, gate: GateConfig) -> SubmoduleDropout | None:
    """Give the set's submodules the dropout of the configuration, and return it."""
    drop = submodule_dropout(gate)
    if drop is not None and drop.by_example and any(term.once and not term.gate_name for term in built.terms.values()):
        raise InjectionError(
            f"{type(target.module).__name__} calls a projection for relative positions too, which all examples share; "
            "take gate.dropout_by: batch, or lora.gate: true"
        )
    if built.prefix is not None:
        built.prefix.drop = drop
    for term in built.terms.values():
        term.drop = drop
    return drop


def _wiring(
    built: SubmoduleSet,
    target: AttentionTargets,
    outputs: dict[str, list[str]],
    inputs: dict[str, list[str]],
    handed: dict[str, list[str]],
    norm: str,
) -> Wiring:
    described, lengthens = target.described, bool(target.key_path) and built.prefix is not None
    if lengthens and built.prefix.gating == "added":
        raise InjectionError(
            f"{type(target.module).__name__} is outside Transformers' attention interface, where alone a prefix can "
            "have a softmax of its own; take the preset unipelt-apl, whose prefix shares the text's softmax "
            "(prefix.softmax: shared), or unipelt-al, which has no prefix"
        )
    reads_mask = lengthens or built.averages
    counts = built.drop is not None and built.drop.by_example
    return Wiring(
        attention=described.path,
        hidden=_argument(target.module, described.hidden) if reads_mask or counts else None,
        mask=_argument(target.module, described.mask) if reads_mask else None,
        bias=_argument(target.module, described.bias) if lengthens else None,
        truth_values=described.mask_is_truth_values,
        added=described.mask_is_added,
        averages=built.averages,
        readers=() if built.entry is None else target.readers,
        outputs={path: tuple(names) for path, names in outputs.items()},
        inputs={path: tuple(names) for path, names in inputs.items()},
        handed={path: tuple(names) for path, names in handed.items()},
        norm=norm,
        keys=target.key_path if lengthens else "",
        values=target.value.path if lengthens else "",
        tokens_first=target.readers if described.tokens_first else (),
    )


def _argument(attention: nn.Module, name: str) -> ForwardArgument:
    signature = inspect.signature(attention.forward).parameters
    if name in signature:
        return ForwardArgument(name, list(signature).index(name))
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.values()):
        return ForwardArgument(name, None)  # each call checks that the keyword argument is given
    raise InjectionError(f"the forward of {type(attention).__name__} has no argument {name!r}")


def _build_prefix(target: AttentionTargets, plan: Plan, index: int, label: str, *, in_cross: bool) -> Prefix:
    config, source = plan.config, NETWORK_NAMES[int(in_cross)]
    assert config.prefix is not None
    prefix = Prefix(
        index,
        source,
        target.value.rows.count,
        config.prefix,
        plan.networks.get(source),
        plan.like(target.value),
        by_query=plan.found.causal or config.gate.pooling == "token",
        gate_name=f"{label}prefix",
    )
    if prefix.gate_name and config.gate.activation == "tanh" and prefix.gating == "mass":
        raise InjectionError(
            "a gate for every token acts on the prefix's mass by its logarithm, and tanh may be below 0; take "
            "activation sigmoid"
        )
    return prefix


def _build_entry(
    target: AttentionTargets, plan: Plan, names: tuple[str, ...], label: str, rows: tuple[Rows, ...]
) -> Entry:
    config = plan.config
    starts = {f"{label}prefix": config.prefix.gate_start} if config.prefix is not None else {}
    like, causal = plan.like(target.value), plan.found.causal
    return Entry(target.query.inputs, names, config.gate, like, causal=causal, starts=starts, rows=rows)


def _averages_behind_attention(layer: LayerTargets, config: UniPELTConfig) -> bool:
    adapter = layer.adapted is not None and config.adapter is not None and _averages(config.adapter)
    terms = (*layer.terms, *layer.low_rank)
    return adapter or any(_averages(target.config) and not target.in_attention for target in terms)


def _averages(part: AdapterConfig | LoRAConfig | SubmoduleConfig) -> bool:
    """Return whether a submodule may average over a text: with a gate, or with a router for each example."""
    return part.gate or (part.mixture is not None and part.mixture.weighs)


def _keep_whole(layer: LayerTargets) -> None:
    """Switch off the chunks of the feed-forward block, because a gate averages over a text. No other value changes."""
    if getattr(layer.module, "chunk_size_feed_forward", None):
        layer.module.unipelt_chunk_size = layer.module.chunk_size_feed_forward
        layer.module.chunk_size_feed_forward = 0


# Prompts


def find_entry(model: PreTrainedModel, found: StackTargets) -> Any:
    """Find the module that embeds a model's text, where a prompt enters.

    The stack's owner comes before the base model, since a head may call the stack and not the base model (OPT's does).
    Raises `InjectionError` if neither embeds the text.
    """
    entry = next((part for part in (found.owner, model.base_model) if embeds_text(part)), None)
    if entry is None:
        raise InjectionError(f"a prompt cannot enter {type(model.base_model).__name__}: it takes no inputs_embeds")
    return entry


def build_prompt(
    model: PreTrainedModel, found: StackTargets, config: UniPELTConfig, device: str | None = None
) -> tuple[Any, Prompt]:
    """Build a prompt; return the module that the prompt enters, and the prompt. Raises `InjectionError`."""
    prompt, gate = config.prompt, config.gate
    assert prompt is not None
    entry = find_entry(model, found)
    table = entry.get_input_embeddings().weight
    if is_quantised(table):
        raise InjectionError("the embeddings are quantised, and a prompt starts from their numbers")
    _check_prompt_gate(prompt, gate, found, entry)
    like = template_for(table, model.dtype, config.dtype)
    like = like if device is None else torch.empty(0, dtype=like.dtype, device=device)
    gates = Entry(table.shape[1], ("prompt",), gate, like, causal=False) if prompt.gate else None
    return entry, Prompt(entry, prompt, gates, like)


def install_prompt(
    model: PreTrainedModel, found: StackTargets, entry: Any, prompt: Prompt, name: str = DEFAULT
) -> None:
    """Put a prompt in front of every text that the base model reads."""
    room = room_of(entry, None)
    if name not in room:
        room[name] = StackSet()
    room[name].add_module("prompt", prompt.train(model.training))
    ends: list[Any] = [found.owner] if found.owner is entry else [found.owner, entry]
    put(entry, end_prompt)
    for end in ends:
        end.unipelt_prompt = (room,)  # a tuple, so that the room does not become a child of this module
        put(end, leave_prompt)
    put(entry, enter_prompt)


def _check_prompt_gate(prompt: PromptConfig, gate: GateConfig, found: StackTargets, entry: Any) -> None:
    if prompt.gate and found.causal and gate.pooling != "static":
        raise InjectionError(
            f"a prompt's gate with gate.pooling: {gate.pooling} averages over a text, and a causal "
            f"{type(entry).__name__} would see the future; take gate.pooling: static, or prompt.gate: false"
        )


# Trained tokens


def install_tokens(model: PreTrainedModel, rows: TokenRows, name: str = DEFAULT) -> None:
    """Put trained rows of the vocabulary into the room of the base model, and wire the modules that hold them."""
    room = room_of(model.base_model, None)
    if name not in room:
        room[name] = StackSet()
    room[name].add_module("tokens", rows.train(model.training))
    wire_tokens(model, room)
