"""Find an attention and its projections in a watched pass.

Which output of which module is a query, a key or a value is asked by gradients: of the queries, keys and values that
the attention interface was given, or of the logits, where it was not: one row of the logits belongs to one query, one
column to one key.
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
"""What an output of a module goes into; a sum, where it goes into several."""


@dataclass
class FoundAttention:
    """An attention as it was found in one layer.

    Attributes:
        attention: its description.
        call: of its module.
        softmax: what took place in it.
        linears: its projections, by identity.
        crosses: whether its keys are of another text.
        no_prefix: why no prefix can enter; "" where one can.
        no_lora: why no low-rank term can be added; "" where one can.
        kinds: of the modules of queries and of values, which outputs are what: place -> (O,).
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
    """Whether submodules attach to it."""
    return isinstance(module, (nn.Linear, Conv1D))


def find_attentions(layer: Call, inside: Sequence[Call], softmaxes: Sequence[Softmax]) -> list[FoundAttention]:
    """The attentions of a layer of which the projections were found, in the order of the pass."""
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
    # the innermost module around the softmax that has the projections inside it
    for attention in reversed(around):
        own = [call for call in before if attention.contains(call)]
        together = [other for other in softmaxes if attention.contains(other)]  # some attentions take place in parts
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
    """For each call of a projection, which of its outputs go into queries, keys and values: each (O,)."""
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
    """By the logits: those of one query and other keys have a gradient at that token's query and at others' keys."""
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
        if gradient.shape[1] != scores.shape[-2]:  # keys of another text
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
    """Of the projections of one kind, the one that reads what the attention is given, and by which argument.

    Where there are several, one that reads the argument `preferred`, or else one that computes nothing else.
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
    """Whether an argument of an attention is of another length than what its queries are computed from."""
    return attention.inputs[source].shape[1] != attention.inputs[hidden].shape[1]


def _fused(
    query: Call, value: Call, kinds: dict[int, dict[int, Tensor]]
) -> Literal["", "qkv", "kv", "heads", "groups", "latent"]:
    """How the module of the values computes other things too; "" where it does not."""
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
    """Kind and length of each run of outputs of one kind."""
    values, counts = torch.unique_consecutive(kinds, return_counts=True)
    return list(zip(values.tolist(), counts.tolist(), strict=True))


def _output(layer: Call, attention: Call, linears: Sequence[Call], softmax: Softmax) -> Call | None:
    """The projection that ends the attention: the first one after the softmax that reads what came of it."""
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
    """Name of the argument with the mask."""
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
