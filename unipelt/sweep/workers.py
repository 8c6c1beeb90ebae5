"""Do the runs of a sweep, each in its own process. Other sweeps may work in the same folder at the same time."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from unipelt.files.messages import say
from unipelt.glue.settings import RunSettings
from unipelt.records.record import RESULT, summary
from unipelt.runs.folder import CHECKPOINTS, clean
from unipelt.runs.processes import need_one_process
from unipelt.sweep.folder import (
    LOG,
    SETTINGS,
    Busy,
    State,
    alone,
    duration,
    finished,
    folder_of,
    read_failure,
    remove_drafts,
    remove_failure,
    write_failure,
    write_settings,
)

BUSY = 75  # exit code of a run's process if another process does the run; EX_TEMPFAIL of sysexits.h
_CLAIM = ".sweep"
_PAUSE = 2.0  # seconds between two checks of runs that other processes do
_TAIL = 20  # number of log lines that a failure keeps


def carry_out(
    state: State,
    start: Callable[[RunSettings, threading.Event], str | None] | None = None,
    log: Callable[[str], None] = say,
) -> dict[str, str]:
    """Do the runs that are left. Wait for runs that other processes do, and do those too if they stay unfinished.

    Args:
        state: the state of the folder, as `status` returns it; updated in place.
        start: a function that does one run and returns None, or the reason of a failure in one line. The function gives
            up once the event is set, and raises `Busy` if another process does the run. The default does the run in its
            own process.
        log: a function that takes each line of progress.

    Returns:
        The error of each failed run in one line, by folder.

    Raises:
        RunError: this process is one of several.
    """
    need_one_process("a sweep")
    start = start or in_process(state.workers)
    earlier, state.failures = state.failures, {}
    for settings in state.sweep.runs:
        if folder_of(settings) in state.seconds:
            _tidy(settings)
    left, announced = state.left, 0
    while left:
        busy: list[RunSettings] = []
        stop = threading.Event()
        with ThreadPoolExecutor(min(state.workers, len(left))) as pool:
            futures = {pool.submit(_attempt, settings, start, stop, earlier): settings for settings in left}
            waiting = list(left)
            try:
                for future in as_completed(futures):
                    settings = futures[future]
                    waiting.remove(settings)
                    if not (outcome := future.result()):
                        busy.append(settings)
                    else:
                        log(_account(state, settings, outcome, [*waiting, *busy]))
            finally:
                stop.set()  # stops the runs after an interruption; otherwise all runs have ended
        if busy:
            if len(busy) != announced:
                log(f"waiting for other processes, which do {len(busy)} of the runs")
            announced = len(busy)
            time.sleep(_PAUSE)
        left = busy
    return {folder: failure["error"] for folder, failure in state.failures.items()}


def _account(state: State, settings: RunSettings, outcome: dict[str, Any], left: Sequence[RunSettings]) -> str:
    """Enter a record or a failure into the state. Return the line of progress."""
    folder = folder_of(settings)
    if "error" in outcome:
        state.failures[folder] = outcome
        line = f"{Path(folder).name} FAILED: {outcome['error']} -> {Path(folder) / LOG}"
    else:
        state.seconds[folder] = outcome["seconds"]["total"]
        line = summary(outcome, Path(folder) / RESULT)
    rest = state.seconds_left(left)
    ended = len(state.seconds) + len(state.failures)
    time_left = f", {duration(rest)} left" if left and rest is not None else ""
    return f"[{ended} of {len(state.sweep.runs)}{time_left}] {line}"


def _attempt(
    settings: RunSettings,
    start: Callable[[RunSettings, threading.Event], str | None],
    stop: threading.Event,
    earlier: Mapping[str, dict[str, Any]],
) -> dict[str, Any] | None:
    """Return a run's record or its failure, or None if another process does the run or if the run was stopped."""
    folder = Path(folder_of(settings))
    if stop.is_set():
        return None
    try:
        with alone(folder / _CLAIM):
            with alone(folder):  # a run's process may outlive its killed sweep for a moment
                remove_drafts(folder)
            if (record := finished(settings)) is not None:
                return record
            failure = read_failure(folder)
            if failure is not None and failure != earlier.get(str(folder)):
                return failure  # another sweep has just tried this run
            write_settings(settings)
            printed = _size(folder / LOG)
            error = start(settings, stop)
            record = finished(settings)
            if record is None:
                tail = _lines(folder / LOG, printed)[-_TAIL:]
                return write_failure(settings, error or "it ended without a result", tail)
            remove_failure(settings)
            return record
    except Busy:
        return None


def in_process(workers: int) -> Callable[[RunSettings, threading.Event], str | None]:
    """Make a function that does a run in its own process, which ends with this process.

    `workers` runs share the cores.
    """
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    defaults = {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1"}
    defaults |= {"OMP_NUM_THREADS": threads} if workers > 1 else {}  # otherwise each process takes all cores

    def start(settings: RunSettings, stop: threading.Event) -> str | None:
        folder = Path(folder_of(settings))
        printed = _size(folder / LOG)
        command = [sys.executable, "-m", "unipelt.sweep", str(folder / SETTINGS)]
        with (
            open(folder / LOG, "ab") as file,
            # the pipe tells the run's process that this process has ended; its own session keeps Ctrl-C from it
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**defaults, **os.environ},
                start_new_session=True,
            ) as process,
        ):
            while (code := _wait(process, seconds=0.5)) is None:
                if stop.is_set():
                    process.kill()
        if stop.is_set() or code == BUSY:
            raise Busy
        if code < 0:
            kill = " (for want of memory?)" if code == -signal.SIGKILL else ""
            return f"killed by {signal.Signals(-code).name}{kill}"
        return None if code == 0 else next(reversed(_lines(folder / LOG, printed)), f"exit code {code}")

    return start


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _tidy(settings: RunSettings) -> None:
    """Remove the checkpoints and the failure of a finished run whose process was killed before their removal."""
    folder = Path(folder_of(settings))
    if (folder / CHECKPOINTS).exists() and not settings.keep_checkpoints:
        with contextlib.suppress(Busy), alone(folder):
            clean(folder)
    remove_failure(settings)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _lines(path: Path, start: int) -> list[str]:
    """Return the lines of a file from the byte `start` on, without blank lines."""
    text = path.read_bytes()[start:].decode("utf-8", "replace") if path.exists() else ""
    return [line for line in text.splitlines() if line.strip()]
