"""Search for good values of fields in each cell of a sweep, with Optuna.

A trial is one set of values. It runs all seeds of its cell, and its score is their mean dev score. So the choice is
that of `choose` with a list: the best mean dev score in each cell. Optuna keeps its trials in the sweep's folder, in a
text file of JSON lines. A search that was stopped goes on with the trials that had begun, and asks for further ones
until each cell has its number of trials.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from filelock import FileLock

from unipelt.files.messages import say
from unipelt.glue.settings import RunSettings
from unipelt.records.record import read_result
from unipelt.sweep.folder import folder_of, status, write_request
from unipelt.sweep.grid import Sweep
from unipelt.sweep.run_server import run_servers
from unipelt.sweep.space import Search, with_values
from unipelt.sweep.workers import carry_out

JOURNAL = "optuna.journal"
"""The file of Optuna's trials in the folder of a sweep."""

Start = Callable[[RunSettings, threading.Event], str | None]


@dataclass
class _Trial:
    """A trial to do: its study, its id in the study, the name of its cell's method, and its runs."""

    study: Any
    number: int
    name: str
    values: dict[str, Any]
    runs: list[RunSettings]


def plan(sweep: Sweep, workers: int = 1) -> str:
    """Return the plan of a search as lines of text. Optuna is not needed."""
    search, cells = _search(sweep), _cells(sweep)
    runs = search.trials * len(sweep.runs)
    lines = {
        "sweep": sweep.path,
        "cells": len(cells),
        "search": f"optuna, {search.trials} trials in each cell, of {', '.join(search.space)}",
        "runs": f"at most {runs}{f', {workers} at a time' if workers > 1 else ''}",
        "choose": f"{', '.join(sweep.chosen)}, on dev",
    }
    return "\n".join(f"{name:<9} {value}" for name, value in lines.items())


def carry_out_search(
    sweep: Sweep, out: Path, workers: int = 1, start: Start | None = None, log: Callable[[str], None] = say
) -> dict[str, str]:
    """Search in each cell until it has its trials.

    Args:
        sweep: a sweep with a search.
        out: the folder of the runs.
        workers: the number of runs at a time.
        start: a function that does one run, as for `unipelt.sweep.carry_out`.
        log: a function that takes each line of progress.

    Returns:
        The error of each failed run in one line, by folder. The trial of a failed run has no score, and the next search
        tries it again.

    Raises:
        ImportError: Optuna is not installed.
    """
    optuna = connect()
    search, cells = _search(sweep), _cells(sweep)
    out.mkdir(parents=True, exist_ok=True)
    storage = _storage(optuna, out)
    studies = {cell: _study(optuna, storage, cell, search, runs) for cell, runs in cells.items()}
    failures: dict[str, str] = {}
    tried: set[tuple[str, int]] = set()
    with contextlib.nullcontext(start) if start is not None else run_servers(workers) as do:
        while trials := list(_next(optuna, search, cells, studies, tried, workers, out)):
            part = replace(sweep, runs=tuple({run.digest(): run for one in trials for run in one.runs}.values()))
            write_request(part, out)
            state = status(part, out, workers)
            failures |= carry_out(state, do, log)
            folders = {run.digest(): folder_of(run) for run in state.sweep.runs}
            for trial in trials:
                score = _score(trial, folders)
                if score is not None:
                    trial.study.tell(trial.number, score, skip_if_finished=True)
                log(f"trial {trial.number + 1} of {search.trials}, {_account(trial.name, trial.values, score)}")
    for cell, runs in cells.items():
        if found := studies[cell].get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)):
            best = max(found, key=lambda trial: trial.value)
            log(f"best of {len(found)} trials, {_account(runs[0].method_name, best.params, best.value)}")
    return failures


