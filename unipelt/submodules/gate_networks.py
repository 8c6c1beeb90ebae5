"""Networks that can transform the input of gates.

Shapes: B examples, T tokens, D hidden size, h hidden size of the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Mlp(nn.Module):
    """The first of two layers, `W2 tanh(W1 x + b1)`, of a gating network that reads each token by itself.

    W2 is the weight of the gates' `Entry`. (..., D) -> (..., h).
    """

    def __init__(self, inputs: int, hidden: int, kind: dict[str, Any]) -> None:
        super().__init__()
        self.inner = _linear(inputs, hidden, kind)

    def forward(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """Return the state before the last layer, (..., h). `weights` is not used."""
        return torch.tanh(self.inner(x))


class Recurrent(nn.Module):
    """A minimal gated recurrence (Feng et al., 2024): `h_t = (1 - z_t) h_(t-1) + z_t (V x_t)`, `z_t = sigmoid(U x_t)`.

    z depends on x_t alone, so the last state is a sum over tokens and needs no loop. A padding token has z = 0 and
    does not change the state, on the left and on the right. (B, T, D) -> (B, 1, h).
    """

    def __init__(self, inputs: int, hidden: int, kind: dict[str, Any]) -> None:
        super().__init__()
        self.update = _linear(inputs, hidden, kind)
        self.candidate = _linear(inputs, hidden, kind)

    def forward(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """Return the state after the last token, (B, 1, h)."""
        scores = self.update(x)
        kept = -nn.functional.softplus(scores)  # log(1 - z)
        update = torch.sigmoid(scores)
        if weights is not None:
            real = (weights > 0).unsqueeze(-1)
            kept, update = kept * real, update * real
        after = kept.flip(1).cumsum(1).flip(1) - kept  # log of the share that later tokens leave of this token
        return (after.exp() * update * self.candidate(x)).sum(1, keepdim=True)


class Transformer(nn.Module):
    """One attention head over the text: `e = E x`, `mean_t(e_t + softmax(q_t k / sqrt(h)) v)`.

    The network has no position embeddings. (B, T, D) -> (B, 1, h).
    """

    def __init__(self, inputs: int, hidden: int, kind: dict[str, Any]) -> None:
        super().__init__()
        self.embed = _linear(inputs, hidden, kind)
        self.attend = _linear(hidden, 3 * hidden, kind)

    def forward(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """Return the mean state over real tokens, (B, 1, h)."""
        embedded = self.embed(x)
        query, key, value = self.attend(embedded).chunk(3, dim=-1)
        mask = None if weights is None else (weights > 0).unsqueeze(1)
        mixed = embedded + nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        if weights is None:
            return mixed.mean(1, keepdim=True)
        return torch.bmm(weights.to(mixed.dtype).unsqueeze(1), mixed)


def _linear(inputs: int, outputs: int, kind: dict[str, Any]) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, **kind)
    nn.init.normal_(linear.weight, std=1 / math.sqrt(inputs))  # with a small std, two layers would barely depend on x
    nn.init.zeros_(linear.bias)
    return linear


NETWORKS: dict[str, Callable[[int, int, dict[str, Any]], nn.Module]] = {
    "mlp": Mlp,
    "recurrent": Recurrent,
    "transformer": Transformer,
}
