"""`transformers.Trainer` with batches of evaluation that are ready made and of different sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput


class BatchTrainer(Trainer):
    """Trains as its parent does, and evaluates batches.

    `eval_dataset`, and what `predict` is given, are not rows but batches: made ones in a list, or `Batches`. The loss
    of an evaluation is the mean over examples, whatever the sizes of the batches. It is for one process.
    """

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
