"""The folder of a run: its lock, whether it finished, what was spent, which checkpoints are complete.

A process may be killed at any moment. A checkpoint counts only once it holds a marker, which is written last and
removed first, so that no half of one is ever taken for a whole; the result is written after everything else.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from unipelt.files.atomic import write_whole
from unipelt.files.messages import show_path
from unipelt.files.strict import PlainError, read_plain
from unipelt.records.record import RESULT, ResultError, mismatch, read_result
from unipelt.runs.errors import RunError
from unipelt.runs.settings import LATER, TrainingSettings

MODEL = "model"
FOLDED = "folded"
PICTURE = "gates.png"
PREDICTIONS = "predictions"
CHECKPOINTS = "checkpoints"
LOGS = "logs"
"""What TensorBoard's events are written to, if a run reports to it."""
_PROGRESS = "progress.json"
_MARKER = "complete.json"
_LOCK = ".lock"
_NUMBER = (int, float)
_PROGRESS_SHAPE: dict[str, Any] = {
    "settings": str,
    "attempts": int,
    "seconds": dict.fromkeys(("train", "evaluation", "total"), _NUMBER),
}


class LockedError(RunError):
    """Another process is running in the folder."""


@dataclass
class Progress:
    """Time and attempts spent on a run so far, each attempt counted up to its last complete checkpoint.

    Attributes:
        settings: digest of the run's settings.
        attempts: how often the run was started.
        seconds: spent on `train`, on `evaluation`, and in `total`.
    """

    settings: str
    attempts: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"train": 0.0, "evaluation": 0.0, "total": 0.0})

    def write(self, folder: Path) -> None:
        """Keep it in the folder of the run."""
        _write_json(folder / CHECKPOINTS / _PROGRESS, asdict(self))


def find_finished(settings: TrainingSettings, folder: Path) -> dict[str, Any] | None:
    """The record of this very run, if it has finished and is not to be repeated.

    Raises:
        RunError: the folder holds the result of another run, or a damaged one.
    """
    if settings.overwrite:
        return None
    if os.path.isfile(folder):  # it may be some run's result, which `read_result` would take
        raise RunError(f"{show_path(folder)} is a file; output_dir is a folder")
    try:
        record = read_result(folder)
    except FileNotFoundError:
        return None
    except ResultError as error:
        raise RunError(f"{error}; choose another output_dir, or --overwrite it") from error
    if record["digest"] != settings.digest():
        raise RunError(
            f"{folder} holds the result of other settings ({_difference(record['settings'], settings)}); "
            "choose another output_dir, or --overwrite it"
        )
    return record


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder and keep other runs out of it. Raises `LockedError`, or `RunError` if it cannot be written."""
    lock = FileLock(folder / _LOCK, timeout=0, thread_local=False)  # it opens no link
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise LockedError(
            f"another process is running in {show_path(folder)}; wait for it, or choose another output_dir"
        ) from error
    except OSError as error:
        if (folder / _LOCK).is_symlink():
            raise RunError(
                f"{show_path(folder / _LOCK)} is a link, and a lock is never made through one; remove it, or choose "
                "another output_dir"
            ) from error
        raise RunError(f"cannot write to {show_path(folder)}: {error.strerror}; choose another output_dir") from error
    try:
        yield
    finally:
        lock.release()


def begin(settings: TrainingSettings, folder: Path) -> Progress:
    """Count an attempt, and clear away what it replaces: an earlier run's files, if that is asked for.

    Raises:
        RunError: the folder holds an unfinished run of other settings, or things that are of no run.
    """
    try:
        progress = _read_progress(folder / CHECKPOINTS / _PROGRESS)
    except PlainError as error:
        if not settings.overwrite:
            raise RunError(
                f"{folder / CHECKPOINTS / _PROGRESS} is damaged: {error}; choose another output_dir, or --overwrite it"
            ) from error
        progress = Progress("")  # of no settings, so that what is there is cleared away
    finished = (folder / RESULT).exists()
    if progress is None and not finished:
        for name in (MODEL, PREDICTIONS, CHECKPOINTS, LOGS, PICTURE):
            # a run that was killed as it began leaves no more than a folder for its progress
            if (folder / name).exists() and not (name == CHECKPOINTS and _is_bare(folder / name)):
                raise RunError(f"{folder / name} is there and is of no run; choose another output_dir")
    if progress is not None and progress.settings != settings.digest() and not settings.overwrite:
        raise RunError(
            f"{folder} holds an unfinished run of other settings; choose another output_dir, or --overwrite it"
        )
    again = progress is None or progress.settings != settings.digest() or finished
    if progress is None or again:
        progress = Progress(settings.digest())
    progress.attempts += 1
    (folder / CHECKPOINTS).mkdir(exist_ok=True)
    progress.write(folder)  # before anything is removed: it says whose folder this is
    if again:
        (folder / RESULT).unlink(missing_ok=True)
        for checkpoint in _checkpoints(folder):
            _remove_checkpoint(checkpoint)
        shutil.rmtree(folder / LOGS, ignore_errors=True)
    for name in (MODEL, PREDICTIONS, FOLDED):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (PICTURE, f".{PICTURE}.*.tmp", f".{RESULT}.*.tmp"):  # drafts of an attempt that was killed
        for path in folder.glob(name):
            path.unlink()
    return progress


def mark(folder: Path, step: int, digest: str, *, finished: bool) -> None:
    """Say that the checkpoint of `step` is complete.

    Args:
        folder: of the run.
        step: that the checkpoint was written after.
        digest: of everything that determines the outcome.
        finished: whether training ended with it.
    """
    checkpoint = checkpoint_at(folder, step)
    for path in checkpoint.iterdir():  # the marker must not reach the disk before what it vouches for
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    _write_json(checkpoint / _MARKER, {"digest": digest, "finished": finished})


def newest_checkpoint(folder: Path, digest: str) -> Path | None:
    """The last complete checkpoint of the run with that digest; None if there is none."""
    found = (checkpoint for checkpoint in _checkpoints(folder) if _read_marker(checkpoint).get("digest") == digest)
    return next(found, None)


def is_final(checkpoint: Path) -> bool:
    """Whether training ended with this checkpoint."""
    return bool(_read_marker(checkpoint).get("finished"))


def checkpoint_at(folder: Path, step: int | None) -> Path:
    """Path of a step's checkpoint, as Transformers names it."""
    return folder / CHECKPOINTS / f"checkpoint-{step}"


