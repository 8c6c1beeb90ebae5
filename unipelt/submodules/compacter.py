"""Compacter: adapters whose weights are sums of Kronecker products.

Shapes: B examples, T tokens, I inputs, O outputs (in `Compacter` the width of the place), n terms, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from unipelt.config.further import CompacterConfig
from unipelt.config.schema import ConfigError
from unipelt.submodules.bottleneck import ACTIVATIONS
from unipelt.submodules.register import TargetInfo, register_submodule

LEFT_STD = 0.01
"""Standard deviation of the initial left factors, as in the authors' release of Compacter."""


class KroneckerLinear(nn.Module):
    """A projection `x W + b` with `W = sum_i A_i (x) (S_i T_i)` (Karimi Mahabadi et al., 2021, equations 5 and 6).

    The input is multiplied by one factor after the other, so W, (I, O), is never computed.

    Attributes:
        shared: holds `left`, (n, n, n), the A_i.
        s: (n, I / n, r).
        t: (n, r, O / n).
        bias: (O,).
    """

    def __init__(self, inputs: int, outputs: int, rank: int, shared: Any) -> None:
        super().__init__()
        left = shared.left
        terms = len(left)
        self.shared = (shared,)
        self.s = nn.Parameter(left.new_empty(terms, inputs // terms, rank))
        self.t = nn.Parameter(left.new_empty(terms, rank, outputs // terms))
        self.bias = nn.Parameter(left.new_zeros(outputs))
        for factor in (self.s, self.t):
            nn.init.xavier_normal_(factor)

    def forward(self, x: Tensor) -> Tensor:
        """Return the projection of x: (B, T, I) -> (B, T, O)."""
        left = self.shared[0]()["left"]
        parts = x.unflatten(-1, (len(left), -1))  # (B, T, n, I / n): x (A (x) C) = A^T parts C, row by row
        low = torch.einsum("...ap,ipr->...air", parts, self.s)
        mixed = torch.einsum("...air,iab->...bir", low, left)
        return torch.einsum("...bir,iro->...bo", mixed, self.t).flatten(-2) + self.bias


class Compacter(nn.Module):
    """An adapter `y + up(f(down(y)))` whose two projections are sums of Kronecker products.

    Source: Karimi Mahabadi et al., 2021, section 3.3.
    """

    def __init__(self, config: CompacterConfig, spot: TargetInfo) -> None:
        super().__init__()
        if spot.outputs % config.terms:
            raise ConfigError(f"compacter.terms must divide the width of its place, {spot.outputs}: {config.terms} not")
        shared: Any = spot.shared
        if not hasattr(shared, "left"):
            size = (config.terms,) * 3
            shared.left = nn.Parameter(spot.weight.new_empty(size).normal_(std=LEFT_STD))
        self.down = KroneckerLinear(spot.outputs, config.bottleneck, config.rank, shared)
        self.up = KroneckerLinear(config.bottleneck, spot.outputs, config.rank, shared)
        self.activation = config.activation

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the term, (B, T, O)."""
        return self.up(ACTIVATIONS[self.activation](self.down(y)))


register_submodule("compacter", CompacterConfig, Compacter)
