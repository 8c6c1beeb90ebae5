"""Compare a step under DeepSpeed's ZeRO-3 and under FSDP1 with a step of one process, on CPUs.

DeepSpeed is in no extra of this package. Install it, then start two processes:

    pip install deepspeed
    DS_ACCELERATOR=cpu torchrun --nproc_per_node 2 tests/scripts/sharded.py bert llama bart

For each architecture and method the first process prints the largest difference of a parameter after the step, and
under ZeRO-3 the number of parameters that differ after saving and loading.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers import shake
from tiny import tiny_batch, tiny_model

import unipelt

METHODS = ("unipelt-apl", "unipelt")
ZERO_3 = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_force_ds_cpu_optimizer": False,
    "zero_allow_untested_optimizer": True,
}


def build(family: str, method: str) -> Any:
    """Return a small injected model, the same in every process."""
    model = unipelt.inject(tiny_model(family), method)
    shake(model)
    return model


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    """Return an optimizer of all parameters that train."""
    return torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)


def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return a loss that depends on every logit."""
    loss: Tensor = model(**batch).logits.square().mean()
    return loss


def largest_difference(model: Any, want: Any) -> float:
    """Return the largest difference between the parameters of two models, which both hold whole parameters."""
    pairs = zip(model.parameters(), want.parameters(), strict=True)
    return max((got.detach() - other.detach()).abs().max().item() for got, other in pairs)


def compare(family: str, method: str, folder: str) -> None:
    """Print the differences for one architecture and method."""
    rank = torch.distributed.get_rank()
    batch = tiny_batch(family, lengths=(5, 9, 7, 3))
    own = {name: tensor[2 * rank : 2 * rank + 2] for name, tensor in batch.items()}
    alone = build(family, method)
    optimizer = optimizer_of(alone)
    loss_of(alone, batch).backward()
    optimizer.step()

    model = build(family, method)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=ZERO_3)
    engine.eval()
    engine.backward(loss_of(engine, own))
    engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        apart = largest_difference(model, alone)
        if rank == 0:
            state = {name: one.detach().clone() for name, one in model.named_parameters()}
            unipelt.save(model, folder, state_dict=state)
            again = dict(unipelt.load(tiny_model(family), folder).named_parameters())
            changed = sum(not torch.equal(state[name], again[name]) for name in state)
            print(f"ZeRO-3 {family} {method}: {apart:.1e}; {changed} of {len(state)} differ after loading", flush=True)

    model = build(family, method)
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = optimizer_of(model)
    loss_of(wrapped, own).backward()
    optimizer.step()
    with FullyShardedDataParallel.summon_full_params(wrapped):
        if rank == 0:
            print(f"FSDP1  {family} {method}: {largest_difference(model, alone):.1e}", flush=True)


if __name__ == "__main__":
    deepspeed.init_distributed("gloo")
    for name in sys.argv[1:] or ["bert"]:
        for chosen in METHODS:
            with tempfile.TemporaryDirectory() as scratch:
                compare(name, chosen, scratch)
