"""Configuration of mixtures: several terms of one kind at one place, with a router."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unipelt.config.schema import ConfigError, check_fields, omitted_if_default
from unipelt.files.messages import show

MOST_EXPERTS = 64
"""The largest number of experts of one mixture."""


@dataclass(frozen=True)
class MixtureConfig:
    """A mixture of terms of one kind, the experts, in place of one term.

    Attributes:
        experts: E, the number of experts.
        router: the weights of the experts. `token`: one learned router per place gives weights for each token (Shazeer
            et al., 2017). `example`: weights for each example, from the mean over its real tokens. Causal layers, and
            terms that read another text, use `token` in its place, because a mean would include later tokens.
            `random`: no weights; while training, each projection of each place takes a random expert in every batch,
            and otherwise the mean of all experts (AdaMix; Wang et al., 2022). `attention`: each token attends to the
            outputs of the experts, which are frozen (AdapterFusion; Pfeiffer et al., 2021); `unipelt.fuse_tasks`
            makes such a mixture from trained tasks.
        top_k: k, the number of experts with a weight above 0; None for all. Only for `token` and `example`.
        balance: the factor of the load-balancing loss (Fedus et al., 2022), which the model adds to its loss while
            training. With 0 there is no such loss. Only for `token` and `example`.
    """

    experts: int = 4
    router: Literal["token", "example", "random", "attention"] = "token"
    top_k: int | None = None
    balance: float = omitted_if_default(0.0)

    def __post_init__(self) -> None:
        check_fields(self)
        if not 2 <= self.experts <= MOST_EXPERTS:
            raise ConfigError(f"experts must be from 2 to {MOST_EXPERTS}, not {show(self.experts)}")
        if self.top_k is not None and not self.weighs:
            raise ConfigError(f"top_k is of the routers token and example; the router {self.router} chooses no experts")
        if self.top_k is not None and not 1 <= self.top_k <= self.experts:
            raise ConfigError(f"top_k must be from 1 to {self.experts}, the number of experts, not {show(self.top_k)}")
        if self.balance and not self.weighs:
            raise ConfigError(f"balance is of the routers token and example, not of {self.router}; leave it out")
        if self.balance and self.top_k in (None, self.experts):
            raise ConfigError("balance needs a top_k below experts; without one every expert has the same load")
        if not 0 <= self.balance <= 1000:
            raise ConfigError(f"balance must be from 0 to 1000, not {show(self.balance)}")

    @property
    def weighs(self) -> bool:
        """Whether a learned router gives each expert a weight."""
        return self.router in ("token", "example")
