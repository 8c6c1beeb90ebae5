"""Caches of keys and values: their names, which of them are understood, and the prefixes that belong to one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
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


_State = tuple[tuple[int, int], ...]
_PREFIXES: WeakKeyDictionary[Cache, WeakKeyDictionary[nn.Module, tuple[_State, Tensor]]] = WeakKeyDictionary()


def prefixes_beside(cache: Any, network: nn.Module) -> Tensor:
    """Return what a prefix network computes, `network()`: once for all passes that share a cache of keys and values.

    The prefixes are keys and values as those of the tokens in the cache are. They are computed anew where the cache is
    empty, where a parameter has changed, and where gradients are on.

    Args:
        cache: what the stack was given as its cache, or None.
        network: computes the prefixes from its parameters alone.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not isinstance(cache, Cache):
        return network()
    length = cache.get_seq_length()
    state = _state_of(network)
    if state is None or not isinstance(length, int):  # on the device, where reading it would wait
        return network()
    kept = _PREFIXES.setdefault(cache, WeakKeyDictionary())
    found = kept.get(network)
    if length == 0 or found is None or found[0] != state:
        found = kept[network] = (state, network())
    return found[1]


def _state_of(network: nn.Module) -> _State | None:
    """Return where the parameters lie and how often they were changed; None where PyTorch does not count that."""
    parameters = list(network.parameters())
    if any(parameter.is_inference() for parameter in parameters):
        return None
    return tuple((parameter.data_ptr(), parameter._version) for parameter in parameters)
