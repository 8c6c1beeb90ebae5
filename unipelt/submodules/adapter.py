"""The bottleneck adapter after a feed-forward network.

Shapes: B examples, T tokens, D hidden size, M bottleneck.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from unipelt.config.methods import AdapterConfig
from unipelt.submodules.forward_pass import Slot
from unipelt.submodules.gate import INITIAL_STD, Gates, as_many_rows, product


class Adapter(nn.Module):
    """`g * up(ReLU(down(x)))` with down: D -> M and up: M -> D, both with bias (paper, section 2.2).

    Starts from normal(0, 0.02) weights and zero biases, as in the authors' release: near, not at, zero.

    Attributes:
        gates: computes g from x; None without a gate (g = 1).
        tokens: brings the token weights of the pass; None where the gate does without.
        gate: brings g, where the layer's attention computes it for all (`GateConfig.shared`); else None.
    """

    def __init__(
        self, hidden: int, config: AdapterConfig, like: Tensor, gates: Gates | None, tokens: Slot | None
    ) -> None:
        super().__init__()
        self.down = nn.Linear(hidden, config.bottleneck, dtype=like.dtype, device=like.device)
        self.up = nn.Linear(config.bottleneck, hidden, dtype=like.dtype, device=like.device)
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=INITIAL_STD)
            nn.init.zeros_(linear.bias)
        self.gates = gates
        self.tokens = tokens
        self.gate: Slot | None = None

    def forward(self, x: Tensor, onto: Tensor) -> Tensor:
        """`onto + g * up(ReLU(down(x)))`, all (B, T, D)."""
        if self.gate is not None:
            opened = self.gate.take()
            assert opened is not None
            return torch.addcmul(onto, as_many_rows(opened, x), self.up(nn.functional.relu(self.down(x))))
        if self.gates is None:
            return onto + self.up(nn.functional.relu(self.down(x)))
        weights = None if self.tokens is None else self.tokens.take()
        logits, low = product(x, self.gates, (self.down.weight,), self.down.bias, weights)
        gate = self.gates(logits, weights)
        return torch.addcmul(onto, gate, self.up(nn.functional.relu(low)))


def adapt_norm(norm: Any, args: tuple[Tensor], normed: Tensor) -> Tensor:
    """Forward hook of the norm after a post-LN layer's feed-forward network.

    With `s = h_F + a` (feed-forward output plus residual), the one thing that this norm is given:

        h_FN = LN(s)
        h    = LN(g * adapter(h_FN) + s)

    Both norms are the layer's own and frozen (semantics of the authors' release; paper, section 3.2).
    """
    return norm.forward(norm.adapter(normed, args[0]))


def adapt_output(feed_forward: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
    """Forward hook of what a pre-LN layer's feed-forward network adds to its residual.

    There is no norm behind the feed-forward network there, so adapter and gate read its output as it is:

        h = a + h_F + g * adapter(h_F)

    (Granite multiplies all that it adds to a residual by a constant, the adapter's part with it.)
    """
    return feed_forward.adapter(output, output)
