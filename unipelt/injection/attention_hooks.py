"""What happens at the entry of a layer's attention, the one place that has the layer's input, its mask and its keys.

Free functions that read only the module they are given, so that copies and replicas of a model stay correct:
`enter_attention`, a forward pre-hook that computes the gates; `attend`, an attention function in Transformers' own
registry that puts the prefix in front of the keys and values and hands on to the model's attention.

An attention outside that registry is given a text that is longer by the prefix instead, the first keys and values of
which are the prefix's (`insert_prefix`, a forward hook of its projections), and loses the first queries again
(`leave_attention`, its forward hook).

Shapes: B examples, H heads (of queries, or of keys and values), T queries, S keys, d head size, L prefix length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig

from unipelt.hosts.attention_interface import ATTENTION, attention_function, is_causal
from unipelt.submodules.forward_pass import Slot
from unipelt.submodules.gate import Gates, product, token_weights
from unipelt.submodules.lora import LoRA


@dataclass(frozen=True)
class ForwardArgument:
    """One argument of an attention's forward: its name, and its place in the signature if it is named there."""

    name: str
    place: int | None

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What was given, or None. Raises `RuntimeError` if there is no such argument."""
        if self.place is None and self.name not in kwargs:
            raise RuntimeError(f"attention was called without {self.name!r}; its description names another argument")
        if self.place is not None and len(args) > self.place:
            return args[self.place]
        return kwargs.get(self.name)

    def write(self, args: list[Any], kwargs: dict[str, Any], value: Any) -> None:
        """Put `value` in its place."""
        if self.place is not None and len(args) > self.place:
            args[self.place] = value
        else:
            kwargs[self.name] = value


@dataclass
class Site:
    """What an attention module that carries submodules remembers.

    Attributes:
        targets: for each of its gates, the path from the attention to the submodule that the gate scales;
        others: and, behind those, what takes a gate to a submodule that would else have its own (`GateConfig.shared`),
            and whether that is inside the attention.
        hidden, mask: the arguments with the states and the mask.
        masked: whether the layer's gates average over real tokens only.
        tokens: take the token weights to what has a gate of its own in the layer and averages, behind the attention;
        inside: and to what has one inside it.
        config: the host's own configuration, where a prefix had to put another in its place.
        bias: the argument added to the logits besides the mask, where the prefix lengthens the text.
        inserts: where it does, what takes its keys and its values to the two projections; else empty.
    """

    targets: tuple[tuple[str, ...], ...]
    hidden: ForwardArgument
    mask: ForwardArgument
    masked: bool
    tokens: tuple[Slot, ...]
    inside: tuple[Slot, ...] = ()
    others: tuple[tuple[Slot, bool], ...] = ()
    config: PreTrainedConfig | None = None
    bias: ForwardArgument | None = None
    inserts: tuple[Slot, ...] = ()


def enter_attention(
    attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook: compute the gates that read the attention's input; each goes to what it scales (`_open`)."""
    site: Site = attention.unipelt_site
    hidden: Tensor = site.hidden.read(args, kwargs)
    weights = None
    if site.masked:
        weights = token_weights(site.mask.read(args, kwargs), hidden.shape[0])
    for slot in site.tokens:
        slot.put(weights)
    if site.inside:
        own = _of_longer(weights, hidden, attention.prefix.length) if site.inserts else weights
        for slot in site.inside:
            slot.put(own)
    gates: Gates | None = attention.gates
    if gates is not None:
        _open(attention, site, gates, hidden, weights)
    if site.inserts:
        return _lengthen(attention, site, hidden, list(args), dict(kwargs))
    return None


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention over a prefix and the module's own keys, by the model's own attention function.

    Where the prefix has a softmax of its own, that function is given the module's own keys alone, and what attention
    over the prefix gives is added.

    Args:
        module: the attention.
        query: (B, H, T, d).
        key: (B, H, S, d).
        value: (B, H, S, d).
        attention_mask: as the model's own attention function takes it.
        kwargs: likewise; `position_bias`, (B or 1, H, T, S), gets columns of zeros for the prefix.

    Returns:
        As the model's own attention function: output (B, T, H, d), and weights (B, H, T, L + S) or None; (B, H, T, S)
        where the prefix has a softmax of its own.
    """
    site: Site = module.unipelt_site
    assert site.config is not None
    name, function = attention_function(module, site.config)
    prefix = module.prefix
    gate = prefix.take_gate()
    if prefix.gating == "added":
        output, weights = function(module, query, key, value, attention_mask, **kwargs)
        return output + prefix.attention(query, key.shape[1], gate, **kwargs), weights
    bias: Tensor | None = kwargs.get("position_bias")
    tokens = query.shape[2]
    if attention_mask is None and name == "sdpa" and tokens > 1 and is_causal(module, kwargs):
        # sdpa would take it for granted that keys start where queries do, and cut off what is longer (the unused
        # end of a static cache). With a prefix in front that is no longer so, and the mask has to be said.
        key, value = key[:, :, :tokens], value[:, :, :tokens]
        bias = None if bias is None else bias[..., :tokens]
        attention_mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=query.device).tril()
    batch, heads, keys, size = key.shape
    before, in_front = prefix.rows(batch, key.dtype, gate).unflatten(-1, (heads, size)).transpose(2, 3).unbind()
    if bias is not None:
        kwargs["position_bias"] = nn.functional.pad(bias, (prefix.length, 0))
    return function(
        module,
        query,
        torch.cat([before, key], dim=2),
        torch.cat([in_front, value], dim=2),
        prefix.columns(attention_mask, key.dtype, keys, gate),
        **kwargs,
    )


def insert_prefix(projection: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """Forward hook of a key or value projection: (B, L + S, W), the first L of which become the prefix's."""
    rows = projection.unipelt_rows.take()
    return torch.cat([rows.to(out.dtype), out[:, rows.shape[1] :]], dim=1)


