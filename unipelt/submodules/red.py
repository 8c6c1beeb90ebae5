"""RED: learned vectors that edit the output of a part of a layer.

Shapes: B examples, T tokens, O width of the place.
"""

from __future__ import annotations

from torch import Tensor, nn

from unipelt.config.further import REDConfig
from unipelt.submodules.register import TargetInfo, register_submodule


class RED(nn.Module):
    """RED: `y + (l - 1) y + b = l y + b`, a factor and a shift for each unit of a place (Wu et al., 2024).

    By default, representation editing (RED) changes the output of the feed-forward network before the residual. With a
    gate the output is `y + g ((l - 1) y + b)`. Unlike BitFit, RED also works in a model without biases, and a gate can
    scale b.

    Attributes:
        offset: (O,), `l - 1`. It starts at 0, so weight decay pulls the factors l to 1.
        shift: (O,), b, which starts at 0.
    """

    def __init__(self, config: REDConfig, spot: TargetInfo) -> None:
        super().__init__()
        self.offset = nn.Parameter(spot.weight.new_zeros(spot.outputs))
        self.shift = nn.Parameter(spot.weight.new_zeros(spot.outputs))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the term, (B, T, O)."""
        return y * self.offset + self.shift

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the projection's weight (O, I) and bias (O,) with the edits merged in."""
        factor, shift = 1 + self.offset.detach().to(weight), self.shift.detach().to(weight)
        return factor[:, None] * weight, shift if bias is None else factor * bias + shift


register_submodule("red", REDConfig, RED)
