"""Run a grid of runs from one file, in one folder that several processes and machines can share.

Each run is its own process. A run that crashes, or that the system kills because memory is short, is a recorded
failure, and the other runs continue. All state is in the folder, not in a process:

    OUT/sweep.json              the request: all runs of the sweep (`write_request`)
    OUT/optuna.journal          Optuna's trials, if the sweep searches
    OUT/RUN/settings.json       the settings of the run
    OUT/RUN/log.txt             the output of the run's processes
    OUT/RUN/result.json         present if the run has finished
    OUT/RUN/failure.json        present if the run's last process failed: {"error": one line, "log": the tail,
                                "time": seconds since 1970}
    OUT/RUN/.sweep/.lock        held by the sweep that starts the run's process
    OUT/RUN/.lock               held by the run's process (`unipelt.runs.folder`)

A process that ends, also by a kill, releases its locks, so a kill needs no cleaning up. `grid` lists the runs,
`folder` reads and writes these files, and `workers` does the runs. `run_server` forks the process of a run from a
server, and `run_process` starts it as a program. `watch` looks at all this from outside.
"""

from unipelt.files.progress import duration
from unipelt.sweep.folder import (
    FAILURE,
    LOG,
    REQUEST,
    SETTINGS,
    Busy,
    State,
    read_failure,
    read_request,
    read_settings,
    run_folder,
    status,
    write_request,
)
from unipelt.sweep.grid import Sweep, SweepError, read_sweep, split_list
from unipelt.sweep.run_process import in_process
from unipelt.sweep.workers import carry_out

__all__ = [
    "FAILURE",
    "LOG",
    "REQUEST",
    "SETTINGS",
    "Busy",
    "State",
    "Sweep",
    "SweepError",
    "carry_out",
    "duration",
    "in_process",
    "read_failure",
    "read_request",
    "read_settings",
    "read_sweep",
    "run_folder",
    "split_list",
    "status",
    "write_request",
]
