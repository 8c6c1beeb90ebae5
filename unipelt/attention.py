"""What happens at the entry of a layer's attention, the one place that has the layer's input, its mask and its keys.

Two free functions that read only the module they are given, so that copies and replicas of a model stay correct:
`enter_attention`, a forward pre-hook that computes the gates, and `attend`, an attention function in Transformers'
own registry that puts the prefix in front of the keys and values and hands on to the model's attention.

Shapes: B examples, H heads, T tokens, d head size.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, PreTrainedConfig

from unipelt.gate import Gates, Slot, token_weights

ATTENTION = "unipelt"
BACK_ENDS = ("eager", "sdpa")


@dataclass
class Site:
    """What an attention module that carries submodules remembers.

    Attributes:
        targets: for each of its gates, the attribute of the attention that the gate scales.
        mask_index: place of `attention_mask` among the positional arguments of the attention's forward.
        masked: whether the layer's gates average over real tokens only.
        tokens: takes the token weights to the layer's adapter; None where no gate there wants them.
        config: the host's own configuration, where a prefix had to put another in its place.
    """

    targets: tuple[str, ...]
    mask_index: int
    masked: bool
    tokens: Slot | None
    config: PreTrainedConfig | None = None


def enter_attention(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Compute the gates that read the attention's input and hand each to what it scales."""
    site: Site = attention.unipelt_site
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    weights = None
    if site.masked:
        mask = kwargs.get("attention_mask", args[site.mask_index] if len(args) > site.mask_index else None)
        weights = token_weights(mask, hidden.shape[0])
        if site.tokens is not None:
            site.tokens.put(weights)
    gates: Gates | None = attention.gates
    if gates is None:
        return
    values = gates(hidden, weights).unbind(dim=1)
    for target, value in zip(site.targets, values, strict=True):
        getattr(attention, target).gate.put(value)


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention over the layer's prefix and its own keys, by the model's own attention function.

    Args:
        module: the attention.
        query: (B, H, T, d).
        key: (B, H, T, d).
        value: (B, H, T, d).
        attention_mask: as the model's own attention function takes it.
        kwargs: likewise.

    Returns:
        As the model's own attention function: output (B, T, H, d), and weights (B, H, T, L + T) or None.
    """
    key, value, attention_mask = module.prefix.attach(key, value, attention_mask)
    return _host_attention(module)(module, query, key, value, attention_mask, **kwargs)


def redirect(attention: Any) -> PreTrainedConfig:
    """Send one module's attention through `attend`; returns the configuration to put back.

    The module reads the name of its attention function from its configuration, so it gets a copy that names ours.
    The model's own configuration is untouched: masks are still built for the model's own back-end.
    """
    host: PreTrainedConfig = attention.config
    own = copy.copy(host)
    own._attn_implementation = ATTENTION
    attention.config = own
    return host


def check_back_end(name: str | None) -> None:
    """Raise `ValueError` for an attention back-end that a prefix does not support."""
    if name not in BACK_ENDS:
        raise ValueError(
            f"a prefix works with the attention back-ends {' and '.join(BACK_ENDS)}, not {name!r}; "
            "call model.set_attn_implementation('sdpa')"
        )


def _host_attention(module: Any) -> Callable[..., tuple[Tensor, Tensor | None]]:
    site: Site = module.unipelt_site
    assert site.config is not None
    name = site.config._attn_implementation
    check_back_end(name)
    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return AttentionInterface()[name]


AttentionInterface.register(ATTENTION, attend)
