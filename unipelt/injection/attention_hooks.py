"""The prefix in an attention.

`attend`, an attention function in Transformers' own registry, puts the prefix in front of the keys and values and hands
on to the model's own attention function. An attention outside that registry (MPNet) is given a text that is longer by
the prefix instead, the first keys and values of which become the prefix's.

Shapes: B examples, H heads (of queries, or of keys and values), T queries, S keys, d head size, L prefix length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from unipelt.hosts.attention_interface import ATTENTION, attention_function, is_causal
from unipelt.injection.caches import find_cache
from unipelt.injection.hooks import hook, note_mask, open_entry, parts_at, split_mask
from unipelt.submodules.forward_pass import AttentionPass, ForwardPass
from unipelt.submodules.room import Port, SubmoduleSet


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Compute attention over a prefix and the module's own keys, by the model's own attention function.

    Where the prefix has a softmax of its own, that function is given the module's own keys alone, and attention over
    the prefix is added. Rows of several sets are computed set by set, so prefixes of different lengths need no padding.

    Args:
        module: the attention.
        query: (B, H, T, d).
        key: (B, H, S, d).
        value: (B, H, S, d).
        attention_mask: as the model's own attention function takes it.
        kwargs: likewise; `position_bias`, (B or 1, H, T, S), gets columns of zeros for the prefix.

    Returns:
        As the model's own attention function: output (B, T, H, d), and weights (B, H, T, L + S) or None; (B, H, T, S)
        where the prefix has a softmax of its own; None for rows of several sets.
    """
    port: Port = module.unipelt_port
    now = port.room[0].passes.current_or_recomputed()
    if now is None:
        raise RuntimeError(f"{type(module).__name__} holds a prefix, and was called outside of its layer")
    if now.facts.rows is None:
        part = port.part(port.room[0].active)
        return _attend(module, part, now, query, key, value, attention_mask, **kwargs)
    rows = now.facts.rows
    masks, bias = split_mask(attention_mask, now.facts), split_mask(kwargs.get("position_bias"), now.facts)
    pieces = zip(*(rows.split(tensor) for tensor in (query, key, value)), strict=True)
    outputs = []
    for part, mask, own_bias, piece in zip(parts_at(port, now), masks, bias, pieces, strict=True):
        given = kwargs if own_bias is None else {**kwargs, "position_bias": own_bias}
        outputs.append(_attend(module, part, now, piece[0], piece[1], piece[2], mask, **given)[0])
    return torch.cat(outputs), None


def _attend(
    module: Any,
    part: SubmoduleSet | None,
    now: ForwardPass,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    prefix: Any = None if part is None else part._modules.get("prefix")
    name, function = attention_function(module, module.unipelt_port.config)
    if part is None or prefix is None:
        return function(module, query, key, value, mask, **kwargs)
    find_cache(kwargs)  # an attention function that fills a cache by itself would take the prefix for text
    gate, both = _gate_of_prefix(part, prefix, now), prefix.by_head(now.facts, key.shape[1])
    if prefix.gating == "added":
        output, weights = function(module, query, key, value, mask, **kwargs)
        return output + prefix.attention(both, query, gate, **kwargs), weights
    bias: Tensor | None = kwargs.get("position_bias")
    tokens = query.shape[2]
    if mask is None and name == "sdpa" and tokens > 1 and is_causal(module, kwargs):
        # sdpa would take it for granted that keys start where queries do, and cut off what is longer (the unused
        # end of a static cache). With a prefix in front that is no longer so, and the mask has to be said.
        key, value = key[:, :, :tokens], value[:, :, :tokens]
        bias = None if bias is None else bias[..., :tokens]
        mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=query.device).tril()
    keys = key.shape[2]
    before, in_front = prefix.scaled(both, len(key), key.dtype, gate)
    if bias is not None:
        kwargs["position_bias"] = nn.functional.pad(bias, (prefix.length, 0))
    return function(
        module,
        query,
        torch.cat([before, key], dim=2),
        torch.cat([in_front, value], dim=2),
        prefix.columns(mask, key.dtype, keys, gate, now.facts),
        **kwargs,
    )


def _gate_of_prefix(part: SubmoduleSet, prefix: Any, now: ForwardPass) -> Tensor | None:
    """Return the prefix's gate, (B, 1) or (B, T), or None without one."""
    name = prefix.gate_name
    return now.attention(part.key).gate_for(name, False).squeeze(-1) if name else None


# A text that is longer by the prefix


@hook("enter")
def lengthen_text(
    attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Put L more tokens in front of an attention's text, and the prefix on its way to the projections."""
    port: Port = attention.unipelt_port
    now = port.room[0].passes.current_or_recomputed()
    part = None if now is None else port.part(port.room[0].active)
    if now is None or part is None or part.prefix is None:
        return None
    now.attentions.pop(part.key, None)
    wiring, prefix = part.wiring, part.prefix
    assert wiring.hidden is not None
    assert wiring.mask is not None
    assert wiring.bias is not None
    hidden: Tensor = wiring.hidden.read(args, kwargs)
    mask, bias = wiring.mask.read(args, kwargs), wiring.bias.read(args, kwargs)
    pass_ = note_mask(part, now, mask, len(hidden))
    if part.entry is not None:
        open_entry(part, hidden, pass_)
    gate, length = _gate_of_prefix(part, prefix, now), prefix.length
    _lengthen_low(pass_, length)
    both = prefix.by_head(now.facts, 1).squeeze(1)
    rows = prefix.scaled(both, len(hidden), hidden.dtype, gate)
    pass_.inserted.update(zip((wiring.keys, wiring.values), rows, strict=True))
    mask = prefix.columns(mask, hidden.dtype, hidden.shape[1], gate, now.facts)
    if mask is not None and mask.shape[2] > 1:
        mask = nn.functional.pad(mask, (0, 0, length, 0))
    changed, named = list(args), dict(kwargs)
    wiring.hidden.write(changed, named, nn.functional.pad(hidden, (0, 0, length, 0)))
    wiring.mask.write(changed, named, mask)
    wiring.bias.write(changed, named, None if bias is None else nn.functional.pad(bias, (length, 0, length, 0)))
    return tuple(changed), named


def _lengthen_low(attention: AttentionPass, length: int) -> None:
    attention.lengthened = length
    for name, low in attention.low.items():
        attention.low[name] = nn.functional.pad(low, (0, 0, length, 0))


@hook("output")
def insert_prefix(projection: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """Put a prefix into the first rows of a key or value projection's output, (B, L + S, W)."""
    port: Port = projection.unipelt_port
    now = port.room[0].passes.current()
    part = None if now is None else port.part(port.room[0].active)
    if now is None or part is None or part.prefix is None:
        return out
    rows = now.attention(part.key).inserted[port.path]
    return torch.cat([rows.to(out.dtype), out[:, rows.shape[1] :]], dim=1)


@hook("output")
def shorten_text(attention: Any, args: tuple[Any, ...], outputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Drop the prefix's rows of a lengthened text: output (B, T, D), and weights (B, H, T, L + T) or None."""
    port: Port = attention.unipelt_port
    now = port.room[0].passes.current()
    part = None if now is None else port.part(port.room[0].active)
    if now is None or part is None or part.prefix is None:
        return outputs
    length = part.prefix.length
    weights = tuple(other if other is None else other[:, :, length:] for other in outputs[1:])
    return (outputs[0][:, length:], *weights)


AttentionInterface.register(ATTENTION, attend)
