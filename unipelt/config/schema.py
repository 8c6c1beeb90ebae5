"""Conversion of dataclasses from and to plain types (JSON, YAML, command line). Every key and type is checked."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from unipelt.files.messages import show, show_path, suggest
from unipelt.files.strict import PlainError, language, read_plain

LARGEST = 1_000_000
"""The largest size or scale that is accepted. A larger one is a mistake or would fill the memory."""

_HINTS: dict[type, dict[str, Any]] = {}
_MOST_INDICES = 10_000
"""The largest number of integers that a range in a file may stand for."""
_KINDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text"}


class ConfigError(ValueError):
    """A configuration is wrong. The message names the field, the value and the possible values."""


def type_hints(kind: type) -> dict[str, Any]:
    """Return the type of each field of a dataclass. The types are kept, because it takes long to find them."""
    if kind not in _HINTS:
        _HINTS[kind] = get_type_hints(kind)
    return _HINTS[kind]


def check_fields(part: Any, *positive: str, skip: tuple[str, ...] = ()) -> None:
    """Check the type of every field of a dataclass, and convert the values as `convert` does.

    Args:
        part: the dataclass instance.
        positive: names of the fields that must be above 0 and at most `LARGEST`.
        skip: names of the fields whose type is not checked.

    Raises:
        ConfigError: a field has a wrong type or value.
    """
    hints = type_hints(type(part))
    for name, hint in ((item.name, hints[item.name]) for item in fields(part) if item.name not in skip):
        object.__setattr__(part, name, convert(hint, getattr(part, name), name))
    for name in positive:
        if not getattr(part, name) > 0:
            raise ConfigError(f"{name} must be above 0, not {show(getattr(part, name))}")
        if getattr(part, name) > LARGEST:
            raise ConfigError(f"{name} must be at most {LARGEST:,}, not {show(getattr(part, name))}")


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def convert(hint: Any, value: Any, where: str) -> Any:
    """Check a value against a field's type.

    Args:
        hint: the type: `int`, `float`, `bool`, `str`, a `Literal`, a tuple of one of these, or a dataclass. Each of
            these types may be combined with None.
        value: the value. An integer is accepted for a float. A list is accepted for a tuple, and a single text for a
            tuple of texts. A range or a text such as "6-11" is accepted for a tuple of integers. If the type is a
            tuple of integers or None, the text "all" is accepted for None.
        where: the name of the value in an error.

    Returns:
        The value, with exactly that type.

    Raises:
        ConfigError: the value does not have that type, or is not finite.
    """
    origin, choices = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        choice = next(choice for choice in choices if choice is not type(None))
        if value is None or (value == "all" and choice == tuple[int, ...]):
            return None
        return convert(choice, value, where)
    if origin is Literal:
        if value not in choices:
            raise ConfigError(f"{where} must be {' or '.join(choices)}, not {show(value)}")
        return value
    if origin is tuple:
        if choices[0] is int and isinstance(value, (range, str)):
            value = _indices(value, where)
        if isinstance(value, str) and (choices[0] is str or get_origin(choices[0]) is Literal):
            value = [value]
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} must be a list, not {show(value)}")
        return tuple(convert(choices[0], item, where) for item in value)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, where)  # type: ignore[arg-type]
    if hint is float and type(value) is int and abs(value) <= sys.float_info.max:
        value = float(value)
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        raise ConfigError(f"{where} must be {_KINDS[hint]}, not {show(value)}")
    return value


def _indices(value: range | str, where: str) -> list[int]:
    """Return the integers of a range, or of a text such as "6-11" with both ends included."""
    if isinstance(value, range):
        return list(value)
    match = re.fullmatch(r"(\d{1,6})-(\d{1,6})", value)
    if match is None:
        raise ConfigError(f'{where} must be a list of integers or text such as "0-5", not {show(value)}')
    numbers = range(int(match[1]), int(match[2]) + 1)
    if len(numbers) > _MOST_INDICES:
        raise ConfigError(f"{where} has {len(numbers):,} numbers, and a range may have {_MOST_INDICES:,}")
    return list(numbers)


def build(
    cls: type[Any], values: Any, where: str, built: Mapping[str, Any] | None = None, also: Sequence[str] = ()
) -> Any:
    """Build a dataclass from plain types. Every key and type is checked, also in nested dataclasses.

    Args:
        cls: the dataclass.
        values: a mapping of field names to values.
        where: the name of the mapping in an error.
        built: values of fields that are built already; `values` may not contain these fields.
        also: further keys that an error lists as possible keys.

    Raises:
        ConfigError: a key is not known, or a value does not have its field's type.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or 'a configuration'} must be a mapping, not {show(values)}")
    hints, built = type_hints(cls), built or {}
    names = [item.name for item in fields(cls) if item.name not in built]
    for key in values:
        if key not in names:
            meant = suggest(key, [*names, *also], f"the keys here are {', '.join([*names, *also])}")
            raise ConfigError(f"unknown key {show(_join(where, str(key)))}; {meant}")
    given = {key: convert(hints[key], value, _join(where, key)) for key, value in values.items()}
    try:
        return cls(**given, **built)
    except ConfigError as error:
        raise ConfigError(_join(where, str(error))) from None


def omitted_if_default(default: Any) -> Any:
    """Return a dataclass field that `to_plain` omits if the field has its default.

    So configurations that are older than the field, and the names of folders for them, do not change.
    """
    return field(default=default, metadata={"later": True})


def to_plain(part: Any) -> dict[str, Any]:
    """Return a dataclass's fields as plain types, without the `omitted_if_default` fields that have their default."""
    values = {
        item.name: getattr(part, item.name)
        for item in fields(part)
        if not (item.metadata.get("later") and getattr(part, item.name) == item.default)
    }
    return {name: to_plain(value) if dataclasses.is_dataclass(value) else value for name, value in values.items()}


def overlay(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with changes merged into them. Nested mappings are merged in the same way."""
    merged = dict(values)
    for key, change in changes.items():
        old = merged.get(key)
        nested = isinstance(change, Mapping) and isinstance(old, dict)
        merged[key] = overlay(old, change) if nested else change  # type: ignore[arg-type]
    return merged


def read_mapping(path: str | Path, most: int | None = None) -> dict[str, Any]:
    """Read a JSON or YAML file that holds one mapping.

    Args:
        path: path of the file.
        most: the largest accepted size of the file in bytes, by default as in `read_plain`.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: the file cannot be read, is too large, or does not hold one mapping of plain values.
    """
    path = Path(path)
    try:
        values = read_plain(path, most)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise FileNotFoundError(f"there is no configuration file at {show_path(path)}") from error
    except OSError as error:
        raise ConfigError(f"{show_path(path)} cannot be read: {error.strerror}") from error
    except PlainError as error:
        raise ConfigError(f"{path} is not valid {language(path)}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold one mapping of names to values, not {type(values).__name__}")
    return values


def flatten(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping with dots in the keys: `{"lora": {"rank": 4}}` is `{"lora.rank": 4}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{where}{key}.") if isinstance(value, Mapping) else {f"{where}{key}": value}
    return flat
