"""Learned factors of what a part of a layer gives.

Shapes: B examples, T tokens, O width of the place.
"""

from __future__ import annotations

from torch import Tensor, nn

from unipelt.config.methods import IA3Config
from unipelt.submodules.register import TargetInfo, register_submodule


class IA3(nn.Module):
    """`y + (l - 1) y = l y`, a factor for each of a place's numbers: (IA)3 (Liu et al., 2022, section 3.3).

    Keys and values are multiplied, and what the feed-forward network's last projection is given. With a gate:
    `(1 + g (l - 1)) y`.

    Attributes:
        offset: (O,), `l - 1`, which starts at 0; so weight decay draws to the model without factors.
    """

    def __init__(self, config: IA3Config, spot: TargetInfo) -> None:
        super().__init__()
        self.offset = nn.Parameter(spot.weight.new_zeros(spot.outputs))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The term, (B, T, O)."""
        return y * self.offset

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return a projection (O, I), and its bias (O,), whose output is multiplied already."""
        factor = 1 + self.offset.detach().to(weight)
        return factor[:, None] * weight, None if bias is None else factor * bias

    def merged_input(self, weight: Tensor) -> Tensor:
        """Return a projection (O, I) that multiplies its input itself."""
        return weight * (1 + self.offset.detach().to(weight))


register_submodule("ia3", IA3Config, IA3)
