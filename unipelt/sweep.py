"""A grid of runs from one file, carried out by as many processes and machines as share the folder.

Every run is a process of its own (`python -m unipelt.sweep RUN/settings.json`), so that one that crashes, or is
killed for want of memory, is a recorded failure and the others go on. The state is the folder's, never a process's:

    OUT/sweep.json              what was asked for (`write_request`)
    OUT/RUN/settings.json       the run's settings
    OUT/RUN/log.txt             what its processes printed
    OUT/RUN/result.json         it has finished
    OUT/RUN/failure.json        its last process failed: {"error": one line, "log": the tail, "time": when}
    OUT/RUN/.sweep/.lock        held by the sweep that starts the run's process
    OUT/RUN/.lock               held by that process (`unipelt.glue.folder`)

A process that dies lets go of its locks, so nothing has to be cleaned up after a kill.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from unipelt.checkpoint import write_whole
from unipelt.glue.folder import CHECKPOINTS, LockedError, clean, find_finished, locked
from unipelt.glue.job import RunError
from unipelt.glue.result import RESULT, summary
from unipelt.glue.settings import (
    RunSettings,
    clean_name,
    locate_path,
    paper_learning_rate,
    read_config,
    read_option,
)
from unipelt.glue.tasks import shorten_name

REQUEST = "sweep.json"
FAILURE = "failure.json"
LOG = "log.txt"
SETTINGS = "settings.json"
_CLAIM = ".sweep"
_BUSY = 75  # exit code of a run's process that found another one at it; EX_TEMPFAIL of sysexits.h
_PAUSE = 2.0  # seconds between two looks at runs that other processes do
_TAIL = 20  # lines of the log kept with a failure
_SEEDS = ("seed", "data_seed")  # what may differ between the runs of a cell


class SweepError(ValueError):
    """A sweep that cannot be meant; the message says where and what is possible. Nothing was run."""


class Busy(Exception):
    """Another process is doing this run."""


# What to run


@dataclass(frozen=True)
class Sweep:
    """The runs that a sweep file asks for.

    Attributes:
        path: the sweep file.
        runs: no two of them the same, in the order of the file.
        chosen: the fields of which each cell tries several values, the best on dev being reported.
    """

    path: str
    runs: tuple[RunSettings, ...]
    chosen: tuple[str, ...] = ()

    def cell(self, settings: RunSettings) -> str:
        """What the runs of a cell have in common, all but seeds and chosen fields, as JSON."""
        values = {name: value for name, value in settings.identity().items() if name not in (*_SEEDS, *self.chosen)}
        return json.dumps(values, sort_keys=True)


def read_sweep(
    path: str | Path, narrow: Mapping[str, Sequence[str]] | None = None, override: Mapping[str, str] | None = None
) -> Sweep:
    """Read a sweep file.

    Args:
        path: YAML or JSON with `grid` (a list of blocks, each the product of its lists), optionally `choose` (values
            to try in each cell), `base`, and fields common to all runs.
        narrow: by field, the values to keep. A method goes by its `method_name`, or by its preset.
        override: by field, as on the command line, what replaces the common value. Of a field that the grid lists,
            it is the values to keep, with commas between them.

    Raises:
        SweepError: a field, a value or a run cannot be meant, or a value to keep is none of those there are.
    """
    try:
        return _read_sweep(Path(path), dict(narrow or {}), dict(override or {}))
    except SweepError:
        raise
    except (ValueError, OSError) as error:
        raise SweepError(str(error)) from error


def split_list(text: str) -> list[str]:
    """The values of a list with commas, which may themselves hold some: `lora,prefix, prefix.length=50` are two."""
    return re.split(r",(?!\s*[\w.]+=)(?![^\[]*\])", text)


def run_folder(out: str | Path, settings: RunSettings) -> Path:
    """Where a run of a sweep into `out` lives; the name is for people, the digest at its end makes it unique."""
    task = settings.task or Path(str(settings.train_file)).stem
    parts = [task, settings.method_name, f"K={settings.train_samples or 'all'}", f"seed={settings.seed}"]
    if settings.learning_rate != paper_learning_rate(settings.config):
        parts.append(f"lr={settings.learning_rate:g}")
    return Path(out) / f"{clean_name('-'.join(parts))}-{settings.digest()[:8]}"


def _read_sweep(path: Path, narrow: dict[str, Sequence[str]], override: dict[str, str]) -> Sweep:
    common = read_config(path, also=("grid", "choose"))
    grid, choose = common.pop("grid", None), common.pop("choose", {})
    if not isinstance(grid, list) or not grid or not all(isinstance(block, dict) and block for block in grid):
        raise SweepError(f"{path}: grid must be a list of blocks, each a mapping of fields to lists of values")
    if not isinstance(choose, dict):
        raise SweepError(f"{path}: choose must be a mapping of fields to lists of values, not {choose!r}")
    listed = {name for block in [*grid, choose] for name in block}
    _check_fields(path, [*common, *listed])
    if any(set(block) & set(choose) for block in grid):
        raise SweepError(f"{path}: a field can stand in grid or in choose, not in both")
    for name in list(override):
        if name in listed:
            narrow[name] = [*narrow.get(name, ()), *split_list(override.pop(name))]
    common |= {name: read_option(name, text) for name, text in override.items()}

    runs: dict[str, RunSettings] = {}
    for number, block in enumerate(grid, start=1):
        for values in _product(path, {**block, **choose}):
            try:
                settings = RunSettings(**{**common, **values})
            except (ValueError, OSError) as error:
                raise SweepError(f"{path}, block {number} of the grid: {error}") from error
            runs.setdefault(settings.digest(), settings)
    return Sweep(str(path), _keep(tuple(runs.values()), narrow), tuple(choose))


def _check_fields(path: Path, names: Sequence[str]) -> None:
    known = [item.name for item in fields(RunSettings) if item.name not in ("output_dir", "overwrite")]
    for name in names:
        if name not in known:
            raise SweepError(f"{path}: unknown field {name!r} of a sweep; known are {', '.join(known)}")


def _product(path: Path, block: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    lists = [value if isinstance(value, list) else [value] for value in block.values()]
    for name, values in zip(block, lists, strict=True):
        if not values:
            raise SweepError(f"{path}: the list of {name} is empty")
    for chosen in itertools.product(*lists):
        yield {name: _located(name, value, path) for name, value in zip(block, chosen, strict=True)}


def _located(name: str, value: Any, path: Path) -> Any:
    """Paths from a sweep file are looked for as those from any configuration file."""
    is_path = name.endswith(("_file", "_dir")) or (name == "method" and str(value).endswith((".json", ".yaml", ".yml")))
    return locate_path(value, path) if is_path and isinstance(value, str) else value


def _keep(runs: tuple[RunSettings, ...], narrow: Mapping[str, Sequence[str]]) -> tuple[RunSettings, ...]:
    for name, texts in narrow.items():
        kept: set[int] = set()
        for text in texts:
            wanted = _wanted(name, text)
            # by its whole name first: "prefix" leaves "prefix, prefix.length=50" out where both are there
            found = [id(settings) for settings in runs if _value(settings, name) == wanted] or [
                id(settings) for settings in runs if name == "method" and settings.method_name.startswith(f"{wanted},")
            ]
            if not found:
                there = dict.fromkeys(str(_shown(settings, name)) for settings in runs)
                raise SweepError(f"no run that is left has the {name} {text.strip()!r}; there is {'; '.join(there)}")
            kept.update(found)
        runs = tuple(settings for settings in runs if id(settings) in kept)
    return runs


def _shown(settings: RunSettings, name: str) -> Any:
    value = settings.method_name if name == "method" else getattr(settings, name)
    return "all" if name == "train_samples" and value is None else value


def _value(settings: RunSettings, name: str) -> Any:
    return settings.method_name.replace(" ", "") if name == "method" else getattr(settings, name)


def _wanted(name: str, text: str) -> Any:
    text = text.strip()
    if name == "method":
        return text.replace(" ", "")
    if name == "task":
        return shorten_name(text)
    return None if (name, text) == ("train_samples", "all") else read_option(name, text)


# What is done, and how long the rest will take


@dataclass
class State:
    """How far the runs of a sweep into a folder have come.

    Attributes:
        sweep: whose runs carry the folder as `output_dir`.
        workers: runs at a time.
        seconds: by folder of a finished run, how long it took.
        failures: by folder of a run whose last process failed, its `failure.json`.
    """

    sweep: Sweep
    workers: int = 1
    seconds: dict[str, float] = field(default_factory=dict)
    failures: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._kinds = {_folder(run): (run.task, run.train_samples, run.method_name) for run in self.sweep.runs}

    @property
    def left(self) -> list[RunSettings]:
        """The runs that have not finished."""
        return [settings for settings in self.sweep.runs if _folder(settings) not in self.seconds]

    def seconds_left(self, left: Sequence[RunSettings]) -> float | None:
        """What `left` will take: as long as finished runs of the same task, K and method took, else as all did."""
        if not self.seconds:
            return None
        known = defaultdict(list)
        for folder, seconds in self.seconds.items():
            known[self._kinds[folder]].append(seconds)
        mean = fmean(self.seconds.values())
        total = sum(fmean(known.get(self._kinds[_folder(settings)], [mean])) for settings in left)
        return total / max(1, min(self.workers, len(left)))

    def __str__(self) -> str:
        """The plan."""
        runs, left = self.sweep.runs, self.left
        estimate = self.seconds_left(left)
        at_once = f", {self.workers} at a time" if self.workers > 1 else ""
        time_left = "unknown until a run has finished" if estimate is None else duration(estimate)
        lines = {
            "sweep": self.sweep.path,
            "cells": len({self.sweep.cell(settings) for settings in runs}),
            "runs": len(runs),
            "finished": len(runs) - len(left),
            "failed": f"{len(self.failures)}{', to be tried again' if self.failures else ''}",
            "left": f"{len(left)}{at_once}",
            "time": time_left if left else "none",
        }
        if self.sweep.chosen:
            lines["choose"] = f"{', '.join(self.sweep.chosen)}, on dev"
        return "\n".join(f"{name:<9} {value}" for name, value in lines.items())


def look(sweep: Sweep, out: str | Path, workers: int = 1) -> State:
    """See what of a sweep into `out` is done; writes nothing."""
    runs = tuple(replace(settings, output_dir=str(run_folder(out, settings))) for settings in sweep.runs)
    state = State(replace(sweep, runs=runs), workers)
    for settings in runs:
        if (record := _finished(settings)) is not None:
            state.seconds[_folder(settings)] = record["seconds"]["total"]
        elif (failure := _read_failure(settings)) is not None:
            state.failures[_folder(settings)] = failure
    return state


def duration(seconds: float) -> str:
    """A time for people."""
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {int(seconds % 60):02} s"


def write_request(sweep: Sweep, out: str | Path) -> None:
    """Add the runs to `out/sweep.json`, so that a report knows what is missing.

    The file lists every run that any sweep into the folder has asked for, each with its cell; sweeps that are
    narrowed differently, on several machines, say, add to each other.

    Raises:
        SweepError: the folder cannot be written.
    """
    runs = {
        settings.digest(): {
            "folder": run_folder(out, settings).name,
            "digest": settings.digest(),
            "cell": sweep.cell(settings),
            "method": settings.method_name,
            "settings": settings.to_dict() | {"output_dir": None},
        }
        for settings in sweep.runs
    }
    while True:
        with contextlib.suppress(Busy), _alone(Path(out)):
            _remove_drafts(Path(out))
            path = Path(out) / REQUEST
            earlier = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else ()
            every = {run["digest"]: run for run in earlier} | runs
            request = {"format": 1, "sweep": sweep.path, "chosen": sweep.chosen, "runs": list(every.values())}
            write_whole(path, f"{json.dumps(request, indent=1)}\n".encode())
            return
        time.sleep(0.1)


# Doing it


def carry_out(
    state: State,
    start: Callable[[RunSettings, threading.Event], str | None] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, str]:
    """Do the runs that are left, wait for those that other processes do, and do those that these leave unfinished.

    Args:
        state: of the folder, as `look` sees it; kept up to date.
        start: does one run and returns None, or in one line why it failed; once the event is set, it gives up.
            Raises `Busy` where another process does the run. By default in a process of its own.
        say: takes the lines for the reader.

    Returns:
        By folder, the failures, each in one line.
    """
    start = start or in_process(state.workers)
    earlier, state.failures = state.failures, {}
    for settings in state.sweep.runs:
        if _folder(settings) in state.seconds:
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
                        say(_account(state, settings, outcome, [*waiting, *busy]))
            finally:
                stop.set()  # for an interruption; otherwise nothing is running any more
        if busy:
            if len(busy) != announced:
                say(f"waiting for other processes, which do {len(busy)} of the runs")
            announced = len(busy)
            time.sleep(_PAUSE)
        left = busy
    return {folder: failure["error"] for folder, failure in state.failures.items()}


def _account(state: State, settings: RunSettings, outcome: dict[str, Any], left: Sequence[RunSettings]) -> str:
    """Enter a record or a failure into the state; returns the line for it."""
    folder = _folder(settings)
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
    """A run's record, or its failure; None if another process is at it, or it was stopped."""
    folder = Path(_folder(settings))
    if stop.is_set():
        return None
    try:
        with _alone(folder / _CLAIM):
            with _alone(folder):  # the process of a sweep that was killed may not be gone yet
                _remove_drafts(folder)
            if (record := _finished(settings)) is not None:
                return record
            failure = _read_failure(settings)
            if failure is not None and failure != earlier.get(str(folder)):
                return failure  # another sweep has just tried
            write_whole(folder / SETTINGS, json.dumps(settings.to_dict(), indent=2).encode())
            printed = _size(folder / LOG)
            error = start(settings, stop)
            record = _finished(settings)
            if record is None:
                log = _lines(folder / LOG, printed)[-_TAIL:]
                failure = {"error": error or "it ended without a result", "log": "\n".join(log), "time": time.time()}
                write_whole(folder / FAILURE, json.dumps(failure, indent=2).encode())
                return failure
            (folder / FAILURE).unlink(missing_ok=True)
            return record
    except Busy:
        return None


