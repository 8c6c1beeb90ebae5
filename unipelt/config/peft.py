"""Configurations of PEFT's tuners as submodules: the key `peft` of a method. PEFT is not imported here."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from unipelt.config.groups import GROUPS, Group
from unipelt.config.parts import LINEAR, Place
from unipelt.config.schema import ConfigError, check_fields
from unipelt.config.submodule import SubmoduleConfig
from unipelt.files.messages import show

KEY = "peft"
"""The key of a method that holds PEFT's tuners."""


class Options(dict[str, Any]):
    """Options of one tuner by PEFT's names, as plain values. The values do not change, so a hash exists."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(json.dumps(self, sort_keys=True))


@dataclass(frozen=True)
class PeftTermConfig(SubmoduleConfig):
    """One tuner of PEFT as a submodule (`unipelt.submodules.peft_term`).

    In a dict or a file, the key `peft` holds one tuner, or several under names of their own:

        {"preset": "lora", "peft": {"type": "OFT", "oft_block_size": 16, "places": ["query", "value"]}}
        {"preset": "lora", "peft": {"first": {"type": "OFT"}, "second": {"type": "BOFT", "gate": false}}}

    Attributes:
        gate: whether a gate scales the term.
        places: the projections with a layer of the tuner (`unipelt.config.parts.LINEAR`).
        type: PEFT's name of the tuner, such as `OFT`.
        label: the tuner's name in the method; by default `type` in lower case. The submodule is called `peft_LABEL`.
        options: the other options of the tuner, by the names in PEFT's configuration. PEFT checks them.
    """

    places: tuple[Place, ...] = ("query", "value")
    type: str = ""
    label: str = ""
    options: Mapping[str, Any] = field(default_factory=Options)

    own: ClassVar[tuple[str, ...]] = ("gate", "places", "type")
    """The keys of this package; all other keys are options of the tuner."""

    def __post_init__(self) -> None:
        if not isinstance(self.type, str) or not self.type:
            raise ConfigError(f"type must be PEFT's name of a tuner, such as OFT or VERA, not {show(self.type)}")
        object.__setattr__(self, "type", self.type.upper())
        object.__setattr__(self, "label", self.label or self.type.lower())
        check_fields(self, skip=("options",))
        if not re.fullmatch(r"[A-Za-z]\w*", self.label, re.ASCII):
            raise ConfigError(
                f"the name of a tuner has letters, digits and _, and starts with a letter: not {show(self.label)}"
            )
        if not self.places or len(set(self.places)) != len(self.places) or not {*self.places} <= {*LINEAR}:
            raise ConfigError(
                f"places must name one or more projections, {', '.join(LINEAR)}, none of them twice: a tuner of PEFT's "
                "is a layer around a projection"
            )
        for name, value in self.options.items():
            if name in {item.name for item in fields(self)} or not isinstance(name, str):
                raise ConfigError(f"options of {self.type} cannot name {show(name)}")
            if not _is_plain(value):
                raise ConfigError(f"{name} must be a plain value, as JSON has it, not {show(value)}")
        object.__setattr__(self, "options", Options(sorted(self.options.items())))

    @property
    def name(self) -> str:
        """The submodule's name in a model."""
        return f"{KEY}_{self.label}"

    def to_dict(self) -> dict[str, Any]:
        """Return the tuner as plain types, as a method holds it. `gate` and `places` are left out at their default."""
        own: dict[str, Any] = {"type": self.type}
        if not self.gate:
            own["gate"] = False
        if self.places != type(self).places:
            own["places"] = list(self.places)
        return {**own, **self.options}


def read_tuners(values: Any) -> tuple[PeftTermConfig, ...]:
    """Return the tuners under the key `peft`: one tuner, or a mapping of names to tuners. Raise `ConfigError`."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{KEY} must be a mapping, not {show(values)}")
    if "type" in values:
        return (_read_tuner(values, "", KEY),)
    if not values or not all(value is None or isinstance(value, Mapping) for value in values.values()):
        raise ConfigError(
            f'{KEY} must name the type of its tuner, as in {{"type": "OFT"}}, or map names to such mappings, not '
            f"{show(dict(values))}"
        )
    named = {name: value for name, value in values.items() if value is not None}
    return tuple(_read_tuner(value, name, f"{KEY}.{name}") for name, value in named.items())


def write_tuners(parts: Sequence[Any]) -> dict[str, Any]:
    """Return tuners as the value of the key `peft`, in the form that `read_tuners` reads."""
    if len(parts) == 1 and parts[0].label == parts[0].type.lower():
        written: dict[str, Any] = parts[0].to_dict()
        return written
    return {part.label: part.to_dict() for part in parts}


def tuner_names(values: Any) -> set[str]:
    """Return the names of the submodules under the key `peft` of a record, which is not checked."""
    if not isinstance(values, Mapping):
        return set()
    labels = [values["type"].lower()] if isinstance(values.get("type"), str) else values
    return {f"{KEY}_{label}" for label in labels}


def _read_tuner(values: Mapping[str, Any], label: str, where: str) -> PeftTermConfig:
    given = {name: values[name] for name in PeftTermConfig.own if name in values}
    options = Options({name: value for name, value in values.items() if name not in PeftTermConfig.own})
    try:
        return PeftTermConfig(**given, label=label, options=options)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _is_plain(inner) for name, inner in value.items())
    if isinstance(value, (list, tuple)):
        return all(_is_plain(inner) for inner in value)
    return value is None or isinstance(value, (bool, int, float, str))


GROUPS[KEY] = Group(PeftTermConfig, read_tuners, write_tuners)
