"""Low-rank updates of a projection.

Shapes: B examples, T tokens, I inputs, O outputs that are meant, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unipelt.config.methods import LoRAConfig
from unipelt.submodules.entry import Part
from unipelt.submodules.forward_pass import AttentionPass
from unipelt.submodules.outputs import OutputSlice
from unipelt.submodules.term import Term, flat_like, require

SMALL = 1 << 14
"""Numbers of an output up to which fewer calls are faster than fewer passes over memory."""
FROZEN_FACTORS = ("A0", "B0")
"""Names of a term's parameters that never train."""


class LoRA(Term):
    """The low-rank term of a projection: `W x + b + s * B A x` (Hu et al., 2022; paper, section 2.2).

    `s = alpha / r`; a gate REPLACES that scale (paper, section 3.2), or with the gating `multiply` is a factor of it:
    `W x + b + g s B A x`. `A` starts Kaiming-uniform with a = sqrt(5), `B` at zero, so the term starts at zero.

    With the start `pissa` the term is `s * (B A - B0 A0) x`, and A and B start at A0 and B0, the principal part of W:
    `s B0 A0` is the best approximation of W of rank r, by its largest singular values (Meng et al., 2024, equations 2
    to 4, where the frozen weight is `W - s B0 A0`; here W stays, so that the checkpoint of the base still fits).
    With a gate that replaces s, `B0 A0` is that approximation, and the gate leads from W (0) to `W - B0 A0 + B A` (1).

    A gate that is computed from x shares its product with A: then an entry holds A's rows, of this term or of the
    layer's attention, and the term has no parameter A. Not so with dropout: while training, x is dropped before A (and
    A0), and never before the gate.

    Attributes:
        A: (r, I); absent where an entry holds it.
        B: (O, r).
        A0, B0: where A and B started, frozen; absent where that is zero.
        in_entry: whether the entry of the layer's attention holds A.
        scale: the factor without a gate.
        gated_scale: the factor beside a gate.
        dropout: the probability that a number of x is zero before A, while training.
    """

    folds_to = "merged"
    A: nn.Parameter
    A0: nn.Parameter
    B0: nn.Parameter

    def __init__(self, name: str, outputs: OutputSlice, config: LoRAConfig) -> None:
        super().__init__(name, "lora", outputs)
        self.scale = config.scale
        self.gated_scale = config.gated_scale
        self.dropout = config.dropout
        self.in_entry = False

    def set_up(self, down: Tensor, like: Tensor, *, has_start: bool, keep_down: bool) -> None:
        """Make the parameters.

        Args:
            down: (r, I), the start of A.
            like: a tensor of the type and on the device of the parameters.
            has_start: whether A and B are to start elsewhere than at zero.
            keep_down: whether A is a parameter of this module.
        """
        if keep_down:
            self.A = nn.Parameter(down)
        self.B = nn.Parameter(torch.zeros(self.outputs.count, len(down), dtype=like.dtype, device=like.device))
        if has_start:
            self.A0 = nn.Parameter(down.detach().clone(), requires_grad=False)
            self.B0 = nn.Parameter(self.B.detach().clone(), requires_grad=False)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The named parts of the term's own parameters, those of its entry apart."""
        return tuple(
            Part(f"{self.name}.{name}", "lora", name, frozen=name in FROZEN_FACTORS) for name in self._parameters
        )

    @staticmethod
    def initial_down(inputs: int, config: LoRAConfig, like: Tensor) -> Tensor:
        """Draw the start of A: (r, I)."""
        down = torch.empty(config.rank, inputs, dtype=like.dtype, device=like.device)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        return down

    @torch.no_grad()
    def start(self, weight: Tensor, gated: bool) -> None:
        """Start as the principal part of a weight.

        Args:
            weight: W, (O, I).
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

    def open_gate(self, x: Tensor, now: AttentionPass | None) -> tuple[Tensor | None, Tensor | None]:
        """Return the gate and `A x`; the gate is None where `A x` carries it already."""
        if self.in_entry:
            return None, require(now, self.name).low[self.gate_name]
        return super().open_gate(x, now)

    def forward(self, x: Tensor, out: Tensor, now: AttentionPass | None) -> Tensor:
        """Return the projection with its term, (B, T, all outputs), for what it gave, (B, T, all outputs)."""
        if self.once and self.gate_name:
            if self.name in require(now, self.name).served:
                return out
            require(now, self.name).served.add(self.name)
        gate, low = self.open_gate(x, now)
        held: Any = self._parameters  # looked up here, since an attribute of a module costs a call
        start, up = held.get("A0"), held["B"]
        if start is not None:
            up = torch.cat([up, -held["B0"]], dim=1)
        if low is None:
            down = held["A"] if start is None else torch.cat([held["A"], start])
            if self.dropout:
                x = nn.functional.dropout(x, self.dropout, self.training)
            low = nn.functional.linear(x.to(down.dtype), down)
        if gate is not None:
            low = low * flat_like(gate, x)
        scale = self.gated_scale if self.gate_name else self.scale
        if self.count == out.shape[-1]:
            if low.dtype == out.dtype == up.dtype and not is_small(out):
                both = torch.addmm(out.flatten(0, -2), low.flatten(0, -2), up.t(), alpha=scale)
                return both.view(out.shape)
            return torch.add(out, nn.functional.linear(low.to(up.dtype), up).to(out.dtype), alpha=scale)
        update = nn.functional.linear(low.to(up.dtype), up).to(out.dtype)
        rest = out.shape[-1] // self.outputs.groups - self.outputs.start - self.outputs.size
        groups = update.unflatten(-1, (self.outputs.groups, self.outputs.size))
        update = nn.functional.pad(groups, (self.outputs.start, rest)).flatten(-2)
        return torch.add(out, update, alpha=scale)

    def extra_repr(self) -> str:
        """Describe the module for `print(model)`."""
        return ", ".join(part for part in (f"rank={self.B.shape[1]}", super().extra_repr()) if part)


def is_small(out: Tensor) -> bool:
    """Return whether a tensor is so small that calls cost more than numbers, as in decoding token by token."""
    return not torch.compiler.is_compiling() and not torch.is_grad_enabled() and out.numel() <= SMALL


def low_rank_factors(parts: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return all that a term adds as one product, (R, I) and (O, R): `B A - B0 A0 = [B, -B0] [A; A0]`.

    Args:
        parts: A, B and, with a start, A0 and B0, by name. R is r, or 2 r with a start.
    """
    if "A0" not in parts:
        return parts["A"], parts["B"]
    return torch.cat([parts["A"], parts["A0"]]), torch.cat([parts["B"], -parts["B0"]], dim=1)
