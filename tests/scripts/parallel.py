"""Run one of several data-parallel processes, started by `torch.distributed.run`. The results go to FOLDER.

Usage: parallel.py gradients FOLDER METHOD...   gradients of the second step of every method, by DistributedDataParallel
       parallel.py trainer FOLDER METHOD...     a run of plain Trainer for every method
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from helpers import shake, tiny_batch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from scripts.train import EXAMPLES, STEPS_PER_EPOCH, make_model, make_trainer

LENGTHS = ((5, 9, 7, 8), (3, 9, 6, 2))


def steps() -> list[dict[str, Tensor]]:
    """Return two labelled batches of four texts."""
    return [{**tiny_batch(seed, lengths), "labels": torch.tensor([0, 1, 1, 0])} for seed, lengths in enumerate(LENGTHS)]


def second_gradients(model: Any, wrapped: Any, rows: slice) -> dict[str, Tensor]:
    """Return the gradients of the second of two steps.

    A parameter that the first step left unreduced is then an error.
    """
    for batch in steps():
        model.zero_grad()
        wrapped(**{name: tensor[rows] for name, tensor in batch.items()}).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def prepared(method: Any, checkpointing: bool | None = None) -> Any:
    """Return an injected model in training mode. `checkpointing` is None, or whether checkpointing is reentrant."""
    model = make_model(method, dropout=0.0).train()
    shake(model)
    if checkpointing is not None:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": checkpointing})
    return model


def gradients(folder: Path, jobs: list[str]) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    rows = slice(2 * rank, 2 * rank + 2)
    for number, job in enumerate(jobs):
        options = json.loads(job)
        model = prepared(**options)
        # without a static graph, DDP cannot do reentrant checkpointing of a shared network
        static = bool(options.get("checkpointing"))
        wrapped = DistributedDataParallel(model, find_unused_parameters=False, static_graph=static)
        save_file(second_gradients(model, wrapped, rows), folder / f"{number}-{rank}.safetensors")


def trainer(folder: Path, jobs: list[str]) -> None:
    for method in jobs:
        make_trainer(
            prepared(method),
            folder / method,
            optim="sgd",
            learning_rate=0.1,
            ddp_backend="gloo",
            ddp_find_unused_parameters=False,
            average_tokens_across_devices=False,
            per_device_train_batch_size=EXAMPLES // STEPS_PER_EPOCH // 2,
        ).train()


def main(what: str, folder: str, *jobs: str) -> None:
    torch.set_num_threads(1)
    {"gradients": gradients, "trainer": trainer}[what](Path(folder), list(jobs))
    torch.distributed.barrier()
    sys.stdout.flush()
    # exit without torch's destructors: they may hold the GIL and wait for gloo's thread, which may wait for the GIL
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
