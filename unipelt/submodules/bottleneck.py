"""Bottleneck adapters that differ from the paper's adapter in place and form.

Shapes: B examples, T tokens, I width of the place's input, O width of the place's output, M bottleneck.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from unipelt.config.further import HoulsbyConfig, ParallelConfig
from unipelt.submodules.gate import INITIAL_STD
from unipelt.submodules.register import TargetInfo, register_submodule

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}


class Houlsby(nn.Module):
    """An adapter `y + up(f(down(y)))` of a sublayer's output before the residual (Houlsby et al., 2019, section 2.1).

    down: O -> M and up: M -> O, both with bias. The weights start normal(0, 0.02) and the biases start at zero.
    """

    def __init__(self, config: HoulsbyConfig, spot: TargetInfo) -> None:
        super().__init__()
        self.down, self.up = _linears(spot.outputs, config.bottleneck, spot.outputs, spot.weight)
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=INITIAL_STD)
        self.activation = config.activation

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the term, (B, T, O)."""
        return self.up(ACTIVATIONS[self.activation](self.down(y)))


class Parallel(nn.Module):
    """An adapter `y + s up(f(down(x)))` parallel to the feed-forward network (He et al., 2022, sections 3.2 and 4.6).

    x is the network's input and y is the network's output. down: I -> M and up: M -> O, both with bias. As in LoRA, the
    weight of `down` starts Kaiming-uniform with a = sqrt(5) and `up` starts at zero, so the term starts at zero.
    """

    def __init__(self, config: ParallelConfig, spot: TargetInfo) -> None:
        super().__init__()
        self.down, self.up = _linears(spot.inputs, config.bottleneck, spot.outputs, spot.weight)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)
        self.activation = config.activation
        self.scale = config.scale

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the term, (B, T, O)."""
        return self.scale * self.up(ACTIVATIONS[self.activation](self.down(x)))


def _linears(inputs: int, bottleneck: int, outputs: int, like: Tensor) -> tuple[nn.Linear, nn.Linear]:
    down = nn.Linear(inputs, bottleneck, dtype=like.dtype, device=like.device)
    up = nn.Linear(bottleneck, outputs, dtype=like.dtype, device=like.device)
    for linear in (down, up):
        nn.init.zeros_(linear.bias)
    return down, up


register_submodule("houlsby", HoulsbyConfig, Houlsby)
register_submodule("parallel", ParallelConfig, Parallel)
