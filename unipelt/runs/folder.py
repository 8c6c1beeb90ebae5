"""The folder of a run: its lock, its result, its progress and its complete checkpoints.

A process may be killed at any moment. A checkpoint counts only if it holds a marker, which is written last and removed
first. So an incomplete checkpoint is never used. The result is written after everything else.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from unipelt.files.atomic import write_whole
from unipelt.files.messages import show_path
from unipelt.files.strict import PlainError, read_plain
from unipelt.records.record import RESULT, ResultError, mismatch, read_result
from unipelt.runs import processes
from unipelt.runs.errors import RunError
from unipelt.runs.settings import LATER, TrainingSettings

MODEL = "model"
FOLDED = "folded"
PICTURE = "gates.png"
PREDICTIONS = "predictions"
CHECKPOINTS = "checkpoints"
LOGS = "logs"
"""The folder of TensorBoard's events, if a run reports to TensorBoard."""
_PROGRESS = "progress.json"
_BEGUN = ".begun.json"
"""The file that says that a run has begun, outside the folder of checkpoints, which a user may delete."""
NOW = "now.json"
"""The file in the folder of checkpoints that says how far a training is (`unipelt.runs.moment`)."""
_MARKER = "complete.json"
_LOCK = ".lock"
_NUMBER = (int, float)
_PROGRESS_SHAPE: dict[str, Any] = {
    "settings": str,
    "attempts": int,
    "seconds": dict.fromkeys(("train", "evaluation", "total"), _NUMBER),
}
_STATE_SHAPE = {"global_step": int, "max_steps": int, "epoch": _NUMBER, "num_train_epochs": _NUMBER}


class LockedError(RunError):
    """Error of a folder in which another process is running."""


@dataclass
class Progress:
    """Time and attempts of a run so far. Each attempt counts up to its last complete checkpoint.

    Attributes:
        settings: the digest of the run's settings.
        attempts: the number of times that the run was started.
        seconds: the seconds of `train`, of `evaluation`, and in `total`.
        emptied: whether an earlier attempt had begun, and its folder of checkpoints is gone. This is not written.
        world_size: the number of processes of the run.
    """

    settings: str
    attempts: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"train": 0.0, "evaluation": 0.0, "total": 0.0})
    emptied: bool = False
    world_size: int = field(default_factory=processes.world_size)

    def write(self, folder: Path) -> None:
        """Write the progress into the folder of the run."""
        values = {name: getattr(self, name) for name in (*_PROGRESS_SHAPE, "world_size")}
        _write_json(folder / CHECKPOINTS / _PROGRESS, values)


def find_finished(settings: TrainingSettings, folder: Path) -> dict[str, Any] | None:
    """Return the record of this run if the run has finished and is not to be overwritten, else None.

    Raises:
        RunError: the folder holds the result of another run, or a damaged result.
    """
    if settings.overwrite:
        return None
    if os.path.isfile(folder):  # `read_result` would accept the path of a result
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
    """Make the folder and lock it against other runs.

    Raises:
        LockedError: another process is running in the folder.
        RunError: the folder cannot be written, or its lock is a link.
    """
    lock = FileLock(folder / _LOCK, timeout=0, thread_local=False)  # FileLock opens no link
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
    """Count an attempt, and remove the files that the attempt replaces, with `overwrite` also those of another run.

    Returns:
        The progress of the run, with this attempt.

    Raises:
        RunError: the folder holds an unfinished run of other settings, damaged progress, or files of no run.
    """
    try:
        progress = _read_progress(folder / CHECKPOINTS / _PROGRESS)
    except PlainError as error:
        if not settings.overwrite:
            raise RunError(
                f"{folder / CHECKPOINTS / _PROGRESS} is damaged: {error}; choose another output_dir, or --overwrite it"
            ) from error
        progress = Progress("")  # no settings have this digest, so the old files are removed
    finished = (folder / RESULT).exists()
    there = folder / CHECKPOINTS
    if progress is None and not finished and (not there.exists() or _is_bare(there)):
        progress = _read_begun(settings, folder)
    if progress is None and not finished:
        for name in (MODEL, PREDICTIONS, CHECKPOINTS, LOGS, PICTURE):
            # a run that was killed at its start leaves only the folder of its progress
            if (folder / name).exists() and not (name == CHECKPOINTS and _is_bare(folder / name)):
                raise RunError(f"{folder / name} is there and is of no run; choose another output_dir")
    if progress is not None and progress.settings != settings.digest() and not settings.overwrite:
        raise RunError(
            f"{folder} holds an unfinished run of other settings; choose another output_dir, or --overwrite it"
        )
    again = progress is None or progress.settings != settings.digest() or finished
    if progress is not None and not again and progress.world_size != processes.world_size():
        if not settings.overwrite:
            raise RunError(
                f"{folder} holds an unfinished run of {progress.world_size} processes, and here are "
                f"{processes.world_size()}; start as many, choose another output_dir, or --overwrite it"
            )
        again = True
    if progress is None or again:
        progress = Progress(settings.digest())
    progress.attempts += 1
    (folder / CHECKPOINTS).mkdir(exist_ok=True)
    (folder / CHECKPOINTS / NOW).unlink(missing_ok=True)
    progress.write(folder)  # before anything is removed, because it names the run of this folder
    _write_json(folder / _BEGUN, {"settings": progress.settings, "attempts": progress.attempts})
    if again:
        (folder / RESULT).unlink(missing_ok=True)
        for checkpoint in _checkpoints(folder):
            _remove_checkpoint(checkpoint)
        shutil.rmtree(folder / LOGS, ignore_errors=True)
    for name in (MODEL, PREDICTIONS, FOLDED):
        shutil.rmtree(folder / name, ignore_errors=True)
    drafts = (f".{name}.*.tmp" for name in (PICTURE, RESULT, _BEGUN))  # of an attempt that was killed
    for name in (PICTURE, *drafts):
        for path in folder.glob(name):
            path.unlink()
    return progress


