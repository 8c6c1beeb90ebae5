"""Low-rank updates of a projection.

Shapes: B examples, T tokens, I inputs, O outputs that belong to the projection, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unipelt.config.parts import LoRAConfig
from unipelt.submodules.entry import Part
from unipelt.submodules.forward_pass import AttentionPass
from unipelt.submodules.outputs import OutputSlice
from unipelt.submodules.term import Term, flat_like, require

SMALL = 1 << 14
"""The largest number of output elements for which fewer calls save more time than fewer passes over memory."""
FROZEN_FACTORS = ("A0", "B0")
"""The names of a term's frozen parameters."""


class LoRA(Term):
    """The low-rank term of a projection: `W x + b + s * B A x` (Hu et al., 2022; paper, section 2.2).

    The scale is `s = alpha / r`, or `s = alpha / sqrt(r)` with the scaling `rank_stabilised`. With the gating
    `replace`, a gate REPLACES the scale (paper, section 3.2). With the gating `multiply`, the gate multiplies the
    scale: `W x + b + g s B A x`. `A` starts Kaiming-uniform with a = sqrt(5) and `B` starts at zero, so the term
    starts at zero.

    With the start `pissa` the term is `s * (B A - B0 A0) x`. A and B start at A0 and B0, the principal part of W:
    `s B0 A0` is the best approximation of W of rank r, from the largest singular values (Meng et al., 2024, equations
    2 to 4). In that paper the frozen weight is `W - s B0 A0`. Here W is not changed, so the checkpoint of the base
    model still fits. With a gate that replaces s, `B0 A0` is the approximation, and the weight is W for a gate of 0
    and `W - B0 A0 + B A` for a gate of 1.

    A gate that reads x shares one matrix product with A. Then an entry, of this term or of the layer's attention, holds
    the rows of A, and the term has no parameter A. With dropout the product is not shared: in training, x is dropped
    before A (and A0), but never before the gate.

    Attributes:
        A: (r, I); absent if an entry holds A.
        B: (O, r).
        A0, B0: the frozen initial values of A and B, (r, I) and (O, r); absent without the start `pissa`.
        in_entry: whether the entry of the layer's attention holds A.
        scale: the factor of `B A x` without a gate.
        gated_scale: the factor of `g B A x` with a gate.
        dropout: the probability that an element of x is zero before A, in training.
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
        """Create the parameters.

        Args:
            down: (r, I), the initial value of A.
            like: a tensor with the type and the device of the parameters.
            has_start: whether to create A0 and B0, for a term that starts at a part of W.
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
        """The named parts of the term's own parameters, without those of the entry."""
        return tuple(
            Part(f"{self.name}.{name}", "lora", name, frozen=name in FROZEN_FACTORS) for name in self._parameters
        )

    @staticmethod
    def initial_down(inputs: int, config: LoRAConfig, like: Tensor) -> Tensor:
        """Draw the initial value of A, (r, I)."""
        down = torch.empty(config.rank, inputs, dtype=like.dtype, device=like.device)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        return down

    @torch.no_grad()
    def start(self, weight: Tensor, gated: bool) -> None:
        """Set A, B, A0 and B0 to the principal part of a weight.

        Args:
            weight: W, (O, I).
            gated: whether the term has a gate, so that the factor is `gated_scale`.
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
        """Return the gate, (B, 1 or T, 1), and `A x`, (B, T, r).

        The gate is None if the term has no gate, or if the second value is already `g A x`. The second value is None
        if the term itself computes `A x`.
        """
        if self.in_entry:
            return None, require(now, self.name).low[self.gate_name]
        return super().open_gate(x, now)

    def forward(self, x: Tensor, out: Tensor, now: AttentionPass | None) -> Tensor:
        """Add the term to the projection's output.

        Args:
            x: (B, T, I), the projection's input.
            out: (B, T, all outputs), the projection's output.
            now: the pass of the layer's attention; None outside of a pass.

        Returns:
            (B, T, all outputs).
        """
        if self.once and self.gate_name:
            if self.name in require(now, self.name).served:
                return out
            require(now, self.name).served.add(self.name)
        gate, low = self.open_gate(x, now)
        gate = self.drop_from(gate, x, now)
        held: Any = self._parameters  # faster than attributes, for which PyTorch calls __getattr__
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
    """Return whether a tensor has so few elements that calls take most of the time, as in token-by-token decoding."""
    return not torch.compiler.is_compiling() and not torch.is_grad_enabled() and out.numel() <= SMALL


def low_rank_factors(parts: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return a term's update as the two factors of one product: `B A - B0 A0 = [B, -B0] [A; A0]`.

    Args:
        parts: A, B and, with the start `pissa`, A0 and B0, by name.

    Returns:
        The right factor (R, I) and the left factor (O, R). R is r, or 2 r with A0 and B0.
    """
    if "A0" not in parts:
        return parts["A"], parts["B"]
    return torch.cat([parts["A"], parts["A0"]]), torch.cat([parts["B"], -parts["B0"]], dim=1)
