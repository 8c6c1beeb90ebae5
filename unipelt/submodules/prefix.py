"""Prefix-tuning: learned keys and values before the keys and values of an attention.

Shapes: B examples, T queries, H key-value heads, d head size, W = H * d, L prefix length, N attentions that share a
network, D hidden size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from unipelt.config.parts import PrefixConfig
from unipelt.submodules.drop import SubmoduleDropout
from unipelt.submodules.entry import Part
from unipelt.submodules.forward_pass import AttentionPass, PassFacts, new_key, split_heads
from unipelt.submodules.gate import INITIAL_STD

NETWORK_NAMES = ("prefix_network", "cross_prefix_network")
"""The names of the prefix networks in a stack's set: for self-attentions and for cross-attentions."""


class _Blocks(nn.Linear):
    """A projection whose outputs are blocks of equal size, and which can compute a single block."""

    def forward(self, x: Tensor, index: int | None = None, size: int = 0) -> Tensor:
        """Return all outputs of x, or the `size` outputs of block `index`."""
        if index is None:
            return super().forward(x)
        rows = slice(index * size, (index + 1) * size)
        return nn.functional.linear(x, self.weight[rows], self.bias[rows])


class PrefixNetwork(nn.Module):
    """The reparameterisation of a stack's prefixes: `P' = W2 tanh(W1 P)` (Li and Liang, 2021; paper, section 2.2).

    `P` is (L, D), W1: D -> hidden and W2: hidden -> N * 2 * W, both with bias. One network serves all layers of a
    stack, and a second network serves their cross-attentions. The networks are needed only in training.
    """

    def __init__(self, hidden: int, width: int, layers: int, config: PrefixConfig, like: Tensor) -> None:
        super().__init__()
        kind: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        self.key = new_key()
        self.width = width
        self.layers = layers
        self.embedding = nn.Parameter(torch.empty(config.length, hidden, **kind))
        self.w1 = nn.Linear(hidden, config.hidden, **kind)
        self.w2 = _Blocks(config.hidden, layers * 2 * width, **kind)
        nn.init.normal_(self.embedding, std=INITIAL_STD)
        for linear in (self.w1, self.w2):
            nn.init.normal_(linear.weight, std=INITIAL_STD)
            nn.init.zeros_(linear.bias)
        if config.start == "zero":
            with torch.no_grad():
                self.w2.weight.unflatten(0, (layers, 2, width))[:, 1].zero_()

    @property
    def parts(self) -> tuple[Part, ...]:
        """The named parts of the parameters."""
        return tuple(Part(f"prefix_network.{name}", "prefix", name) for name, _ in self.named_parameters())

    @property
    def deployed_count(self) -> int:
        """The number of parameters that replace this network after training."""
        return 2 * self.layers * self.embedding.shape[0] * self.width

    def forward(self, index: int | None = None) -> Tensor:
        """Compute keys and values of the prefixes.

        Args:
            index: the attention's index among the N attentions that share this network; None for all attentions.

        Returns:
            (N, 2, L, W) for all attentions, or (2, L, W) for one. In the dimension of size 2, keys are before values.
        """
        low = torch.tanh(self.w1(self.embedding))
        shaped = self.w2(low, index, 2 * self.width).unflatten(-1, (-1, 2, self.width)).movedim(0, -2)
        return shaped if index is None else shaped[0]


