"""Import names of a package on first access (PEP 562), so that importing the package is fast."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], set[str]]]:
    """Return a package's `__getattr__` and `__dir__`.

    Args:
        package: the package's `__name__`.
        modules: by name, the module of the package that defines the name.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(modules[name]), name)
        setattr(sys.modules[package], name, value)  # so that `get` runs once for each name
        return value

    def names() -> set[str]:
        return {*vars(sys.modules[package]), *modules}

    return get, names
