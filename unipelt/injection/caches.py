"""Caches of keys and values: their argument names, their supported form, and the prefixes that belong to a cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache

CACHE_NAMES = ("past_key_values", "cache")
"""The names of a model's argument with the cache, in the supported versions of Transformers."""


def find_cache(given: Mapping[str, Any]) -> Cache | None:
    """Return the cache among a model's arguments, or None.

    Args:
        given: the arguments, by name.

    Raises:
        ValueError: the cache has an unknown name or form, so its length is unknown, or is that of continuous batching.
    """
    for name, value in given.items():
        if isinstance(value, Cache) and name not in CACHE_NAMES:
            raise ValueError(
                f"a cache was given as {name}, a name that this version of unipelt does not know; call the model with "
                "use_cache=False"
            )
    for name in CACHE_NAMES:
        cache = given.get(name)
        check_paged(is_paged(cache))
        if cache is not None and not isinstance(cache, Cache):
            raise ValueError(
                f"{name} is a {type(cache).__name__}, and not a Cache of Transformers, so its length is not known; "
                "call the model with use_cache=False"
            )
        if cache is not None:
            return cache
    return None


def is_paged(cache: Any) -> bool:
    """Return whether a cache is that of continuous batching."""
    return type(cache).__name__ == "PagedAttentionCache"


def check_paged(paged: bool) -> None:
    """Raise `ValueError` for what continuous batching cannot do, if the pass is one of it (`paged`)."""
    if paged:
        raise ValueError(
            "continuous batching (generate_batch) puts all texts into one row, so it takes no prompt, and no prefix in "
            "the softmax of the text; give the prefix a softmax of its own (prefix.softmax: own), or call "
            "model.generate"
        )


def cached_tokens(cache: Any) -> int | None:
    """Return the number of tokens in a cache, 0 without one; None if the number would have to be read from the device.

    Args:
        cache: the cache that a stack or a layer got, or None.
    """
    if not isinstance(cache, Cache):
        return 0
    if cache.is_compileable:
        return None
    length = cache.get_seq_length()
    return length if isinstance(length, int) else None


_State = tuple[tuple[int, int], ...]
_PREFIXES: WeakKeyDictionary[Cache, WeakKeyDictionary[nn.Module, tuple[_State, Tensor]]] = WeakKeyDictionary()


def prefixes_beside(cache: Any, network: nn.Module) -> Tensor:
    """Return the prefixes of a network, computed once for all passes that share a cache of keys and values.

    The prefixes are kept beside the cache, as the keys and values of its tokens are. They are computed again if the
    cache is empty, if a parameter has changed, or if gradients are on.

    Args:
        cache: the cache that the stack got, or None.
        network: a module that computes the prefixes from its parameters alone.

    Returns:
        The result of `network()`: for a `PrefixNetwork`, keys and values, (attentions, 2, L, W).
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not isinstance(cache, Cache):
        return network()
    length = cache.get_seq_length()
    state = _state_of(network)
    if state is None or not isinstance(length, int):  # reading a length on the device would wait for it
        return network()
    kept = _PREFIXES.setdefault(cache, WeakKeyDictionary())
    found = kept.get(network)
    if length == 0 or found is None or found[0] != state:
        found = kept[network] = (state, network())
    return found[1]


def _state_of(network: nn.Module) -> _State | None:
    """Return the address and the version of each parameter; None for inference tensors, which have no version."""
    parameters = list(network.parameters())
    if any(parameter.is_inference() for parameter in parameters):
        return None
    return tuple((parameter.data_ptr(), parameter._version) for parameter in parameters)
