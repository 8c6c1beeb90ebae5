"""Kill runs with SIGKILL at chosen moments, and start them again: `python killed.py FOLDER`.

Every attempt is its own process. The processes are forked, because importing the libraries takes longer than the runs.
No thread is used before a fork.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_task import make_quick, quick

from unipelt.glue.run import run
from unipelt.glue.settings import RunSettings

# The function, the number of the call that kills the process, and whether the kill is before or after the call.
MOMENTS = {
    "before the first epoch": ("transformers.trainer.Trainer", "train", 1, "before"),
    "in an epoch": ("transformers.trainer.Trainer", "training_step", 5, "after"),
    "in an evaluation": ("transformers.trainer.Trainer", "prediction_step", 3, "after"),
    "weights written, optimizer not": (
        "transformers.trainer.Trainer",
        "_save_optimizer_and_scheduler",
        2,
        "before",
    ),
    "checkpoint written, marker not": ("unipelt.runs.folder", "mark", 2, "before"),
    "checkpoint marked, older ones not removed": ("unipelt.runs.folder", "mark", 3, "after"),
    "in the removal of an older one": ("shutil", "rmtree", 4, "before"),
    "after a first evaluation that was not better": ("unipelt.runs.folder", "mark", 4, "after"),
    "trained, not tested": ("transformers.trainer.Trainer", "predict", 1, "before"),
    "picture half written": ("matplotlib.figure.Figure", "savefig", 1, "after"),
    "picture written, result not": ("unipelt.glue.run", "write_result", 1, "before"),
    "result written, checkpoints there": ("unipelt.runs.folder", "clean", 1, "before"),
}


def kill_at(place: str, name: str, call: int, when: str) -> None:
    """Make this process kill itself at call number `call` of a function, before or after the call."""
    try:
        owner: Any = importlib.import_module(place)
    except ModuleNotFoundError:
        module, _, cls = place.rpartition(".")
        owner = getattr(importlib.import_module(module), cls)
    original = getattr(owner, name)
    calls = 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, wrapper)


def attempt(settings: RunSettings, prepare: Callable[[], None] = lambda: None, seconds: float | None = None) -> int:
    """Do a run in its own process, and return the wait status. With `seconds`, the process is killed from outside."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            prepare()
            run(settings, log=lambda line: None)
            code = 0
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def main(folder: Path) -> None:
    """Write `report.json`: for each moment, how the killed attempt ended, and how the second attempt ended."""
    torch.set_num_threads(1)
    make_quick(folder)

    def settings(name: str) -> RunSettings:
        # the run stops after the fifth of at most six epochs, and the third epoch is the best
        return RunSettings(**quick(folder, output_dir=str(folder / name), epochs=6, patience=2))

    report = {"undisturbed": [attempt(settings("undisturbed"))]}
    for number, moment in enumerate(MOMENTS):
        name = f"moment-{number}"
        first = attempt(settings(name), lambda moment=moment: kill_at(*MOMENTS[moment]))  # type: ignore[misc]
        report[name] = [first, attempt(settings(name))]
    for number, seconds in enumerate((0.5, 1.1)):  # at any moment of the run
        name = f"clock-{number}"
        report[name] = [attempt(settings(name), seconds=seconds), attempt(settings(name))]
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
