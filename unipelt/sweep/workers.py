"""Do the runs of a sweep. Other sweeps may work in the same folder at the same time."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from unipelt.files.messages import say
from unipelt.files.progress import Progress, above_bars, duration
from unipelt.glue.settings import RunSettings
from unipelt.records.record import RESULT, summary
from unipelt.runs.folder import CHECKPOINTS, clean
from unipelt.runs.processes import need_one_process
from unipelt.sweep.folder import (
    CLAIM,
    LOG,
    Busy,
    State,
    alone,
    finished,
    folder_of,
    read_failure,
    remove_drafts,
    remove_failure,
    write_failure,
    write_settings,
)
from unipelt.sweep.run_process import lines_of, size_of
from unipelt.sweep.run_server import run_servers

_PAUSE = 2.0  # seconds between two checks of runs that other processes do
_TICK = 1.0  # seconds between two looks at the clock for a line of progress
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
            up once the event is set, and raises `Busy` if another process does the run. The default is that of
            `unipelt.sweep.run_server.run_servers`.
        log: a function that takes each line of progress.

    Returns:
        The error of each failed run in one line, by folder.

    Raises:
        RunError: this process is one of several.
    """
    need_one_process("a sweep")
    earlier, state.failures = state.failures, {}
    for settings in state.sweep.runs:
        if folder_of(settings) in state.seconds:
            _tidy(settings)
    with contextlib.nullcontext(start) if start is not None else run_servers(state.workers) as do:
        left, announced = state.left, 0
        while left:
            busy = _do_once(state, left, do, earlier, log)
            if busy:
                if len(busy) != announced:
                    log(f"waiting for other processes, which do {len(busy)} of the runs")
                announced = len(busy)
                time.sleep(_PAUSE)
            left = busy
    return {folder: failure["error"] for folder, failure in state.failures.items()}


def _do_once(
    state: State,
    left: Sequence[RunSettings],
    start: Callable[[RunSettings, threading.Event], str | None],
    earlier: Mapping[str, dict[str, Any]],
    log: Callable[[str], None],
) -> list[RunSettings]:
    """Try each of these runs once. Return the runs that other processes do."""
    busy: list[RunSettings] = []
    stop = threading.Event()
    ended = len(state.sweep.runs) - len(left)
    with (
        ThreadPoolExecutor(min(state.workers, len(left))) as pool,
        Progress("sweep", len(state.sweep.runs), "run", done=ended, log=log) as progress,
    ):
        futures = {pool.submit(_attempt, settings, start, stop, earlier): settings for settings in left}
        try:
            while futures:
                ready, _ = wait(futures, timeout=_TICK, return_when=FIRST_COMPLETED)
                for future in [future for future in futures if future in ready]:
                    settings = futures.pop(future)
                    if not (outcome := future.result()):
                        busy.append(settings)
                        continue
                    with above_bars():
                        log(_account(state, settings, outcome, [*futures.values(), *busy]))
                    progress.update()
                progress.tick()
        finally:
            stop.set()  # stops the runs after an interruption; otherwise all runs have ended
    return busy


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
        with alone(folder / CLAIM):
            with alone(folder):  # a run's process may outlive its killed sweep for a moment
                remove_drafts(folder)
            if (record := finished(settings)) is not None:
                return record
            failure = read_failure(folder)
            if failure is not None and failure != earlier.get(str(folder)):
                return failure  # another sweep has just tried this run
            write_settings(settings)
            printed = size_of(folder / LOG)
            error = start(settings, stop)
            record = finished(settings)
            if record is None:
                tail = lines_of(folder / LOG, printed)[-_TAIL:]
                return write_failure(settings, error or "it ended without a result", tail)
            remove_failure(settings)
            return record
    except Busy:
        return None


def _tidy(settings: RunSettings) -> None:
    """Remove the checkpoints and the failure of a finished run whose process was killed before their removal."""
    folder = Path(folder_of(settings))
    if (folder / CHECKPOINTS).exists() and not settings.keep_checkpoints:
        with contextlib.suppress(Busy), alone(folder):
            clean(folder)
    remove_failure(settings)
