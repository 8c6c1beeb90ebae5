"""Recording gates: nothing is recorded outside a `record_gates` block.

Shapes: B examples of a batch, E examples of all batches, N layers that carry the gate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from unipelt.gate import Gates


class GateRecord(Mapping[str, Tensor]):
    """Gate values by name: `adapter`, `prefix`, `lora_query`, `lora_value`, as far as the model has them.

    `record["adapter"]` is (E, N), on the model's device: a row for each example in the order that the model saw
    them, a column for each layer that carries the gate.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self._calls: dict[str, list[list[Tensor]]] = {name: [] for name in names}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._calls:
            raise KeyError(f"this model has no gate {name!r}; it has {', '.join(self._calls) or 'none'}")
        calls = self._calls[name]
        if not calls:
            raise KeyError(f"no gate {name!r} was recorded yet: call the model inside the record_gates block")
        return torch.cat([torch.stack(layers, dim=1) for layers in calls])

    def __iter__(self) -> Iterator[str]:
        return iter(self._calls)

    def __len__(self) -> int:
        return len(self._calls)

    def _start(self) -> None:
        for calls in self._calls.values():
            calls.append([])

    def _drop(self) -> None:
        for calls in self._calls.values():
            calls.pop()

    def _add(self, names: tuple[str, ...], values: Tensor) -> None:
        for name, value in zip(names, values.detach().unbind(dim=1), strict=True):
            self._calls[name][-1].append(value)


@contextmanager
def record_gates(model: nn.Module) -> Iterator[GateRecord]:
    """Record every gate of every forward pass of `model` inside the block.

    Values stay on the model's device, detached. The recomputation of gradient checkpointing is not a pass of the
    model and is not recorded. Raises `ValueError` if the model has no gates.
    """
    modules = [module for module in model.modules() if isinstance(module, Gates)]
    if not modules:
        raise ValueError(f"this {type(model).__name__} has no gates to record; inject a gated method first")
    record = GateRecord(tuple(dict.fromkeys(name for module in modules for name in module.names)))
    inside = False

    def enter(module: nn.Module, args: Any) -> None:
        nonlocal inside
        inside = True
        record._start()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal inside
        inside = False
        if output is None:  # the pass failed half-way: it has no row
            record._drop()

    def keep(names: tuple[str, ...], module: nn.Module, args: Any, output: Tensor) -> None:
        if inside:
            record._add(names, output)

    handles = [
        model.register_forward_pre_hook(enter),
        model.register_forward_hook(leave, always_call=True),
        *(module.register_forward_hook(partial(keep, module.names)) for module in modules),
    ]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
