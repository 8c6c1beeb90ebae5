"""Find attentions and their projections in a recorded pass, by the roles of the projections (`roles.py`)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from unipelt.hosts.description import CALLED_TWICE, IN_PARTS, KEYS_REPEATED, OWN_ATTENTION, TWO_WIDTHS, Attention
from unipelt.hosts.probe import Call, Softmax, gradients, random_like
from unipelt.hosts.roles import KEY, QUERY, VALUE, find_roles


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
        width: width of the input of the projection of queries.
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
    width: int
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
    # the attention is the innermost module around the softmax that also contains the projections
    around = [call for call in inside if call.contains(softmax)][::-1] or [layer]
    for apart in (False, True):  # an attention whose values read another argument is the second choice
        for attention in around:
            own = [call for call in before if attention.contains(call)]
            together = [other for other in softmaxes if attention.contains(other)]  # some are computed in parts
            kinds = find_roles(own, together, attention)
            found = _find_pair(attention, own, kinds, apart)
            if found is None:
                continue
            signature = inspect.signature(attention.module.forward).parameters.values()
            mask = _mask(attention)
            if any(parameter.name == mask or parameter.kind is parameter.VAR_KEYWORD for parameter in signature):
                return _assemble(layer, attention, linears, together, kinds, *found)
    return None


def _find_pair(
    attention: Call, own: Sequence[Call], kinds: dict[int, dict[int, Tensor]], apart: bool
) -> tuple[Read, Read] | None:
    """Return the projections of queries and of values; None if no two projections fit."""
    asked = [call for call in own if kinds[id(call)][QUERY].any()]
    valued = [call for call in own if kinds[id(call)][VALUE].any()]
    for argument in ("", *attention.inputs):  # the first projection of queries, then those that read other arguments
        query = _read(attention, asked, kinds, QUERY, argument)
        value = None if query is None else _read(attention, valued, kinds, VALUE, query.argument)
        if query is not None and value is not None and _fit(attention, query, value, apart):
            return query, value
    return None


def _fit(attention: Call, query: Read, value: Read, apart: bool) -> bool:
    """Return whether queries and values are those of one attention.

    They read one tensor, or the values read another text or, if `apart`, another argument for the same text.
    """
    if query.tokens_first != value.tokens_first:
        return False
    if query.argument == value.argument:
        return torch.equal(query.tensor, value.tensor)
    return apart or _of_other_text(attention, query.argument, value.argument)


def _assemble(
    layer: Call,
    attention: Call,
    linears: Sequence[Call],
    softmaxes: Sequence[Softmax],
    kinds: dict[int, dict[int, Tensor]],
    read_query: Read,
    read_value: Read,
) -> FoundAttention:
    hidden, query, source, value = read_query.argument, read_query.call, read_value.argument, read_value.call
    crosses = _of_other_text(attention, hidden, source)
    softmax = softmaxes[-1]
    own = [call for call in linears if attention.contains(call) and call.end < softmax.start]
    keys = [call for call in own if kinds[id(call)][KEY].any()]
    found_key = _read(attention, keys, kinds, KEY, hidden if hidden != source and not crosses else source)
    fused = _fused(query, value, kinds)
    key = found_key.call if found_key is not None and not fused else None
    if key is not None and (key is query or key is value):
        key = None
    calls_of_query = [call for call in own if call.module is query.module]
    output = _output(layer, attention, linears, softmax)
    mask = _mask(attention)
    described = Attention(
        _below(attention, layer),
        _below(query, attention),
        _below(value, attention),
        fused=fused,
        key=_below(key, attention) if key is not None else "",
        output=_below(output, layer) if output is not None else "",
        hidden=hidden,
        mask=mask,
        query_serves_positions=len(calls_of_query) > 1,
        value_apart=hidden != source and not crosses,
        tokens_first=read_query.tokens_first,
        mask_is_added=_is_added(attention.inputs.get(mask)),
    )
    held = {id(call.module) for call in own if any(flags.any() for flags in kinds[id(call)].values())}
    if output is not None:
        held.add(id(output.module))
    flags = {"query": kinds[id(query)][QUERY], "key": kinds[id(value)][KEY], "value": kinds[id(value)][VALUE]}
    no_prefix = _no_prefix(attention, softmaxes, kinds[id(value)])
    width = read_query.tensor.shape[-1]
    no_lora = CALLED_TWICE if sum(call.module is value.module for call in own) > 1 else ""
    return FoundAttention(described, attention, softmax, held, crosses, no_prefix, no_lora, width, flags)


def _below(call: Call, owner: Call) -> str:
    return "" if call.path == owner.path else call.path.removeprefix(f"{owner.path}.")


@dataclass(frozen=True)
class Read:
    """An argument of an attention, and a projection that reads it.

    Attributes:
        argument: name of the argument.
        call: call of the projection.
        tensor: the projection's input.
        tokens_first: whether that input is (T, B, I) and the argument (B, T, I).
    """

    argument: str
    call: Call
    tensor: Tensor
    tokens_first: bool = False


def _read(
    attention: Call, candidates: Sequence[Call], kinds: dict[int, dict[int, Tensor]], kind: int, preferred: str = ""
) -> Read | None:
    """Return the projection of one kind that reads an argument of the attention.

    A projection that reads the argument itself comes before one that reads a norm of it. Of several projections, one
    that reads the argument `preferred` comes first, then one that computes nothing else. None is returned without any.
    """
    found = _as_given(attention, candidates) or _as_derived(attention, candidates)
    pure = [
        one for one in found if not any(flags.any() for other, flags in kinds[id(one.call)].items() if other != kind)
    ]
    for some in (pure, found):
        if same := [one for one in some if one.argument == preferred]:
            return same[0]
    return next(iter(pure or found), None)


def _as_given(attention: Call, candidates: Sequence[Call]) -> list[Read]:
    """Return the projections whose input is an argument of the attention, or that argument with tokens first."""
    found = []
    for call, given in _inputs(candidates):
        for name, tensor in attention.inputs.items():
            turned = tensor.transpose(0, 1) if tensor.dim() == 3 else tensor
            if tensor.shape == given.shape and torch.equal(tensor, given):
                found.append(Read(name, call, given))
                break
            if turned.shape == given.shape and torch.equal(turned, given):
                found.append(Read(name, call, given, tokens_first=True))
                break
    return found


def _as_derived(attention: Call, candidates: Sequence[Call]) -> list[Read]:
    """Return the first projections whose input is computed, token by token, from an argument of the attention."""
    found = []
    for call, given in _inputs(candidates):
        for name, tensor in attention.inputs.items():
            if tensor.dim() == 3 and tensor.shape == given.shape and gradients(given, [tensor])[0] is not None:
                found.append(Read(name, call, given))
                break
    return found


def _inputs(calls: Sequence[Call]) -> Iterator[tuple[Call, Tensor]]:
    """Yield each call that is given a tensor, with the first such tensor."""
    for call in calls:
        if call.inputs:
            yield call, next(iter(call.inputs.values()))


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


def _is_added(mask: Tensor | None) -> bool:
    """Return whether a mask with 2 dimensions is added to the logits: its padding is far below 0."""
    return mask is not None and mask.dim() == 2 and mask.is_floating_point() and bool((mask < 0).any())


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
