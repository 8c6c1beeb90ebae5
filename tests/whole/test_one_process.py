"""Commands for one process are refused under a launcher of several, before they read or write a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from unipelt.glue.fold_run import fold_run
from unipelt.glue.pack_runs import run_packed
from unipelt.glue.rerun import rerun
from unipelt.runs.errors import RunError
from unipelt.sweep import State, Sweep, carry_out


@pytest.mark.parametrize(
    ("what", "do"),
    [
        ("a rerun", lambda folder: rerun(folder, folder / "out")),
        ("folding a run", lambda folder: fold_run(folder, folder / "out")),
        ("a pack of runs", lambda folder: run_packed([], 1)),
        ("a sweep", lambda folder: carry_out(State(Sweep("sweep.yaml", ())))),
    ],
)
def test_several_processes_are_refused(
    what: str, do: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match=f"^{what} is one process, and WORLD_SIZE is 2; start it without a launcher$"):
        do(tmp_path)
    assert not list(tmp_path.iterdir())
