"""Gates, and nothing about what they scale.

Shapes: B examples, T tokens, D hidden size, G gates that read the same input.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from unipelt.config.methods import GateConfig
from unipelt.config.schema import ConfigError
from unipelt.submodules.forward_pass import cached_on
from unipelt.submodules.gate_networks import NETWORKS

INITIAL_STD = 0.02
"""Standard deviation of every normal start, as in the authors' release: gates begin near 0.5."""


class Gates(nn.Module):
    """The gates that read one input.

    Where attention looks both ways, a gate is one number an example (paper, section 3.2):

        g = sum_t m_t sigmoid(w x_t + b)

    `m` are the token weights: 1 / (number of real tokens) on real tokens under `masked_mean`, 1 / T under `mean`.
    Where it is causal, such an average would see the future, and a gate is one number a token:

        g_t = sigmoid(w x_t + b)

    `GateConfig` has other ways: x may go through a network first, or there may be no x (`static`: g = sigmoid(b));
    sigmoid may be tanh, or a softmax over the gates; logits may be divided by a temperature.

    Attributes:
        names: the name of each gate, in the order of the rows.
        weight: (G, D), or (G, h) behind a network; one row a gate. Not there where gates have no input.
        bias: (G,).
        network: what x goes through first, or None.
        has_input: whether there is an x.
        pooling: `masked_mean`, `mean`, `static`, `token` for a number a token, `text` for a network that pools.
    """

    weight: nn.Parameter

    def __init__(
        self,
        hidden: int,
        names: tuple[str, ...],
        config: GateConfig,
        like: Tensor,
        *,
        causal: bool,
        starts: Mapping[str, float | None] | None = None,
    ) -> None:
        super().__init__()
        if causal and config.over_text:
            raise ConfigError(f"a {config.network} network reads a whole text, and a causal layer would see the future")
        if config.activation == "softmax" and len(names) == 1:
            raise ConfigError(f"a softmax over one gate, {names[0]}, is always 1; take sigmoid, or leave it out")
        kind: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        self.names = names
        self.pooling: str = config.pooling
        if config.over_text:
            self.pooling = "text"
        elif causal:
            self.pooling = "token"
        self.activation: str = config.activation
        self.temperature = config.temperature
        self.network = NETWORKS[config.network](hidden, config.hidden, kind) if config.network in NETWORKS else None
        inner = hidden if self.network is None else config.hidden
        self.has_input = config.pooling != "static"
        if self.has_input:
            self.weight = nn.Parameter(torch.empty(len(names), inner, **kind))
            nn.init.normal_(self.weight, std=0.0 if self.activation == "tanh" else INITIAL_STD)
        begin = [(starts or {}).get(name) for name in names]
        self.bias = nn.Parameter(
            torch.tensor([_start(config, config.start if start is None else start) for start in begin], **kind)
        )

    def forward(self, logits: Tensor, weights: Tensor | None) -> Tensor:
        """Gate values.

        Args:
            logits: `W x + b`, (B, T, G), or (B, 1, G) behind a network that pools; with a number a token, of any
                shape (..., G). They are the reader's to compute, since what reads the same x takes part in the same
                product (`product`).
            weights: (B, T) token weights that sum to 1 over an example, or None for the mean over all tokens.

        Returns:
            (B, 1, G), or (..., G) with a number a token; each in (0, 1), or in (-1, 1) under tanh.
        """
        if self.temperature != 1:
            logits = logits / self.temperature
        if self.activation == "sigmoid":
            open_ = torch.sigmoid(logits)
        else:
            open_ = torch.tanh(logits) if self.activation == "tanh" else torch.softmax(logits, dim=-1)
        if self.pooling in ("token", "static", "text"):
            return open_
        if weights is None:
            return open_.mean(dim=1, keepdim=True)
        return torch.bmm(cached_on(weights, open_.dtype, partial(weights.to, open_.dtype)).unsqueeze(1), open_)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        more = "" if self.activation == "sigmoid" else f", activation={self.activation}"
        return f"{', '.join(self.names)}; pooling={self.pooling}{more}"


def as_many_rows(gate: Tensor, x: Tensor) -> Tensor:
    """A gate (B, T, 1) as it is, or (B T, 1) for an x that has the tokens of all texts in one row."""
    return gate.flatten(0, -2) if gate.dim() > x.dim() else gate


def _start(config: GateConfig, start: float | None) -> float:
    """The bias with which a gate begins where it should."""
    if start is None:
        return 0.0
    logit = math.atanh(start) if config.activation == "tanh" else math.log(start / (1 - start))
    return logit * config.temperature


def product(
    x: Tensor, gates: Gates, others: Sequence[Tensor] = (), bias: Tensor | None = None, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One product for all that reads the same x: each has few rows, and x is read once instead of once for each.

    Args:
        x: (..., D).
        gates: the gates that read x.
        others: what else reads it, each (R_i, D); R is the sum.
        bias: (R,), or None for none.
        weights: (B, T) token weights, for gates whose network reads the text.

    Returns:
        The gates' logits, (..., G) or, of a network that pools, (B, 1, G); and the others' `W x + b`, (..., R).
    """
    count = len(gates.names)
    if gates.network is not None or not gates.has_input:
        if gates.network is None:
            places = x.shape[:-1] if gates.pooling == "token" else (len(x), 1)
            logits = gates.bias.expand(*places, count)
        else:
            logits = nn.functional.linear(gates.network(x, weights), gates.weight, gates.bias)
        return logits, nn.functional.linear(x, torch.cat([*others]), bias) if others else logits[..., count:]
    if not others:
        logits = nn.functional.linear(x, gates.weight, gates.bias)
        return logits, logits[..., count:]
    weight = torch.cat([gates.weight, *others])
    rest = len(weight) - count
    all_bias = nn.functional.pad(gates.bias, (0, rest)) if bias is None else torch.cat([gates.bias, bias])
    logits, low = nn.functional.linear(x, weight, all_bias).split((count, rest), dim=-1)
    return logits, low


def token_weights(attention_mask: Tensor | None, batch: int) -> Tensor | None:
    """Weights of the masked mean, from the mask that a layer's attention is given.

    A token is real if any query may attend to it, so that padding masks of every form (2-D, 4-D boolean, 4-D
    additive) and masks of the caller's own give the same answer.

    Args:
        attention_mask: None, (B, T) or (B or 1, heads or 1, queries or 1, T); boolean or integer masks mark real
            tokens, floating-point masks are added to the logits.
        batch: B.

    Returns:
        (B, T) float32 weights that sum to 1 over an example, or None where every token is real.

    Raises:
        ValueError: the mask is not a tensor (flex attention's block masks).
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor):
        raise ValueError(
            f"gates that average over a text cannot read a {type(attention_mask).__name__} (flex attention); "
            "call model.set_attn_implementation('sdpa')"
        )
    return cached_on(attention_mask, ("token weights", batch), lambda: _token_weights(attention_mask, batch))


def _token_weights(mask: Tensor, batch: int) -> Tensor:
    if mask.is_floating_point():
        mask = mask > torch.finfo(mask.dtype).min / 2
    real = mask.bool() if mask.dim() == 2 else mask.bool().flatten(1, 2).any(dim=1)
    real = real.float()
    weights = real / real.sum(dim=1, keepdim=True).clamp_min(1.0)
    return weights if weights.shape[0] == batch else weights.expand(batch, -1)
