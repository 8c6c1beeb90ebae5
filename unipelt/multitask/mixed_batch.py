"""Run one pass of a frozen base over rows of several tasks: the base computes all rows, each set the rows of its task.

Each task has its own model over the same base (`unipelt.multitask.tasks`), with a set in its rooms. The shared base is
a further model. Its rooms hold the sets of all tasks, which are the same modules, under the tasks' names. The hooks of
injected models apply to each row the set of its task.

Shapes: B rows of all tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unipelt.injection.attach import room_of
from unipelt.injection.hooks import hook, put
from unipelt.injection.wire import wire_layer, wire_stack
from unipelt.submodules.forward_pass import Passes, SetRows
from unipelt.submodules.mixture import Mixture
from unipelt.submodules.prompt import Prompt
from unipelt.submodules.room import DEFAULT, SubmoduleSet, layer_sets, rooms
from unipelt.submodules.token_rows import TokenRows


@dataclass
class OwnModules:
    """A record on a module of the shared base for which tasks have separate parameters.

    Attributes:
        modules: the module of each such task, by the task's name.
        passes: the passes of the shared base, with the tasks of their rows.
    """

    modules: Mapping[str, nn.Module]
    passes: Passes


def find_unmixable(base: nn.Module, model: nn.Module) -> str | None:
    """Return the reason why rows of this task's model cannot be in one batch with another task's rows, or None.

    Args:
        base: the base, without submodules.
        model: the same base with the task's set.
    """
    if any(isinstance(module, Prompt) for module in model.modules()):
        return "its prompt makes its texts longer, and a batch has texts of one length"
    if any(isinstance(module, TokenRows) for module in model.modules()):
        return "it has trained embeddings of tokens, and a batch is embedded once for all tasks"
    if any(isinstance(module, Mixture) and module.config.balance for module in model.modules()):
        return "its load-balancing loss belongs to the tokens of one task"
    for _, layer, part in layer_sets(model):
        if any(term.once for term in part.terms.values()):
            return (
                "its attention also projects relative positions, one table for all rows of a batch, and what is added "
                "to that projection is the task's own"
            )
        if part.wiring.lengthens:
            attention = layer.get_submodule(part.wiring.attention)
            return f"{type(attention).__name__} takes a prefix as a longer text, and a batch has texts of one length"
    for path, module in base.named_modules():
        if any(module.children()) and _differs(module, model.get_submodule(path)):
            return f"{path} has parameters of the task's own beside its parts"
    return None


def furnish(base: nn.Module, models: Mapping[str, nn.Module]) -> Passes:
    """Put the sets of all tasks into the rooms of a shared base.

    Args:
        base: the base, without submodules.
        models: the same base of each task, with the task's set; none of them unmixable.

    Returns:
        The passes of the base; `Passes.rows` sets the tasks of their rows.
    """
    passes = Passes()
    for task, model in models.items():
        for path, room in rooms(model):
            added = room.present(DEFAULT)
            host: Any = base.get_submodule(path.rpartition(".")[0])
            room_of(host, passes)[task] = added
            if isinstance(added, SubmoduleSet):
                wire_layer(host, added)
            else:
                wire_stack(host, _layer_of(model, path, base))
    for module in base.modules():
        if getattr(module, "chunk_size_feed_forward", None):
            module.chunk_size_feed_forward = 0  # type: ignore[assignment] # a gate averages over a whole text
    return passes


def route_own(shared: nn.Module, models: Mapping[str, nn.Module], passes: Passes) -> None:
    """Make the modules of a shared model compute the rows of tasks that have separate parameters there, such as heads.

    Args:
        shared: the shared model, with its head.
        models: the model of each task.
        passes: the passes of the shared base.
    """
    for path, host in list(shared.named_modules()):
        own = {task: mine for task, model in models.items() if _differs(host, mine := _at(model, path))}
        if own:
            target: Any = host
            target.unipelt_own_modules = OwnModules(own, passes)
            put(target, compute_own)


def _layer_of(model: nn.Module, room: str, base: nn.Module) -> nn.Module:
    """Return the layer of the shared base that belongs to the room of a stack."""
    owner: Any = model.get_submodule(room.rpartition(".")[0])
    path = next(path for path, module in model.named_modules() if module is owner.unipelt_layer[0])
    return base.get_submodule(path)


def _at(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:  # inside a room of the shared base
        return nn.Module()


def _differs(host: nn.Module, own: nn.Module) -> bool:
    return any(own._parameters.get(name, parameter) is not parameter for name, parameter in host._parameters.items())


@hook("output")
def compute_own(host: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
    """Compute the rows of tasks that have separate parameters here with their own modules; None without such rows.

    Args:
        host: a module of the shared base.
        args: the module's inputs; the first is a tensor of B rows.
        output: the output of the module for all B rows.
    """
    own: OwnModules = host.unipelt_own_modules
    rows: SetRows | None = own.passes.given_rows()
    if rows is None or not any(name in own.modules for name in rows.names):
        return None
    pieces = zip(rows.names, rows.split(args[0]), rows.split(output), strict=True)
    return torch.cat(
        [
            own.modules[name](given) if name is not None and name in own.modules else piece
            for name, given, piece in pieces
        ]
    )
