"""Low-rank updates of a projection.

Shapes: B examples, T tokens, r rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from unipelt.config import LoRAConfig
from unipelt.gate import Slot


class LoRALinear(nn.Linear):
    """A projection with a low-rank term: `W x + b + s * B A x` (Hu et al., 2022; paper, section 2.2).

    `s = alpha / r`; a gate REPLACES that scale by one number an example (paper, section 3.2). `A` starts
    Kaiming-uniform with a = sqrt(5), `B` at zero, so the term starts at zero.

    Attributes:
        lora_A: (r, in_features).
        lora_B: (out_features, r).
        gate: brings (B,), the gate of the pass, from the attention that this projection belongs to; None without.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scale: float
    gate: Slot | None

    def add_low_rank(self, config: LoRAConfig) -> None:
        """Give this projection its low-rank term."""
        like = self.weight
        self.lora_A = nn.Parameter(torch.empty(config.rank, self.in_features, dtype=like.dtype, device=like.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, config.rank, dtype=like.dtype, device=like.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scale = config.alpha / config.rank
        self.gate = Slot() if config.gate else None

    def drop_low_rank(self) -> None:
        """Take the low-rank term away again, also one that was half added."""
        for name in ("lora_A", "lora_B"):
            self._parameters.pop(name, None)
        for name in ("scale", "gate"):
            self.__dict__.pop(name, None)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, in_features) -> (B, T, out_features)."""
        low = nn.functional.linear(x, self.lora_A)
        if self.gate is None:
            low = low * self.scale
        else:
            gate = self.gate.take()
            assert gate is not None
            low = low * gate.view(-1, *[1] * (low.dim() - 1))
        return super().forward(x) + nn.functional.linear(low, self.lora_B)
