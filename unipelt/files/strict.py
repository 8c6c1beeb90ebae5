"""A strict reader for JSON and YAML from untrusted files. It returns plain values only.

Plain values are texts, finite numbers, truth values, None, and lists and mappings of plain values. The names in a
mapping are texts. All code that reads a configuration, a manifest or a record uses this reader, so the rest of the code
gets no other kind of value. A file that is too large, too deeply nested or has too many aliases is refused quickly.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from unipelt.files.messages import shorten, show

MOST_BYTES = {"JSON": 64 * 2**20, "YAML": 2**20}
"""The largest accepted sizes of files, in bytes. YAML takes seconds per megabyte, and people write it by hand."""
MOST_VALUES = 100_000
"""The largest accepted number of values in a YAML file. Each alias counts as all the values that it repeats."""
DEEPEST = 100
"""The largest accepted depth of nesting."""
_MOST_BITS = 14_000  # Python prints whole numbers of at most 4300 digits, which are about 14,280 bits


class PlainError(ValueError):
    """A text does not hold plain values. The message names the problem, but not the file."""


def read_plain(path: str | Path, most: int | None = None) -> Any:
    """Read the plain value in a file of JSON, or of YAML if the file's name does not end in `.json`.

    Args:
        path: path of the file.
        most: the largest accepted size of the file, in bytes; by default from `MOST_BYTES`.

    Raises:
        OSError: the file does not exist, cannot be read, or is a pipe or a device.
        PlainError: the file is too large or does not hold plain values.
    """
    path = Path(path)
    most = MOST_BYTES[language(path)] if most is None else most
    content = read_bytes(path, most + 1)
    if len(content) > most:
        raise PlainError(f"it is larger than {most // 2**20} MB")
    return parse_json(content) if language(path) == "JSON" else parse_yaml(content)


def language(path: Path) -> str:
    """Return the language of a file by its name: `JSON` for a name that ends in `.json`, else `YAML`."""
    return "JSON" if path.suffix == ".json" else "YAML"


def read_bytes(path: Path, most: int = -1) -> bytes:
    """Return the content of a file, or its first `most` bytes if `most` is not negative.

    Raises:
        OSError: the file does not exist, cannot be read, or is a pipe or a device.
    """
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:  # a NUL or half a surrogate pair
        raise FileNotFoundError(errno.ENOENT, "no file has such a name", show(str(path))) from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "a pipe or a device, and not a file", str(path))
    with open(path, "rb") as file:
        return file.read(most)


def parse_json(content: bytes) -> Any:
    """Return the plain value in a JSON text in UTF-8. Raise `PlainError`, also for a repeated name in a mapping."""
    try:
        value = json.loads(_text(content), object_pairs_hook=_mapping)
    except RecursionError as error:
        raise PlainError(_TOO_DEEP) from error
    except PlainError:
        raise
    except ValueError as error:
        raise PlainError(shorten(error)) from error
    _check(value)
    return value


def parse_yaml(content: bytes | str) -> Any:
    """Return the plain value in a YAML text in UTF-8. Raise `PlainError`, also for tags and circular aliases."""
    try:
        loader = _PlainLoader(content if isinstance(content, str) else _text(content))
        try:
            value = loader.get_single_data()
        finally:
            loader.dispose()
    except PlainError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2020-13-45, a number of 5000 digits
        raise PlainError(str(error)) from error
    _check(value)
    return value


_TOO_DEEP = f"it is nested more than {DEEPEST} deep"


def _text(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise PlainError(f"byte 0x{byte:02x} at position {error.start} is not UTF-8; save it as UTF-8") from error


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise PlainError(f"{show(key)} stands twice in one mapping; keep one of them")
        values[key] = value
    return values


def _check(value: Any) -> None:
    """Raise `PlainError` for the first value inside a value that is not plain."""
    left: list[tuple[Any, tuple[str, ...]]] = [(value, ())]
    while left:
        value, path = left.pop()
        if len(path) > DEEPEST:
            raise PlainError(_TOO_DEEP)
        if isinstance(value, dict):
            for key, inner in value.items():
                if not isinstance(key, str):
                    where = _place((*path, f".{show(key)}"))
                    raise PlainError(f"{where}: a name must be a text; put it in quotes")
                _check_text(key, path)
                left.append((inner, (*path, f".{key}")))
        elif isinstance(value, list):
            left += [(inner, (*path, f"[{index}]")) for index, inner in enumerate(value)]
        elif isinstance(value, str):
            _check_text(value, path)
        elif isinstance(value, float):
            if not math.isfinite(value):
                raise PlainError(f"{_place(path)} is {value}, which is no finite number")
        elif isinstance(value, int):
            if value.bit_length() > _MOST_BITS:
                raise PlainError(f"{_place(path)} is a whole number of {value.bit_length()} bits")
        elif value is not None:
            kind = type(value).__name__
            raise PlainError(f"{_place(path)} is a {kind}, neither text nor number; put it in quotes if it is a text")


def _check_text(text: str, path: tuple[str, ...]) -> None:
    """Raise `PlainError` for a text with a NUL or half a surrogate pair.

    JSON can hold half a surrogate pair, but no file can. No name and no path can hold a NUL.
    """
    if text.isascii() and "\0" not in text:
        return
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise PlainError(f"{_place(path)} holds {show(text)}, with a character that no text has")


def _place(path: tuple[str, ...]) -> str:
    where = "".join(path).removeprefix(".") or "it"
    return where if len(where) <= 200 else f"{where[:200]}..."


class _PlainLoader(yaml.SafeLoader):
    """YAML's safe loader, which refuses tags, repeated names, circular or too many aliases, and deep nesting."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, int] = {}  # number of values in each node, by the node's id

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if getattr(event, "tag", None) is not None:
            raise PlainError(f"line {line}: the tag {show(event.tag)} is not allowed")
        if self._depth > DEEPEST:
            raise PlainError(_TOO_DEEP)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent) and id(node) not in self._sizes:
            raise PlainError(f"line {line}: {show(event.anchor)} stands within itself")
        if node is not None and id(node) not in self._sizes:
            children = _children(node)
            self._sizes[id(node)] = 1 + sum(self._sizes[id(child)] for child in children)
            if self._sizes[id(node)] > MOST_VALUES:
                raise PlainError(f"it stands for more than {MOST_VALUES:,} values")
            if isinstance(node, yaml.MappingNode):
                _check_names(node)
        return node


