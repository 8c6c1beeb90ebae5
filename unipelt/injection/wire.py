"""Connect host modules with the rooms that serve them, by a port and hooks on each host and nothing else."""

from __future__ import annotations

from typing import Any

from torch import nn

from unipelt.hosts.attention_interface import redirect
from unipelt.hosts.locate import InjectionError
from unipelt.hosts.norms import is_norm
from unipelt.injection.attention_hooks import insert_prefix, lengthen_text, shorten_text
from unipelt.injection.gradient_checkpointing import wake_input
from unipelt.injection.hooks import (
    adapt_norm,
    add_terms,
    change_input,
    enter_attention,
    enter_layer,
    enter_stack,
    leave_layer,
    leave_stack,
    put,
    take_off,
)
from unipelt.submodules.room import ROOM, Port, SubmoduleSet, Wiring, rooms

NAMES = (ROOM, "unipelt_port", "unipelt_layer", "unipelt_prompt", "unipelt_tokens", "unipelt_chunk_size")
"""Names of the attributes that modules of the model get; `detach` removes all of them."""


def check_names(model: nn.Module) -> None:
    """Raise `InjectionError` if a module already has an attribute with a name of `NAMES`."""
    for path, module in model.named_modules():
        for name in NAMES:
            if hasattr(module, name):
                raise InjectionError(f"{path or type(model).__name__} has an attribute {name!r} of its own")


def wire_stack(owner: Any, layer: nn.Module) -> None:
    """Put the hooks on a stack that begin and end its passes, and the hook for gradient checkpointing."""
    put(owner, leave_stack)
    put(owner, enter_stack)
    owner.unipelt_layer = (layer,)  # a tuple, so that the layer does not become a child of this module
    put(owner, wake_input)


def wire_layer(layer: nn.Module, added: SubmoduleSet) -> None:
    """Give every host module of a set its port and its hooks."""
    room: Any = layer._modules[ROOM]
    for cross, part in enumerate(added.attentions()):
        wiring = part.wiring

        def port(path: str, cross: bool = bool(cross), wiring: Wiring = wiring) -> Any:
            host: Any = layer.get_submodule(path)
            if "unipelt_port" not in vars(host):
                host.unipelt_port = Port((room,), path, cross)
            elif host.unipelt_port.room[0] is not room:
                raise InjectionError(f"layers that share modules cannot take submodules, and two share their {path}")
            host.unipelt_port.tokens_first = path in wiring.tokens_first
            return host

        if part.needs_pass:
            put(layer, leave_layer)
            put(layer, enter_layer)
        if wiring.lengthens:
            attention = port(wiring.attention)
            put(attention, lengthen_text)
            put(attention, shorten_text)
            put(port(wiring.keys), insert_prefix)
            put(port(wiring.values), insert_prefix)
        elif part.averages or part.drop is not None or any(term.once for term in part.terms.values()):
            put(port(wiring.attention), enter_attention)
        elif part.entry is not None:
            port(wiring.readers[0]).unipelt_port.begins = True
        for path in wiring.handed:
            port(path).unipelt_port.begins = True
        for path in wiring.inputs:
            put(port(path), change_input)
        for path in dict.fromkeys((*wiring.readers[:1], *wiring.handed, *wiring.outputs)):
            host = port(path)
            put(host, adapt_norm if is_norm(host) else add_terms)
        if wiring.norm:
            put(port(wiring.norm), adapt_norm)
        if part.prefix is not None and not wiring.lengthens:
            attention = port(wiring.attention)
            if attention.unipelt_port.config is None:
                attention.unipelt_port.config = redirect(attention)


def rewire_layer(layer: nn.Module) -> None:
    """Replace the ports and hooks in a layer by those that its sets still need."""
    room: Any = layer._modules[ROOM]
    ours = set(room.modules())
    for module in layer.modules():
        if module not in ours:
            _release(module)
    for built in room._modules.values():
        wire_layer(layer, built)


def rewire_stacks(model: nn.Module) -> None:
    """Remove the hooks for passes from stacks whose layers have no prefix and no term left."""
    found = list(rooms(model))
    sets = [(room, part) for _, room in found for part in room._modules.values() if isinstance(part, SubmoduleSet)]
    used = {room.passes for room, built in sets for part in built.attentions() if part.prefix is not None or part.terms}
    for path, room in found:
        if room.passes not in used:
            take_off(model.get_submodule(path.rpartition(".")[0]), enter_stack, leave_stack)


def detach(model: nn.Module) -> None:
    """Remove all rooms, ports and hooks, also after a failed injection; the caller restores the parameters."""
    for module in list(model.modules()):
        _unwire(module)


def _release(module: Any) -> None:
    """Remove a host module's hooks and port, and restore its configuration."""
    take_off(module)
    port: Port | None = module.__dict__.pop("unipelt_port", None)
    if port is not None and port.config is not None:
        module.config = port.config


def _unwire(module: Any) -> None:
    """Remove all that was added to a module, and restore its former attributes."""
    _release(module)
    for name in ("unipelt_layer", "unipelt_prompt", "unipelt_tokens"):
        module.__dict__.pop(name, None)
    if "unipelt_chunk_size" in module.__dict__:
        module.chunk_size_feed_forward = module.__dict__.pop("unipelt_chunk_size")
    if ROOM in module._modules:
        delattr(module, ROOM)
