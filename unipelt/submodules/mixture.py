"""Mixtures: several terms of one kind at one place, combined by a router, at random, or by attention.

Shapes: B examples, T tokens, I inputs, O outputs, E experts, k experts that the router keeps.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from unipelt.config.mixture import MixtureConfig
from unipelt.submodules.entry import Part
from unipelt.submodules.forward_pass import AttentionPass
from unipelt.submodules.gate import INITIAL_STD
from unipelt.submodules.outputs import OutputSlice
from unipelt.submodules.term import FunctionTerm, add_scaled, require

EXPERTS = "function.experts"
"""The path of the list of experts in its term."""


class Mixture(nn.Module):
    """The function of a mixture, from the functions f_1 … f_E of its experts.

    With the routers `token` and `example`, the function is (Shazeer et al., 2017, equations 1 to 5, without noise)

        sum_e p_e f_e(x, y),  p = softmax(top_k(W x_t))  for a token,  p = softmax(top_k(W mean_t x_t))  for an example

    The mean is over real tokens. `top_k` keeps the k largest logits. With k = 1 the softmax is over all experts before
    the choice, because the weight of a single expert would be 1 and W would get no gradient (Fedus et al., 2022,
    equation 2). Every expert is computed, whatever k is.

    With the router `random` (AdaMix; Wang et al., 2022, sections 3.1 and 3.3), each child of an expert (`down`, `up`,
    or A, B) is that of a random expert in every call while training, and has the mean of the experts' parameters
    otherwise. So the experts become one ordinary term after training (`unipelt.merge_experts`).

    With the router `attention` (AdapterFusion; Pfeiffer et al., 2021, section 3.2), the function is

        V sum_e p_e f_e(x, y),  p = softmax_e((Q x_t) . (K f_e(x, y)_t))

    and the experts are frozen. V starts as the identity.

    Attributes:
        experts: the E functions.
        router: W, (E, I); only with the routers `token` and `example`.
        query, key, value: Q (O, I), K (O, O) and V (O, O); only with the router `attention`.
        config: the mixture's configuration.
        by_example: whether the weights are one set for each example.
    """

    router: nn.Parameter
    query: nn.Parameter
    key: nn.Parameter
    value: nn.Parameter

    def __init__(
        self, experts: Sequence[nn.Module], config: MixtureConfig, inputs: int, outputs: int, like: Tensor, causal: bool
    ) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.config = config
        self.by_example = config.router == "example" and not causal
        if config.weighs:
            self.router = nn.Parameter(like.new_empty(config.experts, inputs).normal_(std=INITIAL_STD))
        elif config.router == "attention":
            self.query = nn.Parameter(like.new_empty(outputs, inputs).normal_(std=INITIAL_STD))
            self.key = nn.Parameter(like.new_empty(outputs, outputs).normal_(std=INITIAL_STD))
            self.value = nn.Parameter(torch.eye(outputs, dtype=like.dtype, device=like.device))

    def route(self, x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the weights of the experts, and the softmax over all experts, each (B, 1 or T, E).

        Args:
            x: (B, T, I).
            weights: (B, T) token weights that sum to 1 over each example; None if every token has the same weight.
        """
        x = x.to(self.router.dtype)
        if self.by_example:
            x = x.mean(1, keepdim=True) if weights is None else torch.bmm(weights.to(x.dtype).unsqueeze(1), x)
        logits = nn.functional.linear(x, self.router)
        shares = torch.softmax(logits, dim=-1)
        kept = self.config.top_k or self.config.experts
        if kept == self.config.experts:
            return shares, shares
        largest, index = (shares if kept == 1 else logits).topk(kept, dim=-1)
        chosen = largest if kept == 1 else torch.softmax(largest, dim=-1)
        return torch.zeros_like(shares).scatter(-1, index, chosen), shares

    def balance(self, routed: Tensor, shares: Tensor, weights: Tensor | None) -> Tensor:
        """Return the load-balancing loss of the router, a scalar (Fedus et al., 2022, equations 4 to 6).

            balance E sum_e f_e P_e

        P_e is the mean of the softmax over real tokens (or examples), and f_e is the share of the chosen experts that
        are e. Equal shares give `balance`.

        Args:
            routed: (B, 1 or T, E), the weights of the experts.
            shares: (B, 1 or T, E), the softmax over all experts.
            weights: (B, T) token weights, 0 for padding; None if every token is real.
        """
        routed, shares = routed.flatten(0, -2), shares.flatten(0, -2)
        real = shares.new_ones(len(shares))
        if weights is not None and not self.by_example:
            real = (weights > 0).flatten().to(shares.dtype)
        real = (real / real.sum()).unsqueeze(-1)
        load = ((routed > 0) * real).sum(dim=0) / (self.config.top_k or self.config.experts)
        return self.config.balance * self.config.experts * (load * (shares * real).sum(dim=0)).sum()

    def forward(self, x: Tensor, y: Tensor, routed: Tensor | None) -> Tensor:
        """Return the term, (B, T, O).

        Args:
            x: (B, T, I).
            y: (B, T, O).
            routed: the weights from `route`; None with the routers `random` and `attention`.
        """
        if self.config.router == "random":
            values = self.drawn(x.device) if self.training else self.averaged()
            found: Tensor = _stand_in(self.experts[0], values)(x, y)
            return found
        if self.config.router == "attention":
            return self._attend(x, [expert(x, y) for expert in self.experts])
        assert routed is not None
        terms = [weight * expert(x, y) for expert, weight in zip(self.experts, routed.split(1, dim=-1), strict=True)]
        return torch.stack(terms).sum(dim=0)

    def _attend(self, x: Tensor, terms: Sequence[Tensor]) -> Tensor:
        query = nn.functional.linear(x, self.query)
        logits = [(query * nn.functional.linear(term, self.key)).sum(-1, keepdim=True) for term in terms]
        shares = torch.softmax(torch.cat(logits, dim=-1), dim=-1).split(1, dim=-1)
        mixed = torch.stack([share * term for share, term in zip(shares, terms, strict=True)]).sum(dim=0)
        return nn.functional.linear(mixed, self.value)

    def _by_expert(self) -> dict[str, Tensor]:
        """Return the parameters of all experts in one tensor, (E, ...), by their name in an expert."""
        named = [dict(expert.named_parameters()) for expert in self.experts]
        return {name: torch.stack([parameters[name] for parameters in named]) for name in named[0]}

    def averaged(self) -> dict[str, Tensor]:
        """Return the mean of the experts' parameters by name."""
        return {name: stacked.mean(dim=0) for name, stacked in self._by_expert().items()}

    def drawn(self, device: torch.device) -> dict[str, Tensor]:
        """Return parameters by name, each child's from a random expert. The other experts get gradients of zeros."""
        drawn: dict[str, Tensor] = {}
        index: dict[str, Tensor] = {}
        for name, stacked in self._by_expert().items():
            child = name.partition(".")[0]
            if child not in index:
                index[child] = torch.randint(self.config.experts, (1,), device=device)
            drawn[name] = stacked.index_select(0, index[child]).squeeze(0)
        return drawn

    def extra_repr(self) -> str:
        """Describe the module for `print(model)`."""
        kept = "" if self.config.top_k is None else f", top_k={self.config.top_k}"
        return f"router={self.config.router}{kept}"


