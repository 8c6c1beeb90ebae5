"""Batches of evaluation and parts of a batch of training: as many rows as a budget of tokens holds.

Each is padded to the longest among its rows. Rows sorted by length need little padding this way, and short texts come
in few large batches. What is evaluated again and again is padded once.

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
"""What the model takes by name: `input_ids`, `attention_mask` (B, T) and so on, and `labels` (B,) where known."""

_TOKENS = {"cpu": 1024, "cuda": 8192}
_SMALL = 64 * 2**20  # bytes of a split that may stay on the GPU: some 50,000 texts of 50 tokens


def default_tokens(device: str) -> int:
    """The budget in tokens of a batch: what stays in a CPU's cache; on a GPU, 64 texts of 128 tokens."""
    return _TOKENS[device]


def text_lengths(split: Dataset) -> list[int]:
    """Tokens of each row."""
    columns = split.select_columns("input_ids").iter(batch_size=1000)  # row by row takes four times as long
    return [len(ids) for batch in columns for ids in batch["input_ids"]]


def pack_tokens(lengths: Sequence[int], tokens: int) -> list[range]:
    """Cut rows into runs of consecutive ones, each as long as the budget allows.

    Args:
        lengths: tokens of each row (N).
        tokens: the budget: rows of a batch times tokens of its longest row. A row that is longer by itself is a
            batch of one.

    Returns:
        The rows of each batch, which together are 0 to N - 1 in order.

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
    """Cut `count` rows into batches of `rows` consecutive ones and a rest. Raises `ValueError` if `rows` is below 1."""
    if rows < 1:
        raise ValueError(f"a batch needs 1 row or more, not {rows}")
    return [range(start, min(start + rows, count)) for start in range(0, count, rows)]


def split_batch(batch: Mapping[str, Tensor], tokens: int) -> list[Batch]:
    """Cut a batch into parts of texts that are alike in length, each padded to its own longest, longest texts first.

    Args:
        batch: with `attention_mask` (B, T), 0 where there is padding, on either side; what else has T columns is cut
            along with it.
        tokens: the budget of a part, as in `pack_tokens`.

    Returns:
        The parts, of b rows and t columns each, which together are the batch; the batch alone if it is one part.

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
    """Tokens that the model computes over these batches, padding included."""
    return sum(len(rows) * max(lengths[row] for row in rows) for rows in batches)


class Batches(TorchDataset[Batch]):
    """The batches of a split, each collated when it is asked for.

    Args:
        split: N rows of token ids; columns that the model does not take are left out.
        rows: the rows of each batch.
        collate: makes tensors of equally long rows out of rows, as a Transformers collator does.
        model: the model that is to take the batches; its `forward` names what it takes.
    """

    def __init__(
        self, split: Dataset, rows: Sequence[range], collate: Callable[[list[dict[str, Any]]], Any], model: nn.Module
    ) -> None:
        taken = {*inspect.signature(model.forward).parameters, "label"}  # which the collator calls labels
        self._split = split.select_columns([name for name in split.column_names if name in taken])
        self._rows = rows
        self._collate = collate

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Batch:
        columns = self._split[list(self._rows[index])]
        return dict(
            self._collate([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])
        )


def materialize(batches: Batches, device: str) -> list[Batch]:
    """Make batches now, to be used many times: on the GPU if that is the device and they are small."""
    held = [batches[index] for index in range(len(batches))]
    if device != "cpu" and sum(tensor.nbytes for batch in held for tensor in batch.values()) <= _SMALL:
        held = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in held]
    return held
