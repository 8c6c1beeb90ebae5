"""A trainer that evaluates prepared batches, and can train on a batch in parts."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from unipelt.runs import processes
from unipelt.runs.batches import split_batch
from unipelt.runs.joint_trainer import WEIGHT, JointTrainer


class BatchTrainer(JointTrainer):
    """Trainer that evaluates prepared batches, and can train on a batch in parts.

    `eval_dataset` and the dataset of `predict` hold batches and not rows: a list of batches, or `Batches`. The loss of
    an evaluation is the mean over examples, for batches of any size.

    Args:
        train_tokens: the token budget of a part, see `unipelt.runs.batches.split_batch`. None trains on whole batches.
            The gradient of a step is the gradient of the mean loss over the whole batch. So the model must compute the
            mean over examples, and no example may depend on its padding.
        options: the options of the parent class.
    """

    def __init__(self, *, train_tokens: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._train_tokens = train_tokens

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Compute the gradients of a batch, as a whole or part by part, and return its loss, ()."""
        if self._train_tokens is None:
            return super().training_step(model, inputs, num_items_in_batch)
        weight, rows = inputs.pop(WEIGHT, 1.0), len(inputs["attention_mask"])
        losses = []
        parts = split_batch(inputs, self._train_tokens)
        for number, part in enumerate(parts, start=1):
            # the processes may have different numbers of parts, so they exchange gradients once, after the last part
            wait = processes.world_size() > 1 and number < len(parts)
            with self.accelerator.no_sync(model) if wait else contextlib.nullcontext():
                part[WEIGHT] = weight * len(part["attention_mask"]) / rows
                # with None the model takes the mean over the part; `compute_loss` weights the mean by the share
                losses.append(super().training_step(model, part, None))
        return torch.stack(losses).sum()

    def batches_of(self, dataset: Any) -> Any:
        """Return the batches, which are not changed."""
        return dataset

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return a loader of the batches, which are not changed."""
        return self.load_batches(self.eval_dataset if eval_dataset is None else eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Return a loader of the batches, which are not changed."""
        return self.load_batches(test_dataset)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """Do the parent's step, and repeat its loss for every example, (B,), because Trainer takes the mean."""
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        return (None if loss is None else loss.expand(len(inputs["input_ids"]))), logits, labels

    def evaluation_loop(self, *args: Any, **options: Any) -> EvalLoopOutput:
        """Run the parent's loop over all rows of all batches."""
        # gather_for_metrics would cut the results to the size of the last training batch, because accelerate does not
        # know this loader
        self.gather_function = self.accelerator.gather
        output = super().evaluation_loop(*args, **options)
        if output.predictions is None:  # only the loss was wanted
            return output
        return output._replace(num_samples=len(output.predictions))  # the parent counted batches
