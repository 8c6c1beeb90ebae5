"""Sweeps whose runs share processes: who is told of which run, and what a process that dies takes with it."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tiny_task import save_model, write_glue

from unipelt.cli import main
from unipelt.glue.settings import RunSettings
from unipelt.records.record import RESULT, read_result
from unipelt.runs.folder import locked
from unipelt.sweep import FAILURE, LOG, SETTINGS, Busy, read_sweep, run_folder
from unipelt.sweep import pack_workers as packs
from unipelt.sweep.pack_workers import by_pack, in_packs

pytestmark = pytest.mark.usefixtures("alone")

SWEEP = """
model: {home}/model
glue_dir: {home}/glue
dev_samples: 8
epochs: {epochs}
patience: null
max_length: 16
threads: 1
device: cpu
grid:
  - task: [rte, SST-2]
    method: lora
    seed: [1, 2]
    train_samples: 16
"""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "_PAUSE", 0.05)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    save_model(folder / "model")
    write_glue(folder / "glue")
    return folder


def write_sweep(home: Path, path: Path, epochs: int = 2, more: str = "") -> Path:
    path.write_text(SWEEP.format(home=home, epochs=epochs) + more)
    return path


@pytest.mark.slow
def test_runs_share_a_process(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = write_sweep(home, tmp_path / "sweep.yaml"), tmp_path / "out"
    assert main(["sweep", str(file), "--out", str(out), "--pack", "3"]) == 0
    folders = [run_folder(out, settings) for settings in read_sweep(file).runs]
    assert len(folders) == 4
    for folder in folders:
        assert read_result(folder)["packed"] == {"places": 3}
        assert "epoch   2" in (folder / LOG).read_text()
        assert not (folder / FAILURE).exists()
    assert "left      4, 3 at a time" in capsys.readouterr().out
    assert main(["sweep", str(file), "--out", str(out)]) == 0
    assert "finished  4" in capsys.readouterr().out


@pytest.mark.slow
def test_a_model_that_cannot_be_packed(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_sweep(home, tmp_path / "sweep.yaml")
    mean = "{preset: unipelt-apl, gate: {pooling: mean}}"
    file.write_text(file.read_text().replace("method: lora", f"method: [{mean}]"))
    assert main(["sweep", str(file), "--out", str(tmp_path / "out"), "--pack", "2", "--tasks", "rte"]) == 1
    assert "PackError: gates with pooling 'mean' average over padding" in capsys.readouterr().out


def test_bad_places(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_sweep(home, tmp_path / "sweep.yaml")
    for options in (["--pack", "0"], ["--pack", "2", "--backend", "ray"]):
        assert main(["sweep", str(file), "--out", str(tmp_path / "out"), *options]) == 2
        assert "--pack must be 1 or more" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_runs_of_a_pack_stand_side_by_side(home: Path, tmp_path: Path) -> None:
    more = "  - task: [rte, stsb]\n    method: [bitfit, lora]\n    seed: 3\n    train_samples: 16\n"
    sweep = by_pack(read_sweep(write_sweep(home, tmp_path / "sweep.yaml", more=more)))
    kinds = [(settings.method_name, settings.task == "stsb") for settings in sweep.runs]
    assert len(kinds) == 8
    assert kinds[:5] == [("lora", False)] * 5
    assert sorted(kinds[5:]) == [("bitfit", False), ("bitfit", True), ("lora", True)]


def prepared(home: Path, out: Path, count: int, epochs: int) -> list[RunSettings]:
    """Runs whose folders hold their settings, as `carry_out` leaves them to whoever starts them."""
    runs = []
    for seed in range(count):
        values: dict[str, Any] = {"task": "rte", "method": "lora", "seed": seed, "epochs": epochs, "patience": None}
        values |= {"model": str(home / "model"), "glue_dir": str(home / "glue"), "train_samples": 16, "dev_samples": 8}
        values |= {"max_length": 16, "threads": 1, "device": "cpu", "output_dir": str(out / str(seed))}
        settings = RunSettings(**values)
        (out / str(seed)).mkdir(parents=True)
        (out / str(seed) / SETTINGS).write_text(json.dumps(settings.to_dict()))
        runs.append(settings)
    return runs


def wait_for(text: str, path: Path) -> None:
    until = time.monotonic() + 60
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < until, f"{path} never said {text!r}"
        time.sleep(0.05)


def children() -> set[int]:
    """Processes of packs that this one has started."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = path.read_text().rpartition(")")[2].split()
            command = path.with_name("cmdline").read_bytes()
        except OSError:
            continue
        if int(words[1]) == os.getpid() and b"unipelt.sweep.pack_workers" in command:
            found.add(int(path.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_process_that_dies_fails_its_runs(home: Path, tmp_path: Path) -> None:
    runs, start, stop = prepared(home, tmp_path, 2, epochs=5000), in_packs(2), threading.Event()
    before = children()  # an earlier test's pack waits a while for more before it ends
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(start, settings, stop) for settings in runs]
        for settings in runs:
            wait_for("epoch   1", Path(str(settings.output_dir)) / LOG)
        (child,) = children() - before
        os.kill(child, signal.SIGKILL)
        for future in futures:
            assert future.result(60) == (
                "the pack was killed by SIGKILL (for want of memory? --pack fewer), with 2 runs in it"
            )
    for settings in runs:
        with locked(Path(str(settings.output_dir))):
            assert not (Path(str(settings.output_dir)) / RESULT).exists()


@pytest.mark.slow
def test_gives_up_when_told_to(home: Path, tmp_path: Path) -> None:
    runs, start, stop = prepared(home, tmp_path, 3, epochs=5000), in_packs(2), threading.Event()
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(start, settings, stop) for settings in runs]
        until = time.monotonic() + 60
        while sum((tmp_path / str(seed) / LOG).exists() for seed in range(3)) < 2:
            assert time.monotonic() < until
            time.sleep(0.05)
        stop.set()
        for future in futures:  # the third waits for a place
            with pytest.raises(Busy):
                future.result(60)


@pytest.mark.slow
def test_a_run_that_another_process_does(home: Path, tmp_path: Path) -> None:
    (settings,) = prepared(home, tmp_path, 1, epochs=1)
    with locked(tmp_path / "0"), pytest.raises(Busy):
        in_packs(2)(settings, threading.Event())