class Prefix(nn.Module):
    """The prefix of one attention, and the effect of its gate.

    With `scale`, the keys are `[g P_K ; K]` and the values are `[g P_V ; V]` (the paper). With `mass`, the keys are
    `[P_K ; K]`, the values are `[P_V ; V]`, and `log g` is added to the prefix's attention logits, so that the
    prefix's keys get g times the weight. If every token has a gate (always in causal attention), the gate of the query,
    g_t, is used with `mass`. Then keys and values are the same for every query and can be cached. The prefix is never
    masked and does not shift positions. It is added after rotary embeddings and key norms.

    With a separate softmax (`added`), the text's keys and values do not change:
    `attention(Q, K, V) + g attention(Q, P_K, P_V)`, with g or g_t.

    Attributes:
        index: the attention's index among the attentions that share the network.
        source: the name of the network in the stack's set.
        network: the shared network, in a tuple, so that it is no child of this module; empty after deployment, and for
            a flat prefix (`PrefixConfig.reparameterize: false`).
        keys_values: (2, L, W), the parameter of a flat prefix, or the one that replaces the network after deployment;
            else None.
        gate_name: the gate's name; empty without a gate.
        gating: `scale`, `mass`, or `added` for a separate softmax.
        mass: the constant that is added to the prefix's attention logits. It is `log c` if `unipelt.fold` replaced a
            gate with the gating `mass` by the constant c; else 0.
        drop: the dropout of whole submodules, or None. A prefix that is left out takes no attention.
    """

    folds_to = "constant"
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
        gate_name: str,
    ) -> None:
        super().__init__()
        self.index = index
        self.source = source
        self.length = config.length
        self.gate_name = gate_name if config.gate else ""
        self.gating: str = "added" if config.softmax == "own" else "mass" if by_query else config.gating
        self.mass = 0.0
        self.drop: SubmoduleDropout | None = None
        self.network: tuple[PrefixNetwork, ...] = () if network is None else (network,)
        self.keys_values = None
        if network is None:
            start = torch.zeros(2, config.length, width, dtype=like.dtype, device=like.device)
            if not config.reparameterize:
                nn.init.normal_(start if config.start == "normal" else start[0], std=INITIAL_STD)
            self.keys_values = nn.Parameter(start)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The named parts of the parameters."""
        return () if self.keys_values is None else (Part("prefix.keys_values", "prefix", "keys_values"),)

    @property
    def takes_attention(self) -> bool:
        """Whether the prefix takes attention even if its gate is 0."""
        return self.gating == "scale"

    def deploy(self, both: Tensor) -> None:
        """Replace the network by its keys and values, (2, L, W), in place."""
        self.keys_values = nn.Parameter(both)
        self.network = ()

    @torch.no_grad()
    def scale_by(self, constant: float) -> None:
        """Replace the gate by a constant above 0, in place. The prefix must be deployed."""
        assert self.keys_values is not None
        if self.gating == "scale":
            self.keys_values.mul_(constant)
        elif self.gating == "added":
            self.keys_values[1].mul_(constant)
        else:
            self.mass = math.log(constant)
        self.gate_name = ""

    def forward(self) -> Tensor:
        """Return keys and values before the gate, computed for this attention alone: (2, L, W)."""
        own = self._parameters.get("keys_values")
        return self.network[0](self.index) if own is None else own

    def keep(self, now: AttentionPass, batch: int, like: Tensor) -> Tensor | None:
        """Return 1 where the prefix is kept and 0 where dropout leaves it out, (B, 1); None if nothing is dropped.

        Args:
            now: the pass of the attention.
            batch: B.
            like: a tensor with the type and the device of the result.
        """
        if self.drop is None or not self.training:
            return None
        return self.drop.keep(now, "prefix", like.device).squeeze(-1).expand(batch, 1).to(like.dtype)

    def by_head(self, facts: PassFacts, heads: int) -> Tensor:
        """Return keys and values before the gate, (2, H, L, d).

        They come from the pass if the pass has computed the prefixes of all attentions.
        """
        shared = facts.prefix(self.network[0].key, self.index, heads) if self.network else None
        return split_heads(self(), heads, rows_first=bool(self.network)) if shared is None else shared

    def scaled(self, both: Tensor, batch: int, dtype: torch.dtype, gate: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return keys and values after the gate, each (B, ..., L, width).

        Only the gating `scale` changes them.

        Args:
            both: (2, ..., L, width), before the gate.
            batch: B.
            dtype: the type of the attention's keys.
            gate: (B, 1) or (B, T), or None.
        """
        both = both.to(dtype)
        if gate is None or self.gating != "scale":
            keys, values = both.unsqueeze(1).expand(-1, batch, *[-1] * (both.dim() - 1)).unbind()
        else:
            keys, values = _times(gate, both).unbind(1)
        return keys, values

    def join(self, both: Tensor, gate: Tensor | None, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of the prefix, after the gate, in front of the text's, each (B, H, L + S, d).

        Args:
            both: (2, H, L, d), before the gate.
            gate: (B, 1) or (B, T), or None.
            key: (B, H, S, d), the text's keys.
            value: (B, H, S, d), the text's values.
        """
        before, in_front = self.scaled(both, len(key), key.dtype, gate)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return torch.cat([before, key], dim=2), torch.cat([in_front, value], dim=2)
        # one operation, which in the backward pass would cost a copy of everything
        keys, values = torch.cat([before, key, in_front, value], dim=2).chunk(2, dim=2)
        return keys, values

    def attention(self, both: Tensor, query: Tensor, gate: Tensor | None, **kwargs: Any) -> Tensor:
        """Compute the gated attention over the prefix alone, (B, T, heads of queries, d).

        Args:
            both: (2, H, L, d), before the gate.
            query: (B, heads of queries, T, d).
            gate: (B, 1) or (B, T), or None.
            kwargs: arguments of the model's attention function. Only `scaling` and `dropout` are used.
        """
        by_query = gate is not None and gate.shape[1] > 1
        if gate is None or by_query:
            keys, values = self.scaled(both, len(query), query.dtype, None)
        else:  # the attention is linear in its values, and these are smaller than its output
            shared, values = both.to(query.dtype).unbind()
            keys, values = shared.expand(len(query), -1, -1, -1), _times(gate, values)
        out = nn.functional.scaled_dot_product_attention(
            query,
            keys,
            values,
            dropout_p=kwargs.get("dropout", 0.0),
            scale=kwargs.get("scaling"),
            enable_gqa=query.shape[1] != keys.shape[1],
        ).transpose(1, 2)
        return out if gate is None or not by_query else out * gate.to(out.dtype)[:, :, None, None]

    def columns(
        self,
        mask: Tensor | None,
        dtype: torch.dtype,
        tokens: int,
        gate: Tensor | None,
        facts: PassFacts,
        keep: Tensor | None = None,
    ) -> Tensor | None:
        """Return the attention's mask with L columns for the prefix before the other columns.

        Args:
            mask: None, boolean or additive, (B or 1, heads or 1, queries or 1, keys).
            dtype: the type of the attention's logits.
            tokens: the number of keys, which is used if there is no mask.
            gate: (B, 1) or (B, T), or None.
            facts: the facts of the pass.
            keep: (B, 1), as `keep` returns it. A prefix that is left out has the mass 0.

        Returns:
            (B or 1, heads or 1, queries or 1, L + keys), or None if no mask is needed.
        """
        mass = gate.to(dtype) if gate is not None and self.gating == "mass" else None
        if keep is not None:
            mass = keep.to(dtype) if mass is None else mass * keep.to(dtype)
        if mass is not None:
            return _with_mass(mass, mask, tokens, self.length)
        if self.mass and mask is None:
            assert self.keys_values is not None
            mask = torch.zeros(1, 1, 1, tokens, dtype=dtype, device=self.keys_values.device)
        if mask is None:
            return None
        return facts.once(
            mask, ("prefix", self.length, dtype, self.mass), lambda: _with_columns(mask, dtype, self.length, self.mass)
        )

    def extra_repr(self) -> str:
        """Describe the module for `print(model)`."""
        form = "deployed" if self.keys_values is not None else f"part {self.index} of {self.source}"
        constant = f"constant, log g = {self.mass:.3f}" if self.mass else "none"
        gating = self.gating if self.gate_name or self.gating == "added" else constant
        return f"length={self.length}, {form}, gating={gating}"


def _with_columns(mask: Tensor, dtype: torch.dtype, length: int, mass: float = 0.0) -> Tensor:
    """Return an additive mask with `length` columns of the value `mass` before the other columns.

    The keys of these columns get exp(mass) times the weight.
    """
    if mask.dtype == torch.bool:  # sdpa converts the mask too, but in every layer
        mask = mask.to(dtype).log()  # 0 where it is true, -inf where it is false
    return nn.functional.pad(mask, (length, 0), value=mass)


def _with_mass(gate: Tensor, mask: Tensor | None, tokens: int, length: int) -> Tensor:
    """Return an additive mask whose prefix columns hold `log g`, for gates (B, 1) or (B, queries)."""
    if torch.is_grad_enabled() and gate.requires_grad:
        # log 0 = -inf closes the prefix exactly; the inner clamp keeps its gradient finite
        log = torch.where(gate > 0, gate.clamp_min(torch.finfo(gate.dtype).tiny).log(), -torch.inf)
    else:
        log = gate.log()
    log = log[:, None, :, None]
    if mask is None:
        return nn.functional.pad(log.expand(-1, -1, -1, length), (0, tokens))
    if mask.dtype == torch.bool:
        mask = gate.new_zeros(()).masked_fill(~mask, torch.finfo(gate.dtype).min)
    rows = max(log.shape[2], mask.shape[2])
    mask = mask.expand(gate.shape[0], -1, rows, -1)
    columns = log.expand(-1, mask.shape[1], rows, length)
    return torch.cat([columns, mask.to(gate.dtype)], dim=-1)


def _times(gate: Tensor, x: Tensor) -> Tensor:
    """Return `g x` for each example, (B, ...), for gates (B, 1) and an x that all examples share, (...)."""
    gate = gate.to(x.dtype)
    if torch.is_grad_enabled() and _is_product(x):
        # as a matrix product, whose backward pass has two operations fewer
        return torch.mm(gate, x.reshape(1, -1)).view(-1, *x.shape)
    return x * gate.view(-1, *[1] * x.dim())


def _is_product(x: Tensor) -> bool:
    """Return whether a matrix product of x runs at once, and in the type of x.

    A compiler fuses elementwise operations better than a product, and autocast may change the type.
    """
    if torch.compiler.is_compiling() or x.is_meta:
        return False
    kind = x.device.type
    return not torch.is_autocast_enabled(kind) or torch.get_autocast_dtype(kind) == x.dtype
