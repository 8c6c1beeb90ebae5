"""Transformers' attention interface: which modules use it, and which function serves a module."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, PreTrainedConfig

ATTENTION = "unipelt"

BACK_ENDS = ("eager", "sdpa")


def uses_interface(attention: Any) -> bool:
    """Whether a module's code goes through Transformers' attention interface, where a prefix can enter."""
    names = vars(sys.modules[type(attention).__module__]).values()
    known = any(value is AttentionInterface or isinstance(value, AttentionInterface) for value in names)
    return known and isinstance(getattr(attention, "config", None), PreTrainedConfig)


def check_back_end(name: str | None) -> None:
    """Raise `ValueError` for an attention back-end that a prefix does not support."""
    if name not in BACK_ENDS:
        raise ValueError(
            f"a prefix works with the attention back-ends {' and '.join(BACK_ENDS)}, not {name!r}; "
            "call model.set_attn_implementation('sdpa')"
        )


def attention_function(module: Any, config: PreTrainedConfig) -> tuple[str, Callable[..., tuple[Tensor, Any]]]:
    """A module's own attention back-end, by its own configuration: name and function."""
    name = config._attn_implementation
    check_back_end(name)
    if name == "eager":
        # FSDP2 puts a class of its own, from a module of its own, in front of the attention's
        for cls in type(module).__mro__:
            function = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
            if function is not None:
                return name, function
        raise ValueError(
            f"there is no eager_attention_forward beside {type(module).__name__}; "
            "call model.set_attn_implementation('sdpa')"
        )
    return name, AttentionInterface()[name]


def redirect(attention: Any, name: str = ATTENTION) -> PreTrainedConfig:
    """Send one module's attention through `attend`, or what has that name; returns the configuration to put back.

    The module reads the name of its attention function from its configuration, so it gets a copy that names ours.
    The model's own configuration is untouched: masks are still built for the model's own back-end.
    """
    host: PreTrainedConfig = attention.config
    own = copy.copy(host)
    own._attn_implementation = name
    attention.config = own
    return host


def is_causal(module: Any, kwargs: dict[str, Any]) -> bool:
    """As Transformers' sdpa decides it."""
    said = kwargs.get("is_causal")
    return getattr(module, "is_causal", True) if said is None else said
