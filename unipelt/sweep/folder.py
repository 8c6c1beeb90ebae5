"""Read and write the files of a sweep's folder, hold its locks, and estimate the time that is left."""

from __future__ import annotations

import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from unipelt.config.schema import read_mapping
from unipelt.files.atomic import write_whole
from unipelt.files.messages import show
from unipelt.files.progress import duration
from unipelt.files.strict import PlainError, read_plain
from unipelt.glue.settings import RunSettings
from unipelt.records.record import mismatch
from unipelt.runs.errors import RunError
from unipelt.runs.folder import LockedError, find_finished, locked
from unipelt.runs.settings import SettingsError, clean_name, paper_learning_rate
from unipelt.sweep.grid import Sweep, SweepError

REQUEST = "sweep.json"
FAILURE = "failure.json"
LOG = "log.txt"
SETTINGS = "settings.json"
CLAIM = ".sweep"
"""The folder whose lock the sweep that does a run holds."""
_FORMAT = 1

# The fields that are read from these files, and their types (see `mismatch`).
_REQUEST = {"format": int, "sweep": str, "chosen": list, "runs": list}
_RUN = {
    "folder": str,
    "digest": str,
    "method": str,
    "settings": {"task": (str, type(None)), "train_samples": (int, type(None)), "seed": int, "data_seed": int},
}
_FAILURE = {"error": str}


class Busy(Exception):
    """Another process is doing this run."""


@dataclass
class State:
    """The progress of the runs of a sweep in one folder.

    Attributes:
        sweep: the sweep; each of its runs has its folder as `output_dir`.
        workers: the number of runs at a time.
        seconds: by the folder of a finished run, the seconds that the run took.
        failures: by the folder of a run whose last process failed, the content of its `failure.json`.
    """

    sweep: Sweep
    workers: int = 1
    seconds: dict[str, float] = field(default_factory=dict)
    failures: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._kinds = {folder_of(run): (run.task, run.train_samples, run.method_name) for run in self.sweep.runs}

    @property
    def left(self) -> list[RunSettings]:
        """The runs that have not finished."""
        return [settings for settings in self.sweep.runs if folder_of(settings) not in self.seconds]

    def seconds_left(self, left: Sequence[RunSettings]) -> float | None:
        """Return the estimated seconds until the runs in `left` are done, or None if no run has finished.

        The estimate of a run is the mean over finished runs of the same task, K and method. Without such runs, the
        estimate is the mean over all finished runs.
        """
        if not self.seconds:
            return None
        known = defaultdict(list)
        for folder, seconds in self.seconds.items():
            known[self._kinds[folder]].append(seconds)
        mean = fmean(self.seconds.values())
        total = sum(fmean(known.get(self._kinds[folder_of(settings)], [mean])) for settings in left)
        return total / max(1, min(self.workers, len(left)))

    def __str__(self) -> str:
        """Return the plan and the progress as lines of text."""
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


def status(sweep: Sweep, out: str | Path, workers: int = 1) -> State:
    """Return the state of a sweep in the folder `out`. Nothing is written."""
    runs = tuple(replace(settings, output_dir=str(run_folder(out, settings))) for settings in sweep.runs)
    state = State(replace(sweep, runs=runs), workers)
    for settings in runs:
        if (record := finished(settings)) is not None:
            state.seconds[folder_of(settings)] = record["seconds"]["total"]
        elif (failure := read_failure(folder_of(settings))) is not None:
            state.failures[folder_of(settings)] = failure
    return state


def run_folder(out: str | Path, settings: RunSettings) -> Path:
    """Return the folder of a run of a sweep in `out`. The name is for people; the digest at its end makes it unique."""
    task = settings.task or Path(str(settings.train_file)).stem
    parts = [task, settings.method_name, f"K={settings.train_samples or 'all'}", f"seed={settings.seed}"]
    if settings.learning_rate != paper_learning_rate(settings.config):
        parts.append(f"lr={settings.learning_rate:g}")
    return Path(out) / f"{clean_name('-'.join(parts))}-{settings.digest()[:8]}"


def folder_of(settings: RunSettings) -> str:
    """Return the run's folder as text, the key of the mappings in `State`."""
    return str(settings.output_dir)


