"""LoRA and the adapter as plain functions f(x, y), for mixtures of several of them.

Shapes: B examples, T tokens, I inputs, O outputs, D hidden size, M bottleneck, r rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from unipelt.config.parts import AdapterConfig, LoRAConfig
from unipelt.submodules.dora import DoRA
from unipelt.submodules.gate import INITIAL_STD
from unipelt.submodules.register import MODULES, TargetInfo


class LowRank(nn.Module):
    """The low-rank update `s B A x` of a projection (Hu et al., 2022), with its start and scale as in `LoRA`.

    Attributes:
        A: (r, I).
        B: (O, r).
        scale: s. With a gate it is 1, or the scale of LoRA with the gating `multiply`.
        dropout: the probability that an element of x is zero before A, in training.
    """

    def __init__(self, config: LoRAConfig, spot: TargetInfo) -> None:
        super().__init__()
        self.A = nn.Parameter(spot.weight.new_empty(config.rank, spot.inputs))
        self.B = nn.Parameter(spot.weight.new_zeros(spot.outputs, config.rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.scale = config.gated_scale if config.gate else config.scale
        self.dropout = config.dropout

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the term, (B, T, O)."""
        if self.dropout:
            x = nn.functional.dropout(x, self.dropout, self.training)
        return self.scale * nn.functional.linear(nn.functional.linear(x, self.A), self.B)


class Bottleneck(nn.Module):
    """The function `up(dropout(ReLU(down(x))))` of the adapter, with its start as in `Adapter`.

    down: D -> M and up: M -> D, both with bias.
    """

    def __init__(self, config: AdapterConfig, spot: TargetInfo) -> None:
        super().__init__()
        kind: dict[str, Any] = {"dtype": spot.weight.dtype, "device": spot.weight.device}
        self.down = nn.Linear(spot.inputs, config.bottleneck, **kind)
        self.up = nn.Linear(config.bottleneck, spot.outputs, **kind)
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=INITIAL_STD)
            nn.init.zeros_(linear.bias)
        if config.start == "zero":
            nn.init.zeros_(self.up.weight)
        self.dropout = config.dropout

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the term, (B, T, D)."""
        low = torch.relu(self.down(x))
        if self.dropout:
            low = nn.functional.dropout(low, self.dropout, self.training)
        return self.up(low)


def _low_rank(config: LoRAConfig, spot: TargetInfo) -> nn.Module:
    return DoRA(config, spot) if config.decomposed else LowRank(config, spot)


MODULES[LoRAConfig] = _low_rank
MODULES[AdapterConfig] = Bottleneck
