"""Both ends of the pipe between a sweep and a pack: processes that only pretend to train, and a queue for the pipe."""

from __future__ import annotations

import io
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from unipelt.glue.settings import RunSettings
from unipelt.runs.folder import LockedError
from unipelt.sweep import LOG, SETTINGS, Busy
from unipelt.sweep import pack_workers as packs
from unipelt.sweep.folder import write_settings
from unipelt.sweep.pack_workers import in_packs
from unipelt.sweep.run_process import environment

PROCESS = """
import json, os, signal, sys, time

for line in sys.stdin:
    folder = os.path.dirname(line.strip())
    what = os.path.basename(folder).partition("-")[0]
    if not folder:
        break
    with open(folder + "/told", "a") as file:
        file.write(str(os.getpid()) + "\\n")
    if what == "leaves" and os.path.exists(folder + "/left"):
        what = "good"
    if what in ("good", "bad", "busy"):
        error = "ValueError: no luck" if what == "bad" else None
        print(json.dumps({"folder": folder, "error": error, "busy": what == "busy"}), flush=True)
    elif what == "killed":
        print("so far so good", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
    elif what == "memory":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "words":
        sys.exit("its last words")
    elif what == "silent":
        sys.exit(3)
    elif what == "half":
        print('{"folder": ', end="", flush=True)
        os._exit(4)
    elif what == "chatter":
        print("a library's greeting", flush=True)
    elif what == "stranger":
        print(json.dumps({"folder": "/of/nobody", "error": None, "busy": False}), flush=True)
    elif what == "leaves":
        open(folder + "/left", "w").close()
        sys.exit(0)
"""
"""What it does with a run is the first word of the folder's name; of a word that it does not know, nothing."""

Run = Callable[[str], RunSettings]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Makes a run's folder, as `carry_out` leaves it to whoever starts it."""

    def make(name: str, **changes: Any) -> RunSettings:
        settings = RunSettings(task="rte", method="lora", output_dir=str(tmp_path / name), **changes)
        (tmp_path / name).mkdir()
        write_settings(settings)
        return settings

    return make


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[str]]]:
    """The processes that packs have started, none of which trains."""
    found: list[subprocess.Popen[str]] = []

    def pretend(key: str, places: int, count: int) -> packs._Pack:
        printed = tempfile.TemporaryFile()  # noqa: SIM115  (closed by whoever reads it)
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": printed}
        found.append(subprocess.Popen([sys.executable, "-S", "-c", PROCESS], text=True, **pipes))
        return packs._Pack(key, found[-1], printed)

    monkeypatch.setattr(packs, "_open", pretend)
    monkeypatch.setattr(packs, "_PAUSE", 0.02)
    yield found
    for process in found:
        if process.stdin is not None and not process.stdin.closed:
            process.stdin.close()
        process.wait(20)
    until(lambda: not [thread for thread in threading.enumerate() if "(listen)" in thread.name])


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.01)


def told(settings: RunSettings) -> list[str]:
    """Processes that were told of a run."""
    path = Path(str(settings.output_dir)) / "told"
    return path.read_text().split() if path.exists() else []


def test_answers_are_passed_on(opened: list[subprocess.Popen[str]], run: Run) -> None:
    start, stop = in_packs(1), threading.Event()
    assert start(run("good"), stop) is None
    assert start(run("bad"), stop) == "ValueError: no luck"
    with pytest.raises(Busy):
        start(run("busy"), stop)
    assert len(opened) == 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("killed", "the pack was killed by SIGTERM"),
        ("memory", "the pack was killed by SIGKILL (for want of memory? --pack fewer)"),
        ("words", "the pack ended: its last words"),
        ("silent", "the pack ended: exit code 3"),
        ("half", "the pack ended: exit code 4"),
        ("chatter", 'the pack was ended, since it wrote "a library\'s greeting" where an answer belongs'),
        (
            "stranger",
            """the pack was ended, since it wrote '{"folder": "/of/nobody", "error": null, "busy": false}' where an """
            "answer belongs",
        ),
    ],
)
def test_a_pack_that_dies_says_of_what(
    opened: list[subprocess.Popen[str]], run: Run, tmp_path: Path, name: str, reason: str
) -> None:
    start, stop = in_packs(2), threading.Event()
    assert start(run(name), stop) == reason
    said = (tmp_path / name / LOG).read_text()
    assert said == {"killed": "so far so good\n", "words": "its last words\n"}.get(name, "")
    assert start(run("good"), stop) is None  # in another
    assert len(opened) == 2


def test_a_pack_that_dies_takes_its_runs_with_it(opened: list[subprocess.Popen[str]], run: Run) -> None:
    start, stop, waits = in_packs(2), threading.Event(), run("waits")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(start, waits, stop)
        until(lambda: told(waits))
        second = pool.submit(start, run("killed"), stop)
        assert {first.result(20), second.result(20)} == {"the pack was killed by SIGTERM, with 2 runs in it"}
    assert (Path(str(waits.output_dir)) / LOG).read_text() == "so far so good\n"


