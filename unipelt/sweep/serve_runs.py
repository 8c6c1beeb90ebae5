"""The process of a server, which forks a process for each run: `python -m unipelt.sweep.serve_runs`.

    standard input    a line for each run: the path of its settings.json as JSON; the server ends when the pipe is
                      closed, and takes its run with it
    standard output   a line for each run: the exit code of its process; negative for a signal

The output of a run goes to the run's log.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import select
import signal
import sys
import warnings
from pathlib import Path

from unipelt.sweep import __main__ as run_process
from unipelt.sweep.folder import LOG

PRELOADED = (
    *("unipelt.glue.run", "matplotlib.figure", "matplotlib.backends.backend_agg"),
    "transformers.models.bert.modeling_bert",
)
"""The modules that a server imports. A run imports what it needs besides."""
_PAUSE = 0.05  # seconds between two looks at a run's process
_NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"


def main() -> int:
    """Serve. In the process of a run, return the exit code of the run."""
    answers = os.dup(1)
    os.dup2(2, 1)  # other output must not be read as an answer
    _preload()
    pipe, held = os.pipe()  # this process alone holds one end, so that its death ends a run, too
    while line := _read_line():
        child = _fork()
        if child == 0:
            os.close(held)
            os.close(answers)
            return _do(Path(json.loads(line)), pipe)
        code = _wait(child)
        if code is None:
            break
        os.write(answers, f"{code}\n".encode())
    return 0


def _preload() -> None:
    """Import the modules, without any computation and without the start of a GPU, which forked processes cannot use."""
    before = os.environ.get(_NVML)
    os.environ[_NVML] = "1"  # the other way to look for a GPU would start it
    for name in PRELOADED:
        with contextlib.suppress(ImportError):  # the run says what is missing
            importlib.import_module(name)
    if before is None:
        del os.environ[_NVML]
    else:
        os.environ[_NVML] = before
    gc.collect()
    gc.freeze()  # the garbage collector of a run need not look at these modules


def _read_line() -> bytes:
    """Return the next line of standard input, empty at its end. Nothing follows a line before its answer."""
    line = b""
    while not line.endswith(b"\n"):
        block = os.read(0, 1 << 16)
        if not block:
            return b""
        line += block
    return line


def _fork() -> int:
    with warnings.catch_warnings():
        # a library of linear algebra has threads from its import on, and makes a fork safe by itself
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _wait(child: int) -> int | None:
    """Return the exit code of the process, or None if standard input has ended, which ends the process."""
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if select.select([0], [], [], _PAUSE)[0]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None


def _do(settings: Path, pipe: int) -> int:
    """Do a run in this new process, whose standard input is then the pipe, and return the exit code."""
    log = os.open(settings.parent / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for number, file in enumerate((pipe, log, log)):
        os.dup2(file, number)
    os.close(pipe)
    os.close(log)
    random.seed()  # a new process has random numbers of its own until its run sets a seed
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules and sys.modules["torch"].cuda._is_in_bad_fork():
        # a module has started the GPU in the server, so this run needs a program of its own
        os.execv(sys.executable, [sys.executable, "-m", "unipelt.sweep", str(settings)])
    return run_process.main(settings)


if __name__ == "__main__":
    sys.exit(main())
