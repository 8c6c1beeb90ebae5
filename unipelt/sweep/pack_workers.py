"""Do the runs of a sweep in processes that do several runs at once (`unipelt.glue.pack_runs`).

`in_packs` starts runs for `unipelt.sweep.carry_out`, which handles claims, logs and failures as for any run. A pack is
a process (`python -m unipelt.sweep.pack_workers PLACES`). The process receives runs as its places become free:

    standard input    a line for each run: the path of its settings.json; the process ends when the pipe is closed
    standard output   a line for each run: {"folder": ..., "error": one line or null, "busy": whether another process
                      does the run}

The output of a run goes to the run's log. Other output of the process goes to the logs of the runs that ended with the
process.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, TimeoutError
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from unipelt.glue.pack_runs import pack_key, train
from unipelt.glue.packed_run import check_packable
from unipelt.glue.settings import RunSettings
from unipelt.runs.folder import LockedError
from unipelt.sweep import LOG, SETTINGS, Busy, Sweep, read_settings
from unipelt.sweep.run_process import environment

IDLE_SECONDS = 5.0
"""The seconds that a pack without runs waits for the next run before it ends."""
_PAUSE = 0.5  # seconds between two checks of the stop event
_TAIL = 4000  # bytes of a process's last output that are added to the logs of the runs that ended with it


class _Unbegun(Exception):
    """The pack ended before it started this run."""


@dataclass
class _Pack:
    """A process and its runs: by folder, the future outcome of each run."""

    key: str
    process: subprocess.Popen[str]
    printed: IO[bytes]
    runs: dict[str, Future[str | None]] = field(default_factory=dict)
    over: bool = False


def by_pack(sweep: Sweep) -> Sweep:
    """Return the sweep in an order in which runs that can share a pack are neighbours.

    Raises `PackError` if a run cannot train in a pack.
    """
    for settings in sweep.runs:
        check_packable(settings)
    order: dict[str, list[RunSettings]] = {}
    for settings in sweep.runs:
        order.setdefault(pack_key(settings), []).append(settings)
    return replace(sweep, runs=tuple(settings for runs in order.values() for settings in runs))


def in_packs(places: int, packs: int = 1) -> Callable[[RunSettings, threading.Event], str | None]:
    """Make a function that starts a run in a process with a free place. Use one caller for each place.

    Args:
        places: the number of runs that a process does at a time.
        packs: the number of processes at a time; they share the cores.
    """
    open_packs: list[_Pack] = []
    changed = threading.Condition()

    def sit(settings: RunSettings, stop: threading.Event) -> tuple[_Pack, Future[str | None]]:
        key, folder = pack_key(settings), str(settings.output_dir)
        with changed:
            while True:
                if stop.is_set():
                    raise Busy
                open_packs[:] = [pack for pack in open_packs if not pack.over]
                for pack in open_packs:
                    if pack.key == key and len(pack.runs) < places:
                        outcome: Future[str | None] = Future()
                        pack.runs[folder] = outcome
                        _tell(pack, str(Path(folder) / SETTINGS))
                        return pack, outcome
                if len(open_packs) < packs:
                    open_packs.append(_open(key, places, packs))
                    threading.Thread(target=listen, args=(open_packs[-1],)).start()
                    continue
                for pack in open_packs:
                    if not pack.runs:
                        pack.over = True  # makes room for a pack with this key
                        _tell(pack, "")
                        break
                else:
                    changed.wait(_PAUSE)

    def listen(pack: _Pack) -> None:
        assert pack.process.stdout is not None
        wrong = None  # a line that is not an answer
        for line in pack.process.stdout:
            if not line.endswith("\n"):
                break  # the process ended before the end of the line
            try:
                said = json.loads(line)
                with changed:
                    outcome = pack.runs.pop(said["folder"])
                    changed.notify_all()
            except (ValueError, TypeError, KeyError):
                wrong = line
                pack.process.kill()
                break
            if said["busy"]:
                outcome.set_exception(Busy())
            else:
                outcome.set_result(said["error"])
        code = pack.process.wait()
        with changed:
            pack.over = True
            left, pack.runs = pack.runs, {}
            changed.notify_all()
        pack.printed.seek(max(0, pack.printed.seek(0, os.SEEK_END) - _TAIL))
        tail = pack.printed.read()
        pack.printed.close()
        with pack.process:  # closes the pipes of the process
            for folder, outcome in left.items():
                if code == 0 and wrong is None:
                    outcome.set_exception(_Unbegun())
                else:
                    # a full disk must not keep the outcome from the waiting caller
                    with contextlib.suppress(OSError), open(Path(folder) / LOG, "ab") as file:
                        file.write(tail)
                    outcome.set_result(_reason(code, tail, len(left)) if wrong is None else _unlike(wrong))

    def start(settings: RunSettings, stop: threading.Event) -> str | None:
        while True:
            pack, outcome = sit(settings, stop)
            try:
                while True:
                    try:
                        return outcome.result(_PAUSE)
                    except TimeoutError:
                        if stop.is_set():
                            pack.process.kill()
                            raise Busy from None
            except _Unbegun:
                continue

    return start


def _open(key: str, places: int, packs: int) -> _Pack:
    printed = tempfile.TemporaryFile()  # noqa: SIM115  (`listen` closes it after the process has ended)
    process = subprocess.Popen(
        [sys.executable, "-m", "unipelt.sweep.pack_workers", str(places)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=printed,
        env=environment(packs),
        text=True,
        start_new_session=True,  # so that Ctrl-C does not reach the process
    )
    return _Pack(key, process, printed)


def _tell(pack: _Pack, line: str) -> None:
    assert pack.process.stdin is not None
    try:
        pack.process.stdin.write(f"{line}\n")
        pack.process.stdin.flush()
    except BrokenPipeError:  # the process has just ended, and `listen` tells the waiting callers
        pack.over = True


def _unlike(line: str) -> str:
    return f"the pack was ended, since it wrote {line.strip()!r} where an answer belongs"


def _reason(code: int, tail: bytes, runs: int) -> str:
    with_others = f", with {runs} runs in it" if runs > 1 else ""
    if code < 0:
        kill = " (for want of memory? --pack fewer)" if code == -signal.SIGKILL else ""
        return f"the pack was killed by {signal.Signals(-code).name}{kill}{with_others}"
    lines = [line for line in tail.decode("utf-8", "replace").splitlines() if line.strip()]
    return f"the pack ended{with_others}: {lines[-1] if lines else f'exit code {code}'}"


# The process of a pack


def _main(places: int) -> int:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # other output must not be read as an answer
    asked: queue.Queue[str] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            asked.put(line.strip())
        os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    _serve(places, asked, answers)
    return 0


def _serve(places: int, asked: queue.Queue[str], answers: IO[str]) -> None:
    """Do the runs whose settings.json files are named in `asked`, until an empty line comes or no more runs come."""
    ended = False

    def answer(folder: str, error: str | None, *, busy: bool = False) -> None:
        print(json.dumps({"folder": folder, "error": error, "busy": busy}), file=answers, flush=True)

    def take(free: int, idle: bool) -> Sequence[RunSettings]:
        nonlocal ended
        new: list[RunSettings] = []
        while len(new) < free and not ended:
            try:
                line = asked.get(timeout=IDLE_SECONDS) if idle and not new else asked.get_nowait()
            except queue.Empty:
                break
            if not line:
                ended = True
                break
            try:
                new.append(read_settings(Path(line)))
            except (ValueError, OSError, TypeError) as error:
                answer(str(Path(line).parent), _line(error))
        return new

    def done(settings: RunSettings, outcome: dict[str, Any] | Exception) -> None:
        folder = str(settings.output_dir)
        if not isinstance(outcome, Exception):
            answer(folder, None)
        elif isinstance(outcome, LockedError):
            answer(folder, None, busy=True)
        else:
            voice(settings)("".join(traceback.format_exception(outcome)))
            answer(folder, _line(outcome))

    train(take, done, places, voice)


def voice(settings: RunSettings) -> Callable[[str], None]:
    """Return a function that appends lines to a run's log."""
    path = Path(str(settings.output_dir)) / LOG

    def log(text: str) -> None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{text}\n")

    return log


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


if __name__ == "__main__":
    sys.exit(_main(int(sys.argv[1])))
