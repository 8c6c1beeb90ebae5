"""Runs of a sweep on a Ray cluster: the same folder and records, on as many machines as it has."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unipelt.glue.settings import RunSettings
from unipelt.sweep import SETTINGS, Busy, in_process, read_settings

_PAUSE = 0.5  # seconds between two looks at whether to stop


def connect(address: str | None = None) -> Any:
    """Join a Ray cluster, or start one on this machine.

    Args:
        address: of the cluster (`auto`, or `host:port`); None starts one here.

    Returns:
        The module `ray`, connected.

    Raises:
        ImportError: Ray is not installed.
        ConnectionError: there is no cluster at the address.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("--backend ray needs Ray; install the extra 'ray' (pip install 'unipelt[ray]')") from error
    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    return ray


def capacity(ray: Any, cpus: float, gpus: float) -> int:
    """How many runs, each of which takes `cpus` and `gpus`, the cluster can do at a time.

    Raises:
        ValueError: not one.
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

    Every machine must see the folder of the sweep, and data and models, at the same path. A run whose worker is lost
    (killed, out of memory, a machine gone) is tried again, anywhere, and goes on from its last checkpoint.

    Args:
        ray: connected.
        cpus: what one run takes.
        gpus: likewise; with a fraction, several share one.
        retries: how often a run is tried again.
    """
    # retries are counted here, where a run that another process is at can be told from one whose worker was lost
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
            except Busy:  # as Ray passes on what a task raises
                raise
            except ray.exceptions.RayTaskError as error:
                return " ".join(str(error.cause).split())
            except ray.exceptions.RayError as error:
                lost = f"its worker was lost {attempt + 1} times, last by {type(error).__name__}"
        return lost

    return start


def _run(folder: str, current: str) -> str | None:
    """On a worker: do the run of a folder in a process of its own, which ends when this worker does."""
    with contextlib.suppress(OSError):
        os.chdir(current)  # relative paths of data are meant from where the sweep was started
    return in_process(1)(read_settings(Path(folder) / SETTINGS), threading.Event())