def _whole_number(loader: _PlainLoader, node: yaml.ScalarNode) -> Any:
    """Return the value of a YAML whole number. `1:10` is a text, not a number in base 60, and `010` is refused."""
    text = str(loader.construct_scalar(node))
    if ":" in text:
        return text
    value = loader.construct_yaml_int(node)
    digits = text.replace("_", "").lstrip("+-")
    if digits.isdigit() and int(digits) != abs(value):
        line = node.start_mark.line + 1
        raise PlainError(
            f"line {line}: {text} is {value} in YAML, which reads a number that starts with 0 to the base 8; write "
            f"{int(digits)}, or put it in quotes"
        )
    return value


def _number(loader: _PlainLoader, node: yaml.ScalarNode) -> Any:
    """Return the value of a YAML number with a decimal point. `1:10.5` is a text."""
    text = str(loader.construct_scalar(node))
    return text if ":" in text else loader.construct_yaml_float(node)


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _whole_number)
_PlainLoader.add_constructor("tag:yaml.org,2002:float", _number)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _check_names(node: yaml.MappingNode) -> None:
    seen: set[Hashable] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise PlainError(f"line {key.start_mark.line + 1}: a list or a mapping stands where a name should")
        if (key.tag, key.value) in seen:
            raise PlainError(f"line {key.start_mark.line + 1}: {show(key.value)} stands twice; keep one of them")
        seen.add((key.tag, key.value))
