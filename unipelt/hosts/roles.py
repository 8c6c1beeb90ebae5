"""Find which outputs of a projection are queries, keys or values, by gradients of a recorded pass.

There are three ways, in this order:

1. The attention interface got queries, keys and values, and their gradients show what they were computed from.
2. The logits of a softmax: one row belongs to one query, and one column to one key.
3. The attention's output, for an attention without a softmax over all keys: the output at one token depends on the
   query of that token alone, and on the keys and values of all tokens; it is linear in the values.

Shapes: B examples, T tokens, O outputs of a projection.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unipelt.hosts.probe import Call, Softmax, gradients, random_like

QUERY, KEY, VALUE = 1, 2, 4
"""Uses of a module's output; their sum stands for an output with several uses."""
_TOKEN = 4
"""The token whose query and output are asked for."""


def find_roles(linears: Sequence[Call], softmaxes: Sequence[Softmax], attention: Call) -> dict[int, dict[int, Tensor]]:
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
        elif softmax.scores is not None:
            found = _by_scores(softmax.scores, outputs, attention)
        else:
            found = _by_output(softmax.weighted, outputs)
        for kind, flags in found.items():
            for call, reached in zip(linears, flags, strict=True):
                if reached is not None:
                    kinds[id(call)][kind] |= reached
    return kinds


def _by_scores(scores: Tensor, outputs: Sequence[Tensor], attention: Call) -> dict[int, list[Tensor | None]]:
    """Return which outputs go into queries, keys and values, each (O,), by gradients of the logits.

    The logits of one token's query and the other tokens' keys have gradients at that query and at those keys alone.
    """
    token = _TOKEN
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


def _by_output(attended: Tensor, outputs: Sequence[Tensor]) -> dict[int, list[Tensor | None]]:
    """Return which outputs go into queries, keys and values, each (O,), by gradients of the attention's output.

    Args:
        attended: (B, T, D), the attention's output.
        outputs: outputs of the projections, (B, T, O) or (T, B, O).
    """
    direction = torch.zeros_like(attended)
    direction[:, _TOKEN] = random_like(attended[:, _TOKEN])
    total = (attended * direction).sum()
    found: dict[int, list[Tensor | None]] = {QUERY: [], KEY: [], VALUE: []}
    for output, gradient in zip(outputs, gradients(attended, outputs, direction), strict=True):
        role = None if gradient is None else _role(gradient, output, attended.shape, total)
        for kind, flags in found.items():
            flags.append(_reached(gradient) if role == kind else None)
    return found


def _role(gradient: Tensor, output: Tensor, shape: torch.Size, total: Tensor) -> int | None:
    """Return the role of one projection of an attention, from the gradient of the attention's output at one token."""
    part = (gradient * output).sum()
    if gradient.shape[:2] == (shape[1], shape[0]) != tuple(shape[:2]):
        gradient = gradient.transpose(0, 1)
    if gradient.shape[:2] != shape[:2]:
        return None
    others = gradient.clone()
    others[:, _TOKEN] = 0
    if not others.any():
        return QUERY
    return VALUE if torch.isclose(part, total, rtol=1e-3, atol=1e-5) else KEY
