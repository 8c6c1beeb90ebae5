"""The registry of all hooks of host modules, which wiring and detaching use.

A hook is a plain function and reads all its state from the module that it is called with, so that copies of a model
stay correct. All hooks run before those of the user. So a user's hook has the same effect whether it was registered
before or after `inject`: it sees the output of a projection with its terms, as if the terms were part of the weight.

Shapes: B examples, T tokens, I inputs, O outputs of a host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from unipelt.injection.caches import CACHE_NAMES, cached_tokens, is_paged, prefixes_beside
from unipelt.submodules.forward_pass import AttentionPass, ForwardPass, PassFacts
from unipelt.submodules.prefix import NETWORK_NAMES
from unipelt.submodules.room import ROOM, Port, Room, SubmoduleSet
from unipelt.submodules.tokens import dense_mask, token_weights

Hook = TypeVar("Hook", bound=Callable[..., Any])
HOOKS: dict[Callable[..., Any], str] = {}
"""Hook -> the time of its call: `enter` (before a forward, with keyword arguments), `input` (before a forward),
`output` (after a forward), `leave` (after a forward, also after a failure)."""


def hook(when: str) -> Callable[[Hook], Hook]:
    """Return a decorator that registers a function as a hook, called at the time `when` (see `HOOKS`)."""

    def register(function: Hook) -> Hook:
        HOOKS[function] = when
        return function

    return register


def put(host: nn.Module, function: Callable[..., Any]) -> None:
    """Put a registered hook on a module, before all other hooks, unless the module already has this hook."""
    when = HOOKS[function]
    there = host._forward_pre_hooks if when in ("enter", "input") else host._forward_hooks
    if function in there.values():
        return
    if when == "enter":
        host.register_forward_pre_hook(function, prepend=True, with_kwargs=True)
    elif when == "input":
        host.register_forward_pre_hook(function, prepend=True)
    else:
        host.register_forward_hook(function, prepend=True, always_call=when == "leave")


def take_off(host: nn.Module, *functions: Callable[..., Any]) -> None:
    """Remove these hooks from a module; remove every registered hook if none is named."""
    dropped = functions or tuple(HOOKS)
    for hooks in (host._forward_pre_hooks, host._forward_hooks):
        for key in [key for key, function in hooks.items() if function in dropped]:
            del hooks[key]
            host._forward_pre_hooks_with_kwargs.pop(key, None)
            host._forward_hooks_always_called.pop(key, None)


# Stacks and layers: where a pass begins and ends


@hook("enter")
def enter_stack(owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Begin a pass of the stack, and compute the prefixes of all its attentions at once."""
    if getattr(owner, "_is_replica", False):
        raise RuntimeError(
            "torch.nn.DataParallel does not work with submodules; start one process a GPU (accelerate launch, "
            "torchrun), or let Python see one GPU (CUDA_VISIBLE_DEVICES=0)"
        )
    room: Room = owner._modules[ROOM]
    facts = PassFacts(room.passes.given_rows(), room.passes.losses())
    cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
    facts.paged = is_paged(cache)
    for name in (room.active,) if facts.rows is None else facts.rows.names:
        stack_set = room.present(name)
        if stack_set is not None and stack_set.chooses_tokens:
            facts.cached = cached_tokens(cache)
        for source in NETWORK_NAMES if stack_set is not None else ():
            network = stack_set._modules.get(source)
            if network is not None:
                facts.prefixes[network.key] = prefixes_beside(cache, network)
    return room.passes.enter(facts, args), kwargs


@hook("leave")
def leave_stack(owner: Any, args: tuple[Any, ...], output: Any) -> None:
    """End the pass of the stack."""
    owner._modules[ROOM].passes.leave()


