"""A `transformers.Trainer` whose processes do together what one process would do.

Every process draws the same batches. It computes its own rows of each training batch, padded as in the whole batch, and
weights their loss, so that the mean over the processes is the loss of the whole batch. In an evaluation, each batch is
computed by one process, and all processes get the results of all rows in their order.

Shapes: N rows of a split, B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from transformers import Trainer
from transformers.trainer_pt_utils import nested_concat, nested_detach, nested_truncate
from transformers.trainer_utils import EvalLoopOutput

from unipelt.runs import processes
from unipelt.runs.batches import Batch, Batches, pack_rows

WEIGHT = "unipelt_weight"
"""The key of a batch for the weight of its loss. The model does not get it."""
_PADDING = -100  # of Trainer


def own_indices(count: int) -> list[int]:
    """Return the indices of the batches that this process evaluates, of `count` batches."""
    return list(range(processes.rank(), count, processes.world_size()))


def join_rows(own: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Return the rows of all batches in order, (N, ...), from the rows that each process has computed.

    Args:
        own: the rows of this process's batches, one batch after the other. Rows after these are left out.
        sizes: the number of rows of each batch of the split.
    """
    if processes.world_size() == 1:
        return own
    parts: list[Any] = [None] * len(sizes)
    mine = [sizes[index] for index in own_indices(len(sizes))]
    for first, held in enumerate(processes.gather(own.cpu()[: sum(mine)])):
        theirs = range(first, len(sizes), processes.world_size())
        for index, rows in zip(theirs, held.split([sizes[index] for index in theirs]), strict=True):
            parts[index] = rows
    return torch.cat(parts)