def test_a_run_that_a_pack_did_not_come_to_goes_to_the_next(opened: list[subprocess.Popen[str]], run: Run) -> None:
    leaves = run("leaves")
    assert in_packs(1)(leaves, threading.Event()) is None
    assert len(opened) == len(set(told(leaves))) == 2


def test_a_pack_with_nothing_to_do_makes_room_for_another_kind(
    opened: list[subprocess.Popen[str]], run: Callable[..., RunSettings]
) -> None:
    start, stop = in_packs(1), threading.Event()
    assert start(run("good"), stop) is None
    assert start(run("good-too", max_length=16), stop) is None
    assert len(opened) == 2
    assert opened[0].wait(20) == 0


def test_told_to_stop_one_that_trains_and_one_that_waits_for_a_place(
    opened: list[subprocess.Popen[str]], run: Callable[..., RunSettings]
) -> None:
    start, stop, waits = in_packs(1), threading.Event(), run("waits")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(start, waits, stop)
        until(lambda: told(waits))
        without = run("other", max_length=16)
        second = pool.submit(start, without, stop)
        time.sleep(0.1)
        stop.set()
        for future in (first, second):
            with pytest.raises(Busy):
                future.result(20)
    assert len(opened) == 1
    assert opened[0].wait(20) == -9
    assert not told(without)


def test_a_process_that_has_ended_unheard(opened: list[subprocess.Popen[str]], run: Run) -> None:
    process = subprocess.Popen([sys.executable, "-S", "-c", ""], stdin=subprocess.PIPE, text=True)
    process.wait(20)
    with tempfile.TemporaryFile() as printed:
        pack = packs._Pack("kind", process, printed)
        packs._tell(pack, "settings.json")
        assert pack.over
    # what it could not be told stays in the buffer of the pipe, and closing it would try once more
    assert process.stdin is not None
    with pytest.raises(BrokenPipeError):
        process.stdin.close()


def test_packs_are_programs_that_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[str], dict[str, Any]]] = []

    def popen(line: list[str], **options: Any) -> Any:
        started.append((line, options))
        return "a process"

    monkeypatch.setattr(packs, "subprocess", SimpleNamespace(PIPE=subprocess.PIPE, Popen=popen))
    with packs._open("a key", 3, 2).printed as printed:
        [(line, options)] = started
        assert line == [sys.executable, "-m", "unipelt.sweep.pack_workers", "3"]
        assert options["env"] == environment(2)
        assert (options["stdin"], options["stdout"], options["stderr"]) == (subprocess.PIPE, subprocess.PIPE, printed)
        assert options["start_new_session"], "Ctrl-C is for the sweep alone"
        assert options["text"]


# The process itself


def serve(
    monkeypatch: pytest.MonkeyPatch, lines: list[str], outcomes: dict[str, Exception], places: int = 2
) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """What a pack answers to lines, and the runs that it took at a time; each run ends at once."""
    asked: queue.Queue[str] = queue.Queue()
    for line in lines:
        asked.put(line)
    answers, taken = io.StringIO(), []

    def train(
        take: Callable[[int, bool], list[RunSettings]], done: Callable[..., None], count: int, voice: Callable[..., Any]
    ) -> None:
        assert count == places
        while new := take(count, True):
            taken.append([Path(str(settings.output_dir)).name for settings in new])
            for settings in new:
                done(settings, outcomes.get(taken[-1][0], {}))

    monkeypatch.setattr(packs, "train", train)
    monkeypatch.setattr(packs, "IDLE_SECONDS", 0.01)
    packs._serve(places, asked, answers)
    return [json.loads(line) for line in answers.getvalue().splitlines()], taken


def line_of(settings: RunSettings) -> str:
    return str(Path(str(settings.output_dir)) / SETTINGS)


def test_takes_as_many_as_there_are_places(monkeypatch: pytest.MonkeyPatch, run: Run, tmp_path: Path) -> None:
    answers, taken = serve(monkeypatch, [line_of(run(name)) for name in "abc"], {})
    assert taken == [["a", "b"], ["c"]]
    assert answers == [{"folder": str(tmp_path / name), "error": None, "busy": False} for name in "abc"]


def test_an_empty_line_is_the_end(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    _, taken = serve(monkeypatch, [line_of(run("a")), "", line_of(run("b"))], {})
    assert taken == [["a"]]


def test_what_went_wrong_is_answered_and_logged(monkeypatch: pytest.MonkeyPatch, run: Run, tmp_path: Path) -> None:
    outcomes = {"a": LockedError("another process"), "b": RuntimeError("no\n  luck")}
    lines = [line_of(run(name)) for name in "abc"]
    (tmp_path / "c" / SETTINGS).write_text("{")
    answers, taken = serve(monkeypatch, lines, outcomes, places=1)
    assert taken == [["a"], ["b"]]
    assert answers[0] == {"folder": str(tmp_path / "a"), "error": None, "busy": True}
    assert answers[1] == {"folder": str(tmp_path / "b"), "error": "RuntimeError: no luck", "busy": False}
    assert answers[2]["folder"] == str(tmp_path / "c")
    assert "is not valid JSON" in answers[2]["error"]
    assert "RuntimeError: no\n  luck" in (tmp_path / "b" / LOG).read_text()
    assert not (tmp_path / "a" / LOG).exists()
