"""Batches of evaluation and parts of training batches, each with as many rows as a token budget allows.

Each batch or part is padded to its longest row. So rows that are sorted by length need little padding, and short texts
are in few, large batches. A split that is evaluated many times is padded once.

Shapes: N rows of a split, B rows of a batch, T tokens of its longest row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import Dataset as TorchDataset

Batch = dict[str, Tensor]
"""The inputs of the model by name: `input_ids`, `attention_mask` (B, T) and others, and `labels` (B,) if known."""

_TOKENS = {"cpu": 1024, "cuda": 8192}
_SMALL = 64 * 2**20  # largest split to keep on the GPU, in bytes: about 50,000 texts of 50 tokens


def default_tokens(device: str) -> int:
    """Return the token budget of a batch: 1,024 for the cache of a CPU, or 8,192 on a GPU (64 texts of 128 tokens)."""
    return _TOKENS[device]


def text_lengths(split: Dataset) -> list[int]:
    """Return the number of tokens of each row, (N,)."""
    columns = split.select_columns("input_ids").iter(batch_size=1000)  # single rows take four times as long
    return [len(ids) for batch in columns for ids in batch["input_ids"]]


def pack_tokens(lengths: Sequence[int], tokens: int) -> list[range]:
    """Cut rows into batches of consecutive rows, each as long as the budget allows.

    Args:
        lengths: the number of tokens of each row, (N,).
        tokens: the budget, which is the rows of a batch times the tokens of its longest row. A row that is longer than
            the budget is a batch of one row.

    Returns:
        The rows of each batch. Together they are 0 to N - 1, in order.

    Raises:
        ValueError: the budget is below 1.
    """
    if tokens < 1:
        raise ValueError(f"a batch needs a budget of 1 token or more, not {tokens}")
    batches = []
    start, longest = 0, 0
    for row, length in enumerate(lengths):
        longest = max(longest, length)
        if row > start and longest * (row - start + 1) > tokens:
            batches.append(range(start, row))
            start, longest = row, length
    if start < len(lengths):
        batches.append(range(start, len(lengths)))
    return batches


def pack_rows(count: int, rows: int) -> list[range]:
    """Cut `count` rows into batches of `rows` consecutive rows. The last batch may be smaller.

    Raises:
        ValueError: `rows` is below 1.
    """
    if rows < 1:
        raise ValueError(f"a batch needs 1 row or more, not {rows}")
    return [range(start, min(start + rows, count)) for start in range(0, count, rows)]


def split_batch(batch: Mapping[str, Tensor], tokens: int) -> list[Batch]:
    """Cut a batch into parts of texts of similar length, the longest texts first. Each part is padded by itself.

    Args:
        batch: a batch with `attention_mask` (B, T), which is 0 at padding on either side. Other tensors with T columns
            are cut in the same way.
        tokens: the token budget of a part, as in `pack_tokens`.

    Returns:
        The parts, with b rows and t columns each. Together they are the batch. A single part is the batch unchanged.

    Raises:
        ValueError: the budget is below 1.
    """
    mask = batch["attention_mask"]
    lengths = mask.sum(dim=1)
    order = lengths.argsort(descending=True, stable=True)
    packed = pack_tokens(lengths[order].tolist(), tokens)
    if len(packed) == 1:
        return [dict(batch)]
    parts = []
    for rows in packed:
        chosen = order[rows.start : rows.stop]
        columns = mask[chosen].any(dim=0).nonzero().flatten().tolist() or [0]  # a text may be empty
        kept = slice(columns[0], columns[-1] + 1)
        parts.append({name: whole[chosen] if whole.ndim == 1 else whole[chosen, kept] for name, whole in batch.items()})
    return parts


def padded_tokens(lengths: Sequence[int], batches: Iterable[range]) -> int:
    """Return the number of tokens that the model computes over these batches, including padding."""
    return sum(len(rows) * max(lengths[row] for row in rows) for rows in batches)


class Batches(TorchDataset[Batch]):
    """The batches of a split. Each batch is collated when it is read.

    Args:
        split: N rows of token ids. Columns that the model does not take are left out.
        rows: the rows of each batch.
        collate: function that pads rows and makes tensors of them, as a Transformers collator does.
        model: the model for the batches. Its `forward` names its inputs.
    """

    def __init__(
        self, split: Dataset, rows: Sequence[range], collate: Callable[[list[dict[str, Any]]], Any], model: nn.Module
    ) -> None:
        taken = {*inspect.signature(model.forward).parameters, "label"}  # the collator renames label to labels
        self._split = split.select_columns([name for name in split.column_names if name in taken])
        self._rows = rows
        self._collate = collate

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def sizes(self) -> list[int]:
        """The number of rows of each batch."""
        return [len(rows) for rows in self._rows]

    def __getitem__(self, index: int) -> Batch:
        columns = self._split[list(self._rows[index])]
        return dict(
            self._collate([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])
        )


def materialize(batches: Batches, device: str) -> list[Batch]:
    """Collate all batches now, for repeated use. Batches of at most 64 MiB in total are moved to `device`."""
    held = [batches[index] for index in range(len(batches))]
    if device != "cpu" and sum(tensor.nbytes for batch in held for tensor in batch.values()) <= _SMALL:
        held = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in held]
    return held
