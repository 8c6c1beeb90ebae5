"""(IA)3: learned factors of the output of a part of a layer.

Shapes: B examples, T tokens, O width of the place.
"""

from __future__ import annotations

from torch import Tensor, nn

from unipelt.config.further import IA3Config
from unipelt.submodules.register import TargetInfo, register_submodule


class IA3(nn.Module):
    """(IA)3: `y + (l - 1) y = l y`, one factor for each unit of a place (Liu et al., 2022, section 3.3).

    By default the factors multiply the keys, the values and the input of the feed-forward network's last projection.
    With a gate the output is `(1 + g (l - 1)) y`.

    Attributes:
        offset: (O,), `l - 1`. It starts at 0, so weight decay pulls the factors l to 1.
    """

    def __init__(self, config: IA3Config, spot: TargetInfo) -> None:
        super().__init__()
        self.offset = nn.Parameter(spot.weight.new_zeros(spot.outputs))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the term, (B, T, O)."""
        return y * self.offset

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the projection's weight (O, I) and bias (O,), or None, with the factors of the output merged in."""
        factor = 1 + self.offset.detach().to(weight)
        return factor[:, None] * weight, None if bias is None else factor * bias

    def merged_input(self, weight: Tensor) -> Tensor:
        """Return the projection's weight (O, I) with the factors of the input, (I,), merged in."""
        return weight * (1 + self.offset.detach().to(weight))


register_submodule("ia3", IA3Config, IA3)
