"""Errors of a run, before and during training; each message is one sentence that says what to do."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator

from unipelt.files.messages import complain

_ON = "the same command goes on from the last finished epoch"


class RunError(ValueError):
    """A run that cannot start; the message says why and what to do. Nothing was trained."""


class RunFailed(RuntimeError):
    """A run that failed after it had begun; the message says why and how to go on. Its checkpoints are kept."""


class Diverged(ValueError):
    """Numbers of a run that are no longer finite.

    Args:
        what: is not finite, in words.
        where: in the training, in words; where that is known.
    """

    def __init__(self, what: str, where: str = "") -> None:
        super().__init__(
            f"{what}{where and f' {where}'}: training has diverged; lower the learning rate or use float32"
        )
        self.what = what

    def at(self, epoch: float, step: int, learning_rate: float) -> Diverged:
        """The same, with the end of what was trained, and the run's learning rate."""
        return Diverged(self.what, f"after epoch {epoch:g} (step {step}, learning_rate {learning_rate:g})")


def check_losses(**losses: float) -> None:
    """Raise `Diverged` if one of these losses, named by their split, is not finite."""
    for split, loss in losses.items():
        if not math.isfinite(loss):
            raise Diverged(f"the {split} loss is {loss}")


def explain(error: Exception) -> str | None:
    """Explain why training ended with this error and what to do; None for a mistake in the code."""
    if is_out_of_memory(error):
        return (
            f"memory ran out{_because(error)}; with more of it free {_ON}, with less a run needs a smaller batch_size "
            "or max_length, or gradient_checkpointing"
        )
    if isinstance(error, Diverged):
        return f"{error}; the last good checkpoint is kept, and other settings need another output_dir, or --overwrite"
    if isinstance(error, (OSError, ValueError)):
        return f"{error}; {_ON}"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, a GPU or PyTorch's allocator of the host, which has no error of its own, had no more memory."""
    import torch  # here, so that a program that prints its help need not wait for it

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


@contextlib.contextmanager
def memory_named(what: str, remedy: str, kind: type[Exception]) -> Iterator[None]:
    """Turn running out of memory into an error of this kind, which names the step and a remedy."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise kind(f"memory ran out while {what}{_because(error)}; {remedy}") from error


def _because(error: Exception) -> str:
    """The first line of what an error says, in brackets, if it says anything."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f" ({lines[0]})" if lines else ""


def exit_code(program: str, do: Callable[[], object]) -> int:
    """Do it; say in one line what is wrong with the input, or why a run failed.

    Returns:
        0 done, 1 the run failed, 2 bad input, 130 interrupted.
    """
    try:
        do()
    except (ValueError, OSError) as error:
        complain(program, error)
        return 2
    except RunFailed as error:
        complain(program, error)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last finished epoch", file=sys.stderr)
        return 130
    return 0
