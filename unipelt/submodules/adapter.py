"""The bottleneck adapter after a feed-forward network.

Shapes: B examples, T tokens, D hidden size, M bottleneck.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from unipelt.config.parts import AdapterConfig
from unipelt.submodules.gate import INITIAL_STD
from unipelt.submodules.outputs import OutputSlice
from unipelt.submodules.term import Term, add_scaled


class Adapter(Term):
    """The adapter `y + g * up(ReLU(down(h)))`, with down: D -> M and up: M -> D, both with bias (paper, section 2.2).

    In a post-LN layer, the adapter uses `s = h_F + a` (feed-forward output plus residual) and the layer's frozen norm:

        h_FN = LN(s)
        h    = LN(s + g * up(ReLU(down(h_FN))))

    This is the computation of the authors' release (paper, section 3.2). In a pre-LN layer no norm follows the
    feed-forward network, so the adapter and the gate read the network's output directly:
    `h = a + h_F + g * up(ReLU(down(h_F)))`. Granite multiplies everything that a layer adds to a residual by a
    constant, and so also the adapter's term.

    The weights start normal(0, 0.02) and the biases start at zero, as in the authors' release, so the term starts near
    zero. With the start `zero`, the weight of `up` also starts at zero. With dropout, in training, the term is
    `g * up(dropout(ReLU(down(h))))`. A gate that reads h shares one matrix product with `down`. Then the entry holds
    the rows of `down`.

    Attributes:
        down: D -> M; None if the entry holds the rows of `down`.
        up: M -> D.
        dropout: the probability that an activation in the bottleneck is zero, in training.
    """

    folds_to = "constant"
    down: nn.Linear | None
    up: nn.Linear

    def __init__(self, name: str, hidden: int) -> None:
        super().__init__(name, "adapter", OutputSlice(1, 0, hidden))
        self.reads_output = True
        self.down = None
        self.dropout = 0.0

    def set_up(self, config: AdapterConfig, like: Tensor) -> None:
        """Draw the initial values of both projections. If the entry holds the rows of `down`, write them there."""
        hidden = self.outputs.count
        self.dropout = config.dropout
        down = nn.Linear(hidden, config.bottleneck, dtype=like.dtype, device=like.device)
        self.up = nn.Linear(config.bottleneck, hidden, dtype=like.dtype, device=like.device)
        for linear in (down, self.up):
            nn.init.normal_(linear.weight, std=INITIAL_STD)
            nn.init.zeros_(linear.bias)
        if config.start == "zero":
            nn.init.zeros_(self.up.weight)
        if self.entry is not None and self.gate_name in self.entry.row_names:
            self.entry.start_rows(self.gate_name, down.weight, down.bias)
        else:
            self.down = down

    @torch.no_grad()
    def scale_by(self, constant: float) -> None:
        """Replace the gate by a constant, in place."""
        self.up.weight.mul_(constant)
        self.up.bias.mul_(constant)
        if self.entry is not None and self.down is None:
            self.down = self.entry.extract(self.gate_name)
        self.entry, self.gate_name = None, ""

    def add(self, x: Tensor, y: Tensor, gate: Tensor | None, low: Tensor | None) -> Tensor:
        """Return `y + g * up(ReLU(down(x)))`, all (B, T, D)."""
        up: Any = self._modules["up"]
        if low is None:
            assert self.down is not None
            low = self.down(x.to(up.weight.dtype))
        low = nn.functional.relu(low)
        if self.dropout:
            low = nn.functional.dropout(low, self.dropout, self.training)
        update = up(low).to(y.dtype)
        return add_scaled(y, gate, update)
