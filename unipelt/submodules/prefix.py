"""Prefix-tuning: learned keys and values in front of an attention's own.

Shapes: B examples, T queries, H key-value heads, d head size, W = H * d, L prefix length, N attentions that share a
network, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from unipelt.config.methods import PrefixConfig
from unipelt.submodules.forward_pass import Pass, Slot, cached_on
from unipelt.submodules.gate import INITIAL_STD


class PrefixNetwork(nn.Module):
    """The reparameterisation of a stack's prefixes: `P' = W2 tanh(W1 P)` (Li and Liang, 2021; paper, section 2.2).

    `P` is (L, D), W1: D -> hidden, W2: hidden -> N * 2 * W, both with bias; one network for all layers of a stack (and
    one more for their cross-attentions), needed only while training.
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

        self.pass_ = Pass()

    def forward(self, index: int | None = None) -> Tensor:
        """Keys and values of the prefixes: of all, (N, 2, L, W), or of one, (2, L, W); keys, then values.

        Args:
            index: the attention's place among those that share this network; None for all.
        """
        low = torch.tanh(self.w1(self.embedding))
        if index is None:
            both = self.w2(low)
        else:
            rows = slice(index * 2 * self.width, (index + 1) * 2 * self.width)
            both = nn.functional.linear(low, self.w2.weight[rows], self.w2.bias[rows])
        shaped = both.unflatten(-1, (-1, 2, self.width)).movedim(0, -2)
        return shaped if index is None else shaped[0]


class Prefix(nn.Module):
    """One attention's prefix, and how its gate acts.

    `scale`: keys `[g P_K ; K]`, values `[g P_V ; V]` (the paper). `mass`: keys `[P_K ; K]`, values `[P_V ; V]`, and
    `log g` is added to the prefix's attention logits, so that its keys weigh g times as much. Where there is a gate
    for every token (in causal attention always) it is that of the query, g_t, and acts through the mass: keys and
    values are the same for every query then, and can be cached. The prefix is never masked, shifts no position, and is
    put in front after rotary embeddings and key norms.

    With a softmax of its own nothing is put in front: `attention(Q, K, V) + g attention(Q, P_K, P_V)`, g or g_t.

    Attributes:
        index: the attention's place among those that share the network.
        source: the attribute of the stack's owner that holds the network.
        network: the shared network, in a tuple because it is a reference and not a part; empty once deployed.
        keys_values: (2, L, W), the parameter that remains when the network has been folded away; else None.
        gate: brings the gate of the pass, (B, 1) or (B, T), from the attention; None without.
        gating: `scale` or `mass`, or `added` with a softmax of its own.
        mass: what is added to the prefix's attention logits, `log c` where a gate that acts through the mass became
            the constant c (`unipelt.fold`); else 0.
    """

    keys_values: nn.Parameter | None

    def __init__(
        self,
        index: int,
        source: str,
        width: int,
        config: PrefixConfig,
        network: PrefixNetwork | None,
        like: Tensor,
        *,
        by_query: bool,
    ) -> None:
        super().__init__()
        self.index = index
        self.source = source
        self.length = config.length
        self.gate = Slot() if config.gate else None
        self.gating: str = "added" if config.softmax == "own" else "mass" if by_query else config.gating
        self.mass = 0.0
        self.network: tuple[PrefixNetwork, ...] = () if network is None else (network,)
        self.keys_values = None
        if network is None:
            start = torch.zeros(2, config.length, width, dtype=like.dtype, device=like.device)
            self.keys_values = nn.Parameter(start)

    def forward(self) -> Tensor:
        """Keys and values before the gate: (2, L, W)."""
        if self.keys_values is not None:
            return self.keys_values
        network = self.network[0]
        shared = network.pass_.look()
        return network(self.index) if shared is None else shared[self.index]

    def take_gate(self) -> Tensor | None:
        """The gate of the pass, (B, 1) or (B, T), or None. Raises `KeyError` outside a pass of the attention."""
        return None if self.gate is None else self.gate.take()

    def rows(self, batch: int, dtype: torch.dtype, gate: Tensor | None) -> Tensor:
        """Keys and values as the gate leaves them: (2, B, L, W)."""
        both = self().to(dtype).unsqueeze(1)
        if gate is not None and self.gating == "scale":
            both = both * gate.to(dtype).view(1, batch, 1, 1)
        return both.expand(2, batch, -1, -1)

    def attention(self, query: Tensor, heads: int, gate: Tensor | None, **kwargs: Any) -> Tensor:
        """What attention over the prefix by itself gives, as the gate leaves it: (B, T, heads of queries, d).

        Args:
            query: (B, heads of queries, T, d).
            heads: H.
            gate: as `take_gate` gave it.
            kwargs: what the model's own attention function takes, of which `scaling` and `dropout` are looked at.
        """
        batch, queries, _, size = query.shape
        keys, values = self.rows(batch, query.dtype, gate).unflatten(-1, (heads, size)).transpose(2, 3).unbind()
        out = nn.functional.scaled_dot_product_attention(
            query,
            keys,
            values,
            dropout_p=kwargs.get("dropout", 0.0),
            scale=kwargs.get("scaling"),
            enable_gqa=queries != heads,
        ).transpose(1, 2)
        return out if gate is None else out * gate.to(out.dtype)[:, :, None, None]

    def columns(self, mask: Tensor | None, dtype: torch.dtype, tokens: int, gate: Tensor | None) -> Tensor | None:
        """The attention's mask with columns for the prefix in front.

        Args:
            mask: None, boolean or additive, (B or 1, heads or 1, queries or 1, keys).
            dtype: of the attention's logits.
            tokens: how many keys there are, where there is no mask.
            gate: as `take_gate` gave it.

        Returns:
            (B or 1, heads or 1, queries or 1, L + keys), or None where there is no mask and need not be one.
        """
        if gate is not None and self.gating == "mass":
            return _with_mass(gate.to(dtype), mask, tokens, self.length)
        if self.mass:
            if mask is None:
                mask = torch.zeros(1, 1, 1, tokens, dtype=dtype, device=self().device)
            return _with_columns(mask, dtype, self.length, self.mass)
        if mask is None:
            return None
        return cached_on(mask, ("prefix", self.length, dtype), lambda: _with_columns(mask, dtype, self.length))

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        form = "deployed" if self.keys_values is not None else f"part {self.index} of {self.source}"
        constant = f"constant, log g = {self.mass:.3f}" if self.mass else "none"
        gating = self.gating if self.gate or self.gating == "added" else constant
        return f"length={self.length}, {form}, gating={gating}"


def _with_columns(mask: Tensor, dtype: torch.dtype, length: int, mass: float = 0.0) -> Tensor:
    """An additive mask with `length` open columns in front, whose keys weigh exp(mass) times as much."""
    if mask.dtype == torch.bool:  # sdpa does this too, but in every layer anew
        mask = mask.to(dtype).log()  # 0 where it is true, -inf where it is false
    return nn.functional.pad(mask, (length, 0), value=mass)


def _with_mass(gate: Tensor, mask: Tensor | None, tokens: int, length: int) -> Tensor:
    """An additive mask whose prefix columns hold `log g`, for gates (B, 1) or (B, queries)."""
    # log 0 = -inf closes the prefix exactly; the inner clamp keeps its gradient finite
    log = torch.where(gate > 0, gate.clamp_min(torch.finfo(gate.dtype).tiny).log(), -torch.inf)
    if mask is None:
        mask = gate.new_zeros(1, 1, 1, tokens)
    elif mask.dtype == torch.bool:
        mask = gate.new_zeros(()).masked_fill(~mask, torch.finfo(gate.dtype).min)
    log = log[:, None, :, None]
    rows = max(log.shape[2], mask.shape[2])
    mask = mask.expand(gate.shape[0], -1, rows, -1)
    columns = log.expand(-1, mask.shape[1], rows, length)
    return torch.cat([columns, mask.to(gate.dtype)], dim=-1)


NETWORKS = ("prefix_network", "cross_prefix_network")
"""The attributes of a stack's owner that hold its networks."""


def enter_stack(owner: Any, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of a stack's owner: compute all its prefixes."""
    if getattr(owner, "_is_replica", False):  # of `nn.DataParallel`, whose prefixes still know the model's network
        for module in owner.modules():
            if isinstance(module, Prefix):
                module.network = (getattr(owner, module.source),)
        return
    for network in _networks(owner):
        network.pass_.enter(network().unbind())


def leave_stack(owner: Any, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of a stack's owner, called after a failure too."""
    for network in _networks(owner):
        network.pass_.leave()


def _networks(owner: Any) -> Iterator[PrefixNetwork]:
    found = (getattr(owner, name, None) for name in NETWORKS)
    return (network for network in found if isinstance(network, PrefixNetwork))
