"""Do the runs of `FOLDER/runs.json` in two processes: `python joint_runs.py FOLDER [kill]`.

The processes are forked, so that the libraries are imported once. Each one has the environment that a launcher gives.
With `kill`, the second process ends by SIGKILL in the second epoch.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from scripts.families_parallel import PROCESSES, in_processes
from scripts.killed import kill_at
from unipelt.glue.run import run as run_glue
from unipelt.glue.settings import RunSettings
from unipelt.runs import processes
from unipelt.runs.run import run as run_task
from unipelt.tasks import qa, translation
from unipelt.tasks.settings import QASettings, TranslationSettings


def do(kind: str, values: dict[str, Any]) -> None:
    """Do one run. The lines for the reader go to a file of this process."""
    lines = Path(f"{values['output_dir']}.lines-{processes.rank()}")

    def log(line: str) -> None:
        with lines.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")

    if kind == "glue":
        run_glue(RunSettings(**values), log)
    elif kind == "questions":
        run_task(QASettings(**values), qa.prepare, log)
    else:
        run_task(TranslationSettings(**values), translation.prepare, log)


def work(rank: int, folder: Path, port: int, kill: bool) -> None:
    """Do all runs as the process `rank`, and write the error of each run, or null."""
    torch.set_num_threads(1)
    for name in ("RANK", "LOCAL_RANK"):
        os.environ[name] = str(rank)
    os.environ |= {"WORLD_SIZE": str(PROCESSES), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    if kill and rank == 1:
        kill_at("transformers.trainer.Trainer", "training_step", 6, "after")
    errors: dict[str, str | None] = {}
    for name, (kind, values) in json.loads((folder / "runs.json").read_text(encoding="utf-8")).items():
        try:
            do(kind, values)
            errors[name] = None
        except (ValueError, OSError) as error:
            errors[name] = f"{type(error).__name__}: {error}"
        except Exception:
            errors[name] = traceback.format_exc()
        (folder / f"errors-{rank}.json").write_text(json.dumps(errors), encoding="utf-8")
    sys.stdout.flush()
    processes.wait()
    # exit without torch's destructors: they may hold the GIL and wait for gloo's thread, which may wait for the GIL
    os._exit(0)


def free_port() -> int:
    """Return a port that no program listens on."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    sys.exit(in_processes(work, Path(sys.argv[1]), free_port(), "kill" in sys.argv[2:]))
