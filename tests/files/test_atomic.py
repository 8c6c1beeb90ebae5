"""Errors for files that cannot be written: which file they name, and which remedy."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from unipelt.files.atomic import failed_write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose newest file is `inner/new.json`."""
    (tmp_path / "inner").mkdir()
    for age, name in enumerate(("inner/new.json", "old.json", "inner/older.json")):
        (tmp_path / name).write_text("{}")
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    return tmp_path


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space, or get a larger quota"),
        (errno.EFBIG, "raise the limit on the size of a file (ulimit -f)"),
        (errno.EROFS, "make the folder writable again"),
        (errno.EACCES, "make the folder writable again"),
    ],
)
def test_an_error_of_the_system_gets_a_remedy(folder: Path, number: int, remedy: str) -> None:
    reason = os.strerror(number)
    for given, path in ((None, folder / "inner" / "new.json"), ("/data/state.pt", Path("/data/state.pt"))):
        found = failed_write(OSError(number, reason, given) if given else OSError(number, reason), folder)
        assert str(found) == f"[Errno {number}] {reason} ({remedy}): '{path}'"
        assert found is not None
        assert failed_write(found, folder) is None, "it has its remedy"
    assert str(failed_write(ValueError(f"it failed: {reason} (os error {number})"), folder)) == (
        f"[Errno {number}] {reason} ({remedy}): '{folder / 'inner' / 'new.json'}'"
    )
    safetensors = type("SafetensorError", (Exception,), {})
    assert str(failed_write(safetensors(f"I/O error: {reason} (os error {number})"), folder)) == (
        f"[Errno {number}] {reason} ({remedy}): '{folder / '*.safetensors'}'"
    )


@pytest.mark.parametrize(
    "text",
    ["PytorchStreamWriter failed", "[enforce fail at inline_container.cc:659]", "basic_ios::clear: iostream error"],
)
def test_an_error_of_pytorch_names_the_newest_file(folder: Path, text: str) -> None:
    newest = folder / "inner" / "new.json"
    said = f"{newest} cannot be written; where the disk is full, free some space"
    assert str(failed_write(RuntimeError(text), folder)) == said
    assert failed_write(RuntimeError(f"PytorchStreamReader: {text}"), folder) is None, "it was reading"
    assert failed_write(ValueError(text), folder) is None


def test_other_errors_have_no_remedy(folder: Path) -> None:
    others = [OSError("no number"), OSError(errno.ENOENT, "No such file"), ValueError("(os error 2)"), ValueError("28")]
    assert [failed_write(error, folder) for error in others] == [None] * 4


def test_a_folder_without_files_is_named_itself(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert str(failed_write(OSError(errno.ENOSPC, "full"), tmp_path)).endswith(f"(free some space): '{tmp_path}'")
