"""The registry of submodules: what builds each, what it is told, and how one of your own is added.

Shapes: B examples, T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from unipelt.config.methods import SUBMODULES, SubmoduleConfig, UniPELTConfig
from unipelt.config.schema import ConfigError
from unipelt.submodules.outputs import OutputSlice, matrix_of, own_rows
from unipelt.submodules.term import SharedParameters


@dataclass(frozen=True)
class TargetInfo:
    """What a submodule is told of its place.

    Attributes:
        place: its name (`unipelt.config.Place`).
        inputs: I, width of what the place is given.
        outputs: O, width of what it gives.
        weight: for its type and its device: the host's own weight, frozen, or one like it where that is quantised.
        shared: what all modules of this submodule in a stack share: parameters, as its attributes; whichever module
            comes first makes them. A module refers to it in a tuple, `self.shared = (spot.shared,)`, which makes no
            part of it, and reads them in `forward` as `self.shared[0]()["name"]`.
        host: the projection.
        rows: which of its outputs are meant.
    """

    place: str
    inputs: int
    outputs: int
    weight: Tensor
    shared: SharedParameters
    host: Any
    rows: OutputSlice

    def matrix(self) -> Tensor:
        """The projection's weight as it is now, the rows that are meant: (O, I)."""
        return matrix_of(self.host, self.rows)

    def bias(self) -> Tensor | None:
        """Its bias, (O,), if it has one."""
        return None if self.host.bias is None else own_rows(self.host.bias, self.rows)


Spot = TargetInfo
"""An older name of `TargetInfo`."""

MODULES: dict[type[Any], Callable[[Any, TargetInfo], nn.Module]] = {}
"""What builds a submodule's function, by its configuration's class."""


def register_submodule(
    name: str, config: type[SubmoduleConfig], build: Callable[[Any, TargetInfo], nn.Module]
) -> type[SubmoduleConfig]:
    """Make a submodule of your own known: it gets gates, a configuration, saving, counting and removal.

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
        name: a name in Python; its key in a configuration, and the first part of its gates' names.
        config: a frozen dataclass, with defaults, whose `places` say where it is added.
        build: makes the module of one place, from the configuration and a `TargetInfo`: `module(x, y)` gives the term,
            (B, T, O), for x (B, T, I) and y (B, T, O). Its parameters are of the type and on the device of
            `spot.weight`.

    Returns:
        The configuration's class.

    Raises:
        ValueError: the name cannot be one, or is taken; or the class is no configuration.
    """
    taken = {"adapter", "prefix", "lora", "gate", "gates", "base", "head", *UniPELTConfig.__dataclass_fields__}
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
