"""The registry of submodules, the facts that a builder receives, and the function that adds a user's submodule.

Shapes: B examples, T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from unipelt.config.groups import GROUPS
from unipelt.config.methods import UniPELTConfig
from unipelt.config.schema import ConfigError
from unipelt.config.submodule import SUBMODULES, SubmoduleConfig
from unipelt.submodules.outputs import OutputSlice, matrix_of, own_rows
from unipelt.submodules.term import SharedParameters


@dataclass(frozen=True)
class TargetInfo:
    """The facts about one place that the builder of a submodule receives.

    Attributes:
        place: the place's name (`unipelt.config.Place`).
        inputs: I, width of the place's input.
        outputs: O, width of the place's output.
        weight: a tensor with the type and the device for new parameters. It is the host's frozen weight, or a similar
            tensor where the host is quantised.
        shared: holds the parameters that all modules of this submodule in a stack share, as its attributes. The first
            module creates these parameters. A module keeps `shared` in a tuple, `self.shared = (spot.shared,)`, so
            that PyTorch does not register `shared` as a child. The module reads a parameter in `forward` as
            `self.shared[0]()["name"]`.
        host: the projection.
        rows: the outputs of the host that belong to the place.
    """

    place: str
    inputs: int
    outputs: int
    weight: Tensor
    shared: SharedParameters
    host: Any
    rows: OutputSlice

    def matrix(self) -> Tensor:
        """Return the present weight of the projection, (O, I): the rows that belong to the place."""
        return matrix_of(self.host, self.rows)

    def bias(self) -> Tensor | None:
        """Return the projection's bias, (O,), or None if the projection has no bias."""
        return None if self.host.bias is None else own_rows(self.host.bias, self.rows)


Spot = TargetInfo
"""An older name of `TargetInfo`."""

MODULES: dict[type[Any], Callable[[Any, TargetInfo], nn.Module]] = {}
"""The builder of each submodule, by the class of the submodule's configuration."""


def register_submodule(
    name: str, config: type[SubmoduleConfig], build: Callable[[Any, TargetInfo], nn.Module]
) -> type[SubmoduleConfig]:
    """Register a submodule of your own. The submodule then has gates, a configuration, saving, counting and removal.

        @dataclass(frozen=True)
        class ShiftConfig(unipelt.SubmoduleConfig):
            places: tuple[Place, ...] = ("value",)
            start: float = 0.0

        class Shift(nn.Module):
            def __init__(self, config: ShiftConfig, spot: unipelt.TargetInfo) -> None:
                super().__init__()
                self.shift = nn.Parameter(spot.weight.new_full((spot.outputs,), config.start))

            def forward(self, x: Tensor, y: Tensor) -> Tensor:
                return self.shift.expand_as(y)

        unipelt.register_submodule("shift", ShiftConfig, Shift)
        unipelt.inject(model, {"preset": "lora", "shift": {"gate": True}})

    Args:
        name: a Python identifier. It is the submodule's key in a configuration and the first part of its gates' names.
        config: a frozen dataclass with a default for every field. Its field `places` lists the places of the submodule.
        build: builds the module of one place from the configuration and a `TargetInfo`. `module(x, y)` returns the
            term, (B, T, O), for x (B, T, I) and y (B, T, O). The parameters have the type and the device of
            `spot.weight`.

    Returns:
        The configuration's class.

    Raises:
        ValueError: the name is not an identifier, the name or the class is taken, or the class is not a valid
            configuration.
    """
    taken = {"gates", "base", "head", *GROUPS, *UniPELTConfig.__dataclass_fields__}
    if not name.isidentifier() or name in taken:
        raise ValueError(f"a submodule's name is one in Python, and none of {', '.join(sorted(taken))}: not {name!r}")
    if not (isinstance(config, type) and issubclass(config, SubmoduleConfig)):
        raise ValueError("a submodule's configuration is a frozen dataclass that inherits from SubmoduleConfig")
    if SUBMODULES.get(name, config) is not config or (config in MODULES and SUBMODULES.get(name) is not config):
        raise ValueError(f"the name {name!r} or the class {config.__name__} belongs to another submodule")
    try:
        config()
    except (TypeError, ConfigError) as error:
        raise ValueError(f"{config.__name__}() must give a configuration: {error}") from error
    SUBMODULES[name] = config
    MODULES[config] = build
    return config
