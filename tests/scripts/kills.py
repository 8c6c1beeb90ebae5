"""Kill saves, runs and sweeps with SIGKILL at random moments, until they end: `python kills.py FOLDER SEED NAME…`.

Every process is forked from this one, which imports the libraries once and never uses a thread itself. The script
writes `report.json`: by scenario, the number of killed processes, and the problem that was found, if any.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch
from safetensors.torch import load_file
from tiny_task import SMALL_BERT, make_quick, quick

import unipelt
from scripts.crashes import copy, fill, found_record, silent, tiny_model, version_in
from unipelt.checkpoint.manifest import WEIGHTS
from unipelt.cli import main as command
from unipelt.glue import pack_runs as packed
from unipelt.glue.run import run
from unipelt.glue.settings import RunSettings
from unipelt.records.record import RESULT, read_result
from unipelt.runs import training
from unipelt.sweep import pack_workers as packs
from unipelt.sweep import run_server, serve_runs
from unipelt.sweep import workers as work

SAVES, RUNS, SWEEPS, PACKS = 30, 12, 7, 7
"""The smallest numbers of killed processes.

A process that ends before its kill does not count, and another one is started.
"""


class Process:
    """A process forked from this one, which reports its start.

    Args:
        act: the action of the process. Its argument is a function that sends a line to this process.
    """

    def __init__(self, act: Callable[[Callable[[str], None]], object]) -> None:
        read, write = os.pipe()
        self.said = b""
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.close(read)
                os.setpgid(0, 0)
                with os.fdopen(write, "w", buffering=1) as pipe:
                    act(lambda line: print(line, file=pipe))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(write)
        self.read = read

    def end(self, seconds: float | None) -> bool:
        """Kill the process `seconds` after its first line, or wait for its end.

        Return whether the process was killed.
        """
        if seconds is not None:
            self.said += os.read(self.read, 1 << 16)
            time.sleep(seconds)
            os.kill(self.pid, signal.SIGKILL)
        status = os.waitpid(self.pid, 0)[1]
        while block := os.read(self.read, 1 << 16):
            self.said += block
        os.close(self.read)
        assert status in (0, signal.SIGKILL), f"it failed by itself, with {status}"
        return status == signal.SIGKILL


# Saves


def saves(home: Path, chance: random.Random) -> int:
    """Kill a process that saves version after version. After every kill, the last version or the next one is whole."""
    model, base, folder = unipelt.inject(tiny_model(), "unipelt-apl"), tiny_model(), home / "folder"
    unipelt.save(fill(model, 1), folder)
    there, kills, new = 1, 0, set[bool]()

    def loop(log: Callable[[str], None]) -> None:
        version = there
        while True:
            log(str(version))
            version += 1
            unipelt.save(fill(model, version), folder)

    while kills < SAVES or len(new) < 2:
        process = Process(loop)
        kills += process.end(chance.uniform(0.0, 0.15))
        last = int(process.said.split()[-1])
        found = version_in(base, folder)
        assert found in (last, last + 1), f"{found} is there, and {last} had been saved"
        new.add(found == last)
        assert kills < 10 * SAVES, f"of every kill, the same was there: {new}"
        there = found
    return kills


# Runs


def runs(home: Path, chance: random.Random) -> int:
    """Kill chains of runs, each in one folder. Every chain ends like the run that nobody disturbed."""
    kills = 0
    whole: dict[str, float] = {}
    for number in range(100):
        method, keep = (("unipelt-apl", True), ("lora", False))[number % 2]
        if kills >= RUNS:
            break
        settings, calm = (
            RunSettings(
                **quick(home.parent, epochs=6, patience=2, method=method, keep_checkpoints=keep, output_dir=str(out))
            )
            for out in (home / f"chain-{number}", home / f"calm-{number % 2}")
        )
        if number < 2:
            begun = time.monotonic()
            Process(run_it(calm)).end(None)
            whole[method] = time.monotonic() - begun
        folder = home / f"chain-{number}"
        for delay in delays(chance, whole[method]):
            kills += Process(run_it(settings)).end(delay)
            check_pieces(folder)
            if (folder / RESULT).exists():
                break
        finished = (folder / RESULT).read_bytes()
        kills += Process(run_it(settings)).end(chance.uniform(0.0, 0.01))
        Process(run_it(settings)).end(None)
        assert (folder / RESULT).read_bytes() == finished, "a finished run was repeated"
        check_same(folder, home / f"calm-{number % 2}")
    return kills


def delays(chance: random.Random, whole: float) -> Iterator[float]:
    """Yield the seconds until each kill: at first within the time of a whole run, then more, for a slower machine."""
    for attempt in count():
        yield chance.uniform(0.0, whole * (1 + attempt / 4))


def run_it(settings: RunSettings) -> Callable[[Callable[[str], None]], object]:
    def act(log: Callable[[str], None]) -> None:
        log("begun")
        run(settings, log=silent)

    return act


def check_pieces(folder: Path) -> None:
    """Check that every file that is marked as whole is whole."""
    found_record(folder)
    for marker in folder.glob("checkpoints/*/complete.json"):
        json.loads(marker.read_text())
        weights = marker.with_name(WEIGHTS)
        load_file(weights if weights.exists() else marker.with_name("pack.safetensors"))
        json.loads(marker.with_name("trainer_state.json").read_text())


def check_same(folder: Path, calm: Path) -> None:
    """Check that two runs have the same outcome, bit for bit."""
    names = ("evaluations", "best", "dev", "test", "gates", "majority", "data", "parameters", "digest", "files")
    ours, theirs = read_result(folder), read_result(calm)
    assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}
    for file in (WEIGHTS, "unipelt.json"):
        assert (folder / "model" / file).read_bytes() == (calm / "model" / file).read_bytes()


def check_close(folder: Path, calm: Path) -> None:
    """Check that two runs have the same outcome except for rounding.

    After a kill, a run can have other neighbours in its pack, which changes the rounding.
    """
    ours, theirs = read_result(folder), read_result(calm)
    for name in ("best", "majority", "data", "parameters", "digest", "files"):
        assert ours[name] == theirs[name], name
    pairs = [(ours[name], theirs[name]) for name in ("dev", "test")]
    pairs += zip(ours["evaluations"], theirs["evaluations"], strict=True)
    for one, other in pairs:
        assert one["metrics"] == other["metrics"]
        for name in one.keys() & {"loss", "train_loss"}:
            assert math.isclose(one[name], other[name], rel_tol=1e-5), f"{name}: {one[name]} and {other[name]}"
    weights, expected = (load_file(place / "model" / WEIGHTS) for place in (folder, calm))
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=2e-5, msg=name)


# Sweeps


class Forked:
    """A replacement of `subprocess.Popen` that forks, and calls the function of `python -m MODULE ARGUMENT`."""

    tell: Callable[[str], None] = staticmethod(silent)  # takes the id of each process

    def __init__(
        self,
        line: list[str],
        stdin: int,
        stdout: Any,
        stderr: Any,
        env: dict[str, str],
        text: bool = False,
        start_new_session: bool = False,
    ) -> None:
        (module, *arguments), mode = line[2:], "" if text else "b"
        into, stdin_end = os.pipe()
        out_end, out = os.pipe() if stdout == subprocess.PIPE else (None, stdout.fileno())
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.setsid()
                for number, file in enumerate((into, out, out if stderr == subprocess.STDOUT else stderr.fileno())):
                    os.dup2(file, number)
                os.closerange(3, 1000)  # a new program would not hold the locks and pipes of this process
                sys.stdin = os.fdopen(0)
                sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
                code = packs._main(int(arguments[0])) if module == packs.__name__ else serve_runs.main()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        self.tell(str(self.pid))
        os.close(into)
        self.stdin: IO[Any] = os.fdopen(stdin_end, f"w{mode}")
        self.stdout: IO[Any] | None = None
        if out_end is not None:
            os.close(out)
            self.stdout = os.fdopen(out_end, f"r{mode}")
        self.code: int | None = None

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.code

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while self.code is None:
            pid, status = os.waitpid(self.pid, 0 if end is None else os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired("forked", timeout or 0.0)
            else:
                time.sleep(0.01)
        return self.code

    def kill(self) -> None:
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *error: object) -> None:
        self.wait()
        for file in (self.stdin, self.stdout):
            if file is not None:
                file.close()


SWEEP = """
model: {home}/still
train_file: {home}/train.tsv
dev_file: {home}/dev.tsv
train_samples: 48
dev_samples: 24
epochs: 3
patience: null
batch_size: 12
learning_rate: 1e-2
max_length: 16
threads: 1
device: cpu
grid:
  - {{method: lora, seed: [1, 2, 3]}}
