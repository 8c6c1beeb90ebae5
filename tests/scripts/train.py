"""Train tiny injected BERTs with plain Trainers. As a program, train each method in a process that is killed midway.

Usage: `train.py FOLDER METHOD=CHECKPOINT...` trains each method in FOLDER/METHOD. After the checkpoint of this step is
written, the process ends with SIGKILL at the next read of a batch.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from helpers import tiny_batch, tiny_bert
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import unipelt

EXAMPLES = 16
STEPS_PER_EPOCH = 4
LABELS = torch.tensor([0, 1, 1, 0] * (EXAMPLES // 4))


class Texts(Dataset[dict[str, Tensor]]):
    """Labelled random texts. If `lethal` is given, reading a text kills the process once this checkpoint exists."""

    def __init__(self, labels: Tensor = LABELS, lethal: Path | None = None) -> None:
        texts = tiny_batch(lengths=(5, 9, 7, 8) * (EXAMPLES // 4))
        self.columns = {**texts, "labels": labels}
        self.lethal = lethal

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if self.lethal is not None and (self.lethal / "trainer_state.json").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return {name: column[index] for name, column in self.columns.items()}


def make_model(method: Any, dropout: float = 0.1) -> Any:
    return unipelt.inject(tiny_bert(dropout=dropout), method)


def make_trainer(
    model: Any, folder: Path, data: Texts | None = None, evaluation: Texts | None = None, **changes: Any
) -> Trainer:
    """Return a plain Trainer: 3 epochs of 4 steps, with a checkpoint after each epoch."""
    options: dict[str, Any] = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": EXAMPLES // STEPS_PER_EPOCH,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "epoch",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **changes,
    }
    return Trainer(
        model,
        TrainingArguments(str(folder), **options),
        train_dataset=data or Texts(),
        eval_dataset=evaluation or Texts(),
    )


def train_until_killed(folder: Path, method: str, checkpoint: int) -> None:
    torch.set_num_threads(1)
    data = Texts(lethal=folder / f"checkpoint-{checkpoint}")
    make_trainer(make_model(method), folder, data, save_strategy="steps", save_steps=checkpoint).train()


def main(folder: str, *jobs: str) -> None:
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    for job in jobs:
        method, checkpoint = job.split("=")
        process = fork.Process(target=train_until_killed, args=(Path(folder) / method, method, int(checkpoint)))
        process.start()
        process.join()
        print(method, process.exitcode)


if __name__ == "__main__":
    main(*sys.argv[1:])
