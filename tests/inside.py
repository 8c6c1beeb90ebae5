"""Read the parts of an injected model by name, wherever they are stored."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from unipelt.submodules.entry import Entry
from unipelt.submodules.forward_pass import Passes
from unipelt.submodules.room import DEFAULT, ROOM, OwnPart, own_parts


def name_of(own: OwnPart) -> str:
    """Return the path of the layer or stack, `cross.` in cross-attention, and the part: `….layer.0.lora_query.A`."""
    host = own.room.rpartition(".")[0]
    return ".".join(part for part in (host, "cross" if own.cross else "", own.part.name) if part)


def parts(model: nn.Module, kind: str = "") -> dict[str, Tensor]:
    """Return every part, or all parts of one kind, as views without gradient. The views may be written to."""
    return {name_of(own): own.tensor for own in own_parts(model) if kind in ("", own.part.kind)}


def gradients_of_parts(model: nn.Module) -> dict[str, Tensor | None]:
    """Return the gradient of every part, or None if its parameter has no gradient."""
    return {
        name_of(own): None if own.parameter.grad is None else own.part.of(own.parameter.grad)
        for own in own_parts(model)
    }


def parts_in(added: nn.Module) -> dict[str, Tensor]:
    """Return the parts of one set, except those of its cross-attention: `lora_query.A`, `gate.adapter.weight`."""
    return {
        part.name: part.of(module.get_parameter(part.parameter).detach())
        for path, module in added.named_modules()
        if path.partition(".")[0] != "cross"
        for part in getattr(module, "parts", ())
    }


def added_at(host: Any, name: str = DEFAULT) -> Any:
    """Return the set that computes at a host: that of its layer, or of the layer's cross-attention."""
    return host.unipelt_port.part(name)


def fill(model: nn.Module, end: str, value: float) -> int:
    """Set every part whose name ends with `end` to a number. Return the number of these parts."""
    found = [tensor for name, tensor in parts(model).items() if name.endswith(end)]
    for tensor in found:
        tensor.fill_(value)
    return len(found)


def added_to(layer: Any, name: str = DEFAULT) -> Any:
    """Return the set of a layer or of a stack."""
    return layer._modules[ROOM][name]


def entries(model: nn.Module) -> list[Entry]:
    """Return every entry of a model."""
    return [module for module in model.modules() if isinstance(module, Entry)]


def is_idle(passes: Passes) -> bool:
    """Return whether no pass leaves anything in `passes`, by a weak or a strong reference."""
    if passes._latest is not None and passes._latest() is not None:
        return False
    return not (passes._by_thread or passes._recomputed or passes._rows or passes._traced)
