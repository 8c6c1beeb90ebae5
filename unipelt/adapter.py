"""The bottleneck adapter after a feed-forward network.

Shapes: B examples, T tokens, D hidden size, M bottleneck.
"""

from __future__ import annotations

from torch import Tensor, nn

from unipelt.config import AdapterConfig
from unipelt.gate import INITIAL_STD, Gates, Slot


class Adapter(nn.Module):
    """`up(ReLU(down(x)))` with down: D -> M and up: M -> D, both with bias (paper, section 2.2).

    Starts from normal(0, 0.02) weights and zero biases, as in the authors' release: near, not at, zero.
    """

    def __init__(self, hidden: int, config: AdapterConfig, like: Tensor) -> None:
        super().__init__()
        self.down = nn.Linear(hidden, config.bottleneck, dtype=like.dtype, device=like.device)
        self.up = nn.Linear(config.bottleneck, hidden, dtype=like.dtype, device=like.device)
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=INITIAL_STD)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.up(nn.functional.relu(self.down(x)))


class AdapterNorm(nn.LayerNorm):
    """The LayerNorm after a post-LN layer's feed-forward network, whose input is first adapted.

    With `s = h_F + a` (feed-forward output plus residual), the one thing this norm is given:

        h_FN = LN(s)
        h    = LN(g * adapter(h_FN) + s)          g = 1 without a gate

    Both norms are the layer's own and frozen (semantics of the authors' release; paper, section 3.2).

    Attributes:
        tokens: brings the token weights of the pass; None where the gate averages over all tokens.
    """

    adapter: Adapter
    gates: Gates | None
    tokens: Slot | None

    def forward(self, s: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        normed = super().forward(s)
        adapted = self.adapter(normed)
        if self.gates is None:
            return super().forward(adapted + s)
        gate = self.gates(normed, None if self.tokens is None else self.tokens.take())
        return super().forward(adapted * gate.unsqueeze(1) + s)
