"""`transformers.Trainer` with batches of evaluation that are ready made, and batches of training in parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from unipelt.runs.batches import split_batch


class BatchTrainer(Trainer):
    """Trains as its parent does, in parts of a batch if told so, and evaluates batches.

    `eval_dataset`, and what `predict` is given, are not rows but batches: made ones in a list, or `Batches`. The loss
    of an evaluation is the mean over examples, whatever the sizes of the batches. It is for one process.

    Args:
        train_tokens: the budget of a part, see `unipelt.runs.batches.split_batch`; None trains whole batches. The
            gradient of a step is that of the mean loss over the whole batch, so the model must compute the mean over
            examples, and no example may depend on its padding.
        options: as of the parent.
    """

    def __init__(self, *, train_tokens: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._train_tokens = train_tokens
        self._share = 1.0  # of the batch, what is passed through the model

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The parent's step, or one for each part of the batch: gradients add up, and so does the loss."""
        if self._train_tokens is None:
            return super().training_step(model, inputs, num_items_in_batch)
        parts = split_batch(inputs, self._train_tokens)
        losses = []
        try:
            for part in parts:
                self._share = len(part["attention_mask"]) / len(inputs["attention_mask"])
                # None: the model takes the mean over its part, which the share makes a part of the batch's
                losses.append(super().training_step(model, part, None))
        finally:
            self._share = 1.0
        return torch.stack(losses).sum()

    def compute_loss(self, *args: Any, **options: Any) -> Any:
        """The parent's, weighted where it is that of a part."""
        found: Any = super().compute_loss(*args, **options)
        return found if self._share == 1.0 else found * self._share

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The batches as they are."""
        return self._load(self.eval_dataset if eval_dataset is None else eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """The batches as they are."""
        return self._load(test_dataset)

    def _load(self, batches: Any) -> DataLoader:
        # Through a loader, although a plain loop would do: it draws a number from PyTorch's generator, and without
        # that draw the dropout of the next epoch would not be that of a run with Trainer's own evaluation.
        made = isinstance(batches, list)
        on_host = not (made and any(tensor.is_cuda for tensor in batches[0].values()))
        return DataLoader(
            batches,
            batch_size=None,
            num_workers=0 if made else self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and on_host,
        )

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """The parent's step, with its loss once for every example: Trainer takes the mean of what it gets."""
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        return (None if loss is None else loss.expand(len(inputs["input_ids"]))), logits, labels

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The parent's loop over all rows of all batches."""
        # the parent's choice, gather_for_metrics, cuts results to the rest that the training loader ended with: what is
        # loaded here is not known to accelerate
        self.gather_function = self.accelerator.gather
        output = super().evaluation_loop(*args, **kwargs)
        if output.predictions is None:  # nothing but the loss was wanted
            return output
        return output._replace(num_samples=len(output.predictions))  # it has counted batches
