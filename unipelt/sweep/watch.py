"""Look at runs from outside: which run, how far each is, which failed, and how long the rest takes.

A look writes nothing, and works while a sweep runs and after it was killed.
"""

from __future__ import annotations

import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from unipelt.files.messages import printable, say, show_path
from unipelt.files.progress import LINE_SECONDS, duration
from unipelt.records.record import RESULT, ResultError, read_result
from unipelt.runs.folder import CHECKPOINTS, has_begun, is_locked
from unipelt.runs.moment import Moment, of_checkpoint, read_moment
from unipelt.sweep.folder import CLAIM, FAILURE, REQUEST, SweepError, read_failure, read_request

SCREEN_SECONDS = 2.0
"""The seconds between two looks on a terminal."""
STATES = ("finished", "failed", "running", "starting", "stopped", "waiting")
_CLEAR = "\x1b[H\x1b[J"


@dataclass
class SeenRun:
    """One run, as it is seen from outside.

    Attributes:
        name: the name of its folder.
        state: `finished`; `failed`, with the sentence in `note`; `running`; `starting`, which is before the training;
            `stopped`, which goes on with the next sweep; or `waiting`.
        kind: task, K and method, which runs of about the same length share.
        note: what to say of the run.
        seconds: the seconds that a finished run took.
        left: the estimated seconds of training that are left of a running run; None if unknown.
    """

    name: str
    state: str
    kind: tuple[Any, ...] = ()
    note: str = ""
    seconds: float | None = None
    left: float | None = None


@dataclass
class Look:
    """All runs of a folder at one moment.

    Attributes:
        path: the sweep file, or the folder if there is no sweep.
        runs: the runs, in the order of the sweep.
    """

    path: str
    runs: list[SeenRun] = field(default_factory=list)

    @property
    def active(self) -> int:
        """The number of runs that are running or starting."""
        return sum(run.state in ("running", "starting") for run in self.runs)

    @property
    def seconds_left(self) -> float | None:
        """The estimated seconds until all runs have ended, or None if no run has finished and none says how long.

        A run that has not begun takes the mean of finished runs of its task, K and method, or of all finished runs. The
        number of runs at a time is that of now.
        """
        known: dict[tuple[Any, ...], list[float]] = defaultdict(list)
        for run in self.runs:
            if run.seconds is not None:
                known[run.kind].append(run.seconds)
        every = [seconds for group in known.values() for seconds in group]
        total = 0.0
        for run in self.runs:
            if run.state == "finished":
                continue
            whole = fmean(known.get(run.kind) or every) if every else None
            estimate = whole if run.left is None else run.left
            if estimate is None:
                return None
            total += estimate
        return total / max(1, self.active)

    def __str__(self) -> str:
        """Return the counts, the time left, and a line for each run that runs, has stopped or has failed."""
        counts = Counter(run.state for run in self.runs)
        lines = [
            f"of        {self.path}",
            f"runs      {counts['finished']} of {len(self.runs)} finished"
            + "".join(f", {counts[state]} {state}" for state in STATES[1:] if counts[state]),
        ]
        if counts["finished"] < len(self.runs):
            seconds, at_once = self.seconds_left, f"{max(1, self.active)} at a time"
            words = "unknown until a run has finished" if seconds is None else f"about {duration(seconds)}, an estimate"
            lines.append(f"left      {words}{'' if seconds is None else f' with {at_once}'}")
        shown = [
            run for state in ("running", "starting", "stopped", "failed") for run in self.runs if run.state == state
        ]
        lines += ["", *(f"{run.state:<9} {run.name}{run.note and f': {run.note}'}" for run in shown)] if shown else []
        return "\n".join(lines)


def look(folder: str | Path) -> Look:
    """Look at the runs of a folder: those of a sweep, one run, or a folder of runs.

    Raises:
        FileNotFoundError: the folder does not exist.
        SweepError: the folder holds no run, or a file of the sweep cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder at {show_path(folder)}")
    request = read_request(folder)
    if request is not None:
        runs = []
        for planned in request["runs"]:
            settings = planned["settings"]
            kind = (settings["task"], settings["train_samples"], planned["method"])
            runs.append(_see(folder / planned["folder"], kind, planned["digest"]))
        return Look(request["sweep"], runs)
    if _is_run(folder):
        return Look(str(folder), [_see(folder)])
    inside = [path for path in sorted(folder.iterdir()) if _is_run(path)]
    if not inside:
        raise SweepError(f"{show_path(folder)} holds no run and no {REQUEST}; give the folder of a sweep or of a run")
    return Look(str(folder), [_see(path) for path in inside])


def watch(folder: str | Path, print_: Callable[[str], None] = say) -> None:
    """Look at the runs of a folder again and again, until no run is running.

    On a terminal the screen is drawn again every two seconds. Elsewhere a look is printed every minute.
    """
    terminal = sys.stdout.isatty()
    quiet = 0
    while True:
        now = look(folder)
        if terminal:
            sys.stdout.write(f"{_CLEAR}{printable(str(now))}\n")
            sys.stdout.flush()
        else:
            print_(str(now))
        # a worker runs nothing for a moment between two runs
        quiet = 0 if now.active else quiet + 1
        if quiet > 1 or all(run.state == "finished" for run in now.runs):
            return
        time.sleep(SCREEN_SECONDS if terminal or quiet else LINE_SECONDS)
        if not terminal:
            print_("")


def _is_run(folder: Path) -> bool:
    return (folder / RESULT).exists() or (folder / FAILURE).exists() or has_begun(folder)


def _see(folder: Path, kind: tuple[Any, ...] = (), digest: str | None = None) -> SeenRun:
    """Return the state of a run, from the files in its folder."""
    run = SeenRun(folder.name, "waiting", kind)
    try:
        record = read_result(folder)
    except FileNotFoundError:
        record = None
    except (ResultError, OSError) as error:
        run.state, run.note = "failed", str(error)
        return run
    held = is_locked(folder)
    active = bool(held)
    if record is not None and not active and digest in (None, record["digest"]):
        run.state, run.seconds = "finished", record["seconds"]["total"]
        return run
    if active and (folder / CHECKPOINTS).exists():
        run.state, moment = "running", read_moment(folder)
        run.left = None if moment is None else moment.left
        run.note = "before the end of its first epoch" if moment is None else _words(moment)
        return run
    if active or is_locked(folder / CLAIM):
        run.state = "starting"
        return run
    if (failure := read_failure(folder)) is not None:
        run.state, run.note = "failed", failure["error"]
        return run
    if has_begun(folder):
        run.state, moment = "stopped", of_checkpoint(folder)
        run.note = "before its first checkpoint" if moment is None else f"goes on from {moment}"
        if held is None:
            run.note += " (its lock cannot be opened, so it may be running)"
    return run


def _words(moment: Moment) -> str:
    left = "" if moment.left is None else f", about {duration(moment.left)} of training left"
    return f"{moment}{left}"
