"""Split the rows of a batch by task, merge them for one pass, and gather the outputs.

Shapes: B rows of a batch, C labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput


@dataclass
class MixedOutput(ModelOutput):
    """The output for a batch of several tasks.

    Attributes:
        loss: the sum of `losses`, a scalar; None without labels. Every task's submodules get the same gradient as from
            the task's own model on the task's own rows.
        logits: (B, ..., C) in the order of the batch, with C the largest number of labels of a task in the batch. A row
            has minus infinity at labels that its task does not have. None if a task's output has no logits.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None

    @property
    def outputs(self) -> dict[str, Any]:
        """By task, the output of its model for its rows: logits (rows, C), loss, and other fields."""
        outputs: dict[str, Any] = self.__dict__.get("_outputs", {})
        return outputs

    @property
    def rows(self) -> dict[str, list[int]]:
        """By task, the indices of its rows in the batch."""
        rows: dict[str, list[int]] = self.__dict__.get("_rows", {})
        return rows

    @property
    def losses(self) -> dict[str, Tensor]:
        """By task, the loss over its rows (a mean), as the class of its model computes it; empty without labels."""
        losses = {task: getattr(output, "loss", None) for task, output in self.outputs.items()}
        return {task: loss for task, loss in losses.items() if loss is not None}


def count_rows(batch: Mapping[str, Any]) -> int:
    """Return the number of rows, B, of a batch. Raises `ValueError` if the batch has no tensor of texts."""
    texts = [batch.get(name) for name in ("input_ids", "inputs_embeds", "decoder_input_ids")]
    first = next((value for value in (*texts, *batch.values()) if isinstance(value, Tensor) and value.dim() > 1), None)
    if first is None:
        raise ValueError("the batch has no tensor of texts; give input_ids or inputs_embeds by keyword")
    return len(first)


def _is_by_row(value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == size


def reorder(value: Any, size: int, index: Tensor) -> Any:
    """Return a value of a batch with its rows in another order; a value without a row for each text is unchanged."""
    return value.index_select(0, index.to(value.device)) if _is_by_row(value, size) else value


def sort_rows(
    given: Sequence[str], names: Sequence[str], batch: Mapping[str, Any]
) -> tuple[dict[str, list[int]], dict[str, Any], Tensor | None]:
    """Bring the rows of each task together.

    Args:
        given: the task of each row, B names.
        names: the names of all tasks, in the order that the rows get.
        batch: the batch, in which a tensor of length B has one row for each text.

    Returns:
        The indices of each task's rows in the given batch; the sorted batch, without None; and (B,), the index that
        restores the order of the batch, or None if the order did not change.
    """
    rows = {name: [row for row, other in enumerate(given) if other == name] for name in names if name in given}
    batch = {name: value for name, value in batch.items() if value is not None}
    order = [row for own in rows.values() for row in own]
    if order == sorted(order):
        return rows, batch, None
    device = next(value.device for value in batch.values() if isinstance(value, Tensor))
    index = torch.tensor(order, device=device)
    return rows, {name: reorder(value, len(given), index) for name, value in batch.items()}, torch.argsort(index)


def split_batch(batch: Mapping[str, Any], size: int, counts: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Return each task's part of a batch in which the rows of a task are contiguous.

    Args:
        batch: the batch.
        size: its number of rows, B.
        counts: the number of rows by task, in the order of the batch.
    """
    parts: dict[str, dict[str, Any]] = {name: {} for name in counts}
    for key, value in batch.items():
        pieces = value.split([*counts.values()]) if _is_by_row(value, size) else [value] * len(counts)
        for part, piece in zip(parts.values(), pieces, strict=True):
            part[key] = piece
    return parts


def merge(questions: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> dict[str, Any]:
    """Return the arguments of one pass of the base, from the arguments of each task."""
    merged = {}
    for name, first in questions[0].items():
        values = [question.get(name) for question in questions]
        if all(_is_by_row(value, count) for value, count in zip(values, counts, strict=True)):
            merged[name] = torch.cat([value for value in values if value is not None])
        else:
            merged[name] = first
    return merged


def split_output(value: Any, counts: Sequence[int]) -> list[Any]:
    """Split the base's output by rows: tensors, and containers of tensors."""
    if _is_by_row(value, sum(counts)):
        return list(value.split(list(counts)))
    if isinstance(value, ModelOutput):
        fields = {name: split_output(inner, counts) for name, inner in value.items()}
        return [type(value)(**{name: pieces[index] for name, pieces in fields.items()}) for index in range(len(counts))]
    if isinstance(value, (tuple, list)):
        return list(zip(*(split_output(inner, counts) for inner in value), strict=True)) or [value] * len(counts)
    return [value] * len(counts)


def gather(outputs: Mapping[str, Any], rows: Mapping[str, list[int]], back: Tensor | None) -> MixedOutput:
    """Return the outputs of the tasks as one output, in the order of the batch.

    Args:
        outputs: the output of each task's model.
        rows: the indices of each task's rows in the batch.
        back: (B,), the index that restores the order of the batch; None if the order did not change.
    """
    logits = [getattr(output, "logits", None) for output in outputs.values()]
    there = [own for own in logits if isinstance(own, Tensor) and own.dim() > 1]
    joined = None
    if len(there) == len(logits):
        widest = max(own.shape[-1] for own in there)
        joined = torch.cat([nn.functional.pad(own, (0, widest - own.shape[-1]), value=-torch.inf) for own in there])
        joined = joined if back is None else joined.index_select(0, back)
    losses = [loss for output in outputs.values() if (loss := getattr(output, "loss", None)) is not None]
    gathered = MixedOutput(loss=torch.stack(losses).sum() if losses else None, logits=joined)
    gathered.__dict__.update(_outputs=dict(outputs), _rows=dict(rows))
    return gathered
