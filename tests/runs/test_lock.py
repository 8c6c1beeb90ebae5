"""The lock of a run's folder: one process at a time, and never through a link."""

from __future__ import annotations

from pathlib import Path

import pytest

from unipelt.runs.errors import RunError
from unipelt.runs.folder import LockedError, locked


def test_one_at_a_time(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "run"),
        pytest.raises(LockedError, match="another process is running in"),
        locked(tmp_path / "run"),
    ):
        pass
    with locked(tmp_path / "run"):
        pass


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_refused_and_left(tmp_path: Path, there: bool) -> None:
    if there:
        (tmp_path / "victim").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "victim")
    with (
        pytest.raises(RunError, match=r"\.lock is a link, and a lock is never made through one"),
        locked(tmp_path / "run"),
    ):
        pass
    assert (tmp_path / "run" / ".lock").is_symlink()
    assert not there or (tmp_path / "victim").read_text() == "precious"
    assert (tmp_path / "victim").exists() == there


def test_what_is_in_a_lock_stays(tmp_path: Path) -> None:
    """An error inside lets go of it."""
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    with locked(tmp_path):
        pass