def mark(folder: Path, step: int, digest: str, *, finished: bool) -> None:
    """Mark the checkpoint of `step` as complete.

    Args:
        folder: the folder of the run.
        step: the step after which the checkpoint was written.
        digest: the digest of everything that determines the outcome.
        finished: whether training ended with this checkpoint.
    """
    checkpoint = checkpoint_at(folder, step)
    for path in checkpoint.iterdir():  # the marker must not reach the disk before the other files
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    _write_json(checkpoint / _MARKER, {"digest": digest, "finished": finished})


def newest_checkpoint(folder: Path, digest: str) -> Path | None:
    """Return the last complete checkpoint of the run with that digest, or None if there is none."""
    found = (checkpoint for checkpoint in _checkpoints(folder) if _read_marker(checkpoint).get("digest") == digest)
    return next(found, None)


def reason_to_start_over(folder: Path, progress: Progress, digest: str) -> str | None:
    """Return why a run that had begun has no checkpoint to go on from. Return None for a first attempt.

    Args:
        folder: the folder of the run, before its unusable checkpoints are removed.
        progress: the progress of the run, with this attempt.
        digest: the digest of everything that determines the outcome.
    """
    if progress.attempts < 2 or newest_checkpoint(folder, digest) is not None:
        return None
    if progress.emptied:
        return f"this run had begun, and the folder {show_path(folder / CHECKPOINTS)} is gone"
    found = [_read_marker(checkpoint) for checkpoint in _checkpoints(folder)]
    if any(found):
        return "the checkpoints are of other data, or of other weights of the base"
    if found:
        return "the checkpoint of the earlier attempt is incomplete"
    if progress.seconds["total"] > 0:
        return f"this run had a checkpoint, and there is none in {show_path(folder / CHECKPOINTS)}"
    return "the earlier attempt ended before its first checkpoint"


def newest_step(folder: Path) -> dict[str, Any] | None:
    """Return Trainer's state of the newest complete checkpoint of any run in the folder, or None."""
    for checkpoint in _checkpoints(folder):
        if not _read_marker(checkpoint):
            continue
        try:
            state = read_plain(checkpoint / "trainer_state.json")
        except (OSError, PlainError):
            continue
        if not mismatch(state, _STATE_SHAPE, ""):
            return state
    return None


def is_locked(folder: Path) -> bool | None:
    """Return whether a process is running in the folder, or None if that cannot be told. Nothing is written."""
    if not (folder / _LOCK).exists():
        return False
    try:
        with FileLock(folder / _LOCK, timeout=0, thread_local=False):
            return False
    except Timeout:
        return True
    except OSError:  # the folder is another user's
        return None


