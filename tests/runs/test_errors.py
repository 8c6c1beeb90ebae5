"""The errors of a run: what each says, and what a program that ends with one prints and returns."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from unipelt.runs.errors import (
    Diverged,
    RunError,
    RunFailed,
    check_losses,
    exit_code,
    explain,
    is_out_of_memory,
    memory_named,
)

AGAIN = "the same command goes on from the last finished epoch"


def raising(error: BaseException) -> Callable[[], None]:
    def do() -> None:
        raise error

    return do


def test_a_loss_that_is_not_finite() -> None:
    check_losses(train=0.5, dev=1e30)
    with pytest.raises(Diverged) as caught:
        check_losses(train=0.5, dev=float("nan"))
    lower = "training has diverged; lower the learning rate or use float32"
    assert str(caught.value) == f"the dev loss is nan: {lower}"
    later = caught.value.at(2.0, 14, 5e-4)
    assert str(later) == f"the dev loss is nan after epoch 2 (step 14, learning_rate 0.0005): {lower}"
    with pytest.raises(Diverged, match="the train loss is inf"):
        check_losses(train=float("inf"))


ALLOCATOR = "[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), f"memory ran out; with more of it free {AGAIN}, with less a run needs a smaller batch_size"),
        (torch.OutOfMemoryError("\n  CUDA out of memory \nof many lines"), "memory ran out (CUDA out of memory); with"),
        (RuntimeError(ALLOCATOR), f"memory ran out ({ALLOCATOR}); with more of it free"),
        (Diverged("the loss is nan"), "; the last good checkpoint is kept, and other settings need another output_dir"),
        (OSError(28, "No space left"), f"[Errno 28] No space left; {AGAIN}"),
        (ValueError("no"), f"no; {AGAIN}"),
        (RuntimeError("a mistake"), None),
        (KeyError(ALLOCATOR), None),
    ],
)
def test_why_training_ended(error: Exception, said: str | None) -> None:
    found = explain(error)
    assert found is None if said is None else said in str(found)
    assert is_out_of_memory(error) is ("memory ran out" in str(found))


def test_a_step_for_which_memory_ran_out() -> None:
    with memory_named("loading", "take a smaller model", RunError):
        pass
    with (
        pytest.raises(RunError, match=r"^memory ran out while loading \(no room\); take a smaller model$"),
        memory_named("loading", "take a smaller model", RunError),
    ):
        raise MemoryError("no room")
    with pytest.raises(RuntimeError, match=r"^a mistake$"), memory_named("loading", "", RunError):
        raise RuntimeError("a mistake")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RunError("no such\ntask"), 2, "program: no such task\n"),
        (OSError(2, "No such file"), 2, "program: [Errno 2] No such file\n"),
        (RunFailed("it failed"), 1, "program: it failed\n"),
        (KeyboardInterrupt(), 130, f"\ninterrupted; {AGAIN}\n"),
    ],
)
def test_a_program_says_in_one_line_why_it_ends(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("program", raising(error)) == code
    assert capsys.readouterr() == ("", line)
    assert exit_code("program", raising(error), lambda: False) == code, "another process has reported"
    assert capsys.readouterr() == ("", "")


def test_a_program_that_ends_well_or_by_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("program", lambda: None) == 0
    with pytest.raises(ZeroDivisionError):
        exit_code("program", lambda: 1 / 0)
    assert exit_code("program", lambda: 1 / 0, lambda: False) == 1
    assert capsys.readouterr() == ("", "")
