"""The processes that do one run together, as `torchrun` or `accelerate launch` starts them.

The first process has rank 0. It alone writes files and speaks to the reader. In a run of one process, every function
here does its work at once, and nothing is sent.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

from unipelt.runs.errors import RunError

_WAIT = timedelta(hours=2)  # longest time that one process waits for another: the first one may have to load a model
_OTHERS = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
_FAILED = "unipelt/failed"
_GRACE = 30  # seconds that a process without a report waits for its end

Made = TypeVar("Made")
_store: Any = None
_reports = False


def world_size() -> int:
    """Return the number of processes that do the run together."""
    return max(1, int(os.environ.get("WORLD_SIZE") or 1))


def rank() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ.get("RANK") or 0) if world_size() > 1 else 0


def is_first() -> bool:
    """Return whether this process writes the files of the run."""
    return rank() == 0


def only_first(log: Callable[[str], None]) -> Callable[[str], None]:
    """Return the function that takes lines for the reader, or in other processes one that drops them."""
    return log if is_first() else lambda line: None


def need_one_process(what: str) -> None:
    """Raise `RunError` if this process is one of several. The message begins with `what`, such as `a rerun`."""
    if world_size() > 1:
        raise RunError(f"{what} is one process, and WORLD_SIZE is {world_size()}; start it without a launcher")


def check_launcher(precision: str, trainer: Mapping[str, Any]) -> None:
    """Check the environment that a launcher has made.

    Args:
        precision: the setting `precision` of the run.
        trainer: the options for Trainer.

    Raises:
        RunError: the launcher asks for something that a run cannot do, or a variable is missing.
    """
    for name, what in _SHARDED.items():
        if os.environ.get(name, "").lower() in ("true", "1"):
            raise RunError(
                f"a run in several processes keeps the whole model in each of them (DDP), and accelerate's "
                f"configuration asks for {what}; choose MULTI_GPU there, or start the run by torchrun"
            )
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    ours = "bf16" if precision == "bf16" else "fp16" if trainer.get("fp16") else "no"
    if asked not in ("no", ours):
        raise RunError(
            f"accelerate's configuration asks for mixed_precision {asked}, and the run is to train in {precision}; set "
            "the precision of the run (--precision), and mixed_precision no"
        )
    if "WORLD_SIZE" not in os.environ:
        if found := [name for name in _OTHERS if int(os.environ.get(name) or 1) > 1]:
            raise RunError(f"{found[0]} is above 1, and WORLD_SIZE is not set; start several processes by torchrun")
    elif world_size() > 1 and (absent := [name for name in _NEEDED if name not in os.environ]):
        raise RunError(
            f"WORLD_SIZE is {world_size()}, and {absent[0]} is not set; start several processes by torchrun or "
            "accelerate launch, and one process without WORLD_SIZE"
        )


def check_batch_size(batch_size: int) -> None:
    """Raise `RunError` if the processes cannot share a batch of this size equally."""
    if batch_size % world_size():
        raise RunError(
            f"batch_size is {batch_size}, which {world_size()} processes cannot share equally; it is the size of the "
            "whole batch, so give a multiple of the number of processes"
        )


def join(device: str) -> None:
    """Join the other processes, if there are any. A second call does nothing.

    Args:
        device: `cpu` or `cuda`. On `cuda`, this process takes the GPU with its local rank.

    Raises:
        RunError: this machine has fewer GPUs than processes.
    """
    global _store
    if world_size() == 1:
        return
    import torch
    from torch import distributed

    if device == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise RunError(
                f"this machine has {torch.cuda.device_count()} GPUs, and a process for GPU number {local}; start as "
                "many processes as there are GPUs, or take --device cpu"
            )
        torch.cuda.set_device(local)
    if distributed.is_initialized():
        return
    # accelerate calls the CPU of a process cpu:0 and so on, and Transformers 5.0 loads the optimizer to that device
    torch.serialization.register_package(1999, lambda storage: None, _restore_numbered_cpu)
    _store, *_ = next(distributed.rendezvous("env://", timeout=_WAIT))
    # objects travel by gloo on every device, and gradients by NCCL on a GPU
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, store=_store, rank=rank(), world_size=world_size(), timeout=_WAIT)


def gather(value: Made) -> list[Made]:
    """Return the values of all processes, in the order of their ranks. Each process must call this."""
    if world_size() == 1:
        return [value]
    from torch import distributed

    found: list[Any] = [None] * world_size()
    distributed.all_gather_object(found, value)
    return found


def wait() -> None:
    """Wait until all processes are here."""
    gather(None)


def on_first(do: Callable[[], Made]) -> Made:
    """Call `do` in the first process alone. Return its value, or raise its error, in all processes."""
    if world_size() == 1:
        return do()
    from torch import distributed

    outcome: list[Any] = [None, None]
    error: Exception | None = None
    if is_first():
        try:
            outcome[0] = do()
        except Exception as caught:
            error = caught
            outcome[1] = _portable(caught)
    distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise error or outcome[1]
    found: Made = outcome[0]
    return found


def first_then_others(do: Callable[[], Made]) -> Made:
    """Call `do` in the first process, and then in the others, which find what the first one has downloaded.

    An error of one process is raised in all.
    """
    if world_size() == 1:
        return do()
    made: Any = None
    for turn in (True, False):
        error: Exception | None = None
        if is_first() == turn:
            try:
                made = do()
            except Exception as caught:
                error = caught
        found = [one for one in gather(_portable(error)) if one is not None]
        if found:
            raise error or found[0]
    result: Made = made
    return result


def has_to_report() -> bool:
    """Return whether this process is the one that reports a failure: of all processes, the first one that asks.

    Before the processes have joined, it is the one with rank 0.
    """
    global _reports
    if world_size() == 1 or _store is None:
        _reports = is_first()
    else:
        try:
            _reports = _store.add(_FAILED, 1) == 1
        except RuntimeError:  # the process that kept the store has ended, so it has reported
            _reports = False
    return _reports


def leave(code: int) -> None:
    """Leave the other processes at the end of the program.

    After a failure, the program ends here, because other processes may wait for this one forever. When the process that
    reports has ended, the launcher ends the others.

    Args:
        code: the exit code of the program.
    """
    if world_size() == 1 or (code == 0 and _store is None):
        return
    if code == 0:
        from torch import distributed

        wait()
        distributed.destroy_process_group()
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if not _reports:
        time.sleep(_GRACE)  # a launcher that sees this process end would end the reporting one
    os._exit(code)


def _restore_numbered_cpu(storage: Any, location: str) -> Any:
    """Return a storage that is to be on a CPU with a number, and None for another device."""
    return storage if location.startswith("cpu:") else None


def _portable(error: Exception | None) -> Exception | None:
    """Return the error in a form that can be sent to another process: its class with its message."""
    if error is None:
        return None
    try:
        reduced: Any = error.__reduce__()  # of an OSError with the file's name, which its `args` leave out
        arguments = reduced[1]
        made = type(error)(*arguments)
        plain = all(one is None or isinstance(one, (str, int, float, os.PathLike)) for one in arguments)
        whole = plain and str(made) == str(error)
    except Exception:  # its class cannot be made again from what is sent
        whole = False
    return made if whole else RuntimeError(f"{type(error).__name__}: {error}")
