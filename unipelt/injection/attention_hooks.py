"""The prefix in an attention.

`attend` is an attention function in Transformers' registry. It puts the prefix in front of the keys and values, and
calls the model's own attention function. An attention outside that registry (MPNet) gets a text that is longer by L
tokens, and the prefix replaces the keys and values of the first L tokens.

Shapes: B examples, H heads (of queries, or of keys and values), T queries, S keys, d head size, L prefix length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from unipelt.hosts.attention_interface import ATTENTION, attention_function, check_back_end, is_causal
from unipelt.injection.caches import check_paged, find_cache
from unipelt.injection.hooks import hook, note_mask, open_entry, parts_at, split_mask
from unipelt.submodules.forward_pass import AttentionPass, ForwardPass
from unipelt.submodules.room import Port, SubmoduleSet


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Compute attention over a prefix and the module's own keys, by the model's own attention function.

    If the prefix has a softmax of its own, that function gets the module's own keys alone, and attention over the
    prefix is added. A batch of several sets is computed set by set, so prefixes of different lengths need no padding.

    Args:
        module: the attention.
        query: (B, H, T, d).
        key: (B, H, S, d).
        value: (B, H, S, d).
        attention_mask: the mask for the model's own attention function, of the form that its back-end reads.
        kwargs: further arguments of that function; `position_bias`, (B or 1, H, T, S), gets columns of zeros for the
            prefix.

    Returns:
        The output, (B, T, H, d), and the attention weights, (B, H, T, L + S) or None. The weights are (B, H, T, S) if
        the prefix has a softmax of its own, and None for a batch of several sets of which one shares its softmax.

    Raises:
        RuntimeError: the module was called outside of its layer.
        ValueError: a prefix is in the softmax of the text, and the model's back-end takes no further keys.
    """
    port: Port = module.unipelt_port
    now = port.room[0].passes.current_or_recomputed()
    if now is None:
        raise RuntimeError(f"{type(module).__name__} holds a prefix, and was called outside of its layer")
    parts = parts_at(port, now)
    if all(_is_beside(part) for part in parts):
        return _attend_beside(module, parts, now, query, key, value, attention_mask, **kwargs)
    check_back_end(port.config._attn_implementation)
    if now.facts.rows is None:
        return _attend(module, parts[0], now, query, key, value, attention_mask, **kwargs)
    rows = now.facts.rows
    masks, bias = split_mask(attention_mask, now.facts), split_mask(kwargs.get("position_bias"), now.facts)
    pieces = zip(*(rows.split(tensor) for tensor in (query, key, value)), strict=True)
    outputs = []
    for part, mask, own_bias, piece in zip(parts, masks, bias, pieces, strict=True):
        given = kwargs if own_bias is None else {**kwargs, "position_bias": own_bias}
        outputs.append(_attend(module, part, now, piece[0], piece[1], piece[2], mask, **given)[0])
    return torch.cat(outputs), None


def _is_beside(part: SubmoduleSet | None) -> bool:
    """Return whether a set leaves the softmax of the text alone: without a prefix, or beside a prefix with its own."""
    prefix: Any = None if part is None else part._modules.get("prefix")
    return prefix is None or prefix.gating == "added"


