"""Weight-decomposed low-rank updates of a projection.

Shapes: B examples, T tokens, I what the projection is given, O its outputs that are meant, r rank.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from unipelt.config.methods import LoRAConfig
from unipelt.submodules.register import MODULES, TargetInfo


class DoRA(nn.Module):
    """`W' x + b` with `W' = m (W + s B A) / |W + s B A|`, length and direction apart (Liu et al., 2024, equation 5).

    The length of a row counts as a constant in the backward pass (section 4.3 there). `A` starts Kaiming-uniform with
    a = sqrt(5), `B` at zero and `m` at the lengths of W's rows, so the term starts at zero. With dropout, what A
    reads is dropped while training: `m / |W + s B A| (W x + s B A dropout(x)) + b`.

    Attributes:
        A: (r, I).
        B: (O, r).
        magnitude: (O,), m.
        spot: where W is.
    """

    def __init__(self, config: LoRAConfig, spot: TargetInfo) -> None:
        super().__init__()
        like = spot.weight
        self.A = nn.Parameter(like.new_empty(config.rank, spot.inputs))
        self.B = nn.Parameter(like.new_zeros(spot.outputs, config.rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.magnitude = nn.Parameter(spot.matrix().detach().norm(dim=1).to(like))
        self.spot = replace(spot, weight=like.new_empty(0))  # where W is, and not a copy of it
        self.scale = config.scale
        self.dropout = config.dropout

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The term, (B, T, O)."""
        if self.dropout:
            x = nn.functional.dropout(x, self.dropout, self.training)
        low = self.scale * nn.functional.linear(nn.functional.linear(x, self.A), self.B)
        with torch.no_grad():
            length = (self.spot.matrix() + self.scale * self.B @ self.A).norm(dim=1)
        factor = self.magnitude / length
        bias = self.spot.bias()
        plain = y if bias is None else y - bias
        return (factor - 1) * plain + factor * low

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the updated projection W', (O, I), and its bias as it is."""
        updated = weight + self.scale * (self.B.detach() @ self.A.detach()).to(weight)
        return self.magnitude.detach().to(weight)[:, None] * updated / updated.norm(dim=1, keepdim=True), bias


MODULES[LoRAConfig] = DoRA
