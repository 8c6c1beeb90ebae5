"""Compare a step of two data-parallel processes with a step of one process, by DDP and by FSDP2.

Usage: families_parallel.py FOLDER FAMILY...   process N writes its results to FOLDER/results-N.json

The models are tiny models of many architectures. Each process has half of a batch. Each process also computes, with the
whole batch, the results of one process.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from helpers import shake
from tiny import ENCODER_DECODERS, ENCODERS, FAMILIES, VOCABULARY, WITH_PREFIX, tiny_batch, tiny_model
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import unipelt
from unipelt.hosts.locate import layers_at
from unipelt.injection.state import host_of, injection_inside
from unipelt.submodules.room import own_parts

LENGTHS = ((9, 5, 7, 7), (4, 6, 2, 8))
"""The lengths of the texts in two batches. Both halves of a batch have the same number of tokens, so the mean of their
losses is the loss of the whole batch.
"""
CHECKPOINTED = ("bert", "llama", "bart")
PROCESSES = 2


def build(family: str) -> Any:
    """Return an injected model in training mode, the same in every process."""
    model = tiny_model(family).train()
    unipelt.inject(model, "unipelt-apl" if family in WITH_PREFIX else "unipelt-al")
    shake(model)
    return model


def build_peft(family: str) -> Any:
    """Return a `PeftModel` with the same set, in training mode."""
    import peft

    model = peft.get_peft_model(tiny_model(family).train(), unipelt.PeftConfig("unipelt-apl"))
    shake(model)
    return model


def batches(family: str) -> Iterator[dict[str, Tensor]]:
    """Yield two labelled batches of four texts."""
    for seed, lengths in enumerate(LENGTHS):
        batch = tiny_batch(family, seed, lengths)
        if family in ENCODERS:
            batch["labels"] = torch.tensor([0, 1, 1, 0])
        elif family in ENCODER_DECODERS:
            generator = torch.Generator().manual_seed(seed)
            batch["labels"] = torch.randint(5, VOCABULARY, batch["decoder_input_ids"].shape, generator=generator)
        else:
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        yield batch


def whole(tensor: Tensor) -> Tensor:
    """Return a copy of the whole tensor. Each process may hold only a part of the tensor."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def step(family: str, model: Any, wrapped: Any, rows: slice) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the gradients of the second of two passes, and all parameters after a step with these gradients.

    The second pass is used because DistributedDataParallel reports an unreduced parameter of a pass only in the next
    pass.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # with a large epsilon, Adam's first step depends on the gradient's size and not only on its sign
    optimizer = torch.optim.AdamW(trained, lr=0.1, eps=0.1, weight_decay=0.0)
    for batch in batches(family):
        optimizer.zero_grad()
        wrapped(**{name: tensor[rows] for name, tensor in batch.items()}).loss.backward()
    named = dict(model.named_parameters())
    gradients = {name: whole(parameter.grad) for name, parameter in named.items() if parameter.grad is not None}
    optimizer.step()
    return gradients, {name: whole(parameter) for name, parameter in named.items()}


