"""A sweep's runs in processes of their own, which here only pretend to train: what their ends are taken for."""

from __future__ import annotations

import os
import runpy
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import unipelt.sweep.__main__ as process
from unipelt.glue.settings import RunSettings
from unipelt.runs.folder import CHECKPOINTS, LockedError
from unipelt.sweep import LOG, SETTINGS, Busy
from unipelt.sweep import run_process as work
from unipelt.sweep.folder import alone, write_failure, write_settings
from unipelt.sweep.run_process import BUSY, environment, in_process
from unipelt.sweep.workers import _tidy


@pytest.fixture
def settings(tmp_path: Path) -> RunSettings:
    """A run whose folder is as `carry_out` leaves it to whoever starts it."""
    settings = RunSettings(task="rte", output_dir=str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOG).write_text("of an earlier attempt\n")
    write_settings(settings)
    return settings


def pretend(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """Let a shell script be the Python of runs."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(work, "sys", SimpleNamespace(executable=str(path)))


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 0", None),
        ("kill -KILL $$", "killed by SIGKILL (for want of memory?)"),
        ("kill -TERM $$", "killed by SIGTERM"),
        ("exit 3", "exit code 3"),
        ("echo first; echo ValueError: no luck >&2; echo; exit 1", "ValueError: no luck"),
        ("sleep 0.6; exit 4", "exit code 4"),
    ],
)
def test_the_end_of_a_process_and_its_reason(
    settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str | None
) -> None:
    pretend(monkeypatch, tmp_path, script)
    assert in_process(1)(settings, threading.Event()) == reason


def test_a_process_that_finds_another_at_its_run(
    settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, tmp_path, f"exit {BUSY}")
    with pytest.raises(Busy):
        in_process(1)(settings, threading.Event())


def test_a_process_is_killed_when_the_sweep_stops(
    settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, tmp_path, 'echo "$@"; exec sleep 60')
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(in_process(2), settings, stop)
        until = time.monotonic() + 20
        while SETTINGS not in (tmp_path / "run" / LOG).read_text():
            assert time.monotonic() < until
            time.sleep(0.02)
        stop.set()
        with pytest.raises(Busy):
            future.result(20)
    assert f"-m unipelt.sweep {tmp_path / 'run' / SETTINGS}" in (tmp_path / "run" / LOG).read_text()


def test_what_a_finished_run_had_still_to_remove_is_removed(settings: RunSettings, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / CHECKPOINTS / "checkpoint-2").mkdir(parents=True)
    write_failure(settings, "no luck", [])
    with alone(folder):  # its own process is still at that
        _tidy(settings)
    assert (folder / CHECKPOINTS).exists()
    _tidy(settings)
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) == [LOG, SETTINGS]


def test_processes_share_the_cores_unless_the_user_says_how_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 9)
    for name in ("OMP_NUM_THREADS", "HF_HUB_DISABLE_TELEMETRY", "PYTHONUNBUFFERED"):
        monkeypatch.delenv(name, raising=False)
    always = {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1"}
    given = dict(os.environ)
    assert environment(1) == {**given, **always}
    for workers, threads in ((2, "4"), (3, "3"), (10, "1")):
        assert environment(workers) == {**given, **always, "OMP_NUM_THREADS": threads}
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    assert environment(2) == {**given, **always, "OMP_NUM_THREADS": "7", "HF_HUB_DISABLE_TELEMETRY": "0"}


# The process itself


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [(None, 0, ""), (LockedError("another process"), BUSY, ""), (ValueError("no\n luck"), 1, "ValueError: no luck\n")],
)
def test_a_process_does_the_run_of_its_settings(
    settings: RunSettings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception | None,
    code: int,
    said: str,
) -> None:
    done: list[RunSettings] = []

    def run(found: RunSettings) -> None:
        done.append(found)
        if error is not None:
            raise error

    monkeypatch.setattr("unipelt.glue.run.run", run)
    # for ever: what follows its end is the real os._exit once this test is over
    open_pipe = SimpleNamespace(read=lambda *_: threading.Event().wait(), _exit=lambda _: None)
    monkeypatch.setattr(process, "os", open_pipe)
    assert process.main(Path(str(settings.output_dir)) / SETTINGS) == code
    assert done == [settings]
    printed = capsys.readouterr()
    assert printed.out == said
    assert ("Traceback" in printed.err) == (code == 1)


def test_the_end_of_its_pipe_is_the_end_of_a_process(settings: RunSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    codes: list[Any] = []

    def leave(code: int) -> None:
        codes.append(code)
        ended.set()

    def read(descriptor: int, count: int) -> bytes:
        assert descriptor == 0, "standard input is the pipe"
        return b""

    monkeypatch.setattr(process, "os", SimpleNamespace(read=read, _exit=leave))
    monkeypatch.setattr("unipelt.glue.run.run", lambda found: ended.wait(20))
    process.main(Path(str(settings.output_dir)) / SETTINGS)
    assert codes == [1]


def test_the_program_does_the_run_that_it_is_given(settings: RunSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[RunSettings] = []
    monkeypatch.setattr("unipelt.glue.run.run", done.append)
    monkeypatch.setattr(os, "read", lambda *_: threading.Event().wait())  # the pipe stays open
    monkeypatch.delitem(sys.modules, "unipelt.sweep.__main__")  # as a program it is imported by that name alone
    monkeypatch.setattr(sys, "argv", ["unipelt.sweep", str(Path(str(settings.output_dir)) / SETTINGS)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("unipelt.sweep", run_name="__main__")
    assert ended.value.code == 0
    assert done == [settings]
