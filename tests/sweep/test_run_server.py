"""Servers that fork the process of each run of a sweep: what their ends are taken for, and equal numbers."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_task import make_quick, quick

from unipelt.glue.settings import RunSettings
from unipelt.records.record import read_result
from unipelt.sweep import LOG, SETTINGS, Busy, carry_out, in_process, read_sweep, status
from unipelt.sweep import run_server as near
from unipelt.sweep.folder import write_settings

pytestmark = pytest.mark.skipif(not near.can_fork(), reason="processes of runs are forked on Linux alone")

SERVER = """
import os, signal, sys, time, types
from pathlib import Path
from unipelt.runs.folder import LockedError
from unipelt.sweep import serve_runs

def run(settings):
    word = Path(settings.output_dir).name.partition("-")[0]
    print(f"{word} in {os.getpid()} of {os.getppid()}")
    if word == "raises":
        raise ValueError("no luck")
    if word == "busy":
        raise LockedError("another process")
    if word == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if word == "ends":
        os.kill(os.getppid(), signal.SIGKILL)
    if word in ("ends", "sleeps"):
        time.sleep(60)

serve_runs.PRELOADED = ()
sys.modules["unipelt.glue.run"] = types.SimpleNamespace(run=run)
sys.exit(serve_runs.main())
"""


@pytest.fixture
def run_of(tmp_path: Path) -> Callable[[str], RunSettings]:
    """Makes a run, whose folder is as `carry_out` leaves it to whoever starts it."""

    def make(name: str) -> RunSettings:
        settings = RunSettings(task="rte", output_dir=str(tmp_path / name))
        (tmp_path / name).mkdir()
        write_settings(settings)
        return settings

    return make


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The servers that were started, whose runs only pretend to train."""
    found: list[subprocess.Popen[bytes]] = []

    def start(line: list[str], **options: Any) -> subprocess.Popen[bytes]:
        assert line == [sys.executable, "-m", "unipelt.sweep.serve_runs"]
        found.append(subprocess.Popen([sys.executable, "-c", SERVER], **options))
        return found[-1]

    monkeypatch.setattr(near, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": start}))
    yield found
    assert all(process.poll() is not None for process in found), "the servers end with the sweep"


def log_of(settings: RunSettings) -> str:
    return (Path(str(settings.output_dir)) / LOG).read_text()


def words(settings: RunSettings) -> list[int]:
    """The ids of the process of a run and of its server."""
    first, _, second = log_of(settings).split()[2:5]
    return [int(first), int(second)]


def test_one_server_does_many_runs_each_in_a_process_of_its_own(
    run_of: Callable[[str], RunSettings], started: list[subprocess.Popen[bytes]]
) -> None:
    never = threading.Event()
    with near.run_servers(1) as start:
        runs = {name: run_of(name) for name in ("good", "raises", "crashes", "busy", "good-2")}
        assert start(runs["good"], never) is None
        assert start(runs["raises"], never) == "ValueError: no luck"
        assert start(runs["crashes"], never) == "killed by SIGSEGV"
        with pytest.raises(Busy):
            start(runs["busy"], never)
        assert start(runs["good-2"], never) is None
    [server] = started
    found = [words(settings) for settings in runs.values()]
    assert {parent for _, parent in found} == {server.pid}
    assert len({process for process, _ in found}) == len(runs)


def test_a_server_that_is_killed_takes_its_run_along_and_another_does_the_rest(
    run_of: Callable[[str], RunSettings], started: list[subprocess.Popen[bytes]]
) -> None:
    never = threading.Event()
    ends, good, last = run_of("ends"), run_of("good"), run_of("good-2")
    with near.run_servers(1) as start:
        assert start(ends, never) == "killed by SIGKILL (for want of memory?)"
        until(lambda: has_ended(words(ends)[0]))
        assert start(good, never) is None
        started[1].kill()  # while it does nothing
        started[1].wait()
        assert start(last, never) is None
    assert len(started) == 3


def test_a_server_that_cannot_begin_leaves_its_last_words(
    run_of: Callable[[str], RunSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = run_of("good")

    def start(line: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", "raise ImportError('no such library')"], **options)

    monkeypatch.setattr(near, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": start}))
    with near.run_servers(1) as begin:
        assert begin(settings, threading.Event()) == "ImportError: no such library"
    assert "Traceback" in log_of(settings)


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def has_ended(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_stopped_sweep_ends_run_and_server(
    run_of: Callable[[str], RunSettings], started: list[subprocess.Popen[bytes]]
) -> None:
    settings, stop = run_of("sleeps"), threading.Event()
    path = Path(str(settings.output_dir)) / LOG
    with near.run_servers(1) as start, ThreadPoolExecutor(1) as pool:
        future = pool.submit(start, settings, stop)
        until(lambda: path.exists() and len(path.read_text().split()) > 4)
        os.kill(words(settings)[0], 0)
        stop.set()
        with pytest.raises(Busy):
            future.result(20)
        with pytest.raises(ProcessLookupError):
            os.kill(words(settings)[0], 0)
        assert started[0].returncode == 0


def test_without_a_fork_each_run_is_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "can_fork", lambda: False)
    monkeypatch.setattr(near, "in_process", lambda workers: f"programs of {workers}")
    with near.run_servers(3) as start:
        assert start == "programs of 3"


def test_a_run_on_a_gpu_that_was_started_too_early_is_a_program(
    run_of: Callable[[str], RunSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    from unipelt.sweep import serve_runs

    settings = run_of("good")
    given: list[Any] = []
    pipe, _ = os.pipe()
    stand_ins = {"dup2": lambda *_: None, "execv": execute(given)}
    monkeypatch.setattr(serve_runs, "os", SimpleNamespace(**{**vars(os), **stand_ins}))
    monkeypatch.setattr("torch.cuda._is_in_bad_fork", lambda: True)
    monkeypatch.setattr(serve_runs.run_process, "main", lambda path: 0)
    states = random.getstate(), repr(np.random.get_state())
    with pytest.raises(InterruptedError):
        serve_runs._do(Path(str(settings.output_dir)) / SETTINGS, pipe)
    assert random.getstate() != states[0], "the random numbers are not those of the server"
    assert repr(np.random.get_state()) != states[1]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(pipe)
    open_files = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    assert str(Path(str(settings.output_dir)) / LOG) not in open_files
    assert given == [[sys.executable, "-m", "unipelt.sweep", str(Path(str(settings.output_dir)) / SETTINGS)]]


@pytest.mark.parametrize("before", [None, "0"])
def test_a_server_imports_without_a_gpu_and_leaves_the_environment_as_it_was(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unipelt.sweep import serve_runs

    name, seen = "PYTORCH_NVML_BASED_CUDA_CHECK", list[tuple[str, str]]()
    monkeypatch.setenv(name, "0")
    if before is None:
        monkeypatch.delenv(name)

    def load(module: str) -> None:
        seen.append((module, os.environ[name]))
        raise ImportError(module)

    monkeypatch.setattr(serve_runs, "importlib", SimpleNamespace(import_module=load))
    monkeypatch.setattr(serve_runs, "gc", SimpleNamespace(collect=lambda: None, freeze=lambda: None))
    serve_runs._preload()
    assert seen == [(module, "1") for module in serve_runs.PRELOADED], "the run says what is missing"
    assert os.environ.get(name) == before


def execute(given: list[Any]) -> Callable[[str, list[str]], None]:
    def execv(program: str, line: list[str]) -> None:
        assert program == sys.executable
        given.append(line)
        raise InterruptedError  # the real one does not return

    return execv


@pytest.mark.slow
def test_forked_runs_give_the_same_bits_as_programs(tmp_path: Path) -> None:
    make_quick(tmp_path)
    settings = {**quick(tmp_path), "grid": [{"method": ["unipelt-apl"], "seed": [1, 2]}]}
    del settings["output_dir"]
    (tmp_path / "sweep.json").write_text(json.dumps(settings))
    sweep = read_sweep(tmp_path / "sweep.json")
    assert carry_out(status(sweep, tmp_path / "forked"), log=lambda line: None) == {}
    assert carry_out(status(sweep, tmp_path / "programs"), in_process(1), log=lambda line: None) == {}
    folders = sorted((tmp_path / "forked").glob("*-*"))
    assert len(folders) == 2
    for folder in folders:
        other = tmp_path / "programs" / folder.name
        ours, theirs = read_result(folder), read_result(other)
        for name in ("seconds", "memory", "settings", "code"):
            assert name in ours
            del ours[name], theirs[name]
        assert ours == theirs
        for path in (folder / "model").iterdir():
            if path.name != "README.md":
                assert path.read_bytes() == (other / "model" / path.name).read_bytes(), path
    first, second = (read_result(folder)["test"] for folder in folders)
    assert first != second, "the seeds differ"
