"""Caches of keys and values: under which name a model takes one, and which of them are understood."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Cache

CACHE_NAMES = ("past_key_values", "cache")
"""The names of a cache among a model's arguments, in one version of Transformers or another."""


def find_cache(given: Mapping[str, Any]) -> Cache | None:
    """Return the cache among a model's arguments.

    Args:
        given: the arguments, by name.

    Raises:
        ValueError: it has a name, or a form, that is not known, so that its length cannot be told.
    """
    for name, value in given.items():
        if isinstance(value, Cache) and name not in CACHE_NAMES:
            raise ValueError(
                f"a cache was given as {name}, a name that this version of unipelt does not know; call the model with "
                "use_cache=False"
            )
    for name in CACHE_NAMES:
        cache = given.get(name)
        if cache is not None and not isinstance(cache, Cache):
            raise ValueError(
                f"{name} is a {type(cache).__name__}, and not a Cache of Transformers, so its length is not known; "
                "call the model with use_cache=False"
            )
        if cache is not None:
            return cache
    return None
