"""The folder of a sweep: its files, the locks in it, what of the sweep is done and how long the rest will take."""

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
_FORMAT = 1

# What of these files is read, and what it must be (`mismatch`).
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
        self._kinds = {folder_of(run): (run.task, run.train_samples, run.method_name) for run in self.sweep.runs}

    @property
    def left(self) -> list[RunSettings]:
        """The runs that have not finished."""
        return [settings for settings in self.sweep.runs if folder_of(settings) not in self.seconds]

    def seconds_left(self, left: Sequence[RunSettings]) -> float | None:
        """Estimated seconds for `left`, from finished runs of the same task, K and method, else from all."""
        if not self.seconds:
            return None
        known = defaultdict(list)
        for folder, seconds in self.seconds.items():
            known[self._kinds[folder]].append(seconds)
        mean = fmean(self.seconds.values())
        total = sum(fmean(known.get(self._kinds[folder_of(settings)], [mean])) for settings in left)
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


def status(sweep: Sweep, out: str | Path, workers: int = 1) -> State:
    """See what of a sweep into `out` is done; writes nothing."""
    runs = tuple(replace(settings, output_dir=str(run_folder(out, settings))) for settings in sweep.runs)
    state = State(replace(sweep, runs=runs), workers)
    for settings in runs:
        if (record := finished(settings)) is not None:
            state.seconds[folder_of(settings)] = record["seconds"]["total"]
        elif (failure := read_failure(folder_of(settings))) is not None:
            state.failures[folder_of(settings)] = failure
    return state


def duration(seconds: float) -> str:
    """A time for people."""
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {int(seconds % 60):02} s"


def run_folder(out: str | Path, settings: RunSettings) -> Path:
    """Folder of a run of a sweep into `out`; the name is for people, the digest at its end makes it unique."""
    task = settings.task or Path(str(settings.train_file)).stem
    parts = [task, settings.method_name, f"K={settings.train_samples or 'all'}", f"seed={settings.seed}"]
    if settings.learning_rate != paper_learning_rate(settings.config):
        parts.append(f"lr={settings.learning_rate:g}")
    return Path(out) / f"{clean_name('-'.join(parts))}-{settings.digest()[:8]}"


def folder_of(settings: RunSettings) -> str:
    """The run's folder, as text: what a state's mappings go by."""
    return str(settings.output_dir)


def write_request(sweep: Sweep, out: str | Path) -> None:
    """Add the runs to `out/sweep.json`, so that a report knows what is missing.

    The file lists every run that any sweep into the folder has asked for, each with its cell; sweeps that are
    narrowed differently, on several machines, say, add to each other.

    Raises:
        SweepError: there is a file of that name which is not such a list; it is left as it is.
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
    """The request of sweeps into `out`, as `write_request` wrote it; None if there is none.

    Raises:
        SweepError: the file is damaged, or of another kind or format.
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
    """Leave a run's settings in its folder, for the process that does it."""
    write_whole(Path(folder_of(settings)) / SETTINGS, json.dumps(settings.to_dict(), indent=2).encode())


def read_settings(path: Path) -> RunSettings:
    """The settings that `write_settings` left, for the folder that the file now lies in.

    Raises:
        SettingsError, ConfigError, FileNotFoundError: they are gone, or are none.
    """
    values = read_mapping(path)
    known = {item.name for item in fields(RunSettings)}
    if unknown := sorted(values.keys() - known):
        raise SettingsError(f"{path}: unknown field {show(unknown[0])}; start the sweep again, which writes it anew")
    return RunSettings(**{**values, "output_dir": str(path.parent)})


def finished(settings: RunSettings) -> dict[str, Any] | None:
    """The run's record; None also if it is damaged, which the run itself will then say."""
    try:
        return find_finished(settings, Path(folder_of(settings)))
    except RunError:
        return None


def read_failure(folder: str | Path) -> dict[str, Any] | None:
    """Failure that the last process of a run recorded; None if there is none.

    What is damaged, or of another kind, is a failure all the same, whose error says so: the run is tried again.

    Raises:
        SweepError: it cannot be read.
    """
    path = Path(folder) / FAILURE
    try:
        return _read(path, _FAILURE)
    except SweepError:
        raise
    except ValueError as error:
        return {"error": f"{path} does not say why it failed: {error}; a sweep tries the run again, and replaces it"}


def _read(path: Path, shape: Mapping[str, Any]) -> dict[str, Any] | None:
    """Contents of a JSON file; None if there is no file.

    Raises:
        SweepError: it cannot be read.
        ValueError: what it holds is not of the shape.
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
    """Record that a run's process failed, why, and the last lines that it printed; returns what was written."""
    failure = {"error": error, "log": "\n".join(log), "time": time.time()}
    write_whole(Path(folder_of(settings)) / FAILURE, json.dumps(failure, indent=2).encode())
    return failure


def remove_failure(settings: RunSettings) -> None:
    """Forget that a run's process failed. Raises `SweepError` if that is not possible."""
    path = Path(folder_of(settings)) / FAILURE
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        what = "a folder" if path.is_dir() else error.strerror
        raise SweepError(f"{path} cannot be removed: {what}; move it away") from error


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make the folder and keep others out of it. Raises `Busy` where another process has its lock."""
    try:
        with locked(folder):
            yield
    except LockedError as error:
        raise Busy from error


def remove_drafts(folder: Path) -> None:
    """Remove what `write_whole` leaves where it is killed."""
    for draft in folder.glob(".*.tmp"):
        draft.unlink()
