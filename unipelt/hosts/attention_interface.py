"""Transformers' attention interface: the modules that use it, and the attention function that a module calls."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, PreTrainedConfig

ATTENTION = "unipelt"

BACK_ENDS = ("eager", "sdpa")
"""Back-ends that take further keys and a mask for them, as a prefix in the softmax of the text needs."""


def uses_interface(attention: Any) -> bool:
    """Return whether a module's code calls Transformers' attention interface, where a prefix can enter."""
    names = vars(sys.modules[type(attention).__module__]).values()
    known = any(value is AttentionInterface or isinstance(value, AttentionInterface) for value in names)
    return known and isinstance(getattr(attention, "config", None), PreTrainedConfig)


def check_back_end(name: str | None) -> None:
    """Raise `ValueError` for an attention back-end that cannot take a prefix into the text's softmax."""
    if name not in BACK_ENDS:
        raise ValueError(
            f"a prefix in the softmax of the text works with the attention back-ends {' and '.join(BACK_ENDS)}, not "
            f"{name!r}; call model.set_attn_implementation('sdpa'), or give the prefix a softmax of its own "
            "(prefix.softmax: own), which works with every back-end"
        )


def attention_function(module: Any, config: PreTrainedConfig) -> tuple[str, Callable[..., tuple[Tensor, Any]]]:
    """Return the name and the function of the attention back-end that a configuration chooses for a module.

    Raises:
        ValueError: there is no such back-end, or the file of the module has no `eager_attention_forward`.
    """
    name = config._attn_implementation
    if name in (None, "eager"):  # Transformers takes None for eager
        # FSDP2 replaces the attention's class by a subclass from another file, so all base classes are searched
        for cls in type(module).__mro__:
            function = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
            if function is not None:
                return "eager", function
        raise ValueError(
            f"there is no eager_attention_forward beside {type(module).__name__}; "
            "call model.set_attn_implementation('sdpa')"
        )
    if name not in AttentionInterface():
        raise ValueError(f"Transformers has no attention back-end {name!r}; register it, or take 'sdpa'")
    return name, AttentionInterface()[name]


def redirect(attention: Any, name: str = ATTENTION) -> PreTrainedConfig:
    """Make a module call the attention function of a name, by default `attend`; return its former configuration.

    The module reads the name of its attention function from its configuration, so the module gets a changed copy.
    The model's own configuration does not change: masks are still built for the model's own back-end.
    """
    host: PreTrainedConfig = attention.config
    own = copy.copy(host)
    own._attn_implementation = name
    attention.config = own
    return host


def is_causal(module: Any, kwargs: dict[str, Any]) -> bool:
    """Return whether the attention is causal, by the rule of Transformers' sdpa."""
    said = kwargs.get("is_causal")
    return getattr(module, "is_causal", True) if said is None else said
