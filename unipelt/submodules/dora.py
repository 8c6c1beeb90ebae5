"""Weight-decomposed low-rank updates of a projection.

Shapes: B examples, T tokens, I inputs of the projection, O outputs that belong to the place, r rank.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from unipelt.config.parts import LoRAConfig
from unipelt.submodules.register import TargetInfo


class DoRA(nn.Module):
    """DoRA: `W' x + b` with `W' = m (W + s B A) / |W + s B A|` (Liu et al., 2024, equation 5).

    The parameter m holds the length of each row, and `W + s B A` gives its direction. The norm of a row is a constant
    in the backward pass (section 4.3 of that paper). `A` starts Kaiming-uniform with a = sqrt(5), `B` starts at zero,
    and `m` starts at the norms of W's rows, so the term starts at zero. With dropout, the input of A is dropped in
    training: `m / |W + s B A| (W x + s B A dropout(x)) + b`.

    Attributes:
        A: (r, I).
        B: (O, r).
        magnitude: (O,), m.
        spot: the facts about the place, from which W is read.
    """

    def __init__(self, config: LoRAConfig, spot: TargetInfo) -> None:
        super().__init__()
        like = spot.weight
        self.A = nn.Parameter(like.new_empty(config.rank, spot.inputs))
        self.B = nn.Parameter(like.new_zeros(spot.outputs, config.rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.magnitude = nn.Parameter(spot.matrix().detach().norm(dim=1).to(like))
        self.spot = replace(spot, weight=like.new_empty(0))  # W is read from the host; no copy is kept
        self.scale = config.scale
        self.dropout = config.dropout

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the term, (B, T, O)."""
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
        """Return weight (O, I) and bias (O,), or None, of the updated projection.

        Args:
            weight: W, or W with the terms before this one. The norm of a row is that of `W + s B A` in both cases, as
                in `forward`.
            bias: b, or b with the terms before this one.
        """
        low = self.scale * (self.B.detach() @ self.A.detach()).to(weight)
        own = self.spot.matrix().detach().to(weight)
        factor = self.magnitude.detach().to(weight) / (own + low).norm(dim=1)
        start = self.spot.bias()
        if bias is not None and start is not None:
            start = start.detach().to(bias)
            bias = start + factor * (bias - start)
        return factor[:, None] * (weight + low), bias
