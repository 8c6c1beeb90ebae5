"""The bottleneck adapter after a feed-forward network.

Shapes: B examples, T tokens, D hidden size, M bottleneck.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from unipelt.config.methods import AdapterConfig
from unipelt.submodules.gate import INITIAL_STD
from unipelt.submodules.outputs import OutputSlice
from unipelt.submodules.term import Term, add_scaled


class Adapter(Term):
    """`y + g * up(ReLU(down(h)))` with down: D -> M and up: M -> D, both with bias (paper, section 2.2).

    Behind a norm (post-LN), with `s = h_F + a` (feed-forward output plus residual) and the layer's own, frozen norm:

        h_FN = LN(s)
        h    = LN(s + g * up(ReLU(down(h_FN))))

    (semantics of the authors' release; paper, section 3.2). In a pre-LN layer no norm follows the feed-forward network,
    so adapter and gate read its output as it is: `h = a + h_F + g * up(ReLU(down(h_F)))`. (Granite multiplies all that
    it adds to a residual by a constant, and the adapter's part with it.)

    Weights start normal(0, 0.02) and biases at zero, as in the authors' release: near, not at, zero. With the start
    `zero`, up's weight is zero too. With dropout, while training, the term is `g * up(dropout(ReLU(down(h))))`. A gate
    that reads h shares its product with `down`: the entry then holds down's rows.

    Attributes:
        down: D -> M; None where the entry holds it.
        up: M -> D.
        dropout: the probability that an activation in the bottleneck is zero, while training.
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
        """Draw the start of both projections; where the entry holds down's rows, it gets them."""
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
