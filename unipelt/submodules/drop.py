"""Submodule dropout: while training, a submodule of a layer is left out at random.

Shapes: B examples, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unipelt.config.gate import GateConfig
from unipelt.submodules.forward_pass import AttentionPass


@dataclass(frozen=True)
class SubmoduleDropout:
    """The dropout of whole submodules, `gate.dropout` of a configuration.

    In training, the term of a submodule is `y + d g f(x, y)`, with d = 0 with the probability p and else d = 1. The
    draws are independent for each attention of each layer, and for each submodule there. All terms of one submodule in
    one attention (LoRA's of query and value) share one draw, and a draw holds for the whole pass.

    The term is not rescaled by `1 / (1 - p)`: a kept submodule is exactly the one of evaluation, as in LayerDrop (Fan
    et al., 2020). A gate then stays between 0 and 1. No factor could keep the mean of a prefix, because its output is
    not linear in its gate. Stochastic depth (Huang et al., 2016) drops layers in the same way.

    Attributes:
        probability: p.
        by_example: whether each example has its own draw. Otherwise one draw is for the whole batch.
    """

    probability: float
    by_example: bool

    def keep(self, now: AttentionPass, kind: str, device: torch.device) -> Tensor:
        """Return d, (B or 1, 1, 1), drawn once in a pass for each submodule. `kind` is the submodule's name."""
        found = now.kept.get(kind)
        if found is None:
            count = now.batch if self.by_example else 1
            found = now.kept[kind] = (torch.rand(count, 1, 1, device=device) >= self.probability).float()
        return found

    def keep_for(self, now: AttentionPass, kind: str, x: Tensor) -> Tensor:
        """Return d in a shape that multiplies x: (B or 1, 1, 1), or flat, (B T or 1, 1), if x is (B T, width)."""
        keep = self.keep(now, kind, x.device)
        if x.dim() > 2:
            return keep
        return keep.expand(-1, len(x) // len(keep) if self.by_example else 1, 1).flatten(0, 1)


def submodule_dropout(gate: GateConfig) -> SubmoduleDropout | None:
    """Return the dropout of submodules of a configuration, or None without one."""
    return SubmoduleDropout(gate.dropout, gate.dropout_by == "example") if gate.dropout else None