def write_request(sweep: Sweep, out: str | Path) -> None:
    """Add the runs to `out/sweep.json`, so that a report knows which runs are missing.

    The file lists every run that any sweep in the folder has asked for, each with its cell. Sweeps over different parts
    of a grid, for example on several machines, add to the same list.

    Raises:
        SweepError: the file exists and is not such a list. The file is left unchanged.
        RunError: the folder cannot be written.
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
        with contextlib.suppress(Busy), alone(Path(out)):
            remove_drafts(Path(out))
            earlier = read_request(out) or {"runs": ()}
            every = {run["digest"]: run for run in earlier["runs"]} | runs
            request = {"format": _FORMAT, "sweep": sweep.path, "chosen": sweep.chosen, "runs": list(every.values())}
            write_whole(Path(out) / REQUEST, f"{json.dumps(request, indent=1)}\n".encode())
            return
        time.sleep(0.1)


def read_request(out: str | Path) -> dict[str, Any] | None:
    """Return the request that `write_request` wrote into `out`, or None if the file does not exist.

    Raises:
        SweepError: the file is damaged, or has another kind or format.
    """
    path = Path(out) / REQUEST
    try:
        request = _read(path, _REQUEST)
        if request is None:
            return None
        if request["format"] != _FORMAT:
            raise ValueError(f"its format is {show(request['format'])}, and this version reads {_FORMAT}")
        if not all(isinstance(name, str) for name in request["chosen"]):
            raise ValueError(f"chosen is {show(request['chosen']):.60}")
        for index, run in enumerate(request["runs"]):
            if problem := mismatch(run, _RUN, f"runs[{index}]"):
                raise ValueError(problem)
    except SweepError:
        raise
    except ValueError as error:
        raise SweepError(
            f"{path} does not say what a sweep asked for: {error}; move it away and start the sweep again, which "
            "writes it anew and keeps what has finished"
        ) from error
    return request


def write_settings(settings: RunSettings) -> None:
    """Write a run's settings into its folder, for the process of the run."""
    write_whole(Path(folder_of(settings)) / SETTINGS, json.dumps(settings.to_dict(), indent=2).encode())


def read_settings(path: Path) -> RunSettings:
    """Return the settings that `write_settings` wrote. Their `output_dir` is the folder in which the file is now.

    Raises:
        SettingsError, ConfigError, FileNotFoundError: the file is missing, or does not hold a run's settings.
    """
    values = read_mapping(path)
    known = {item.name for item in fields(RunSettings)}
    if unknown := sorted(values.keys() - known):
        raise SettingsError(f"{path}: unknown field {show(unknown[0])}; start the sweep again, which writes it anew")
    return RunSettings(**{**values, "output_dir": str(path.parent)})


def finished(settings: RunSettings) -> dict[str, Any] | None:
    """Return the record of a finished run, or None.

    A damaged record also gives None. The run itself then reports the damage.
    """
    try:
        return find_finished(settings, Path(folder_of(settings)))
    except RunError:
        return None


def read_failure(folder: str | Path) -> dict[str, Any] | None:
    """Return the failure that the last process of a run recorded, or None without a recorded failure.

    A damaged file, or one of another kind, also counts as a failure, with an error that says so. The sweep then tries
    the run again.

    Raises:
        SweepError: the file cannot be read.
    """
    path = Path(folder) / FAILURE
    try:
        return _read(path, _FAILURE)
    except SweepError:
        raise
    except ValueError as error:
        return {"error": f"{path} does not say why it failed: {error}; a sweep tries the run again, and replaces it"}


def _read(path: Path, shape: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the content of a JSON file, or None if the file does not exist.

    Raises:
        SweepError: the file cannot be read.
        ValueError: the content is not valid JSON, or does not have the shape.
    """
    try:
        value = read_plain(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SweepError(f"{path} cannot be read: {error.strerror}; move it away") from error
    except PlainError as error:
        raise ValueError(f"it is not valid JSON ({error})") from error
    if problem := mismatch(value, shape, ""):
        raise ValueError(problem)
    return value


def write_failure(settings: RunSettings, error: str, log: Sequence[str]) -> dict[str, Any]:
    """Record that a run's process failed, with the reason and the last lines of its output. Return the record."""
    failure = {"error": error, "log": "\n".join(log), "time": time.time()}
    write_whole(Path(folder_of(settings)) / FAILURE, json.dumps(failure, indent=2).encode())
    return failure


def remove_failure(settings: RunSettings) -> None:
    """Remove a run's `failure.json`. Raises `SweepError` if the file cannot be removed."""
    path = Path(folder_of(settings)) / FAILURE
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        what = "a folder" if path.is_dir() else error.strerror
        raise SweepError(f"{path} cannot be removed: {what}; move it away") from error


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make the folder and hold its lock inside the block. Raises `Busy` if another process holds the lock."""
    try:
        with locked(folder):
            yield
    except LockedError as error:
        raise Busy from error


def remove_drafts(folder: Path) -> None:
    """Remove the temporary files that a killed `write_whole` leaves behind."""
    for draft in folder.glob(".*.tmp"):
        draft.unlink()
