"""Files that are written whole or not at all, and what to do where one cannot be written."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

_REMEDIES = {
    number: text
    for name, text in (
        ("ENOSPC", "free some space"),
        ("EDQUOT", "free some space, or get a larger quota"),
        ("EFBIG", "raise the limit on the size of a file (ulimit -f)"),
        ("EROFS", "make the folder writable again"),
        ("EACCES", "make the folder writable again"),
    )
    if (number := getattr(errno, name, None)) is not None
}
# What PyTorch's writer of archives says where a file cannot be written; it raises nothing but a RuntimeError.
_ARCHIVE = ("PytorchStreamWriter", "inline_container.cc", "iostream error", "File cannot be opened")
_RUST = re.compile(r"\(os error (\d+)\)")  # how safetensors and tokenizers end such a message


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: beside it first, then in its place.

    Raises:
        OSError: It cannot be written. The message names the file, and says what to do where that is known.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.unlink(missing_ok=True)  # the draft of a process that was killed
        with open(beside, "xb") as file:  # which opens no link
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        if error.errno is None:
            raise
        # the file, not its draft; where no space is left the system names none at all
        raise _refusal(error.errno, error.strerror or "", path) from error
    finally:
        with contextlib.suppress(OSError):  # where the folder has become read-only, say
            beside.unlink()


def failed_write(error: Exception, folder: Path) -> OSError | None:
    """The failure of another library to write a file, as an `OSError` with the file's name and what to do.

    PyTorch, safetensors and tokenizers raise other errors, which name no file, or a source file of theirs.

    Args:
        error: What was raised.
        folder: The files were written in it, or in folders below.

    Returns:
        The error; None where `error` is of another kind.
    """
    text = str(error)
    if isinstance(error, OSError):
        number = error.errno or 0
        if number not in _REMEDIES or _REMEDIES[number] in text:
            return None
        return _refusal(number, error.strerror or "", Path(os.fsdecode(error.filename or _newest(folder))))
    if (found := _RUST.search(text)) and int(found[1]) in _REMEDIES:
        # safetensors removes what it could not write, so that the newest file is another
        removed = type(error).__name__ == "SafetensorError"
        path = folder / "*.safetensors" if removed else _newest(folder)
        return _refusal(int(found[1]), os.strerror(int(found[1])), path)
    if isinstance(error, RuntimeError) and any(mark in text for mark in _ARCHIVE) and "StreamReader" not in text:
        return OSError(f"{_newest(folder)} cannot be written; where the disk is full, free some space")
    return None


@contextlib.contextmanager
def named_write(folder: Path) -> Iterator[None]:
    """Turn the failure of another library to write into a folder into what `failed_write` makes of it."""
    try:
        yield
    except Exception as error:
        if (refusal := failed_write(error, folder)) is None:
            raise
        raise refusal from error


def _refusal(number: int, reason: str, path: Path) -> OSError:
    remedy = _REMEDIES.get(number)
    return OSError(number, f"{reason} ({remedy})" if remedy else reason, str(path))


def _newest(folder: Path) -> Path:
    """The file that was written last, or else the folder."""
    times: dict[Path, int] = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # it may just have gone
            if path.is_file():
                times[path] = path.stat().st_mtime_ns
    return max(times, key=lambda path: times[path], default=folder)
