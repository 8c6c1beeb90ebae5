"""Find attentions in a recorded pass that compute no softmax over all keys (but over windows of keys, or none)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from unipelt.hosts.probe import Call, Pass, Softmax
from unipelt.hosts.projections import is_projection
from unipelt.hosts.roles import KEY, QUERY, VALUE, find_roles


def attentions_without_softmax(found: Pass) -> list[Softmax]:
    """Return a record for each module with projections of one tensor to queries, keys and values.

    The roles of the projections are known by the module's output (`roles.py`). The record is placed right behind the
    last of these projections.
    """
    records = []
    for call in found.calls:
        own = list(_projections(found, call))
        if len(own) < 3 or call.output is None or call.output.dim() != 3 or not call.output.requires_grad:
            continue
        last = max(projection.end for projection in own)
        record = Softmax(call.module, None, None, None, None, call.output, False, last + 1, last + 1)
        roles = find_roles(own, [record], call)
        if all(any(roles[id(projection)][kind].any() for projection in own) for kind in (QUERY, KEY, VALUE)):
            records.append(record)
    return records


def _projections(found: Pass, owner: Call) -> Iterator[Call]:
    """Yield the projections among a module's own children that read the same tensor as the first of them."""
    children = set(owner.module.children())
    first = None
    for call in found.calls:
        if call.module not in children or not owner.contains(call) or not is_projection(call.module):
            continue
        given = next(iter(call.inputs.values()), None)
        if call.output is None or given is None or not given.is_floating_point():
            continue
        first = given if first is None else first
        if given.shape == first.shape and torch.equal(given, first):
            yield call
