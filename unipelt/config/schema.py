"""Dataclasses from plain types, of JSON, YAML or the command line, and back: every key and type is checked."""

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
"""No size or scale is meant to be above this; a larger one is a slip, or would fill the memory."""

_KINDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text"}


class ConfigError(ValueError):
    """A configuration that cannot be meant; the message says which field, what was seen and what is possible."""


def check_fields(part: Any, *positive: str, skip: tuple[str, ...] = ()) -> None:
    """Check every field's type, and that some are above 0; an integer may stand for a float, a list for a tuple."""
    hints = get_type_hints(type(part))
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
        hint: the type: `int`, `float`, `bool`, `str`, a `Literal`, a tuple of one of these, a dataclass, or one of
            all these or None.
        value: an integer may stand for a float, and a list, or one text, for a tuple of texts. A tuple of integers
            may be a range, text such as "6-11", or, where None is possible, "all".
        where: what the value is called in an error.

    Returns:
        The value, of exactly that type.

    Raises:
        ConfigError: it is not of that type; or not finite.
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
    """The integers of a range, or of text such as "6-11", both ends included."""
    if isinstance(value, range):
        return list(value)
    match = re.fullmatch(r"(\d{1,4})-(\d{1,4})", value)
    if match is None:
        raise ConfigError(f'{where} must be a list of integers or text such as "0-5", not {show(value)}')
    return list(range(int(match[1]), int(match[2]) + 1))


def build(cls: type[Any], values: Any, where: str, apart: Sequence[str] = (), also: Sequence[str] = ()) -> Any:
    """Build a dataclass from plain types, checking every key and type on the way down.

    Args:
        cls: the dataclass.
        values: a mapping of its fields' names.
        where: what it is called in an error.
        apart: fields that have no key here.
        also: keys that an error names besides.

    Raises:
        ConfigError: a key is not known, or a value is not of its field's type.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or 'a configuration'} must be a mapping, not {show(values)}")
    hints = get_type_hints(cls)
    names = [item.name for item in fields(cls) if item.name not in apart]
    for key in values:
        if key not in names:
            meant = suggest(key, [*names, *also], f"the keys here are {', '.join([*names, *also])}")
            raise ConfigError(f"unknown key {show(_join(where, str(key)))}; {meant}")
    given = {key: convert(hints[key], value, _join(where, key)) for key, value in values.items()}
    try:
        return cls(**given)
    except ConfigError as error:
        raise ConfigError(_join(where, str(error))) from None


def omitted_if_default(default: Any) -> Any:
    """A field that is left out of what is written where it has its default.

    So configurations from before the field existed, and folders named after them, stay the same.
    """
    return field(default=default, metadata={"later": True})


def to_plain(part: Any) -> dict[str, Any]:
    """A dataclass's fields as plain types, less those that came later and have their default."""
    values = {
        item.name: getattr(part, item.name)
        for item in fields(part)
        if not (item.metadata.get("later") and getattr(part, item.name) == item.default)
    }
    return {name: to_plain(value) if dataclasses.is_dataclass(value) else value for name, value in values.items()}


def overlay(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Values with changes laid over them, mappings within both merged in the same way."""
    merged = dict(values)
    for key, change in changes.items():
        old = merged.get(key)
        nested = isinstance(change, Mapping) and isinstance(old, dict)
        merged[key] = overlay(old, change) if nested else change  # type: ignore[arg-type]
    return merged


def read_mapping(path: str | Path, most: int | None = None) -> dict[str, Any]:
    """Read a JSON or YAML file that holds one mapping, of at most so many bytes.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: it holds no such mapping.
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
    """Nested mappings as one, with dots in its keys: `{"lora": {"rank": 4}}` is `{"lora.rank": 4}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{where}{key}.") if isinstance(value, Mapping) else {f"{where}{key}": value}
    return flat
