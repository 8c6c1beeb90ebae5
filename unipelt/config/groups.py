"""Keys of a method that hold several submodules of one class, such as `peft`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Group:
    """A key of a method that may hold several submodules of one class.

    Attributes:
        part: the class of the submodules' configurations.
        read: converts the key's value, plain types, to configurations.
        write: the inverse of `read`.
    """

    part: type[Any]
    read: Callable[[Any], tuple[Any, ...]]
    write: Callable[[Sequence[Any]], dict[str, Any]]


GROUPS: dict[str, Group] = {}
"""The groups of submodules by key."""