def remove_checkpoints(folder: Path, keep: tuple[Path, ...] = (), digest: str | None = None) -> None:
    """Remove the checkpoints but for those of `keep` and, with `digest`, the complete ones of that run."""
    for checkpoint in _checkpoints(folder):
        ours = digest is not None and _read_marker(checkpoint).get("digest") == digest
        if checkpoint not in keep and not ours:
            _remove_checkpoint(checkpoint)


def clean(folder: Path) -> None:
    """Remove what a finished run does not need: checkpoints and progress."""
    remove_checkpoints(folder)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def _is_bare(checkpoints: Path) -> bool:
    """Whether there is nothing in the folder of checkpoints but, at most, drafts of the progress."""
    return checkpoints.is_dir() and set(checkpoints.iterdir()) == set(checkpoints.glob(f".{_PROGRESS}.*.tmp"))


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first; also the order of removal, since a checkpoint needs the best one, which is never newer."""
    steps = {path: path.name.removeprefix("checkpoint-") for path in (folder / CHECKPOINTS).glob("checkpoint-*")}
    found = [path for path, step in steps.items() if re.fullmatch(r"[0-9]{1,18}", step)]
    return sorted(found, key=lambda path: int(steps[path]), reverse=True)


def _remove_checkpoint(checkpoint: Path) -> None:
    (checkpoint / _MARKER).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def _read_marker(checkpoint: Path) -> dict[str, Any]:
    """Contents of a marker; empty if it is damaged, so that the checkpoint does not count."""
    try:
        marker = read_plain(checkpoint / _MARKER)
    except (FileNotFoundError, NotADirectoryError, PlainError):
        return {}
    return marker if isinstance(marker, dict) else {}


def _read_progress(path: Path) -> Progress | None:
    """Progress so far; None if there is none. Raises `PlainError` if the file is damaged."""
    try:
        values = read_plain(path)
    except FileNotFoundError:
        return None
    if problem := mismatch(values, _PROGRESS_SHAPE, ""):
        raise PlainError(problem)
    return Progress(**{name: values[name] for name in _PROGRESS_SHAPE})


def _write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value).encode())


def _difference(theirs: Mapping[str, Any], settings: TrainingSettings) -> str:
    """Differences between a record's settings and these, in words."""
    ours = settings.to_dict()
    then = {**LATER, **theirs}  # a record from before there were these fields
    names = [name for name in {**settings.identity(), **LATER} if then.get(name) != ours.get(name)]
    shown = [f"{name} is {then.get(name)!r:.60} there and {ours.get(name)!r:.60} here" for name in names[:2]]
    more = f", and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(shown) + more if shown else "paths that lead elsewhere"


def check_folder(folder: Path) -> None:
    """Raise `RunError` if the output folder cannot be one, before time is spent; nothing is made."""
    place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not place.is_dir():
        raise RunError(f"cannot write the results: {place} is not a folder; choose another output_dir")
    if not os.access(place, os.W_OK | os.X_OK):
        raise RunError(f"cannot write the results: {place} is not writable; choose another output_dir")
