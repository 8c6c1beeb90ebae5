"""The errors of a run, before and during training. Each message is one sentence that says what to do."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator

from unipelt.files.messages import complain

_ON = "the same command goes on from the last finished epoch"


class RunError(ValueError):
    """Error of a run that cannot start. The message gives the reason and the remedy. Nothing was trained."""


class RunFailed(RuntimeError):
    """Error of a run that failed after its start. The message gives the reason and how to continue.

    The checkpoints of the run are kept.
    """


class Diverged(ValueError):
    """Error of a run with numbers that are no longer finite.

    Args:
        what: a statement about these numbers, such as `the dev loss is nan`.
        where: the moment in the training, in words; empty if unknown.
    """

    def __init__(self, what: str, where: str = "") -> None:
        super().__init__(
            f"{what}{where and f' {where}'}: training has diverged; lower the learning rate or use float32"
        )
        self.what = what

    def at(self, epoch: float, step: int, learning_rate: float) -> Diverged:
        """Return the same error with the moment in the training and the run's learning rate."""
        return Diverged(self.what, f"after epoch {epoch:g} (step {step}, learning_rate {learning_rate:g})")


def check_losses(**losses: float) -> None:
    """Raise `Diverged` if one of these losses is not finite. Each loss has the name of its split."""
    for split, loss in losses.items():
        if not math.isfinite(loss):
            raise Diverged(f"the {split} loss is {loss}")


def explain(error: Exception) -> str | None:
    """Return why training ended with this error and what to do. Return None for a mistake in the code."""
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
    """Return whether memory ran out in Python, on a GPU, or in PyTorch's allocator of the CPU.

    The allocator of the CPU has no error class of its own.
    """
    import torch  # imported here, so that `--help` does not wait for PyTorch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


@contextlib.contextmanager
def memory_named(what: str, remedy: str, kind: type[Exception]) -> Iterator[None]:
    """Raise an error of this kind if memory runs out. Its message names the step (`what`) and a remedy."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise kind(f"memory ran out while {what}{_because(error)}; {remedy}") from error


def _because(error: Exception) -> str:
    """Return the first line of an error's message, in brackets, or an empty text if there is no message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f" ({lines[0]})" if lines else ""


def exit_code(program: str, do: Callable[[], object], has_to_report: Callable[[], bool] = lambda: True) -> int:
    """Call `do`, and print one line if the input is wrong or a run failed.

    Args:
        program: the name of the program, for the message.
        do: the function to call.
        has_to_report: function that returns whether this process reports a failure. Of several processes that fail,
            only one reports.

    Returns:
        The exit code: 0 for success, 1 for a failed run, 2 for bad input, 130 for an interrupt.
    """
    try:
        do()
    except (ValueError, OSError, RunFailed) as error:
        if has_to_report():
            complain(program, error)
        return 1 if isinstance(error, RunFailed) else 2
    except KeyboardInterrupt:
        if has_to_report():
            print("\ninterrupted; the same command goes on from the last finished epoch", file=sys.stderr)
        return 130
    except Exception:
        if has_to_report():
            raise
        return 1  # another process has failed, and this one lost its connection
    return 0
