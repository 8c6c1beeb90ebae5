"""A grid of runs from one file, carried out by as many processes and machines as share the folder.

Every run is a process of its own (`python -m unipelt.sweep RUN/settings.json`), so that one that crashes, or is
killed for want of memory, is a recorded failure and the others go on. The state is the folder's, never a process's:

    OUT/sweep.json              what was asked for (`write_request`)
    OUT/RUN/settings.json       the run's settings
    OUT/RUN/log.txt             what its processes printed
    OUT/RUN/result.json         it has finished
    OUT/RUN/failure.json        its last process failed: {"error": one line, "log": the tail, "time": when}
    OUT/RUN/.sweep/.lock        held by the sweep that starts the run's process
    OUT/RUN/.lock               held by that process (`unipelt.runs.folder`)

A process that dies lets go of its locks, so nothing has to be cleaned up after a kill. `grid` says what there is to
do, `folder` knows these files, and `work` does the runs.
"""

from unipelt.sweep.folder import (
    FAILURE,
    LOG,
    REQUEST,
    SETTINGS,
    Busy,
    State,
    duration,
    read_failure,
    read_request,
    read_settings,
    run_folder,
    status,
    write_request,
)
from unipelt.sweep.grid import Sweep, SweepError, read_sweep, split_list
from unipelt.sweep.workers import carry_out, in_process

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
