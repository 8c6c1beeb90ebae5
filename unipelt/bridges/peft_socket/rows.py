"""Support `adapter_names=`: each row of a batch is computed with the set of its name.

Shapes: B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from unipelt.bridges.peft_socket.heads import wrappers
from unipelt.bridges.peft_socket.room import PeftRoom
from unipelt.files.messages import suggest
from unipelt.submodules.forward_pass import SetRows
from unipelt.submodules.room import StackSet, SubmoduleSet, rooms

BASE = "__base__"
"""PEFT's name for the base without a set."""


@contextmanager
def row_by_row(model: nn.Module, names: Sequence[str], options: dict[str, Any]) -> Iterator[Tensor | None]:
    """Compute each row of the model's passes inside the block with its own set.

    Rows of one set are computed together. If they are not contiguous in the batch, the caller sorts the inputs by the
    yielded order, and puts the outputs back.

    Args:
        model: the model inside the `PeftModel`.
        names: the name of a set, or `__base__`, for each of B rows.
        options: the other arguments of the call; `num_beams` is read.

    Yields:
        (B,), the order in which the rows are computed; None if it is the order of the batch.

    Raises:
        ValueError: a name is not known, or a set cannot be in one batch with others.
    """
    held = [room for _, room in rooms(model) if isinstance(room, PeftRoom)]
    known = {name for room in held for name in room}
    if unknown := sorted(set(names) - known - {BASE}):
        meant = suggest(unknown[0], sorted(known), f"there are {', '.join(sorted(known))}")
        raise ValueError(f"there is no set {unknown[0]!r}; {meant}")
    if problem := _find_unmixable(held, set(names)):
        raise ValueError(problem)
    first = {name: place for place, name in reversed(list(enumerate(names)))}
    order = sorted(range(len(names)), key=lambda row: first[names[row]])
    in_order = order == list(range(len(names)))
    ordered = [names[row] for row in order]
    groups = [(name, len(list(same))) for name, same in groupby(ordered)]
    rows = SetRows(tuple(None if name == BASE else name for name, _ in groups), tuple(count for _, count in groups))
    beams = options.get("num_beams") or 1
    index = None if in_order else torch.tensor(order)
    with ExitStack() as stack:
        for passes in {id(room.passes): room.passes for room in held}.values():
            stack.enter_context(passes.rows(rows))
        for _, wrapper in wrappers(model):
            hook = partial(_name_rows, names=[name for name in ordered for _ in range(beams)])
            stack.callback(wrapper.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield index


def _find_unmixable(held: list[PeftRoom], names: set[str]) -> str | None:
    """Return the reason why sets of these names cannot be in one batch with others, or None."""
    for room in held:
        for name in names & set(room):
            added = room[name]
            if isinstance(added, StackSet) and "prompt" in added._modules:
                return f"the prompt of {name!r} makes its texts longer, and a batch has texts of one length"
            for part in added.attentions() if isinstance(added, SubmoduleSet) else ():
                if part.wiring.lengthens:
                    return f"the prefix of {name!r} makes its texts longer here, and a batch has texts of one length"
                if any(term.once for term in part.terms.values()):
                    return f"{name!r} changes a projection that also serves relative positions, one table for all rows"
    return None


def _name_rows(wrapper: Any, args: Any, kwargs: dict[str, Any], names: list[str]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}


def sort_given(value: Any, size: int, order: Tensor) -> Any:
    """Return an argument of a call with its rows sorted: a tensor of B rows, or a container of such tensors."""
    if isinstance(value, Tensor):
        return value.index_select(0, order.to(value.device)) if value.dim() and len(value) == size else value
    if isinstance(value, ModelOutput):
        return type(value)(**{name: sort_given(inner, size, order) for name, inner in value.items()})
    if type(value) in (tuple, list):
        return type(value)(sort_given(inner, size, order) for inner in value)
    return value


def put_back(value: Any, size: int, order: Tensor) -> Any:
    """Return an output with its rows in the order of the batch; several outputs of one row stay together."""
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))

    def restore(tensor: Tensor) -> Tensor:
        times, rest = divmod(len(tensor), size) if tensor.dim() else (0, 1)
        if rest or not times:
            return tensor
        return tensor.unflatten(0, (size, times)).index_select(0, back.to(tensor.device)).flatten(0, 1)

    if isinstance(value, Tensor):
        return restore(value)
    if isinstance(value, ModelOutput):
        return type(value)(**{name: put_back(inner, size, order) for name, inner in value.items()})
    if type(value) in (tuple, list):
        return type(value)(put_back(inner, size, order) for inner in value)
    return value
