"""Prefix-tuning: learned keys and values in front of every layer's own.

Shapes: B examples, H key-value heads, d head size, W = H * d, L prefix length, N layers with a prefix, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from unipelt.config import PrefixConfig
from unipelt.gate import INITIAL_STD, Slot


class PrefixNetwork(nn.Module):
    """The reparameterisation of all layers' prefixes: `P' = W2 tanh(W1 P)` (Li and Liang, 2021; paper, section 2.2).

    `P` is (L, D), W1: D -> hidden, W2: hidden -> N * 2 * W, both with bias; one network for all layers, needed only
    while training.
    """

    def __init__(self, hidden: int, width: int, layers: int, config: PrefixConfig, like: Tensor) -> None:
        super().__init__()
        kind: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        self.width = width
        self.layers = layers
        self.embedding = nn.Parameter(torch.empty(config.length, hidden, **kind))
        self.w1 = nn.Linear(hidden, config.hidden, **kind)
        self.w2 = nn.Linear(config.hidden, layers * 2 * width, **kind)
        nn.init.normal_(self.embedding, std=INITIAL_STD)
        for linear in (self.w1, self.w2):
            nn.init.normal_(linear.weight, std=INITIAL_STD)
            nn.init.zeros_(linear.bias)

    def forward(self, index: int) -> Tensor:
        """Keys and values of one layer's prefix.

        Each layer computes its own slice, so that the recomputation of gradient checkpointing finds everything that
        it needs inside the layer.

        Args:
            index: the layer's place among the layers that carry a prefix.

        Returns:
            (2, L, W): keys, then values.
        """
        rows = slice(index * 2 * self.width, (index + 1) * 2 * self.width)
        low = torch.tanh(self.w1(self.embedding))
        both = nn.functional.linear(low, self.w2.weight[rows], self.w2.bias[rows])
        return both.unflatten(-1, (2, self.width)).movedim(-2, 0)


class Prefix(nn.Module):
    """One layer's prefix, and how its gate acts.

    Attributes:
        index: the layer's place among the layers that carry a prefix.
        network: the shared network, in a tuple because it is a reference and not a part; empty once deployed.
        keys_values: (2, L, W), the parameter that remains when the network has been folded away; else None.
        gate: brings (B,), the gate of the pass, from the attention that this prefix belongs to; None without.
    """

    keys_values: nn.Parameter | None

    def __init__(
        self, index: int, width: int, config: PrefixConfig, network: PrefixNetwork | None, like: Tensor
    ) -> None:
        super().__init__()
        self.index = index
        self.length = config.length
        self.gate = Slot() if config.gate else None
        self.gating = config.gating
        self.network: tuple[PrefixNetwork, ...] = () if network is None else (network,)
        self.keys_values = None
        if network is None:
            start = torch.zeros(2, config.length, width, dtype=like.dtype, device=like.device)
            self.keys_values = nn.Parameter(start)

    def forward(self) -> Tensor:
        """Keys and values before the gate: (2, L, W)."""
        if self.keys_values is not None:
            return self.keys_values
        return self.network[0](self.index)

    def attach(self, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Put the prefix in front of a layer's keys and values.

        `scale`: keys `[g P_K ; K]`, values `[g P_V ; V]`. `mass`: keys `[P_K ; K]`, values `[P_V ; V]`, and `log g`
        is added to the prefix's attention logits. The prefix is never masked and shifts no position.

        Args:
            key: (B, H, T, d).
            value: (B, H, T, d).
            mask: None, boolean or additive, (B or 1, heads or 1, queries or 1, T).

        Returns:
            Keys and values (B, H, L + T, d), and the mask for them.
        """
        gate = None if self.gate is None else self.gate.take()
        batch, heads, tokens, size = key.shape
        both = self().to(key.dtype).view(2, 1, self.length, heads, size).transpose(2, 3)
        if gate is not None and self.gating == "scale":
            both = both * gate.to(key.dtype).view(1, batch, 1, 1, 1)
        keys, values = both.expand(2, batch, heads, self.length, size).unbind(0)
        if gate is not None and self.gating == "mass":
            mask = _with_mass(gate.to(key.dtype), mask, tokens, self.length)
        elif mask is not None:
            open_ = True if mask.dtype == torch.bool else 0.0
            mask = nn.functional.pad(mask, (self.length, 0), value=open_)
        return torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2), mask

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        form = "deployed" if self.keys_values is not None else f"layer {self.index} of the network"
        return f"length={self.length}, {form}, gating={self.gating if self.gate else 'none'}"


def _with_mass(gate: Tensor, mask: Tensor | None, tokens: int, length: int) -> Tensor:
    """An additive mask (B, 1 or heads, 1 or queries, L + T) whose prefix columns hold `log g`."""
    # log 0 = -inf closes the prefix exactly; the inner clamp keeps its gradient finite
    log = torch.where(gate > 0, gate.clamp_min(torch.finfo(gate.dtype).tiny).log(), -torch.inf)
    if mask is None:
        mask = gate.new_zeros(1, 1, 1, tokens)
    elif mask.dtype == torch.bool:
        mask = gate.new_zeros(()).masked_fill(~mask, torch.finfo(gate.dtype).min)
    mask = mask.expand(gate.shape[0], -1, -1, -1)
    columns = log.view(-1, 1, 1, 1).expand(-1, mask.shape[1], mask.shape[2], length)
    return torch.cat([columns, mask.to(gate.dtype)], dim=-1)
