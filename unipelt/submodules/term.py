"""Further submodules: each is a function whose result is added to what a part of a layer gives.

Shapes: B examples, T tokens, I what the place is given, O what it gives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from unipelt.submodules.forward_pass import Slot
from unipelt.submodules.gate import Gates, as_many_rows, product
from unipelt.submodules.outputs import OutputSlice


class Term(nn.Module):
    """A submodule at one place: `y + g f(x, y)`; g = 1 without a gate.

    Attributes:
        name: of the submodule.
        function: computes the term f(x, y), (B, T, O), from x (B, T, I) and y (B, T, O).
        rows: which outputs of the host are y, where it computes several.
        gates: computes g from x; None without a gate.
        tokens: brings the token weights of the pass; None where the gate does without.
        gate: brings g, where the layer's attention computes it for all (`GateConfig.shared`); else None.
        source: brings x, where it is not what the host is given; else None.
        crosses: whether x is of another text than the layer's own.
        skips_ungated_calls: the host is also called for something that no gate belongs to; leave that alone.
    """

    def __init__(
        self,
        name: str,
        function: nn.Module,
        rows: OutputSlice,
        gates: Gates | None,
        tokens: Slot | None,
        source: Slot | None,
    ) -> None:
        super().__init__()
        self.name = name
        self.function = function
        self.rows = rows
        self.gates = gates
        self.tokens = tokens
        self.gate: Slot | None = None
        self.source = source
        self.crosses = False
        self.skips_ungated_calls = False

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """What the host gave, with the term.

        Args:
            x: (B, T, I), what the host was given.
            out: (B, T, all outputs of the host).
        """
        if self.source is not None:
            taken = self.source.take()
            assert taken is not None
            x = taken
        if self.rows.count == out.shape[-1]:
            return self._add(x, out)
        groups = out.unflatten(-1, (self.rows.groups, -1))
        size = groups.shape[-1]
        before, own, after = groups.split(
            (self.rows.start, self.rows.size, size - self.rows.start - self.rows.size), dim=-1
        )
        own = self._add(x, own.flatten(-2)).unflatten(-1, (self.rows.groups, self.rows.size))
        return torch.cat([before, own, after], dim=-1).flatten(-2)

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        if self.gate is not None:
            gate = self.gate.take()
            assert gate is not None
        elif self.gates is not None:
            weights = None if self.tokens is None else self.tokens.take()
            gate = self.gates(product(x, self.gates, weights=weights)[0], weights)
        else:
            return y + self.function(x, y)
        return torch.addcmul(y, as_many_rows(gate, y), self.function(x, y))

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return self.name


def add_terms(host: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """Forward hook of a projection: its terms, in the order in which they were put there."""
    for name in host.unipelt_terms:
        term = getattr(host, name)
        slot = term.gate or term.tokens
        if term.skips_ungated_calls and slot is not None and slot.is_empty():
            continue
        out = term(args[0], out)
    return out


def add_to_input(host: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Forward pre-hook of a projection: the terms of what it is given."""
    x = args[0]
    for name in host.unipelt_inputs:
        x = getattr(host, name)(x, x)
    return (x, *args[1:])


def hand_on(host: Any, args: tuple[Tensor, ...]) -> None:
    """Forward pre-hook of a projection whose input terms elsewhere read."""
    for slot in host.unipelt_readers:
        slot.put(args[0])
