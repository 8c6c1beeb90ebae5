"""Further submodules: each is a function whose result is added to what a part of a layer gives.

Shapes: B examples, T tokens, I what the place is given, O what it gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from unipelt.config.methods import SUBMODULES, SubmoduleConfig, UniPELTConfig
from unipelt.config.schema import ConfigError
from unipelt.submodules.gate import Gates, Slot, as_many_rows, product
from unipelt.submodules.lora import Rows, matrix_of, own_rows


class Shared(nn.Module):
    """Parameters that all modules of a submodule in a stack share; the owner of the stack's layers holds them.

    Those who share them refer to this module, and a replica of theirs (`nn.DataParallel`) still does. So the replica of
    the owner says, at each of its passes, whose parameters are to be read in its thread (`enter_shared`).
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self._replicas: dict[int, Any] = {}

    def here(self) -> Any:
        """Where to read the parameters, as attributes: this module, or its replica in a pass of that."""
        if torch.compiler.is_compiling():
            return self
        return self._replicas.get(get_ident(), self)

    def enter(self) -> None:
        """Begin a pass of this module's owner in this thread."""
        if not torch.compiler.is_compiling():
            self._replicas[get_ident()] = self

    def leave(self) -> None:
        """End it."""
        if not torch.compiler.is_compiling():
            self._replicas.pop(get_ident(), None)

    def has_parameters(self) -> bool:
        """Whether there is anything in it."""
        return bool(self._parameters)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return self.name


@dataclass(frozen=True)
class Spot:
    """What a submodule is told of its place.

    Attributes:
        place: its name (`unipelt.config.Place`).
        inputs: I, width of what the place is given.
        outputs: O, width of what it gives.
        weight: for its type and its device: the host's own weight, frozen, or one like it where that is quantised.
        shared: what all modules of this submodule in a stack share: parameters, as its attributes; whichever module
            comes first makes them. A module refers to it in a tuple, `self.shared = (spot.shared,)`, since it is no
            part of it, and reads them in `forward` as attributes of `self.shared[0].here()`.
        host: the projection.
        rows: which of its outputs are meant.
    """

    place: str
    inputs: int
    outputs: int
    weight: Tensor
    shared: Shared
    host: Any
    rows: Rows

    def matrix(self) -> Tensor:
        """The projection's weight as it is now, the rows that are meant: (O, I)."""
        return matrix_of(self.host, self.rows)

    def bias(self) -> Tensor | None:
        """Its bias, (O,), if it has one."""
        return None if self.host.bias is None else own_rows(self.host.bias, self.rows)


class Term(nn.Module):
    """A submodule at one place: `y + g f(x, y)`; g = 1 without a gate.

    Attributes:
        name: of the submodule.
        function: computes the term f(x, y), (B, T, O), from x (B, T, I) and y (B, T, O).
        rows: which outputs of the host are y, where it computes several.
        gates: computes g from x; None without a gate.
        tokens: brings the token weights of the pass; None where the gate does without.
        gate: brings g, where the layer's attention computes it for all (`GateConfig.shared`); else None.
        source: brings x, where it is not what the host is given; else None.
        crosses: whether x is of another text than the layer's own.
        skips_ungated_calls: the host is also called for something that no gate belongs to; leave that alone.
    """

    def __init__(
        self, name: str, function: nn.Module, rows: Rows, gates: Gates | None, tokens: Slot | None, source: Slot | None
    ) -> None:
        super().__init__()
        self.name = name
        self.function = function
        self.rows = rows
        self.gates = gates
        self.tokens = tokens
        self.gate: Slot | None = None
        self.source = source
        self.crosses = False
        self.skips_ungated_calls = False

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """What the host gave, with the term.

        Args:
            x: (B, T, I), what the host was given.
            out: (B, T, all outputs of the host).
        """
        if self.source is not None:
            taken = self.source.take()
            assert taken is not None
            x = taken
        if self.rows.count == out.shape[-1]:
            return self._add(x, out)
        groups = out.unflatten(-1, (self.rows.groups, -1))
        size = groups.shape[-1]
        before, own, after = groups.split(
            (self.rows.start, self.rows.size, size - self.rows.start - self.rows.size), dim=-1
        )
        own = self._add(x, own.flatten(-2)).unflatten(-1, (self.rows.groups, self.rows.size))
        return torch.cat([before, own, after], dim=-1).flatten(-2)

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        if self.gate is not None:
            gate = self.gate.take()
            assert gate is not None
        elif self.gates is not None:
            weights = None if self.tokens is None else self.tokens.take()
            gate = self.gates(product(x, self.gates, weights=weights)[0], weights)
        else:
            return y + self.function(x, y)
        return torch.addcmul(y, as_many_rows(gate, y), self.function(x, y))

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return self.name


def add_terms(host: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """Forward hook of a projection: its terms, in the order in which they were put there."""
    for name in host.unipelt_terms:
        term = getattr(host, name)
        slot = term.gate or term.tokens
        if term.skips_ungated_calls and slot is not None and slot.is_empty():
            continue
        out = term(args[0], out)
    return out


def add_to_input(host: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Forward pre-hook of a projection: the terms of what it is given."""
    x = args[0]
    for name in host.unipelt_inputs:
        x = getattr(host, name)(x, x)
    return (x, *args[1:])


def hand_on(host: Any, args: tuple[Tensor, ...]) -> None:
    """Forward pre-hook of a projection whose input terms elsewhere read."""
    for slot in host.unipelt_readers:
        slot.put(args[0])


def enter_shared(owner: Any, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of a stack's owner."""
    for module in _shared(owner):
        module.enter()


def leave_shared(owner: Any, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of a stack's owner, called after a failure too."""
    for module in _shared(owner):
        module.leave()


def _shared(owner: Any) -> list[Shared]:
    return [module for module in owner._modules.values() if isinstance(module, Shared)]


MODULES: dict[type[Any], Callable[[Any, Spot], nn.Module]] = {}
"""What builds a submodule's function, by its configuration's class."""


def register_submodule(
    name: str, config: type[SubmoduleConfig], build: Callable[[Any, Spot], nn.Module]
) -> type[SubmoduleConfig]:
    """Make a submodule of your own known: it gets gates, a configuration, saving, counting and removal.

        @dataclass(frozen=True)
        class ShiftConfig(unipelt.SubmoduleConfig):
            places: tuple[Place, ...] = ("value",)
            start: float = 0.0

        class Shift(nn.Module):
            def __init__(self, config: ShiftConfig, spot: unipelt.Spot) -> None:
                super().__init__()
                self.shift = nn.Parameter(spot.weight.new_full((spot.outputs,), config.start))

            def forward(self, x: Tensor, y: Tensor) -> Tensor:
                return self.shift.expand_as(y)

        unipelt.register_submodule("shift", ShiftConfig, Shift)
        unipelt.inject(model, {"preset": "lora", "shift": {"gate": True}})

    Args:
        name: a name in Python; its key in a configuration, and the first part of its gates' names.
        config: a frozen dataclass, with defaults, whose `places` say where it is added.
        build: makes the module of one place, from the configuration and a `Spot`: `module(x, y)` gives the term,
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
