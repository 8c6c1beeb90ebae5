"""Files that are written completely or not at all, and helpful errors for files that cannot be written."""

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
# PyTorch raises only a RuntimeError for a file that cannot be written; these are parts of its messages.
_ARCHIVE = ("PytorchStreamWriter", "inline_container.cc", "iostream error", "File cannot be opened")
_RUST = re.compile(r"\(os error (\d+)\)")  # the end of such a message of safetensors or tokenizers


def write_whole(path: Path, content: bytes) -> None:
    """Write a file completely or not at all: first a draft in the same folder, which then replaces the file.

    Raises:
        OSError: The file cannot be written. The message names the file and, if known, a remedy.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.unlink(missing_ok=True)  # the draft of a process that was killed
        with open(beside, "xb") as file:  # the mode x does not follow a link
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        if error.errno is None:
            raise
        # the error must name the file and not its draft; on a full disk the system names no file
        raise _refusal(error.errno, error.strerror or "", path) from error
    finally:
        with contextlib.suppress(OSError):  # the folder may have become read-only
            beside.unlink()


def failed_write(error: Exception, folder: Path) -> OSError | None:
    """Return another library's error in writing a file as an `OSError` with the file's name and a remedy.

    PyTorch, safetensors and tokenizers raise other errors, which name no file or one of their own source files.

    Args:
        error: The error of the library.
        folder: The folder that holds the written files, directly or in subfolders.

    Returns:
        The `OSError`; None if `error` is of another kind or already names the remedy.
    """
    text = str(error)
    if isinstance(error, OSError):
        number = error.errno or 0
        if number not in _REMEDIES or _REMEDIES[number] in text:
            return None
        return _refusal(number, error.strerror or "", Path(os.fsdecode(error.filename or _newest(folder))))
    if (found := _RUST.search(text)) and int(found[1]) in _REMEDIES:
        # safetensors removes the unfinished file, so the newest file is another one
        removed = type(error).__name__ == "SafetensorError"
        path = folder / "*.safetensors" if removed else _newest(folder)
        return _refusal(int(found[1]), os.strerror(int(found[1])), path)
    if isinstance(error, RuntimeError) and any(mark in text for mark in _ARCHIVE) and "StreamReader" not in text:
        return OSError(f"{_newest(folder)} cannot be written; where the disk is full, free some space")
    return None


@contextlib.contextmanager
def named_write(folder: Path) -> Iterator[None]:
    """Replace another library's error in writing into a folder by the `OSError` from `failed_write`."""
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
    """Return the file in the folder that was written last, or the folder if it holds no file."""
    times: dict[Path, int] = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # another process may have removed the file
            if path.is_file():
                times[path] = path.stat().st_mtime_ns
    return max(times, key=lambda path: times[path], default=folder)
