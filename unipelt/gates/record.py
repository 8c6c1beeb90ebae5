"""Recording gates: nothing is recorded outside a `record_gates` block.

Shapes: B examples of a batch, E examples of all batches, N layers that carry the gate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unipelt.submodules.gate import Gates


class GateRecord(Mapping[str, Tensor]):
    """Gate values by name: `adapter`, `prefix`, `lora_query`, `lora_value`, as far as the model has them.

    Behind an encoder, a decoder's are called `decoder.adapter` and so on; those of its attention to the encoder are
    called `cross.prefix` and so on. A prompt's, `prompt`, belongs to no layer and is one column; passes that find the
    prompt in a cache do not compute it, and have no row.

    `record["adapter"]` is (E, N), on the model's device: a row for each example in the order that the model saw
    them, a column for each layer that carries the gate (for each pass through it, where layers are shared). Of gates
    with a number a token, it is the mean over the tokens of the pass.
    """

    def __init__(self, names: tuple[str, ...], *, detach: bool = True) -> None:
        self._detach = detach
        self._calls: dict[str, list[list[Tensor]]] = {name: [] for name in names}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._calls:
            raise KeyError(f"this model has no gate {name!r}; it has {', '.join(self._calls) or 'none'}")
        calls = [layers for layers in self._calls[name] if layers]
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
        values = values.detach() if self._detach else values
        for name, value in zip(names, values.mean(dim=1).unbind(dim=-1), strict=True):
            self._calls[name][-1].append(value)


@contextmanager
def record_gates(model: nn.Module, *, detach: bool = True) -> Iterator[GateRecord]:
    """Record every gate of every forward pass of `model` inside the block.

    Args:
        model: an injected model with gates.
        detach: values without their graphs. With False a loss can be made of them (`gate_penalty`); without gradient
            checkpointing, whose second computation is not a pass of the model and is not recorded.

    Values stay on the model's device. Raises `ValueError` if the model has no gates.
    """
    modules = [module for module in model.modules() if isinstance(module, Gates)]
    if not modules:
        raise ValueError(f"this {type(model).__name__} has no gates to record; inject a gated method first")
    names = tuple(dict.fromkeys(name for module in modules for name in module.names))
    record = GateRecord(names, detach=detach)
    inside = False
    batch = 1

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal inside, batch
        inside = True
        batch = next((len(given) for given in (*args, *kwargs.values()) if isinstance(given, Tensor)), 1)
        record._start()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal inside
        inside = False
        if output is None:  # the pass failed half-way: it has no row
            record._drop()

    def keep(names: tuple[str, ...], module: nn.Module, args: Any, output: Tensor) -> None:
        if inside:
            # a layer may have put the tokens of all texts in one row
            record._add(names, output if output.dim() == 3 else output.unflatten(0, (batch, -1)))

    handles = [
        model.register_forward_pre_hook(enter, prepend=True, with_kwargs=True),  # a prompt may enter here too
        model.register_forward_hook(leave, always_call=True),
        *(module.register_forward_hook(partial(keep, module.names)) for module in modules),
    ]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def gate_penalty(record: GateRecord, kind: Literal["entropy", "sparsity"]) -> Tensor:
    """A number to add to the loss, times a weight of the caller's choice, so that gates decide or close.

        with unipelt.record_gates(model, detach=False) as gates:
            loss = model(**batch).loss
        (loss + 0.01 * unipelt.gate_penalty(gates, "entropy")).backward()

    Args:
        record: of at least one pass, with `detach=False`.
        kind: `entropy`, the mean of `-g log g - (1 - g) log(1 - g)` over gates, layers and examples, at most log 2, at
            its least where gates are 0 or 1; `sparsity`, the mean of |g|.

    Returns:
        A scalar. Raises `ValueError` for another kind, and for the entropy of gates that are not between 0 and 1.
    """
    if kind not in ("entropy", "sparsity"):
        raise ValueError(f"kind must be entropy or sparsity, not {kind!r}")
    gates = torch.cat([record[name].flatten() for name in record])
    if kind == "sparsity":
        return gates.abs().mean()
    if gates.min() < 0:
        raise ValueError("entropy is of gates between 0 and 1, and these are tanh's; take sparsity")
    inside = gates.clamp(1e-6, 1 - 1e-6)
    return -(inside * inside.log() + (1 - inside) * (1 - inside).log()).mean()
