"""Sweeps on a Ray cluster: a local one in the slow test, a pretended one for what is hard to bring about."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_task import save_model, write_glue

from unipelt.cli import main
from unipelt.glue.settings import RunSettings
from unipelt.records.record import RESULT, read_result
from unipelt.sweep import FAILURE, LOG, Busy
from unipelt.sweep.folder import write_settings
from unipelt.sweep.ray_backend import _run, capacity, connect, on_cluster

SWEEP = """
model: {home}/model
glue_dir: {home}/glue
train_samples: 32
dev_samples: 16
epochs: 30
patience: null
batch_size: 8
max_length: 16
threads: 1
device: cpu
grid:
  - task: rte
    method: [lora, bitfit]
"""


class RayError(Exception):
    """As Ray's."""


class RayTaskError(RayError):
    """As Ray's, of what a task raised."""

    cause: Exception


class Pretend:
    """A cluster whose tasks end as they are told to, one after the other."""

    def __init__(self, *ends: Any) -> None:
        self.ends, self.cancelled = list(ends), 0
        self.options: dict[str, Any] = {}
        self.exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def remote(self, **options: Any) -> Callable[[Any], Any]:
        self.options = options
        return lambda function: SimpleNamespace(remote=lambda *args: args)

    def wait(self, tasks: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        return ([], tasks) if self.ends[0] == "never" else (tasks, [])

    def get(self, task: Any) -> Any:
        end = self.ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end

    def cancel(self, task: Any, force: bool) -> None:
        assert force, "a run does not listen to an interrupt"
        self.cancelled += 1


def start(cluster: Pretend, retries: int = 2, stop: bool = False) -> str | None:
    settings = RunSettings(task="rte", output_dir="nowhere")
    event = threading.Event()
    if stop:
        event.set()
    return on_cluster(cluster, cpus=2, gpus=0.5, retries=retries)(settings, event)


def test_a_run_whose_worker_was_lost_is_tried_again() -> None:
    cluster = Pretend(RayError("gone"), RayError("gone"), None)
    assert start(cluster) is None
    assert cluster.ends == []
    assert cluster.options == {"num_cpus": 2, "num_gpus": 0.5, "max_retries": 0}
    assert start(Pretend(RayError(), RayError(), RayError())) == "its worker was lost 3 times, last by RayError"


def test_by_default_a_run_takes_one_cpu_and_is_tried_four_times() -> None:
    cluster = Pretend(*[RayError() for _ in range(5)])
    settings = RunSettings(task="rte", output_dir="nowhere")
    assert on_cluster(cluster)(settings, threading.Event()) == "its worker was lost 4 times, last by RayError"
    assert cluster.options == {"num_cpus": 1.0, "num_gpus": 0.0, "max_retries": 0}


def test_what_a_run_or_a_task_says_is_its_failure_and_is_not_tried_again() -> None:
    cluster = Pretend("ValueError: no luck", None)
    assert start(cluster) == "ValueError: no luck"
    assert cluster.ends == [None]
    error = RayTaskError()
    error.cause = FileNotFoundError("no such\nfolder")
    assert start(Pretend(error)) == "no such folder"
    with pytest.raises(Busy):
        start(Pretend(Busy()))


def test_an_interruption_cancels_the_task() -> None:
    cluster = Pretend("never")
    with pytest.raises(Busy):
        start(cluster, stop=True)
    assert cluster.cancelled == 1


@pytest.mark.parametrize(
    ("cpus", "gpus", "count"), [(1, 0, 16), (2, 0, 8), (1, 0.25, 8), (0, 1, 2), (0.5, 0, 32), (10, 1, 1)]
)
def test_capacity(cpus: float, gpus: float, count: int) -> None:
    assert capacity(SimpleNamespace(cluster_resources=lambda: {"CPU": 16.0, "GPU": 2.0}), cpus, gpus) == count


def test_a_run_that_is_too_large_for_the_cluster_is_told() -> None:
    with pytest.raises(ValueError, match="a run takes 1 CPU and 1 GPU, and the whole cluster has 4 CPU, 0 GPU"):
        capacity(SimpleNamespace(cluster_resources=lambda: {"CPU": 4.0}), 1, 1)


def test_says_which_extra_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match="install the extra 'ray'"):
        connect()


