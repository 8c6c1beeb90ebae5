"""Read checkpoints of format 1: map the old parameter names to the present ones.

In format 1, parameters were inside modules of the host, and a gate, a low-rank factor and an adapter's projection were
separate parameters. Now parameters that read the same input are rows of one parameter. The numbers are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unipelt.checkpoint.manifest import CheckpointError
from unipelt.files.messages import show
from unipelt.injection.draft import Draft
from unipelt.submodules.entry import Entry
from unipelt.submodules.prompt import Prompt
from unipelt.submodules.room import SubmoduleSet

Constants = Mapping[str, Mapping[str, float | None]]


def renamed(
    drafts: Sequence[Draft], tensors: Mapping[str, Tensor], folded: Constants | None
) -> tuple[dict[str, Tensor], Constants | None]:
    """Return the tensors, and the constants of a folded model, under their present names.

    Args:
        drafts: the sets of the checkpoint's configuration.
        tensors: tensors by their names in format 1. Tensors of the model itself keep their names.
        folded: by the path of the gates, the name of a gate and its constant; None for a model that is not folded.

    Raises:
        CheckpointError: a tensor has a name of the present format, or tensors that form one parameter now do not have
            the right sizes.
    """
    left = dict(tensors)
    found: dict[str, Tensor] = {}
    for name, old_names, sizes in _old_names(drafts):
        if name in left:
            raise CheckpointError(f"the checkpoint is said to be of format 1, which has no tensor {show(name)}")
        pieces = [left.pop(old) for old in old_names if old in left]
        if len(pieces) == len(old_names):
            found[name] = pieces[0] if len(pieces) == 1 else _stack_rows(pieces, old_names, sizes)
    if folded is not None:
        paths = dict(_old_gates(drafts))
        folded = {paths.get(path, path): named for path, named in folded.items()}
    return {**left, **found}, folded


def _stack_rows(pieces: Sequence[Tensor], names: Sequence[str], sizes: Sequence[int]) -> Tensor:
    """Return the pieces, concatenated by rows. Raises `CheckpointError` for a wrong number of rows, shape or type."""
    first = pieces[0]
    for piece, name, size in zip(pieces, names, sizes, strict=True):
        if piece.shape[:1] != (size,) or piece.shape[1:] != first.shape[1:] or piece.dtype != first.dtype:
            raise CheckpointError(
                f"the checkpoint does not fit its own configuration: {name} is {show(tuple(piece.shape))} of "
                f"{piece.dtype} there, and must be {(size, *first.shape[1:])!r:.200} of {first.dtype} like {names[0]}"
            )
    return torch.cat(list(pieces))


def _old_names(drafts: Sequence[Draft]) -> Iterator[tuple[str, list[str], list[int]]]:
    """Yield the name of every parameter, the format 1 names of the tensors that form its rows, and their row counts.

    The row counts are empty if there is one tensor.
    """
    for draft in drafts:
        for path, module, old in _owners(draft):
            for name, _ in module.named_parameters(recurse=not isinstance(module, (SubmoduleSet,))):
                inner = f"{path}.{name}" if path else name
                if isinstance(module, Entry):
                    gates, host = old
                    yield draft.name(inner), *_old_entry(module, name, gates, host)
                elif not name.startswith("entry."):
                    yield draft.name(inner), [f"{old}.{name}"], []


def _old_entry(entry: Entry, name: str, gates: str, hosts: Mapping[str, str]) -> tuple[list[str], list[int]]:
    """Return the old names and row counts of an entry's parameter: first the gates, then the further rows."""
    rows = [part for part in entry.parts if part.parameter == name and part.row]
    old, sizes = [f"{gates}.{name}"], [len(entry.gates.names)]
    for part in rows:
        term, _, rest = part.name.partition(".")
        old.append(f"{hosts[term]}.{rest}")
        sizes.append(part.count or 0)
    return old, sizes


def _owners(draft: Draft) -> Iterator[tuple[str, nn.Module, Any]]:
    """Yield the modules that own parameters: the path in the set, the module, and its path in format 1.

    For an entry, the third value is the path of the gates and the paths of the terms that have rows in the entry.
    """
    added = draft.added
    if not isinstance(added, SubmoduleSet):
        for name, module in added.named_children():
            old = _join(draft.host, name)
            yield name, module, old
            if isinstance(module, Prompt) and module.entry is not None:
                yield f"{name}.entry", module.entry, (f"{old}.gates", {})
        return
    for index, part in enumerate(added.attentions()):
        start = "cross." if index else ""
        attention = _join(draft.host, part.wiring.attention)
        hosts = {name: f"{_join(draft.host, path)}.{name}" for path, name in _hosts(part)}
        if part.entry is not None:
            yield f"{start}entry", part.entry, (f"{attention}.gates", hosts)
        if part.prefix is not None:
            yield f"{start}prefix", part.prefix, f"{attention}.prefix"
        for name, term in part.terms.items():
            yield f"{start}{name}", term, hosts[name]
            if term.entry is not None:
                yield f"{start}{name}.entry", term.entry, (f"{hosts[name]}.gates", hosts)


def _hosts(part: SubmoduleSet) -> Iterator[tuple[str, str]]:
    wiring = part.wiring
    for places in (wiring.outputs, wiring.inputs):
        for path, names in places.items():
            for name in names:
                yield path, name
    if wiring.norm:
        yield wiring.norm, "adapter"


def _old_gates(drafts: Sequence[Draft]) -> Iterator[tuple[str, str]]:
    """Yield the path that the gates of an entry had in format 1, and the present path of the entry."""
    for draft in drafts:
        for path, module, old in _owners(draft):
            if isinstance(module, Entry):
                yield old[0], draft.name(path)


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
