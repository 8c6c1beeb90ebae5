"""Do the runs of a sweep in processes that are forked from a server, which has imported the libraries once.

Importing the libraries takes seconds. A server (`unipelt.sweep.serve_runs`) imports them, and then forks a process for
each run. The process of a run begins with the state of a new process: nothing has been computed before, and its memory
is given back when it ends. So a run gives the same numbers as in a process of its own (`unipelt.sweep.run_process`). A
server does one run at a time, so a crash ends one run.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from unipelt.glue.settings import RunSettings
from unipelt.sweep.folder import LOG, SETTINGS, Busy, folder_of
from unipelt.sweep.run_process import environment, in_process, reason_of, size_of

_ENDING = 10.0  # seconds that a server has to end its run and itself


def can_fork() -> bool:
    """Return whether the processes of runs can be forked. macOS's own libraries do not allow a fork."""
    return sys.platform == "linux"


@contextlib.contextmanager
def run_servers(workers: int) -> Iterator[Callable[[RunSettings, threading.Event], str | None]]:
    """Give a function that does a run in a process that a server forks. The servers end with the block.

    Each of the `workers` callers has a server, and their runs share the cores. Where processes cannot be forked, each
    run is started as a program of its own.
    """
    idle: list[_Server] = []

    def start(settings: RunSettings, stop: threading.Event) -> str | None:
        folder = Path(folder_of(settings))
        printed = size_of(folder / LOG)
        server = idle.pop() if idle else _Server(workers)
        if not server.alive:
            server.close()
            server = _Server(workers)
        code = server.run(folder / SETTINGS, stop)
        if code is not None:
            idle.append(server)
            return reason_of(code, folder, printed)
        with server.printed, open(folder / LOG, "ab") as file:  # the last words of the server
            server.printed.seek(0)
            file.write(server.printed.read())
        return reason_of(server.process.wait(), folder, printed) or "its server ended"

    try:
        yield start if can_fork() else in_process(workers)
    finally:
        while idle:
            idle.pop().close()


class _Server:
    """The near end of a server."""

    def __init__(self, workers: int) -> None:
        self.printed = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the server)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "unipelt.sweep.serve_runs"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.printed,
            env=environment(workers),
            start_new_session=True,  # keeps Ctrl-C from it
        )

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def run(self, settings: Path, stop: threading.Event) -> int | None:
        """Do a run, and return the exit code of its process, or None if the server itself has ended.

        Raises:
            Busy: the event was set. Run and server have ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        answers, answer = self.process.stdout.fileno(), b""
        with contextlib.suppress(BrokenPipeError):  # an ended server also ends its answers
            os.write(self.process.stdin.fileno(), f"{json.dumps(str(settings))}\n".encode())
        while not answer.endswith(b"\n"):
            if stop.is_set():
                self.close()
                raise Busy
            if select.select([answers], [], [], 0.5)[0]:
                block = os.read(answers, 100)
                if not block:
                    self._end()
                    return None
                answer += block
        return int(answer)

    def close(self) -> None:
        """End the server and the run that it does."""
        self._end()
        self.printed.close()

    def _end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()  # the signal to end
        with self.process:
            try:
                self.process.wait(_ENDING)
            except subprocess.TimeoutExpired:
                self.process.kill()
