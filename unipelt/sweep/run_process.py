"""Do a run of a sweep in a process of its own (`python -m unipelt.sweep RUN/settings.json`)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from unipelt.glue.settings import RunSettings
from unipelt.sweep.folder import LOG, SETTINGS, Busy, folder_of

BUSY = 75
"""Exit code of a run's process if another process does the run. It is EX_TEMPFAIL of sysexits.h."""


def in_process(workers: int) -> Callable[[RunSettings, threading.Event], str | None]:
    """Make a function that does a run in its own process, which ends with this process.

    `workers` runs share the cores.
    """

    def start(settings: RunSettings, stop: threading.Event) -> str | None:
        folder = Path(folder_of(settings))
        printed = size_of(folder / LOG)
        command = [sys.executable, "-m", "unipelt.sweep", str(folder / SETTINGS)]
        with (
            open(folder / LOG, "ab") as file,
            # the pipe tells the run's process that this process has ended; its own session keeps Ctrl-C from it
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment(workers),
                start_new_session=True,
            ) as process,
        ):
            while (code := _wait(process, seconds=0.5)) is None:
                if stop.is_set():
                    process.kill()
        if stop.is_set():
            raise Busy
        return reason_of(code, folder, printed)

    return start


def environment(workers: int) -> dict[str, str]:
    """Return the environment of a process, if `workers` such processes share the cores."""
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    defaults = {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1"}
    defaults |= {"OMP_NUM_THREADS": threads} if workers > 1 else {}  # otherwise each process takes all cores
    return {**defaults, **os.environ}


def reason_of(code: int, folder: Path, printed: int) -> str | None:
    """Return in one line why a run's process failed, or None if the process ended well.

    Args:
        code: the exit code of the process; negative for a signal.
        folder: the folder of the run.
        printed: the size of the run's log before the process began, in bytes.

    Raises:
        Busy: another process does the run.
    """
    if code == BUSY:
        raise Busy
    if code < 0:
        kill = " (for want of memory?)" if code == -signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{kill}"
    return None if code == 0 else next(reversed(lines_of(folder / LOG, printed)), f"exit code {code}")


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def size_of(path: Path) -> int:
    """Return the size of a file in bytes, 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def lines_of(path: Path, start: int) -> list[str]:
    """Return the lines of a file from the byte `start` on, without blank lines."""
    text = path.read_bytes()[start:].decode("utf-8", "replace") if path.exists() else ""
    return [line for line in text.splitlines() if line.strip()]
