"""The rows of a batch that mixes tasks: told apart, put together, and given back as one output.

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
    """What a batch of several tasks gives.

    Attributes:
        loss: the sum of `losses`; None without labels. So every task's submodules get the gradient that its own model
            gives them for its own rows.
        logits: (B, ..., C) in the order of the batch, C the most labels of a task in it; a row has minus infinity at
            labels that its task does not have. None where a task's output has no logits.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None

    @property
    def outputs(self) -> dict[str, Any]:
        """By task, what its model gives for its rows: logits (rows, C), loss, and all else."""
        outputs: dict[str, Any] = self.__dict__.get("_outputs", {})
        return outputs

    @property
    def rows(self) -> dict[str, list[int]]:
        """By task, which rows of the batch are its."""
        rows: dict[str, list[int]] = self.__dict__.get("_rows", {})
        return rows

    @property
    def losses(self) -> dict[str, Tensor]:
        """By task, the loss over its rows, as its model's class computes it (a mean); empty without labels."""
        losses = {task: getattr(output, "loss", None) for task, output in self.outputs.items()}
        return {task: loss for task, loss in losses.items() if loss is not None}


def count_rows(batch: Mapping[str, Any]) -> int:
    """How many rows a batch has: those of its texts."""
    texts = [batch.get(name) for name in ("input_ids", "inputs_embeds", "decoder_input_ids")]
    first = next((value for value in (*texts, *batch.values()) if isinstance(value, Tensor) and value.dim() > 1), None)
    if first is None:
        raise ValueError("the batch has no tensor of texts; give input_ids or inputs_embeds by keyword")
    return len(first)


def _is_by_row(value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == size


def reorder(value: Any, size: int, index: Tensor) -> Any:
    """One value of a batch in another order, if it has a row for each text."""
    return value.index_select(0, index.to(value.device)) if _is_by_row(value, size) else value


def split_batch(batch: Mapping[str, Any], size: int, counts: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Each task's rows, of a batch in which they stand together."""
    parts: dict[str, dict[str, Any]] = {name: {} for name in counts}
    for key, value in batch.items():
        pieces = value.split([*counts.values()]) if _is_by_row(value, size) else [value] * len(counts)
        for part, piece in zip(parts.values(), pieces, strict=True):
            part[key] = piece
    return parts


def merge(questions: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> dict[str, Any]:
    """The arguments of one pass of the base, from those of each task's."""
    merged = {}
    for name, first in questions[0].items():
        values = [question.get(name) for question in questions]
        if all(_is_by_row(value, count) for value, count in zip(values, counts, strict=True)):
            merged[name] = torch.cat([value for value in values if value is not None])
        else:
            merged[name] = first
    return merged


def split_output(value: Any, counts: Sequence[int]) -> list[Any]:
    """What the base gives, by rows: tensors, and what holds them."""
    if _is_by_row(value, sum(counts)):
        return list(value.split(list(counts)))
    if isinstance(value, ModelOutput):
        fields = {name: split_output(inner, counts) for name, inner in value.items()}
        return [type(value)(**{name: pieces[index] for name, pieces in fields.items()}) for index in range(len(counts))]
    if isinstance(value, (tuple, list)):
        return list(zip(*(split_output(inner, counts) for inner in value), strict=True)) or [value] * len(counts)
    return [value] * len(counts)


def gather(outputs: Mapping[str, Any], rows: Mapping[str, list[int]], back: Tensor | None) -> MixedOutput:
    """The outputs of tasks as one, in the order of the batch (`back` leads there)."""
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
