"""Gates: the values of gates from their logits. The code here does not depend on the gated submodule.

Shapes: B examples, T tokens, D hidden size, G gates that read the same input.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from unipelt.config.gate import GateConfig
from unipelt.config.schema import ConfigError

INITIAL_STD = 0.02
"""Standard deviation of every normal initialisation, as in the authors' release. Gates start near 0.5."""


class Gates(nn.Module):
    """The activation and the pooling of gates that read one input. The parameters belong to an `Entry`.

    In bidirectional attention, a gate is one number per example (paper, section 3.2):

        g = sum_t m_t sigmoid(w x_t + b)

    `m` are the token weights: 1 / (number of real tokens) on real tokens with `masked_mean`, 1 / T with `mean`.
    In causal attention such a mean would include later tokens, so a gate is one number per token:

        g_t = sigmoid(w x_t + b)

    `GateConfig` has further forms. A network can transform x first. A `static` gate has no input: g = sigmoid(b). The
    activation can be tanh, or a softmax over the gates. A temperature divides the logits.

    Attributes:
        names: the name of each gate, in the order of the logits.
        pooling: `masked_mean`, `mean`, `static`, `token` (one number per token) or `text` (the network pools).
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
        """Whether the gates need the token weights."""
        return self.pooling in ("masked_mean", "text")

    def forward(self, logits: Tensor, weights: Tensor | None) -> Tensor:
        """Compute the gates' values.

        Args:
            logits: `W x + b`, (B, T, G); (B, 1, G) after a network that pools; (..., G) with one number per token.
            weights: (B, T) token weights that sum to 1 over each example, or None for the mean over all tokens.

        Returns:
            (B, 1, G), or (..., G) with one number per token. Each value is in (0, 1), or in (-1, 1) with tanh.
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
    """Return the bias of a gate that starts at the value `start`.

    Without `start` the value is `config.start`. Without both it is 0.5 with sigmoid and 0 with tanh.
    """
    start = config.start if start is None else start
    if start is None:
        return 0.0
    logit = math.atanh(start) if config.activation == "tanh" else math.log(start / (1 - start))
    return logit * config.temperature
