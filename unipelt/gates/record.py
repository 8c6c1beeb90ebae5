"""Record the values of gates inside a `record_gates` block.

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
    """Gate values by name: `adapter`, `prefix`, `lora_query`, `lora_value` and others, for the gates of the model.

    In an encoder-decoder model, the decoder's gates have the names `decoder.adapter` and so on; the gates of its
    cross-attention have the names `cross.prefix` and so on. The gate of a prompt, `prompt`, belongs to no layer and has
    one column; a pass that reads the prompt from a cache does not compute this gate, and adds no row.

    `record["adapter"]` is (E, N), on the model's device: one row for each example, in the order in which the model saw
    them, and one column for each layer that carries the gate (for each pass through the layer, where layers are
    shared). For a gate with one value per token, the mean over the tokens of the pass is recorded.
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
        detach: record values without their graphs. With False, a loss can be computed from the values
            (`gate_penalty`). This needs a model without gradient checkpointing: the second computation of a layer is
            not recorded.

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
        if output is None:  # a failed pass adds no row
            record._drop()

    def keep(names: tuple[str, ...], module: nn.Module, args: Any, output: Tensor) -> None:
        if inside:
            # some layers flatten batch and tokens into one dimension
            record._add(names, output if output.dim() == 3 else output.unflatten(0, (batch, -1)))

    handles = [
        model.register_forward_pre_hook(enter, prepend=True, with_kwargs=True),  # before the hook of a prompt
        model.register_forward_hook(leave, always_call=True),
        *(module.register_forward_hook(partial(keep, module.names)) for module in modules),
    ]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def gate_penalty(record: GateRecord, kind: Literal["entropy", "sparsity"]) -> Tensor:
    """Compute a penalty on gates, to be weighted by the caller and added to the loss.

        with unipelt.record_gates(model, detach=False) as gates:
            loss = model(**batch).loss
        (loss + 0.01 * unipelt.gate_penalty(gates, "entropy")).backward()

    Args:
        record: a record of at least one pass, with `detach=False`.
        kind: `entropy`, the mean of `-g log g - (1 - g) log(1 - g)` over gates, layers and examples: at most log 2, and
            smallest where gates are 0 or 1. `sparsity`, the mean of |g|.

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