def in_process(workers: int) -> Callable[[RunSettings, threading.Event], str | None]:
    """What does a run in a process of its own, which ends when this one does; cores are shared by `workers`."""
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    defaults = {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1"}
    defaults |= {"OMP_NUM_THREADS": threads} if workers > 1 else {}  # or each takes all cores

    def start(settings: RunSettings, stop: threading.Event) -> str | None:
        folder = Path(_folder(settings))
        printed = _size(folder / LOG)
        command = [sys.executable, "-m", "unipelt.sweep", str(folder / SETTINGS)]
        with (
            open(folder / LOG, "ab") as log,
            # the pipe is how it learns of this process's end; a session of its own keeps Ctrl-C from it
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**defaults, **os.environ},
                start_new_session=True,
            ) as process,
        ):
            while (code := _wait(process, seconds=0.5)) is None:
                if stop.is_set():
                    process.kill()
        if stop.is_set() or code == _BUSY:
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


def _folder(settings: RunSettings) -> str:
    return str(settings.output_dir)


def _finished(settings: RunSettings) -> dict[str, Any] | None:
    """The run's record; None also if it is damaged, which the run itself will then say."""
    try:
        return find_finished(settings, Path(_folder(settings)))
    except RunError:
        return None


def _read_failure(settings: RunSettings) -> dict[str, Any] | None:
    try:
        return json.loads((Path(_folder(settings)) / FAILURE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def _tidy(settings: RunSettings) -> None:
    """Remove what a process that was killed after it had written the result still had to remove."""
    folder = Path(_folder(settings))
    if (folder / CHECKPOINTS).exists() and not settings.keep_checkpoints:
        with contextlib.suppress(Busy), _alone(folder):
            clean(folder)
    (folder / FAILURE).unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """`locked`, with an exception of its own where another process has the lock."""
    try:
        with locked(folder):
            yield
    except LockedError as error:
        raise Busy from error


def _remove_drafts(folder: Path) -> None:
    """Remove what `write_whole` leaves where it is killed."""
    for draft in folder.glob(".*.tmp"):
        draft.unlink()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _lines(path: Path, start: int) -> list[str]:
    """The lines of a file from a byte on, those that hold something."""
    text = path.read_bytes()[start:].decode("utf-8", "replace") if path.exists() else ""
    return [line for line in text.splitlines() if line.strip()]


# A run's own process


def _main(path: Path) -> int:
    """Do the run whose settings the file holds. Standard input is a pipe, whose end is the end of this process."""
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
    from unipelt.glue.run import run

    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        run(RunSettings(**{**values, "output_dir": str(path.parent)}))
    except LockedError:
        return _BUSY
    except Exception as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1])))