def has_begun(folder: Path) -> bool:
    """Return whether an unfinished run has begun in the folder."""
    return (folder / _BEGUN).exists() or (folder / CHECKPOINTS / _PROGRESS).exists()


def is_final(checkpoint: Path) -> bool:
    """Return whether training ended with this checkpoint."""
    return bool(_read_marker(checkpoint).get("finished"))


def checkpoint_at(folder: Path, step: int | None) -> Path:
    """Return the path of a step's checkpoint, as Transformers names it."""
    return folder / CHECKPOINTS / f"checkpoint-{step}"


def remove_checkpoints(folder: Path, keep: tuple[Path, ...] = (), digest: str | None = None) -> None:
    """Remove the checkpoints except those in `keep` and, with `digest`, the complete ones of that run."""
    for checkpoint in _checkpoints(folder):
        ours = digest is not None and _read_marker(checkpoint).get("digest") == digest
        if checkpoint not in keep and not ours:
            _remove_checkpoint(checkpoint)


def clean(folder: Path) -> None:
    """Remove the checkpoints and the progress, which a finished run does not need."""
    (folder / _BEGUN).unlink(missing_ok=True)
    remove_checkpoints(folder)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def _is_bare(checkpoints: Path) -> bool:
    """Return whether the folder of checkpoints is empty or holds only drafts of the progress."""
    return checkpoints.is_dir() and set(checkpoints.iterdir()) == set(checkpoints.glob(f".{_PROGRESS}.*.tmp"))


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints, newest first.

    They are removed in this order, because a checkpoint needs the best checkpoint, which is never newer.
    """
    steps = {path: path.name.removeprefix("checkpoint-") for path in (folder / CHECKPOINTS).glob("checkpoint-*")}
    found = [path for path, step in steps.items() if re.fullmatch(r"[0-9]{1,18}", step)]
    return sorted(found, key=lambda path: int(steps[path]), reverse=True)


def _remove_checkpoint(checkpoint: Path) -> None:
    (checkpoint / _MARKER).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def _read_marker(checkpoint: Path) -> dict[str, Any]:
    """Return the contents of a marker. An absent or damaged marker is empty, so its checkpoint does not count."""
    try:
        marker = read_plain(checkpoint / _MARKER)
    except (FileNotFoundError, NotADirectoryError, PlainError):
        return {}
    return marker if isinstance(marker, dict) else {}


def _read_progress(path: Path) -> Progress | None:
    """Return the progress so far, or None if there is none. Raise `PlainError` if the file is damaged."""
    try:
        values = read_plain(path)
    except FileNotFoundError:
        return None
    if problem := mismatch(values, _PROGRESS_SHAPE, ""):
        raise PlainError(problem)
    world_size = values.get("world_size", 1)  # absent in the progress of an older version
    if type(world_size) is not int:
        raise PlainError(f"world_size is {world_size!r:.60}")
    return Progress(**{name: values[name] for name in _PROGRESS_SHAPE}, world_size=world_size)


def _read_begun(settings: TrainingSettings, folder: Path) -> Progress | None:
    """Return the progress of a run of these settings that had begun, and that has no folder of checkpoints now."""
    try:
        begun = read_plain(folder / _BEGUN)
    except (FileNotFoundError, PlainError):
        return None
    if mismatch(begun, {"settings": str, "attempts": int}, "") or begun["settings"] != settings.digest():
        return None
    return Progress(begun["settings"], begun["attempts"], emptied=True)


def _write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value).encode())


def _difference(theirs: Mapping[str, Any], settings: TrainingSettings) -> str:
    """Return the differences between a record's settings and these settings, in words."""
    ours = settings.to_dict()
    then = {**LATER, **theirs}  # an older record lacks these fields
    names = [name for name in {**settings.identity(), **LATER} if then.get(name) != ours.get(name)]
    shown = [f"{name} is {then.get(name)!r:.60} there and {ours.get(name)!r:.60} here" for name in names[:2]]
    more = f", and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(shown) + more if shown else "paths that lead elsewhere"


def check_folder(folder: Path) -> None:
    """Raise `RunError` if the output folder cannot be made or written. Nothing is made here."""
    place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not place.is_dir():
        raise RunError(f"cannot write the results: {place} is not a folder; choose another output_dir")
    if not os.access(place, os.W_OK | os.X_OK):
        raise RunError(f"cannot write the results: {place} is not writable; choose another output_dir")