def shard(family: str, model: Any) -> Any:
    """Apply `fully_shard` as its documentation does: to each layer, then to the rest."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for stack in FAMILIES[family].stacks:
        for layer in layers_at(model.base_model, stack.layers):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def shard_peft(family: str, model: Any) -> Any:
    """Apply `fully_shard` to a `PeftModel`: to the layers, to the model inside, and to the wrapper."""
    shard(family, host_of(model))
    return fully_shard(model, mesh=init_device_mesh("cpu", (PROCESSES,)))


def own_rows() -> slice:
    """Return the slice of a batch that belongs to this process."""
    half, rank = 4 // PROCESSES, torch.distributed.get_rank()
    return slice(half * rank, half * (rank + 1))


def differing(got: dict[str, Tensor], want: dict[str, Tensor]) -> list[str]:
    """Return the names of tensors that are not close, or that only one side has."""
    both = got.keys() & want.keys()
    apart = [name for name in both if not torch.allclose(got[name], want[name], atol=3e-6, rtol=1e-4)]
    return sorted({*apart, *(got.keys() ^ want.keys())})


def differing_between_processes(tensors: dict[str, Tensor]) -> list[str]:
    """Return the names of tensors that are not bitwise equal to those of the first process."""
    apart = []
    for name, tensor in tensors.items():
        first = tensor.clone()
        torch.distributed.broadcast(first, 0)
        if not torch.equal(first, tensor):
            apart.append(name)
    return apart


def compare(family: str, way: str) -> dict[str, Any]:
    """Return the differences between two processes and one process."""
    of_peft = way == "fsdp2 of peft"
    make = build_peft if of_peft else build
    alone, model = make(family), make(family)
    start = {name: whole(parameter) for name, parameter in model.named_parameters()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    want_gradients, want = step(family, alone, alone, slice(None))
    if way == "fsdp2 checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    spread = shard_peft if of_peft else shard
    wrapped = DistributedDataParallel(model) if way == "ddp" else spread(family, model)
    gradients, got = step(family, model, wrapped, own_rows())
    return {
        "prefix": injection_inside(host_of(model)).config.prefix is not None,
        "parameters": len(got),
        "sharded": sum(isinstance(parameter, DTensor) for parameter in model.parameters()),
        "other gradients": differing(gradients, want_gradients),
        "zero gradients": sorted(
            [name for name in trained if not want_gradients[name].any()]
            + [
                f"{own.full_name}: {own.part.name}"
                for own in own_parts(alone)
                if own.full_name in trained and not own.part.of(want_gradients[own.full_name]).any()
            ]
        ),
        "frozen with a gradient": sorted(gradients.keys() - trained),
        "other parameters after the step": differing(got, want),
        "frozen and moved": sorted(name for name in got.keys() - trained if not torch.equal(got[name], start[name])),
        "trained and not moved": sorted(name for name in trained if torch.equal(got[name], start[name])),
        "other in the second process": differing_between_processes(got),
    }


def save(family: str, folder: Path) -> dict[str, Any]:
    """Save a sharded model, whole and deployed, and return the differences between the model and its checkpoints."""
    model = build(family)
    shard(family, model)
    _, got = step(family, model, model, own_rows())
    state: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if torch.distributed.get_rank() != 0:
        return {}
    # only the first process continues, so a call that gathers tensors would wait forever
    unipelt.save(model, folder / family, state_dict=state)
    unipelt.save(model, folder / f"{family}-deployed", state_dict=state, deploy=True)
    again, deployed = (unipelt.load(tiny_model(family), folder / name) for name in (family, f"{family}-deployed"))
    loaded = dict(again.named_parameters())
    batch = next(batches(family))
    with torch.no_grad():
        apart = (again(**batch).logits - deployed(**batch).logits).abs().max().item()
    refusal = ""
    try:
        unipelt.save(model, folder / "refused")
    except ValueError as error:
        refusal = str(error)
    return {
        "other parameters": sorted(name for name in got if not torch.equal(got[name], loaded[name])),
        "logits apart when deployed": apart,
        "class": json.loads((folder / family / "unipelt.json").read_text(encoding="utf-8"))["base"]["class"],
        "refusal": refusal,
    }


def save_peft(family: str, folder: Path) -> dict[str, Any]:
    """Save a sharded `PeftModel`, and return the differences between the model and its folder."""
    import peft

    model = build_peft(family)
    shard_peft(family, model)
    _, got = step(family, model, model, own_rows())
    state: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if torch.distributed.get_rank() != 0:
        return {}
    model.save_pretrained(folder / f"{family}-peft", state_dict=state)
    again = dict(peft.PeftModel.from_pretrained(tiny_model(family), folder / f"{family}-peft").named_parameters())
    return {"other parameters": sorted(name for name in got if not torch.equal(got[name], again[name]))}


def work(rank: int, folder: Path, families: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = torch.distributed.FileStore(str(folder / "store"), PROCESSES)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=60)
    )
    jobs = [(family, way) for family in families for way in ("ddp", "fsdp2")]
    ways = ["fsdp2 checkpointed", "save"]
    if importlib.util.find_spec("peft") is not None:
        ways += ["fsdp2 of peft", "save of peft"]
    jobs += [(family, way) for way in ways for family in families if family in CHECKPOINTED]
    results: dict[str, dict[str, Any]] = {}
    for family, way in jobs:
        try:
            saves = {"save": save, "save of peft": save_peft}
            found = saves[way](family, folder) if way in saves else compare(family, way)
        except Exception:
            found = {"error": traceback.format_exc()}
        results[f"{family} {way}"] = found
        # written after each job, because a collective that only one process reaches may end both
        (folder / f"results-{rank}.json").write_text(json.dumps(results), encoding="utf-8")
    torch.distributed.barrier()
    sys.stdout.flush()
    # exit without torch's destructors: they may hold the GIL and wait for gloo's thread, which may wait for the GIL
    os._exit(0)


def in_processes(work: Callable[..., None], *given: Any) -> int:
    """Call `work(rank, *given)` in forked processes, so that the libraries are imported once.

    Return 0 if all succeed.
    """
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=(rank, *given)) for rank in range(PROCESSES)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return max(abs(worker.exitcode or 0) for worker in workers)


if __name__ == "__main__":
    sys.exit(in_processes(work, Path(sys.argv[1]), sys.argv[2:]))
