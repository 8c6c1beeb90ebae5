"""Find attentions and their projections in a recorded pass.

Gradients show which outputs of a module are queries, keys or values. They are the gradients of the queries, keys and
values that the attention interface got. Without the interface, they are gradients of the logits: one row of the logits
belongs to one query, and one column to one key.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from unipelt.hosts.description import CALLED_TWICE, IN_PARTS, KEYS_REPEATED, OWN_ATTENTION, TWO_WIDTHS, Attention
from unipelt.hosts.probe import Call, Softmax, gradients, random_like

QUERY, KEY, VALUE = 1, 2, 4
"""Uses of a module's output; their sum stands for an output with several uses."""


@dataclass
class FoundAttention:
    """An attention that was found in one layer.

    Attributes:
        attention: description of the attention.
        call: call of its module.
        softmax: the record of its computation; the last one, if it is computed in parts.
        linears: ids of the modules of its projections.
        crosses: whether its keys are of another text.
        no_prefix: the reason why no prefix can enter; empty if a prefix can.
        no_lora: the reason why no low-rank term can be added; empty if one can.
        kinds: place -> (O,), true for the outputs that belong to the place: `query` is for the outputs of the module of
            queries, `key` and `value` are for those of the module of values.
    """

    attention: Attention
    call: Call
    softmax: Softmax
    linears: set[int]
    crosses: bool
    no_prefix: str
    no_lora: str
    kinds: dict[str, Tensor]


def is_projection(module: nn.Module) -> bool:
    """Return whether a module is a projection that submodules can attach to."""
    return isinstance(module, (nn.Linear, Conv1D))


def find_attentions(layer: Call, inside: Sequence[Call], softmaxes: Sequence[Softmax]) -> list[FoundAttention]:
    """Return the attentions of a layer for which projections were found, in the order of the pass."""
    linears = [call for call in inside if is_projection(call.module) and call.output is not None]
    found: list[FoundAttention] = []
    for softmax in softmaxes:
        one = _find_attention(layer, inside, linears, softmax, softmaxes)
        if one is not None and not any(one.call.module is other.call.module for other in found):
            found.append(one)
    return found


def _find_attention(
    layer: Call, inside: Sequence[Call], linears: Sequence[Call], softmax: Softmax, softmaxes: Sequence[Softmax]
) -> FoundAttention | None:
    before = [call for call in linears if call.end < softmax.start]
    around = [call for call in inside if call.contains(softmax)]
    # the attention is the innermost module around the softmax that also contains the projections
    for attention in reversed(around):
        own = [call for call in before if attention.contains(call)]
        together = [other for other in softmaxes if attention.contains(other)]  # some attentions are computed in parts
        kinds = _kinds(own, together, attention)
        query = _reads_hidden(attention, [call for call in own if kinds[id(call)][QUERY].any()], kinds, QUERY)
        if query is None:
            continue
        hidden, asked = query
        valued = [call for call in own if kinds[id(call)][VALUE].any()]
        value = _reads_hidden(attention, valued, kinds, VALUE, hidden)
        if value is None or (value[0] != hidden and not _of_other_text(attention, hidden, value[0])):
            continue
        signature = inspect.signature(attention.module.forward).parameters.values()
        mask = _mask(attention)
        if not any(parameter.name == mask or parameter.kind is parameter.VAR_KEYWORD for parameter in signature):
            continue
        return _assemble(layer, attention, linears, together, kinds, hidden, asked, value)
    return None