@pytest.mark.parametrize("there", [False, True])
def test_connects_once(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    calls: list[dict[str, Any]] = []
    ray = SimpleNamespace(is_initialized=lambda: there, init=lambda **options: calls.append(options))
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert connect("auto") is ray
    quiet = {"log_to_driver": False, "configure_logging": False}
    assert calls == ([] if there else [{"address": "auto", **quiet}])


def test_waits_while_the_cluster_is_at_it() -> None:
    class Slow(Pretend):
        waits = 3

        def wait(self, tasks: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
            self.waits -= 1
            return ([], tasks) if self.waits else (tasks, [])

    cluster = Slow(None)
    assert start(cluster) is None
    assert (cluster.waits, cluster.cancelled) == (0, 0)


@pytest.mark.parametrize("current", [True, False])
def test_a_worker_does_the_run_of_a_folder_from_where_the_sweep_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, current: bool
) -> None:
    """Where that folder is not there, from where the worker is."""
    settings = RunSettings(task="rte", output_dir=str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    write_settings(settings)
    done: list[tuple[RunSettings, str]] = []

    def in_process(workers: int) -> Callable[[RunSettings, threading.Event], str]:
        def begin(found: RunSettings, stop: threading.Event) -> str:
            done.append((found, os.getcwd()))
            return "no luck"

        return begin

    monkeypatch.setattr("unipelt.sweep.ray_backend.in_process", in_process)
    monkeypatch.chdir(Path(__file__).parent)
    assert _run(str(tmp_path / "run"), str(tmp_path if current else tmp_path / "gone")) == "no luck"
    assert done == [(settings, str(tmp_path if current else Path(__file__).parent))]


def test_the_command_does_a_sweep_on_a_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster: Any = Pretend("ValueError: no luck", "ValueError: no luck")
    cluster.cluster_resources = lambda: {"CPU": 4.0}
    cluster.is_initialized = lambda: True
    monkeypatch.setitem(sys.modules, "ray", cluster)
    (tmp_path / "sweep.yaml").write_text(SWEEP.format(home=tmp_path))
    options = ["sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "out"), "--backend", "ray"]
    assert main([*options, "--cpus", "2"]) == 1
    printed = capsys.readouterr().out
    assert "left      2, 2 at a time" in printed
    assert "2 of 2 runs failed" in printed
    assert cluster.options["num_cpus"] == 2
    assert main([*options, "--workers", "0"]) == 2
    assert "--workers must be 1 or more, not 0" in capsys.readouterr().err


def test_impossible_shares_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--cpus", "0"], ["--gpus", "-1"]):
        assert main(["sweep", "no.yaml", "--out", str(tmp_path), "--backend", "ray", *options]) == 2
        assert "--cpus and --gpus must be 0 or more, and not both 0" in capsys.readouterr().err


def run_processes(folder: Path) -> dict[int, int]:
    """Processes that do runs in a folder, and their parents: Ray's workers."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().decode().split("\0")
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if "unipelt.sweep" in words and any(word.startswith(str(folder)) for word in words):
            found[int(path.name)] = parent
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds a worker to kill by Linux's /proc")
def test_a_real_cluster_goes_on_when_a_worker_is_killed(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    write_glue(tmp_path / "glue")
    (tmp_path / "sweep.yaml").write_text(SWEEP.format(home=tmp_path))
    code = "import sys; from unipelt.cli import main; sys.exit(main(sys.argv[1:]))"
    line = [sys.executable, "-c", code, "sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "out")]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    sweep = subprocess.Popen(
        [*line, "--backend", "ray"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    end = time.monotonic() + 120
    victim: Path | None = None
    while victim is None:
        assert time.monotonic() < end, "no run has a checkpoint"
        assert sweep.poll() is None, sweep.communicate()[0]
        begun = {path.parents[2] for path in (tmp_path / "out").glob("*/checkpoints/*/complete.json")}
        victim = next((folder for folder in begun if not (folder / RESULT).exists() and run_processes(folder)), None)
        time.sleep(0.02)
    (worker,) = run_processes(victim).values()
    os.kill(worker, signal.SIGKILL)
    printed, _ = sweep.communicate(timeout=240)
    print(printed)
    assert sweep.returncode == 0, printed
    assert not list(tmp_path.rglob(FAILURE))
    records = {path.parent: read_result(path) for path in (tmp_path / "out").glob(f"*/{RESULT}")}
    assert len(records) == 2
    assert {folder: record["attempts"] for folder, record in records.items()} == {
        folder: 1 + (folder == victim) for folder in records
    }
    assert "going on from" in (victim / LOG).read_text()