@hook("enter")
def enter_layer(
    layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Begin a pass if the layer is called without its stack."""
    passes = layer._modules[ROOM].passes
    if passes.current() is not None:
        return None
    facts = PassFacts(passes.given_rows())
    facts.cached = cached_tokens(next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None))
    return passes.enter(facts, args, by_layer=True), kwargs


@hook("leave")
def leave_layer(layer: Any, args: tuple[Any, ...], output: Any) -> None:
    """Drop the values of the layer's attentions; end the pass if the layer began it."""
    passes = layer._modules[ROOM].passes
    now = passes.current()
    if now is not None and now.by_layer:
        passes.leave()
    elif now is not None:
        now.attentions.clear()


# Attention and projections: where submodules compute


@hook("enter")
def enter_attention(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Begin the pass of an attention; read the number of its examples, and its mask for gates that average over tokens.

    The gates average over all tokens except padding.
    """
    port: Port = attention.unipelt_port
    now = port.room[0].passes.current_or_recomputed()
    if now is None:
        return
    rows = now.facts.rows
    for index, part in enumerate(parts_at(port, now)):
        if part is None:
            continue
        now.attentions.pop(part.key, None)
        if part.wiring.hidden is None:
            continue
        batch = len(part.wiring.hidden.read(args, kwargs))
        if rows is not None:
            batch = rows.counts[index] * (batch // sum(rows.counts))
        now.attention(part.key).batch = batch
        if part.wiring.averages:
            assert part.wiring.mask is not None
            mask = part.wiring.mask.read(args, kwargs)
            note_mask(part, now, mask if rows is None else split_mask(mask, now.facts)[index], batch)


def note_mask(part: SubmoduleSet, now: ForwardPass, mask: Any, batch: int) -> AttentionPass:
    """Keep an attention's mask and, if gates average, its token weights, (B, T), in its pass; return the pass."""
    attention = now.attention(part.key)
    attention.mask, attention.cached = mask, now.facts.cached
    if part.wiring.averages:
        attention.weights = token_weights(
            mask, batch, now.facts, truth_values=part.wiring.truth_values, added=part.wiring.added
        )
    return attention


@hook("input")
def change_input(host: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Add terms to the input of a projection, (B, T, I)."""
    port: Port = host.unipelt_port
    x = args[0].transpose(0, 1) if port.tokens_first else args[0]
    changed = _by_set(port, port.room[0].passes.current(), _add_to_input, x, x)
    if changed is x:
        return None
    return (changed.transpose(0, 1) if port.tokens_first else changed, *args[1:])


def _add_to_input(part: SubmoduleSet, port: Port, now: ForwardPass | None, x: Tensor, _: Tensor) -> Tensor:
    attention = None if now is None else now.attention(part.key)
    for name in part.wiring.inputs.get(port.path, ()):
        term: Any = part._modules[name]
        x = term(x, x, attention)
    return x


@hook("output")
def add_terms(host: Any, args: tuple[Any, ...], out: Any) -> Any:
    """Add terms to the output of a projection or of a feed-forward network, (B, T, O)."""
    port: Port = host.unipelt_port
    passes = port.room[0].passes
    now = passes.current_or_recomputed() if port.begins else passes.current()
    if port.tokens_first:
        return _by_set(port, now, _add_to_output, args[0].transpose(0, 1), out.transpose(0, 1)).transpose(0, 1)
    if isinstance(out, tuple):  # a mixture of experts also returns its router's logits
        return (_by_set(port, now, _add_to_output, args[0] if args else out[0], out[0]), *out[1:])
    return _by_set(port, now, _add_to_output, args[0] if args else out, out)


def _add_to_output(part: SubmoduleSet, port: Port, now: ForwardPass | None, x: Tensor, y: Tensor) -> Tensor:
    modules, wiring, path = part._modules, part.wiring, port.path
    attention = None
    if now is not None:
        attention = now.attention(part.key)
        if port.begins and attention.begun_by == path:
            # gradient checkpointing computes a shared layer again, and so calls the same projection a second time
            attention = now.attentions[part.key] = AttentionPass()
        if path in wiring.readers and not attention.opened and modules.get("entry") is not None:
            attention.begun_by = path
            open_entry(part, x, attention)
        for name in wiring.handed.get(path, ()):
            attention.inputs[name] = x
    for name in wiring.outputs.get(path, ()):
        term: Any = modules[name]
        given = y if term.reads_output else x if attention is None else attention.inputs.get(name, x)
        y = term(given, y, attention)
    return y


def open_entry(part: SubmoduleSet, x: Tensor, attention: AttentionPass) -> None:
    """Compute the gates and low-rank terms' `g A x` from the attention's input x, (B, T, I); keep both in its pass."""
    attention.opened = True
    entry: Any = part._modules["entry"]
    values, further = entry(x, attention.weights if entry.averages else None)
    first, rows, names = entry.first_row, entry.row_names, entry.gate_names
    if further is None:
        attention.note_gates(names, values)
        return
    # one split, because each slice of a tensor costs an operation in the backward pass
    behind = first + len(rows)
    before, scaling, *after = values.split(entry.gate_split, dim=-1)
    attention.note_gates(names[:first], before)
    if after:
        attention.note_gates(names[behind:], after[0])
    low = further.unflatten(-1, (len(rows), -1)) * scaling.unsqueeze(-1)
    attention.low.update(zip(rows, low.unbind(dim=-2), strict=True))


@hook("output")
def adapt_norm(norm: Any, args: tuple[Tensor, ...], normed: Tensor) -> Tensor:
    """Add terms to a norm's output and, after a post-LN layer's feed-forward network, the adapter to its input.

    The adapter changes the input s: `LN(s + g * adapter(LN(s)))` (`Adapter`). `LN` stands for the norm with its terms.
    """
    port: Port = norm.unipelt_port
    tuned = add_terms(norm, args, normed)
    added = _by_set(port, port.room[0].passes.current(), _adapt, tuned, args[0])
    return tuned if added is args[0] else add_terms(norm, (added,), norm.forward(added))


def _adapt(part: SubmoduleSet, port: Port, now: ForwardPass | None, normed: Tensor, given: Tensor) -> Tensor:
    if part.wiring.norm != port.path:
        return given
    adapter: Any = part._modules["adapter"]
    return adapter(normed, given, None if now is None else now.attention(part.key))


# Sets: the active set, or the sets of the batch's rows


def parts_at(port: Port, now: ForwardPass) -> list[SubmoduleSet | None]:
    """Return the active set at a host or, if the batch's rows belong to several sets, each of these sets."""
    rows = now.facts.rows
    return [port.part(port.room[0].active)] if rows is None else [port.part(name) for name in rows.names]


def split_mask(mask: Any, facts: PassFacts) -> tuple[Any, ...]:
    """Split a mask (B or 1, ...) by set, once in a pass; None, or a mask with one row, is returned for every set.

    A block mask of flex attention becomes truth values.
    """
    rows = facts.rows
    assert rows is not None
    if mask is not None and not isinstance(mask, Tensor):
        block = mask
        mask = facts.once(block, "dense", lambda: dense_mask(block))
    if mask is None or len(mask) == 1:
        return (mask,) * len(rows.names)
    return facts.once(mask, "rows", lambda: rows.split(mask))


Compute = Callable[[SubmoduleSet, Port, ForwardPass | None, Tensor, Tensor], Tensor]


def _by_set(port: Port, now: ForwardPass | None, compute: Compute, x: Tensor, y: Tensor) -> Tensor:
    """Compute for the active set, or for every set on its own rows of the batch; rows without a set do not change."""
    # a user's hook that replaces the stack's arguments ends its pass, but the rows still belong to their sets
    rows = port.room[0].passes.given_rows() if now is None else now.facts.rows
    if rows is None:
        part = port.part(port.room[0].active)
        return y if part is None else compute(part, port, now, x, y)
    parts = [port.part(name) for name in rows.names]
    if all(part is None for part in parts):
        return y
    pieces = zip(parts, rows.split(x), rows.split(y), strict=True)
    done = [own_y if part is None else compute(part, port, now, own_x, own_y) for part, own_x, own_y in pieces]
    return torch.cat(done)