"""


def sweeps(home: Path, chance: random.Random) -> int:
    """Kill the process of a sweep, or of one of its runs. A killed run is a failure that is tried again."""
    return _sweeps(home, chance, SWEEPS, [])


def sweeps_in_packs(home: Path, chance: random.Random) -> int:
    """Do the same as `sweeps`, with a process that does two runs at a time.

    Other neighbours in a pack change the rounding.
    """
    return _sweeps(home, chance, PACKS, ["--pack", "2"])


def _sweeps(home: Path, chance: random.Random, least: int, options: list[str]) -> int:
    calm, kills = home / "calm", 0
    begun = time.monotonic()
    Process(sweep_it(home, calm, options)).end(None)
    whole = time.monotonic() - begun
    assert len(list(calm.glob(f"*/{RESULT}"))) == 3
    for number in range(100):
        if kills >= least:
            break
        out = home / f"chain-{number}"
        finished: dict[Path, bytes] = {}
        for delay in delays(chance, whole):
            process = Process(sweep_it(home, out, options))
            kills += kill_below(process, out, delay / 3) if chance.random() < 0.3 else process.end(delay)
            for path, content in finished.items():
                assert path.read_bytes() == content, "a finished run was repeated"
            for folder in out.glob("*-*"):
                check_pieces(folder)
            finished |= {path: path.read_bytes() for path in out.glob(f"*/{RESULT}")}
            if len(finished) == 3:
                break
        Process(sweep_it(home, out, options)).end(None)
        for path, content in finished.items():
            assert path.read_bytes() == content, "a finished run was repeated"
            (check_close if options else check_same)(path.parent, calm / path.parent.name)
        assert not [*out.rglob("failure.json"), *out.rglob("*.tmp"), *out.glob("*/checkpoints")]
    return kills


def kill_below(process: Process, out: Path, seconds: float) -> int:
    """Kill the first process that a sweep has started, and wait for the sweep.

    Return whether the sweep reports the kill.
    """
    while len(words := process.said.split()) < 2:  # the word "begun", and the id of a process
        if not (more := os.read(process.read, 1 << 16)):
            break
        process.said += more
    if len(words) > 1:
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):  # the process has already ended
            os.kill(int(words[1]), signal.SIGKILL)
    process.end(None)
    return int(any("SIGKILL" in json.loads(path.read_text())["error"] for path in out.glob("*/failure.json")))


def sweep_it(home: Path, out: Path, options: list[str]) -> Callable[[Callable[[str], None]], object]:
    def act(log: Callable[[str], None]) -> None:
        log("begun")
        Forked.tell = staticmethod(log)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            code = command(["sweep", str(home.parent / "sweep.yaml"), "--out", str(out), *options])
        assert code in (0, 1)

    return act


def stand_ins() -> None:
    """Replace new processes by forked ones, and long pauses by short ones."""
    for module in (run_server, packs):
        setattr(module, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": Forked}))  # noqa: B010
    for module in (work, packs):
        setattr(module, "_PAUSE", 0.05)  # noqa: B010
    packs.IDLE_SECONDS = 0.2
    packed.CHECKPOINT_SECONDS = 0.0
    training.describe_code = lambda: {"commit": None, "dirty": None}  # the real function starts git in a process


def main(folder: Path, seed: int, names: list[str]) -> None:
    """Do the scenarios with these names, and write `report.json`."""
    torch.set_num_threads(1)
    make_quick(folder)
    copy(folder / "model", folder / "still")  # without dropout, because the runs of a pack share its random numbers
    config = SMALL_BERT.to_dict() | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "still" / "config.json").write_text(json.dumps(config))
    (folder / "sweep.yaml").write_text(SWEEP.format(home=folder))
    stand_ins()
    setattr(os, "fsync", lambda file: None)  # noqa: B010  (no file here must survive a power failure)
    gc.freeze()  # the garbage collector would take most of the time to check the imported objects
    report: dict[str, dict[str, Any]] = {}
    for scenario in [one for one in (saves, runs, sweeps, sweeps_in_packs) if one.__name__ in names]:
        home = folder / scenario.__name__
        home.mkdir()
        try:
            report[scenario.__name__] = {"kills": scenario(home, random.Random(seed)), "problem": None}
        except Exception:
            report[scenario.__name__] = {"kills": 0, "problem": traceback.format_exc()}
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