def _assemble(
    layer: Call,
    attention: Call,
    linears: Sequence[Call],
    softmaxes: Sequence[Softmax],
    kinds: dict[int, dict[int, Tensor]],
    hidden: str,
    query: Call,
    found_value: tuple[str, Call],
) -> FoundAttention:
    source, value = found_value
    crosses = _of_other_text(attention, hidden, source)
    softmax = softmaxes[-1]
    own = [call for call in linears if attention.contains(call) and call.end < softmax.start]
    keys = [call for call in own if kinds[id(call)][KEY].any()]
    found_key = _reads_hidden(attention, keys, kinds, KEY, source)
    fused = _fused(query, value, kinds)
    key = found_key[1] if found_key is not None and not fused else None
    if key is not None and (key is query or key is value):
        key = None
    calls_of_query = [call for call in own if call.module is query.module]
    output = _output(layer, attention, linears, softmax)
    described = Attention(
        _below(attention, layer),
        _below(query, attention),
        _below(value, attention),
        fused=fused,
        key=_below(key, attention) if key is not None else "",
        output=_below(output, layer) if output is not None else "",
        hidden=hidden,
        mask=_mask(attention),
        query_serves_positions=len(calls_of_query) > 1,
    )
    held = {id(call.module) for call in own if any(flags.any() for flags in kinds[id(call)].values())}
    if output is not None:
        held.add(id(output.module))
    flags = {"query": kinds[id(query)][QUERY], "key": kinds[id(value)][KEY], "value": kinds[id(value)][VALUE]}
    no_prefix = _no_prefix(attention, softmaxes, kinds[id(value)])
    no_lora = CALLED_TWICE if sum(call.module is value.module for call in own) > 1 else ""
    return FoundAttention(described, attention, softmax, held, crosses, no_prefix, no_lora, flags)


def _below(call: Call, owner: Call) -> str:
    return call.path.removeprefix(f"{owner.path}.")


def _kinds(linears: Sequence[Call], softmaxes: Sequence[Softmax], attention: Call) -> dict[int, dict[int, Tensor]]:
    """Return, by call of a projection and by use, which of its outputs go into queries, keys and values: each (O,)."""
    outputs = [call.output for call in linears if call.output is not None]
    kinds = {
        id(call): {kind: torch.zeros(output.shape[-1], dtype=torch.bool) for kind in (QUERY, KEY, VALUE)}
        for call, output in zip(linears, outputs, strict=True)
    }
    for softmax in softmaxes:
        if softmax.query is not None and softmax.key is not None and softmax.value is not None:
            found = {
                kind: [_reached(gradient) for gradient in gradients(tensor, outputs)]
                for kind, tensor in ((QUERY, softmax.query), (KEY, softmax.key), (VALUE, softmax.value))
            }
        else:
            assert softmax.scores is not None
            found = _by_scores(softmax.scores, outputs, attention)
        for kind, flags in found.items():
            for call, reached in zip(linears, flags, strict=True):
                if reached is not None:
                    kinds[id(call)][kind] |= reached
    return kinds


def _by_scores(scores: Tensor, outputs: Sequence[Tensor], attention: Call) -> dict[int, list[Tensor | None]]:
    """Return which outputs go into queries, keys and values, each (O,), by gradients of the logits.

    The logits of one token's query and the other tokens' keys have gradients at that query and at those keys alone.
    """
    token = 4
    direction = torch.zeros_like(scores)
    direction[..., token, :] = random_like(scores[..., token, :])
    direction[..., token, token] = 0
    rows: list[Tensor | None] = []
    columns: list[Tensor | None] = []
    for gradient in gradients(scores, outputs, direction):
        if gradient is None or gradient.dim() < 3 or gradient.shape[1] <= token:
            rows.append(None)
            columns.append(None)
            continue
        others = gradient.clone()
        others[:, token] = 0
        at_token = gradient[:, token].flatten(0, -2).ne(0).any(dim=0)
        at_others = others.flatten(0, -2).ne(0).any(dim=0)
        if gradient.shape[1] != scores.shape[-2]:  # the projection reads another text, so it computes keys
            at_token, at_others = torch.zeros_like(at_token), at_token | at_others
        rows.append(at_token)
        columns.append(at_others)
    values: list[Tensor | None] = []
    after = gradients(attention.output, outputs) if attention.output is not None else [None] * len(outputs)
    for gradient, row, column in zip(after, rows, columns, strict=True):
        reached = None if gradient is None else _reached(gradient)
        if reached is not None and row is not None and column is not None:
            reached = reached & ~row & ~column
        values.append(reached)
    return {QUERY: rows, KEY: columns, VALUE: values}