def _stand_in(module: nn.Module, values: Mapping[str, Tensor], start: str = "") -> nn.Module:
    """Return a copy of a module that has these tensors as its parameters. The module itself does not change.

    Several threads may compute one module, so its own parameters cannot be exchanged for the time of a call.
    """
    made = copy.copy(module)
    made.__dict__["_parameters"] = {name: values[f"{start}{name}"] for name in module._parameters}
    made.__dict__["_modules"] = {
        name: None if child is None else _stand_in(child, values, f"{start}{name}.")
        for name, child in module._modules.items()
    }
    return made


class MixtureTerm(FunctionTerm):
    """A term whose function is a mixture: `y + g Mixture(x, y)`, with g = 1 without a gate."""

    function: Mixture

    def __init__(self, name: str, kind: str, outputs: OutputSlice, function: Mixture) -> None:
        super().__init__(name, kind, outputs, function)

    @property
    def depends_on_text(self) -> bool:
        """Whether the term at a token depends on other tokens, or on the purpose of the call, and not on x alone."""
        return bool(self.gate_name) or self.function.config.router != "random"

    @property
    def averages(self) -> bool:
        """Whether the term averages over the real tokens of a text, without its gate."""
        return self.function.by_example or self.function.config.balance > 0

    @property
    def parts(self) -> tuple[Part, ...]:
        """The named parts of the term's own parameters. The experts behind attention are frozen."""
        if self.function.config.router != "attention":
            return super().parts
        start = f"{self.name}.{EXPERTS}."
        return tuple(replace(part, frozen=part.name.startswith(start)) for part in super().parts)

    def open_gate(self, x: Tensor, now: AttentionPass | None) -> tuple[Tensor | None, Tensor | None]:
        """Return the gate, and the weights of the experts, (B, 1 or T, E), in the place of a first projection."""
        gate, _ = super().open_gate(x, now)
        if not self.function.config.weighs:
            return gate, None
        if not self.averages:
            return gate, self.function.route(x, None)[0]
        begun = require(now, self.name)
        weights = begun.weights_for(self.in_attention, x)
        routed, shares = self.function.route(x, weights)
        if self.training and self.function.config.balance:
            loss = self.function.balance(routed, shares, weights)  # also in the recomputation of a checkpointed layer
            if begun.losses is not None:
                begun.losses.append(loss)
        return gate, routed

    def add(self, x: Tensor, y: Tensor, gate: Tensor | None, low: Tensor | None) -> Tensor:
        """Return `y + g Mixture(x, y)`, (B, T, O). `low` holds the weights of the experts."""
        own: Any = next(self.function.parameters()).dtype
        update = self.function(x.to(own), y.to(own), low).to(y.dtype)
        return add_scaled(y, gate, update)
