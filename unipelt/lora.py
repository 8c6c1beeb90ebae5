"""Low-rank updates of a projection.

Shapes: B examples, T tokens, r rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unipelt.config import PROJECTIONS, LoRAConfig
from unipelt.gate import Gates, Slot, as_many_rows, product


@dataclass(frozen=True)
class Rows:
    """Which of a module's outputs are the projection's, where one module computes several.

    The outputs are cut into `groups` of equal size; in each, `size` of them from `start` on are meant.
    """

    groups: int
    start: int
    size: int

    @property
    def count(self) -> int:
        """How many outputs are meant."""
        return self.groups * self.size


class LoRA(nn.Module):
    """The low-rank term of a projection: `W x + b + s * B A x` (Hu et al., 2022; paper, section 2.2).

    `s = alpha / r`; a gate REPLACES that scale (paper, section 3.2). `A` starts Kaiming-uniform with a = sqrt(5), `B`
    at zero, so the term starts at zero.

    Attributes:
        A: (r, in_features).
        B: (rows.count, r).
        rows: which outputs the term is added to.
        low: brings `g A x` of the pass, (B, T, r), from the attention, which computes it in one product with its
            gates; None where the term has no gate of the attention's.
        gates: computes the gate from the projection's own input, where that is not the attention's; else None.
        tokens: brings the token weights of the pass to `gates`; None where they do without.
        gate: brings g alone, where the layer's attention computes it for all (`GateConfig.shared`); else None.
        crosses: whether x is of another text than the layer's own.
        skips_ungated_calls: the projection is also called for something that no gate belongs to; leave that alone.
    """

    def __init__(self, inputs: int, rows: Rows, config: LoRAConfig, like: Tensor, gates: Gates | None) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(config.rank, inputs, dtype=like.dtype, device=like.device))
        self.B = nn.Parameter(torch.zeros(rows.count, config.rank, dtype=like.dtype, device=like.device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.rows = rows
        self.scale = config.scale
        self.gates = gates
        self.low = Slot() if config.gate and gates is None else None
        self.tokens: Slot | None = None
        self.gate: Slot | None = None
        self.crosses = False
        self.skips_ungated_calls = False

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """The projection with its term.

        Args:
            x: (B, T, in_features), what the projection was given.
            out: (B, T, out_features), what it gave.

        Returns:
            (B, T, out_features).
        """
        slot = self.low or self.gate or self.tokens
        if self.skips_ungated_calls and slot is not None and slot.is_empty():
            return out
        scale = 1.0
        if self.low is not None:
            taken = self.low.take()
            assert taken is not None
            low = taken
        elif self.gate is not None:
            gate = self.gate.take()
            assert gate is not None
            low = nn.functional.linear(x, self.A) * as_many_rows(gate, x)
        elif self.gates is not None:
            weights = None if self.tokens is None else self.tokens.take()
            logits, low = product(x, self.gates, (self.A,), weights=weights)
            low = low * self.gates(logits, weights)
        else:
            low, scale = nn.functional.linear(x, self.A), self.scale
        if self.rows.count == out.shape[-1]:
            both = torch.addmm(out.flatten(0, -2), low.flatten(0, -2), self.B.t(), alpha=scale)
            return both.view(out.shape)
        update = nn.functional.linear(low, self.B)
        rest = out.shape[-1] // self.rows.groups - self.rows.start - self.rows.size
        groups = update.unflatten(-1, (self.rows.groups, self.rows.size))
        return torch.add(out, nn.functional.pad(groups, (self.rows.start, rest)).flatten(-2), alpha=scale)


NAMES = tuple(f"lora_{place}" for place in PROJECTIONS)
"""The attributes of a projection that hold its terms."""
ENTRY = NAMES[:2]
"""Those of queries and values, which read what the attention reads and take part in its one product."""


def add_low_rank(projection: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """Forward hook of a projection."""
    for name in NAMES:
        term = getattr(projection, name, None)
        if term is not None:
            out = term(args[0], out)
    return out
