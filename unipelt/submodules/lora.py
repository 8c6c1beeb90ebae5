"""Low-rank updates of a projection.

Shapes: B examples, T tokens, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unipelt.config.methods import PROJECTIONS, LoRAConfig
from unipelt.submodules.forward_pass import Slot
from unipelt.submodules.gate import Gates, as_many_rows, product
from unipelt.submodules.outputs import OutputSlice


class LoRA(nn.Module):
    """The low-rank term of a projection: `W x + b + s * B A x` (Hu et al., 2022; paper, section 2.2).

    `s = alpha / r`; a gate REPLACES that scale (paper, section 3.2), or with the gating `multiply` is a factor of it:
    `W x + b + g s B A x`. `A` starts Kaiming-uniform with a = sqrt(5), `B` at zero, so the term starts at zero.

    With the start `pissa` the term is `s * (B A - B0 A0) x`, and A and B start at A0 and B0, the principal part of W:
    `s B0 A0` is the best approximation of W of rank r, by its largest singular values (Meng et al., 2024, equations 2
    to 4, where the frozen weight is `W - s B0 A0`; here it stays W, so that the checkpoint of the base still fits).
    With a gate that replaces s, `B0 A0` is that approximation, and the gate leads from W (0) to `W - B0 A0 + B A` (1).

    Attributes:
        A: (r, in_features).
        B: (rows.count, r).
        starts: whether they start elsewhere than at zero;
        A0, B0: and where, frozen.
        rows: which outputs the term is added to.
        low: brings `g A x` of the pass, (B, T, r), from the attention, which computes it in one product with its
            gates; None where the term has no gate of the attention's.
        gates: computes the gate from the projection's own input, where that is not the attention's; else None.
        tokens: brings the token weights of the pass to `gates`; None where they do without.
        gate: brings g alone, where the layer's attention computes it for all (`GateConfig.shared`); else None.
        crosses: whether x is of another text than the layer's own.
        skips_ungated_calls: the projection is also called for something that no gate belongs to; leave that alone.
    """

    def __init__(self, inputs: int, rows: OutputSlice, config: LoRAConfig, like: Tensor, gates: Gates | None) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(config.rank, inputs, dtype=like.dtype, device=like.device))
        self.B = nn.Parameter(torch.zeros(rows.count, config.rank, dtype=like.dtype, device=like.device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.starts = config.start != "zero"
        if self.starts:
            self.A0 = nn.Parameter(self.A.detach().clone(), requires_grad=False)
            self.B0 = nn.Parameter(self.B.detach().clone(), requires_grad=False)
        self.rows = rows
        self.scale = config.scale
        self.gated_scale = config.gated_scale
        self.gates = gates
        self.low = Slot() if config.gate and gates is None else None
        self.tokens: Slot | None = None
        self.gate: Slot | None = None
        self.crosses = False
        self.skips_ungated_calls = False

    def pair(self) -> tuple[Tensor, Tensor]:
        """All that is added, as one product: (R, in_features) and (rows.count, R); R is r, or 2 r with a start."""
        if not self.starts:
            return self.A, self.B
        return low_rank_factors({"A": self.A, "B": self.B, "A0": self.A0, "B0": self.B0})

    @torch.no_grad()
    def start(self, weight: Tensor, gated: bool) -> None:
        """Start as the principal part of a weight.

        Args:
            weight: W, (rows.count, in_features).
            gated: whether a gate stands for the scale.
        """
        kind = torch.promote_types(weight.dtype, torch.float32)
        left, values, right = torch.linalg.svd(weight.detach().to(kind), full_matrices=False)
        rank = len(self.A)
        root = (values[:rank] / (self.gated_scale if gated else self.scale)).sqrt()
        for own, first, value in (
            (self.A, self.A0, root[:, None] * right[:rank]),
            (self.B, self.B0, left[:, :rank] * root),
        ):
            own.copy_(value)
            first.copy_(value)

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
        scale = self.gated_scale
        down, up = self.pair()
        if self.low is not None:
            taken = self.low.take()
            assert taken is not None
            low = taken
        elif self.gate is not None:
            gate = self.gate.take()
            assert gate is not None
            low = nn.functional.linear(x, down) * as_many_rows(gate, x)
        elif self.gates is not None:
            weights = None if self.tokens is None else self.tokens.take()
            logits, low = product(x, self.gates, (down,), weights=weights)
            low = low * self.gates(logits, weights)
        else:
            low, scale = nn.functional.linear(x, down), self.scale
        if self.rows.count == out.shape[-1]:
            both = torch.addmm(out.flatten(0, -2), low.flatten(0, -2), up.t(), alpha=scale)
            return both.view(out.shape)
        update = nn.functional.linear(low, up)
        rest = out.shape[-1] // self.rows.groups - self.rows.start - self.rows.size
        groups = update.unflatten(-1, (self.rows.groups, self.rows.size))
        return torch.add(out, nn.functional.pad(groups, (self.rows.start, rest)).flatten(-2), alpha=scale)


FROZEN_FACTORS = ("A0", "B0")
"""A term's parameters that never train."""


def low_rank_factors(parts: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """A and B of all that a term adds, from its parameters by their names: `B A - B0 A0 = [B, -B0] [A; A0]`."""
    if "A0" not in parts:
        return parts["A"], parts["B"]
    return torch.cat([parts["A"], parts["A0"]]), torch.cat([parts["B"], -parts["B0"]], dim=1)


LORA_ATTRIBUTES = tuple(f"lora_{place}" for place in PROJECTIONS)
"""The attributes of a projection that hold its terms."""
FUSED_WITH_GATES = LORA_ATTRIBUTES[:2]
"""Those of queries and values, which read what the attention reads and take part in its one product."""


def add_low_rank(projection: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """Forward hook of a projection."""
    for name in LORA_ATTRIBUTES:
        term = getattr(projection, name, None)
        if term is not None:
            out = term(args[0], out)
    return out