def leave_attention(attention: Any, args: tuple[Any, ...], outputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward hook of an attention whose text was longer: output (B, T, D), and weights (B, H, T, L + T) or None."""
    length = attention.prefix.length
    weights = tuple(other if other is None else other[:, :, length:] for other in outputs[1:])
    return (outputs[0][:, length:], *weights)


def _open(attention: Any, site: Site, gates: Gates, hidden: Tensor, weights: Tensor | None) -> None:
    """Hand the prefix its gate, and each low-rank term its input behind A and gate."""
    scaled = []
    for path in site.targets:
        module = attention
        for name in path:
            module = getattr(module, name)
        scaled.append(module)
    terms = [module for module in scaled if isinstance(module, LoRA)]  # behind a prefix, if there is one
    logits, low = product(hidden, gates, [term.pair()[0] for term in terms], weights=weights)
    opened = gates(logits, weights)
    own, values, others = opened.split((len(scaled) - len(terms), len(terms), len(site.others)), dim=-1)
    longer = attention.prefix.length if site.inserts else 0  # the text that `_lengthen` makes, by what is in front
    by_token = gates.pooling == "token"
    for (slot, inside), gate in zip(site.others, others.unbind(dim=-1), strict=True):
        gate = nn.functional.pad(gate, (longer, 0)) if longer and inside and by_token else gate
        slot.put(gate.unsqueeze(-1))
    if len(terms) < len(scaled):
        attention.prefix.gate.put(own.squeeze(-1))
    if terms:
        if longer:
            low = nn.functional.pad(low, (0, 0, longer, 0))
            values = nn.functional.pad(values, (0, 0, longer, 0)) if by_token else values
        lows = low.unflatten(-1, (len(terms), -1)) * values.unsqueeze(-1)
        for term, gated in zip(terms, lows.unbind(dim=-2), strict=True):
            assert term.low is not None
            term.low.put(gated)


def _of_longer(weights: Tensor | None, hidden: Tensor, length: int) -> Tensor:
    """The token weights of the text that `_lengthen` makes: nothing on what is in front."""
    if weights is None:
        weights = hidden.new_full(hidden.shape[:2], 1 / hidden.shape[1])
    return nn.functional.pad(weights, (length, 0))


def _lengthen(
    attention: Any, site: Site, hidden: Tensor, args: list[Any], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments for a text with L more tokens in front, and the prefix on its way to the projections."""
    prefix = attention.prefix
    gate, length = prefix.take_gate(), prefix.length
    for slot, rows in zip(site.inserts, prefix.rows(hidden.shape[0], hidden.dtype, gate), strict=True):
        slot.put(rows)
    assert site.bias is not None
    mask = prefix.columns(site.mask.read(tuple(args), kwargs), hidden.dtype, hidden.shape[1], gate)
    bias = site.bias.read(tuple(args), kwargs)
    if mask is not None and mask.shape[2] > 1:
        mask = nn.functional.pad(mask, (0, 0, length, 0))
    site.hidden.write(args, kwargs, nn.functional.pad(hidden, (0, 0, length, 0)))
    site.mask.write(args, kwargs, mask)
    site.bias.write(args, kwargs, None if bias is None else nn.functional.pad(bias, (length, 0, length, 0)))
    return tuple(args), kwargs


AttentionInterface.register(ATTENTION, attend)