def connect() -> Any:
    """Return the module `optuna`, which only says what is wrong. Raise `ImportError` with a remedy without it."""
    try:
        import optuna
    except ImportError as error:
        raise ImportError(
            "choose: optuna needs Optuna; install the extra 'optuna' (pip install 'unipelt[optuna]')"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


class _Lock:
    """A lock for Optuna's file that ends with its process, also by a kill."""

    def __init__(self, path: Path) -> None:
        self._lock = FileLock(path, thread_local=False)

    def acquire(self) -> bool:
        self._lock.acquire()
        return True

    def release(self) -> None:
        self._lock.release()


def _storage(optuna: Any, out: Path) -> Any:
    from optuna.storages.journal import JournalFileBackend

    lock: Any = _Lock(out / f".{JOURNAL}.lock")
    return optuna.storages.JournalStorage(JournalFileBackend(str(out / JOURNAL), lock_obj=lock))


def _study(optuna: Any, storage: Any, cell: str, search: Search, runs: list[RunSettings]) -> Any:
    name = hashlib.sha256(f"{cell} {search.digest()}".encode()).hexdigest()[:16]
    study = optuna.create_study(study_name=name, storage=storage, direction="maximize", load_if_exists=True)
    if "cell" not in study.user_attrs:
        study.set_user_attr("cell", f"{runs[0].task or runs[0].train_file}, {runs[0].method_name}")
    return study


def _next(
    optuna: Any,
    search: Search,
    cells: dict[str, list[RunSettings]],
    studies: dict[str, Any],
    tried: set[tuple[str, int]],
    workers: int,
    out: Path,
) -> Iterator[_Trial]:
    """Yield the trials of the next round: those that had begun, and new ones for the cells that lack some."""
    left = {cell: search.trials - len(study.get_trials(deepcopy=False)) for cell, study in studies.items()}
    open_cells = sum(count > 0 for count in left.values())
    for cell, runs in cells.items():
        study, space = studies[cell], search.of(runs[0])
        at_once = max(1, workers // max(1, open_cells * len(runs)))
        # other processes search in this folder, too, and must not ask beyond the number of trials
        with FileLock(out / f".{JOURNAL}.ask", thread_local=False):
            begun = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))
            found = [trial for trial in begun if (cell, trial.number) not in tried]
            count = len(study.get_trials(deepcopy=False))
            trials = []
            for number in [trial.number for trial in found] or range(count, min(search.trials, count + at_once)):
                # the sampler depends on the trial alone, so a search that was stopped goes on as it would have
                seed = int(hashlib.sha256(f"{study.study_name} {number}".encode()).hexdigest()[:8], 16)
                study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(3, search.trials // 3))
                old = [trial for trial in found if trial.number == number]
                trial = optuna.trial.Trial(study, old[0]._trial_id) if old else study.ask()
                trials.append((trial.number, {name: one.suggest(trial, name) for name, one in space.items()}))
        for number, values in trials:
            tried.add((cell, number))
            yield _Trial(study, number, runs[0].method_name, values, [with_values(run, values) for run in runs])


def _score(trial: _Trial, folders: dict[str, str]) -> float | None:
    """Return the mean dev score of a trial's runs, or None if one of them has not finished."""
    scores = []
    for run in trial.runs:
        try:
            record = read_result(folders[run.digest()])
        except (ValueError, OSError):
            return None
        scores.append(record["dev"]["metrics"][record["task"]["primary"]])
    return fmean(scores)


def _account(method: str, values: dict[str, Any], score: float | None) -> str:
    """Return a line about a trial that was done: the method, the values and the score."""
    shown = {name: f"{value:.3g}" if isinstance(value, float) else value for name, value in values.items()}
    words = ", ".join(f"{name} {value}" for name, value in shown.items())
    return f"{method}: {words}: {'no score, as a run failed' if score is None else f'dev {score:.3f}'}"


def _cells(sweep: Sweep) -> dict[str, list[RunSettings]]:
    cells: dict[str, list[RunSettings]] = {}
    for run in sweep.runs:
        cells.setdefault(sweep.cell(run), []).append(run)
    return cells


def _search(sweep: Sweep) -> Search:
    assert sweep.search is not None
    return sweep.search