def _attend_beside(
    module: Any,
    parts: list[SubmoduleSet | None],
    now: ForwardPass,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute the model's own attention, unchanged, and add attention over each set's prefix to the set's rows.

    Any back-end can be the model's own, since it gets neither further keys nor another mask.
    """
    if module.unipelt_port.seen is not None:
        module.unipelt_port.seen.append((key, value))
    _, function = attention_function(module, module.unipelt_port.config)
    output, weights = function(module, query, key, value, mask, **kwargs)
    rows = now.facts.rows
    if rows is None:
        return _add_prefix(parts[0], now, output, query, key.shape[1], **kwargs), weights
    pieces = zip(parts, rows.split(output), rows.split(query), strict=True)
    return torch.cat([_add_prefix(part, now, out, own, key.shape[1], **kwargs) for part, out, own in pieces]), weights


def _add_prefix(
    part: SubmoduleSet | None, now: ForwardPass, output: Tensor, query: Tensor, heads: int, **kwargs: Any
) -> Tensor:
    """Add attention over a set's prefix to the attention over the text, (B, T, heads of queries, d)."""
    prefix: Any = None if part is None else part._modules.get("prefix")
    if part is None or prefix is None:
        return output
    gate, both = _gate_of_prefix(part, prefix, now), prefix.by_head(now.facts, heads)
    added = prefix.attention(both, query, gate, **kwargs)
    keep = prefix.keep(now.attention(part.key), len(query), query)
    return output + (added if keep is None else added * keep[:, :, None, None])


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
    """Compute attention of one set's rows; its prefix may be in the softmax of the text."""
    name, function = attention_function(module, module.unipelt_port.config)
    if part is None or _is_beside(part):
        output, weights = function(module, query, key, value, mask, **kwargs)
        return _add_prefix(part, now, output, query, key.shape[1], **kwargs), weights
    prefix: Any = part._modules["prefix"]
    find_cache(kwargs)  # refuses an unknown cache, in which an attention function would store the prefix as text
    check_paged(now.facts.paged)  # since Transformers 5.24 the attention function does not get this cache
    gate, both = _gate_of_prefix(part, prefix, now), prefix.by_head(now.facts, key.shape[1])
    keep = prefix.keep(now.attention(part.key), len(query), query)
    bias: Tensor | None = kwargs.get("position_bias")
    tokens = query.shape[2]
    if mask is None and name == "sdpa" and tokens > 1 and is_causal(module, kwargs):
        # without a mask, sdpa aligns the first key with the first query and ignores later keys (the unused end of a
        # static cache), which is wrong with a prefix in front
        key, value = key[:, :, :tokens], value[:, :, :tokens]
        bias = None if bias is None else bias[..., :tokens]
        mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=query.device).tril()
    if bias is not None:
        kwargs["position_bias"] = nn.functional.pad(bias, (prefix.length, 0))
    mask = prefix.columns(mask, key.dtype, key.shape[2], gate, now.facts, keep)
    key, value = prefix.join(both, gate, key, value)
    return function(module, query, key, value, mask, **kwargs)


def _gate_of_prefix(part: SubmoduleSet, prefix: Any, now: ForwardPass) -> Tensor | None:
    """Return the prefix's gate, (B, 1) or (B, T), or None for a prefix without a gate."""
    name = prefix.gate_name
    return now.attention(part.key).gate_for(name, False).squeeze(-1) if name else None


# A text that is longer by the prefix


@hook("enter")
def lengthen_text(
    attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Put L zero tokens in front of an attention's text, (B, T, D), and keep the prefix for `insert_prefix`."""
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
    pass_.batch = len(hidden)
    keep = prefix.keep(pass_, len(hidden), hidden)
    mask = prefix.columns(mask, hidden.dtype, hidden.shape[1], gate, now.facts, keep)
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
    """Replace the first L rows of a key or value projection's output, (B, L + S, W), by the prefix."""
    port: Port = projection.unipelt_port
    now = port.room[0].passes.current()
    part = None if now is None else port.part(port.room[0].active)
    if now is None or part is None or part.prefix is None:
        return out
    rows = now.attention(part.key).inserted[port.path]
    return torch.cat([rows.to(out.dtype), out[:, rows.shape[1] :]], dim=1)


@hook("output")
def shorten_text(attention: Any, args: tuple[Any, ...], outputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Remove the prefix's rows from an attention's results: output (B, T, D), weights (B, H, T, L + T) or None."""
    port: Port = attention.unipelt_port
    now = port.room[0].passes.current()
    part = None if now is None else port.part(port.room[0].active)
    if now is None or part is None or part.prefix is None:
        return outputs
    length = part.prefix.length
    weights = tuple(other if other is None else other[:, :, length:] for other in outputs[1:])
    return (outputs[0][:, length:], *weights)


AttentionInterface.register(ATTENTION, attend)
