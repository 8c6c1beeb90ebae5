"""Gates: from logits to values. Nothing here knows what a gate scales.

Shapes: B examples, T tokens, D hidden size, G gates that read the same input.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from unipelt.config.methods import GateConfig
from unipelt.config.schema import ConfigError

INITIAL_STD = 0.02
"""Standard deviation of every normal start, as in the authors' release: gates begin near 0.5."""


class Gates(nn.Module):
    """The activation and the pooling of gates that read one input; their parameters belong to an `Entry`.

    Where attention looks both ways, a gate is one number an example (paper, section 3.2):

        g = sum_t m_t sigmoid(w x_t + b)

    `m` are the token weights: 1 / (number of real tokens) on real tokens under `masked_mean`, 1 / T under `mean`.
    In causal attention such an average would see the future, and a gate is one number a token:

        g_t = sigmoid(w x_t + b)

    `GateConfig` has other forms: x goes through a network first, or is left out (`static`: g = sigmoid(b)); tanh or
    a softmax over the gates stands for sigmoid; a temperature divides the logits.

    Attributes:
        names: the name of each gate, in the order of the logits.
        pooling: `masked_mean`, `mean`, `static`, `token` for a number a token, `text` for a network that pools.
        activation: `sigmoid`, `tanh` or `softmax`.
        temperature: the divisor of the logits.
    """

    def __init__(self, names: tuple[str, ...], config: GateConfig, *, causal: bool) -> None:
        super().__init__()
        if causal and config.over_text:
            raise ConfigError(f"a {config.network} network reads a whole text, and a causal layer would see the future")
        if config.activation == "softmax" and len(names) == 1:
            raise ConfigError(f"a softmax over one gate, {names[0]}, is always 1; take sigmoid, or leave it out")
        self.names = names
        self.pooling: str = config.pooling
        if config.over_text:
            self.pooling = "text"
        elif causal:
            self.pooling = "token" if config.pooling != "static" else "static"
        self.activation: str = config.activation
        self.temperature = config.temperature

    @property
    def averages(self) -> bool:
        """Whether the gates need the weights of real tokens."""
        return self.pooling in ("masked_mean", "text")

    def forward(self, logits: Tensor, weights: Tensor | None) -> Tensor:
        """Compute gate values.

        Args:
            logits: `W x + b`, (B, T, G); (B, 1, G) behind a network that pools; (..., G) with a number a token.
            weights: (B, T) token weights that sum to 1 over an example, or None for the mean over all tokens.

        Returns:
            (B, 1, G), or (..., G) with a number a token; each in (0, 1), or in (-1, 1) under tanh.
        """
        if self.temperature != 1:
            logits = logits / self.temperature
        if self.activation == "sigmoid":
            values = torch.sigmoid(logits)
        else:
            values = torch.tanh(logits) if self.activation == "tanh" else torch.softmax(logits, dim=-1)
        if self.pooling in ("token", "static", "text"):
            return values
        if weights is None:
            return values.mean(dim=1, keepdim=True)
        return torch.bmm(weights.to(values.dtype).unsqueeze(1), values)

    def extra_repr(self) -> str:
        """Describe the module for `print(model)`."""
        activation = "" if self.activation == "sigmoid" else f", activation={self.activation}"
        return f"{', '.join(self.names)}; pooling={self.pooling}{activation}"


def start_logit(config: GateConfig, start: float | None) -> float:
    """Return the bias with which a gate begins at `start` (0.5 under sigmoid and 0 under tanh if None)."""
    start = config.start if start is None else start
    if start is None:
        return 0.0
    logit = math.atanh(start) if config.activation == "tanh" else math.log(start / (1 - start))
    return logit * config.temperature