def _reached(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.flatten(0, -2).ne(0).any(dim=0)


def _reads_hidden(
    attention: Call, candidates: Sequence[Call], kinds: dict[int, dict[int, Tensor]], kind: int, preferred: str = ""
) -> tuple[str, Call] | None:
    """Return the projection of one kind that reads an argument of the attention, after the name of that argument.

    Of several projections, one that reads the argument `preferred` comes first, then one that computes nothing else.
    None is returned without any.
    """
    found = []
    for call in candidates:
        given = next(iter(call.inputs.values()), None)
        for name, tensor in attention.inputs.items():
            if given is not None and tensor.shape == given.shape and torch.equal(tensor, given):
                found.append((name, call))
                break
    pure = [
        (name, call)
        for name, call in found
        if not any(flags.any() for other, flags in kinds[id(call)].items() if other != kind)
    ]
    for some in (pure, found):
        if same := [one for one in some if one[0] == preferred]:
            return same[0]
    return next(iter(pure or found), None)


def _of_other_text(attention: Call, hidden: str, source: str) -> bool:
    """Return whether the argument `source` has another number of tokens than `hidden`, the source of the queries."""
    return attention.inputs[source].shape[1] != attention.inputs[hidden].shape[1]


def _fused(
    query: Call, value: Call, kinds: dict[int, dict[int, Tensor]]
) -> Literal["", "qkv", "kv", "heads", "groups", "latent"]:
    """Return the layout of the outputs of the values' module (`Attention.fused`); empty for values alone."""
    flags = kinds[id(value)]
    queries, keys, values = flags[QUERY], flags[KEY], flags[VALUE]
    if not queries.any() and not keys.any():
        return ""
    runs = _runs(queries.int() * QUERY + keys.int() * KEY + values.int() * VALUE)
    order = [kind for kind, _ in runs]
    if order == [QUERY, KEY, VALUE]:
        return "qkv" if query.module is value.module else ""
    if order == [KEY, VALUE]:
        return "kv"
    if len(order) > 3 and order == [QUERY, KEY, VALUE] * (len(order) // 3):
        sizes = {size for _, size in runs}
        return "heads" if len(sizes) == 1 else "groups"
    if KEY + VALUE in order:
        return "latent"
    return ""


def _runs(kinds: Tensor) -> list[tuple[int, int]]:
    """Return the kind and the length of each run of outputs of one kind."""
    values, counts = torch.unique_consecutive(kinds, return_counts=True)
    return list(zip(values.tolist(), counts.tolist(), strict=True))


def _output(layer: Call, attention: Call, linears: Sequence[Call], softmax: Softmax) -> Call | None:
    """Return the projection that ends the attention: the first after the softmax whose input depends on the softmax."""
    for call in linears:
        if call.start < softmax.end or call.output is None:
            continue
        given = next(iter(call.inputs.values()), None)
        if given is None or not given.requires_grad:
            continue
        direction = random_like(given)
        back = gradients(given, [softmax.weighted], direction)[0]
        if back is None:
            continue
        if attention.contains(call):
            return call
        total, part = (given * direction).sum(), (back * softmax.weighted).sum()
        return call if torch.isclose(total, part, rtol=1e-3) else None
    return None


def _mask(attention: Call) -> str:
    """Return the name of the argument with the mask."""
    signature = list(inspect.signature(attention.module.forward).parameters)
    given = [name for name in attention.inputs if "mask" in name]
    named = [name for name in signature if "mask" in name]
    return next(iter([*given, *named]), "attention_mask")


def _no_prefix(attention: Call, softmaxes: Sequence[Softmax], kinds: dict[int, Tensor]) -> str:
    softmax = softmaxes[-1]
    if sum(other.interface for other in softmaxes) > 1:
        return IN_PARTS
    if not softmax.interface or softmax.owner is not attention.module:
        return OWN_ATTENTION
    assert softmax.key is not None
    assert softmax.value is not None
    if not isinstance(getattr(attention.module, "config", None), PreTrainedConfig):
        return OWN_ATTENTION
    widths = [tensor.shape[1] * tensor.shape[3] for tensor in (softmax.key, softmax.value)]
    if softmax.key.shape[3] != softmax.value.shape[3]:
        return TWO_WIDTHS
    if any(width != int(kinds[VALUE].sum()) for width in widths):
        return KEYS_REPEATED
    return ""
