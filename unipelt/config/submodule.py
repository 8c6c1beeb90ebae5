"""The base class for configurations of further submodules, and the registry of these classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args, get_type_hints

from unipelt.config.gate import GateConfig
from unipelt.config.mixture import MixtureConfig
from unipelt.config.parts import AnyPlace
from unipelt.config.schema import ConfigError, check_fields


@dataclass(frozen=True)
class SubmoduleConfig:
    """The base class for configurations of further submodules, also of those from `unipelt.register_submodule`.

    Attributes:
        gate: whether a gate scales the submodule's term.
        places: the places where the submodule is added, each a `Place`. Each subclass sets a default.
        mixture: several terms at each place in place of one; None for one. A keyword argument.
    """

    gate: bool = True
    places: tuple[AnyPlace, ...] = ()
    mixture: MixtureConfig | None = field(default=None, metadata={"later": True}, kw_only=True)

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.places or len(set(self.places)) != len(self.places):
            possible = get_args(get_args(get_type_hints(type(self))["places"])[0])
            raise ConfigError(f"places must name one or more of {', '.join(possible)}, none of them twice")

    @property
    def name(self) -> str:
        """The submodule's name, in a configuration and in a model."""
        return next(name for name, cls in SUBMODULES.items() if cls is type(self))

    def misfit(self, gates: GateConfig, *, causal: bool, generates: bool, norm_first: bool) -> str:
        """Return the reason why a stack of a model cannot have this submodule; empty if it can.

        Args:
            gates: the computation of the gates.
            causal: whether the stack's attention is causal.
            generates: whether the model generates text.
            norm_first: whether a norm of a layer comes before the layer's attention.
        """
        return ""


SUBMODULES: dict[str, type[SubmoduleConfig]] = {}
"""The configuration classes of further submodules by name, with those from `unipelt.register_submodule`."""