class _OwnBatches(TorchDataset[Batch]):
    """The batches that this process evaluates, as many as those of each other process.

    A process that lacks a batch at the end computes the first batch once more. Its results count for nothing.
    """

    def __init__(self, batches: Any) -> None:
        self._batches = batches
        self._indices = own_indices(len(batches))
        self.counted = len(self._indices)
        if self.counted < -(-len(batches) // processes.world_size()):
            self._indices.append(0)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Batch:
        found: Batch = self._batches[self._indices[index]]
        return found


class JointTrainer(Trainer):
    """Trainer whose processes do together what one process would do. Alone, it is Trainer.

    `per_device_train_batch_size` is the number of rows of the whole batch. Dropout is drawn by each process for its own
    rows, from a generator of its own.

    Attributes:
        repeats_losses: whether the loss of a smaller batch counts in an evaluation as that of a whole one, as in
            `Seq2SeqTrainer`.
    """

    repeats_losses = False
    _weight = 1.0  # of the loss of the rows that pass through the model
    _rows: int | None = None  # number of the rows of this process's batch in an evaluation
    _counted = 0  # number of the batches that still count in an evaluation

    def get_train_dataloader(self) -> DataLoader:
        """Return a loader of the whole batches, the same in every process."""
        loader = super().get_train_dataloader()
        if processes.world_size() > 1:
            shard: Any = loader.batch_sampler
            # accelerate would give each process other batches, and would fill the last one with rows of the first
            shard.num_processes, shard.process_index, shard.even_batches = 1, 0, False
        if not processes.is_first():
            # the order of the rows is drawn from the seed that the loader has read, and dropout from this one
            torch.manual_seed(self.args.seed + 1000003 * processes.rank())
        return loader

    def get_batch_samples(self, *args: Any, **options: Any) -> tuple[list[Any], Any]:
        """Return this process's rows of the next batches. The models take the mean, so no count goes with them."""
        batches, count = super().get_batch_samples(*args, **options)
        if processes.world_size() == 1:
            return batches, count
        return [_own_rows(batch) for batch in batches], None

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Compute the gradients of this process's rows, and return their weighted loss, ()."""
        self._weight = inputs.pop(WEIGHT, 1.0)
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._weight = 1.0

    def compute_loss(self, *args: Any, **options: Any) -> Any:
        """Compute the parent's loss, weighted."""
        found: Any = super().compute_loss(*args, **options)
        return found if self._weight == 1.0 else found * self._weight

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return a loader of the batches that this process evaluates."""
        if processes.world_size() == 1:
            return super().get_eval_dataloader(eval_dataset)
        return self.load_batches(self.batches_of(self.eval_dataset if eval_dataset is None else eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Return a loader of the batches that this process evaluates."""
        if processes.world_size() == 1:
            return super().get_test_dataloader(test_dataset)
        return self.load_batches(self.batches_of(test_dataset))

    def batches_of(self, dataset: Any) -> Any:
        """Return the batches in which one process would evaluate a dataset."""
        rows = pack_rows(len(dataset), self.args.per_device_eval_batch_size)
        assert isinstance(self.model, nn.Module)
        return Batches(dataset, rows, self.data_collator, self.model)

    def load_batches(self, batches: Any) -> DataLoader:
        """Return a loader of this process's batches, of a list of them or of `Batches`."""
        made = isinstance(batches, list)
        on_host = not (made and any(tensor.is_cuda for tensor in batches[0].values()))
        return DataLoader(
            _OwnBatches(batches) if processes.world_size() > 1 else batches,
            batch_size=None,
            num_workers=0 if made else self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and on_host,
        )

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """Do the parent's step, and note how many of its rows count."""
        if processes.world_size() > 1:
            self._rows = len(inputs["input_ids"]) if self._counted > 0 else 0
            self._counted -= 1
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **options: Any) -> EvalLoopOutput:
        """Run the parent's loop over this process's batches. It gets the results of all processes."""
        if processes.world_size() > 1:
            assert isinstance(dataloader.dataset, _OwnBatches), "the loader is of `load_batches`"
            self._counted = dataloader.dataset.counted
            self.gather_function = self._gather_rows
        output = super().evaluation_loop(dataloader, *args, **options)
        if processes.world_size() == 1 or output.predictions is None:
            return output
        first = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
        return output._replace(num_samples=len(first))  # the parent counted this process's batches

    def _gather_rows(self, values: Any) -> Any:
        """Return the rows of one batch of each process, in the order of the batches."""
        rows, longest = self._rows, _count_rows(values)
        assert rows is not None
        if rows and longest > rows and self.repeats_losses:
            rows = longest
        found = None
        for held in processes.gather(nested_truncate(_to_cpu(nested_detach(values)), rows)):
            if _count_rows(held):
                found = held if found is None else nested_concat(found, held, padding_index=_PADDING)
        return found


def _own_rows(batch: Any) -> dict[str, Any]:
    """Return this process's rows of a batch, with the weight of the mean loss over these rows.

    If there are fewer rows than processes, some processes compute the first row with the weight 0.
    """
    labels, rows = batch.get("labels"), len(batch["input_ids"])
    start, end = (number * rows // processes.world_size() for number in (processes.rank(), processes.rank() + 1))
    own = {name: tensor[start:end] if end > start else tensor[:1] for name, tensor in batch.items()}
    if end == start:
        share = 0.0
    elif labels is not None and labels.ndim > 1:  # the loss is the mean over tokens
        share = _count_tokens(own["labels"]) / _count_tokens(labels)
    else:
        share = (end - start) / rows
    return {**own, WEIGHT: share * processes.world_size()}  # the gradients of all processes are averaged


def _count_tokens(labels: torch.Tensor) -> int:
    return int((labels != _PADDING).sum())


def _count_rows(values: Any) -> int:
    while isinstance(values, (tuple, list, dict)):
        inner: Iterable[Any] = values.values() if isinstance(values, dict) else values
        values = next(iter(inner))
    return len(values)


def _to_cpu(values: Any) -> Any:
    if isinstance(values, (tuple, list)):
        return type(values)(_to_cpu(value) for value in values)
    if isinstance(values, dict):
        return type(values)({name: _to_cpu(value) for name, value in values.items()})
    return values.cpu()
