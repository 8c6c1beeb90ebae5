"""Learned vectors that edit what a part of a layer gives.

Shapes: B examples, T tokens, O width of the place.
"""

from __future__ import annotations

from torch import Tensor, nn

from unipelt.config.methods import REDConfig
from unipelt.submodules.register import TargetInfo, register_submodule


class RED(nn.Module):
    """`y + (l - 1) y + b = l y + b`, a factor and a shift for each of a place's numbers (Wu et al., 2024).

    Representation editing (RED) is of what the feed-forward network adds to its residual. With a gate:
    `y + g ((l - 1) y + b)`. Unlike a bias (BitFit), b needs none in the model, and can be scaled by a gate.

    Attributes:
        offset: (O,), `l - 1`, which starts at 0; so weight decay draws to the model without edits.
        shift: (O,), b, which starts at 0.
    """

    def __init__(self, config: REDConfig, spot: TargetInfo) -> None:
        super().__init__()
        self.offset = nn.Parameter(spot.weight.new_zeros(spot.outputs))
        self.shift = nn.Parameter(spot.weight.new_zeros(spot.outputs))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The term, (B, T, O)."""
        return y * self.offset + self.shift

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return a projection (O, I), and its bias (O,), whose output is edited already."""
        factor, shift = 1 + self.offset.detach().to(weight), self.shift.detach().to(weight)
        return factor[:, None] * weight, shift if bias is None else factor * bias + shift


register_submodule("red", REDConfig, RED)
