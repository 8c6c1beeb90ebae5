"""Kill sweeps with SIGKILL at chosen moments, and start them again: `python killed_sweep.py FOLDER`.

The folder holds `sweep.yaml` and `record.json`, which stands for the record of every run. Only the sweep is tested, so
a run is a line in `starts.txt` and a result. Each sweep is its own process, forked before any thread is used.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from scripts.killed import kill_at
from unipelt.glue.settings import RunSettings
from unipelt.records import record as result
from unipelt.sweep import carry_out, read_sweep, status, write_request

# The function, the number of the call that kills the process, and whether the kill is before or after the call.
MOMENTS = {
    "before the request is written": ("unipelt.sweep.folder", "write_whole", 1, "before"),
    "request written, nothing begun": ("unipelt.sweep.folder", "write_whole", 1, "after"),
    "settings written, nothing started": ("unipelt.sweep.folder", "write_whole", 3, "after"),
    "in a run": ("unipelt.records.record", "write_result", 3, "before"),
    "a result written": ("unipelt.records.record", "write_result", 3, "after"),
    "a failure not written": ("unipelt.sweep.folder", "write_whole", 6, "before"),
    "a failure written": ("unipelt.sweep.folder", "write_whole", 6, "after"),
    "the first line printed": ("unipelt.sweep.workers", "_account", 1, "after"),
}


def pretend(home: Path, out: Path, seconds: float = 0.0) -> Callable[[RunSettings, threading.Event], str | None]:
    """Return a function that does a pretended run: it notes the start of the run and writes a record.

    The fourth start fails, if that run starts for the first time.
    """

    def start(settings: RunSettings, stop: threading.Event) -> str | None:
        folder = Path(str(settings.output_dir))
        with open(out / "starts.txt", "a") as file:
            file.write(f"{folder.name}\n")
        time.sleep(seconds)
        starts = (out / "starts.txt").read_text().splitlines()
        if len(starts) == 4 and starts.count(folder.name) == 1 and (home / "fails").exists():
            return "made to fail"
        record = json.loads((home / "record.json").read_text())
        record |= {"settings": settings.to_dict(), "digest": settings.digest()}
        result.write_result(record, folder)
        return None

    return start


def attempt(home: Path, out: Path, moment: str | None = None, workers: int = 1) -> Callable[[], int]:
    """Start a sweep in its own process. Return a function that waits for the process and returns its wait status."""
    child = os.fork()
    if child == 0:
        code = 3
        try:
            if moment is not None:
                kill_at(*MOMENTS[moment])
            sweep = read_sweep(home / "sweep.yaml")
            write_request(sweep, out)
            failures = carry_out(status(sweep, out, workers), pretend(home, out, 0.02), log=lambda line: None)
            code = 1 if failures else 0
        finally:
            os._exit(code)
    return lambda: os.waitpid(child, 0)[1]


def main(home: Path) -> None:
    """Write `report.json`: for each moment, how the attempts ended; and how sweeps that share a folder ended."""
    report = {}
    (home / "fails").touch()
    for number, moment in enumerate(MOMENTS):
        out = home / f"moment-{number}"
        out.mkdir()
        report[moment] = [attempt(home, out, moment)()]
        report[moment] += [attempt(home, out)(), attempt(home, out)()]
    (home / "fails").unlink()
    out = home / "shared"
    out.mkdir()
    report["shared"] = [wait() for wait in [attempt(home, out, workers=2) for _ in range(3)]]
    (home / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
