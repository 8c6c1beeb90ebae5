"""Do the runs of a sweep on all machines of a Ray cluster, with the same folder and records as without Ray."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unipelt.glue.settings import RunSettings
from unipelt.sweep import SETTINGS, Busy, in_process, read_settings

_PAUSE = 0.5  # seconds between two checks of the stop event


def connect(address: str | None = None) -> Any:
    """Join a Ray cluster, or start one on this machine.

    Args:
        address: the address of the cluster (`auto` or `host:port`). None starts a cluster on this machine.

    Returns:
        The module `ray`, connected.

    Raises:
        ImportError: Ray is not installed.
        ConnectionError: no cluster runs at the address.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("--backend ray needs Ray; install the extra 'ray' (pip install 'unipelt[ray]')") from error
    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    return ray


def capacity(ray: Any, cpus: float, gpus: float) -> int:
    """Return how many runs the cluster can do at a time, if each run takes `cpus` CPUs and `gpus` GPUs.

    Raises:
        ValueError: the cluster is too small for one run.
    """
    there = ray.cluster_resources()
    wanted = {"CPU": cpus, "GPU": gpus}
    count = min(int(there.get(kind, 0.0) // share) for kind, share in wanted.items() if share > 0)
    if count < 1:
        seen = ", ".join(f"{there.get(kind, 0.0):g} {kind}" for kind in wanted)
        raise ValueError(f"a run takes {cpus:g} CPU and {gpus:g} GPU, and the whole cluster has {seen}")
    return count


def on_cluster(
    ray: Any, *, cpus: float = 1.0, gpus: float = 0.0, retries: int = 3
) -> Callable[[RunSettings, threading.Event], str | None]:
    """Make a function that starts a run on the cluster, for `unipelt.sweep.carry_out`.

    Every machine must see the sweep's folder, the data and the models at the same paths. If the worker of a run is lost
    (killed, out of memory, or with its machine), the run is tried again on any machine. The new attempt continues from
    the last checkpoint.

    Args:
        ray: the module `ray`, connected.
        cpus: the CPUs that one run takes.
        gpus: the GPUs that one run takes. With a fraction, several runs share one GPU.
        retries: how often a lost run is tried again.
    """
    # Ray's own retries cannot tell a run that another process does from a run whose worker was lost
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_run)

    def start(settings: RunSettings, stop: threading.Event) -> str | None:
        lost = None
        for attempt in range(retries + 1):
            reference = task.remote(str(settings.output_dir), os.getcwd())
            while not ray.wait([reference], timeout=_PAUSE)[0]:
                if stop.is_set():
                    ray.cancel(reference, force=True)
                    raise Busy
            try:
                return ray.get(reference)
            except Busy:  # Ray raises the task's own exception here
                raise
            except ray.exceptions.RayTaskError as error:
                return " ".join(str(error.cause).split())
            except ray.exceptions.RayError as error:
                lost = f"its worker was lost {attempt + 1} times, last by {type(error).__name__}"
        return lost

    return start


def _run(folder: str, current: str) -> str | None:
    """Do the run of a folder on a worker, in a process that ends when the worker ends."""
    with contextlib.suppress(OSError):
        os.chdir(current)  # relative data paths start at the folder in which the sweep was started
    return in_process(1)(read_settings(Path(folder) / SETTINGS), threading.Event())
