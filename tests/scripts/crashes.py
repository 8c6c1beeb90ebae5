"""Kill programs that write files, before each of their file operations in turn: `python crashes.py FOLDER NAME…`.

Every attempt is its own process, forked before any thread is used. The process kills itself with SIGKILL. The script
writes `report.json`: by scenario, the number of killed attempts, and the problem that was found, if any.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import re
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from tiny_task import make_quick, quick
from transformers import BertConfig, BertForSequenceClassification, TrainerState

import unipelt
from unipelt.checkpoint.manifest import CheckpointError
from unipelt.glue import run as running
from unipelt.glue.job import prepare
from unipelt.glue.run import run
from unipelt.glue.settings import RunSettings
from unipelt.injection.parameters import kept_names
from unipelt.records.record import RESULT, ResultError, read_result, write_result
from unipelt.runs import training
from unipelt.runs.folder import CHECKPOINTS
from unipelt.runs.trainer import BatchTrainer
from unipelt.sweep import FAILURE, REQUEST, carry_out, read_request, read_sweep, status, write_request

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")  # names of audit events; functions may have other names
NOT_KILLED = 0


def die_at(operation: int) -> None:
    """Make this process kill itself before its change number `operation` to files.

    At an fsync of a written file, half of the file is lost.
    """
    done = 0

    def step() -> bool:
        nonlocal done
        done += 1
        return done == operation

    def audit(event: str, args: tuple[Any, ...]) -> None:
        opened = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (opened or event in CHANGES) and step():
            os.kill(os.getpid(), signal.SIGKILL)

    def fsync(file: int) -> None:  # the test needs the time of a sync, not the sync
        if step():
            if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY:
                os.ftruncate(file, os.fstat(file).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, "fsync", fsync)  # noqa: B010
    sys.addaudithook(audit)


def attempt(act: Callable[[], object], operation: int | None = None) -> bool:
    """Do `act` in its own process, which kills itself at `operation`. Return whether the process was killed.

    Any other failure of the process is an error.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            die_at(operation or -1)
            act()
            code = NOT_KILLED
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert status in (NOT_KILLED, signal.SIGKILL), f"operation {operation}: it failed by itself"
    return status == signal.SIGKILL


def crash_points(
    act: Callable[[], object], before: Callable[[], None], after: Callable[[bool], None], most: int = 500
) -> int:
    """Do `act` once for each operation, each time from the start, until `act` ends without a kill.

    Args:
        act: the action, which is done in its own processes.
        before: prepares the files with which the action starts.
        after: checks the files that are left. Its argument is whether the process was killed.
        most: the largest number of operations, if only the first ones matter.

    Returns:
        The number of processes that were killed.
    """
    for operation in range(1, most + 1):
        before()
        killed = attempt(act, operation)
        try:
            after(killed)
        except Exception as error:
            raise AssertionError(f"operation {operation}: {error}") from error
        if not killed:
            return operation - 1
    return most


# Saving a model


def tiny_model() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 8, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = BertConfig(**sizes, intermediate_size=4, max_position_embeddings=4)
    return BertForSequenceClassification(config)


def fill(model: Any, version: int) -> Any:
    """Set every saved parameter of a model to the number of a version."""
    kept = set(kept_names(model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in kept:
                parameter.fill_(version)
    return model


def version_in(base: Any, folder: Path) -> int | None:
    """Return the version of a whole checkpoint, or None if there is no checkpoint.

    A mixture of versions is an error.
    """
    try:
        model = unipelt.load(base, folder)
    except (FileNotFoundError, CheckpointError):
        return None
    kept = set(kept_names(model))
    values = {value for name, tensor in model.named_parameters() if name in kept for value in tensor.flatten().tolist()}
    unipelt.remove(model)
    assert len(values) == 1, f"what is loaded is of several versions: {values}"
    return int(values.pop())


def a_save(home: Path) -> int:
    """Kill two saves in a row over an older version, at every operation of each; then do a third save.

    After each kill, the folder holds a whole version: the version from before, or the new one. If several first kills
    leave the same files, only one of them is followed by second kills.
    """
    model, base = unipelt.inject(tiny_model(), "lora"), tiny_model()
    start, between, folder = home / "start", home / "between", home / "folder"
    unipelt.save(fill(model, 1), start)

    def save(version: int) -> Callable[[], object]:
        return lambda: unipelt.save(fill(model, version), folder)

    kills, seen = 0, set[str]()
    for first in count(1):
        copy(start, folder)
        if not attempt(save(2), first):
            break
        kills += 1
        there = version_in(base, folder)
        assert there in (1, 2), f"after operation {first}: {there}"
        if (state := state_of(folder)) in seen:
            continue
        seen.add(state)
        copy(folder, between)

        def after(killed: bool, first: int = first, there: int | None = there) -> None:
            found = version_in(base, folder)
            assert found in ((there, 3) if killed else (3,)), f"{first}: {found}, where {there} was"
            unipelt.save(fill(model, 4), folder)
            assert version_in(base, folder) == 4
            assert {path.name for path in folder.iterdir() if path.suffix != ".tmp"} == {
                *("README.md", "model.safetensors", "unipelt.json")
            }

        kills += crash_points(save(3), lambda: copy(between, folder), after)
    return kills


def a_first_save(home: Path) -> int:
    """Kill a first save at every operation. After the kill, the folder holds the whole version or none."""
    model, base, folder = unipelt.inject(tiny_model(), "lora"), tiny_model(), home / "folder"

    def after(killed: bool) -> None:
        found = version_in(base, folder)
        assert found in ((None, 1) if killed else (1,))
        assert found == 1 or not base_is_injected(base)
        unipelt.save(fill(model, 2), folder)
        assert version_in(base, folder) == 2

    return crash_points(lambda: unipelt.save(fill(model, 1), folder), lambda: clear(folder), after)


def state_of(folder: Path) -> str:
    """Return the names of a folder's files, without process numbers, and their contents."""
    files = ((re.sub(r"\d+", "", path.name), path.read_bytes().hex()) for path in folder.iterdir())
    return str(sorted(files))


def base_is_injected(base: Any) -> bool:
    return getattr(base, "unipelt_injection", None) is not None


def copy(folder: Path, to: Path) -> None:
    clear(to)
    shutil.copytree(folder, to)


def clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


# Records


def a_record(home: Path) -> int:
    """Kill the writing of a record.

    After the kill, the folder holds the old record, if there was one, or the new one.
    """
    old = json.loads((home.parent / "record.json").read_text())
    new = old | {"attempts": 7}
    folder = home / "folder"
    kills = 0
    for earlier in (None, old):

        def before(earlier: Any = earlier) -> None:
            clear(folder)
            folder.mkdir()
            if earlier is not None:
                write_result(earlier, folder)

        def after(killed: bool, earlier: Any = earlier) -> None:
            assert found_record(folder) in ((earlier, new) if killed else (new,))

        kills += crash_points(lambda: write_result(new, folder), before, after)
    return kills


def found_record(folder: Path) -> dict[str, Any] | None:
    try:
        return read_result(folder)
    except FileNotFoundError:
        return None
    except ResultError as error:
        raise AssertionError("half a result is taken for one") from error


# A run without its training

EPOCHS, BEST = 3, 2
METRICS = ("accuracy", "f1", "matthews_correlation")


def pretend(trainer: Any, resume_from_checkpoint: str | None = None) -> None:
    """Run in place of `Trainer.train`: each epoch leaves a checkpoint, and the weights are the number of the epoch."""
    begun = 0
    if resume_from_checkpoint is not None:
        checkpoint = Path(resume_from_checkpoint)
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        begun = trainer.state.global_step
        assert version_in(tiny_base(trainer.model), checkpoint) == begun, "half a checkpoint was taken for a whole one"
        assert (checkpoint / "optimizer.pt").read_bytes() == OPTIMIZER
    for epoch in range(begun + 1, EPOCHS + 1):
        fill(trainer.model, epoch)
        at = {"epoch": float(epoch), "step": epoch}
        score = {"eval_loss": 0.5, **{f"eval_{name}": 0.9 if epoch == BEST else 0.5 for name in METRICS}}
        trainer.state.log_history += [{"loss": 1 / epoch, **at}, {**score, **at}]
        trainer.state.epoch, trainer.state.global_step = float(epoch), epoch
        trainer.state.best_global_step = min(epoch, BEST)
        trainer.control.should_training_stop = epoch == EPOCHS
        checkpoint = Path(trainer.args.output_dir) / f"checkpoint-{epoch}"
        unipelt.save(trainer.model, checkpoint)
        (checkpoint / "optimizer.pt").write_bytes(OPTIMIZER)
        trainer.state.save_to_json(str(checkpoint / "trainer_state.json"))
        trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)


OPTIMIZER = bytes(range(100))
_BASES: list[Any] = []


def tiny_base(model: Any) -> Any:
    """Return the model's base, without the injected parts."""
    if not _BASES:
        _BASES.append(type(model).from_pretrained(model.name_or_path, num_labels=2))
    return _BASES[0]


def a_run(home: Path) -> int:
    """Kill a run at every file operation. The next start continues the run and ends like an undisturbed run.

    A finished run is not repeated.
    """
    settings, folder = pretended(home)
    run(settings, log=silent)
    expected, weights = outcome(folder), (folder / "model" / "model.safetensors").read_bytes()
    names = {".lock", RESULT, "model"}
    assert {path.name for path in folder.iterdir()} == names

    def after(killed: bool) -> None:
        result = folder / RESULT
        before = result.read_bytes() if result.exists() else None
        run(settings, log=silent)
        assert before in (None, result.read_bytes()), "a finished run was repeated"
        assert outcome(folder) == expected
        assert (folder / "model" / "model.safetensors").read_bytes() == weights
        assert {path.name for path in folder.iterdir()} == names
        assert read_result(folder)["attempts"] <= 2

    return crash_points(lambda: run(settings, log=silent), lambda: clear(folder), after)


def a_run_over_another(home: Path) -> int:
    """Kill a run that replaces another.

    The earlier result stays, or the folder has no result until the new one is written.
    """
    earlier, folder = pretended(home)
    later = replace(earlier, overwrite=True, warmup_ratio=0.5, keep_checkpoints=True)
    run(replace(earlier, keep_checkpoints=True), log=silent)
    old = read_result(folder)
    start = home / "start"
    copy(folder, start)

    def after(killed: bool) -> None:
        there = found_record(folder)
        assert there == old or there is None or there["digest"] == later.digest()
        assert (there is not None and there["digest"] == later.digest()) or killed
        run(later, log=silent)
        assert read_result(folder)["digest"] == later.digest()
        kept = {path.name for path in (folder / CHECKPOINTS).glob("checkpoint-*")}
        assert kept == {f"checkpoint-{BEST}", f"checkpoint-{EPOCHS}"}

    return crash_points(lambda: run(later, log=silent), lambda: copy(start, folder), after, most=40)


def pretended(home: Path) -> tuple[RunSettings, Path]:
    """Return settings and folder of a run that only pretends to train.

    Its data and model are loaded once for all processes.
    """
    folder = home / "run"
    settings = RunSettings(**quick(home.parent, output_dir=str(folder), method="lora"))
    job = prepare(settings)
    tiny_base(job.model)
    test = {"loss": 0.5, "metrics": dict.fromkeys(METRICS, 0.5)}
    for module, name, stand_in in (
        (running, "prepare", lambda chosen: replace(job, settings=chosen, digest=chosen.digest())),
        (running, "_test", lambda trainer, job: (test, {})),
        # the real function starts git in a process
        (training, "describe_code", lambda: {"commit": None, "dirty": None}),
    ):
        assert hasattr(module, name)
        setattr(module, name, stand_in)
    BatchTrainer.train = pretend  # type: ignore[assignment]
    return settings, folder


def outcome(folder: Path) -> dict[str, Any]:
    record = read_result(folder)
    return {name: record[name] for name in ("evaluations", "best", "dev", "test", "digest", "parameters", "files")}


# A sweep whose runs only write a record

SWEEP = """
model: {home}/model
train_file: {home}/train.tsv
dev_file: {home}/dev.tsv
train_samples: 16
dev_samples: 8
grid:
  - {{method: lora, seed: [1, 2]}}
"""


def a_sweep(home: Path) -> int:
    """Kill a sweep of two runs, one of which fails at first. All runs finish, and no finished run starts again."""
    sweep, out = read_sweep(home.parent / "sweep.yaml"), home / "out"
    record = json.loads((home.parent / "record.json").read_text())

    def start(settings: RunSettings, stop: threading.Event) -> str | None:
        folder = Path(str(settings.output_dir))
        with open(out / "starts.txt", "a") as file:
            file.write(f"{folder.name}\n")
        if settings.seed == 2 and (out / "starts.txt").read_text().count(folder.name) == 1:
            return "made to fail"
        write_result(record | {"settings": settings.to_dict(), "digest": settings.digest()}, folder)
        (folder / CHECKPOINTS).mkdir(exist_ok=True)
        return None

    def act() -> None:
        write_request(sweep, out)
        for _ in range(3):  # the second call repeats failed runs, and the third one removes their files
            carry_out(status(sweep, out), start, log=silent)

    def before() -> None:
        clear(out)
        out.mkdir()
        (out / "starts.txt").touch()

    def after(killed: bool) -> None:
        results = {path: path.read_bytes() for path in out.glob(f"*/{RESULT}")}
        starts = (out / "starts.txt").read_text().split()
        act()
        assert len(list(out.glob(f"*/{RESULT}"))) == 2
        assert {path: path.read_bytes() for path in results} == results
        new = (out / "starts.txt").read_text().split()[len(starts) :]
        assert not {path.parent.name for path in results} & set(new), "a finished run was started again"
        assert not [*out.rglob("*.tmp"), *out.rglob(FAILURE), *out.rglob(CHECKPOINTS)]
        request = read_request(out)
        assert request is not None
        assert len(request["runs"]) == 2
        assert (out / REQUEST).is_file()

    return crash_points(act, before, after)


def silent(line: str) -> None:
    pass


SCENARIOS = (a_first_save, a_save, a_record, a_sweep, a_run, a_run_over_another)


def main(folder: Path, names: list[str]) -> None:
    """Do the scenarios with these names, and write `report.json`."""
    torch.set_num_threads(1)
    make_quick(folder)
    settings = RunSettings(**quick(folder, output_dir=str(folder / "first"), method="lora", epochs=1))
    attempt(lambda: (folder / "record.json").write_text(json.dumps(run(settings, log=silent))))
    (folder / "sweep.yaml").write_text(SWEEP.format(home=folder))
    setattr(os, "fsync", lambda file: None)  # noqa: B010  (no file here must survive a power failure)
    gc.freeze()  # the garbage collector would take most of the time to check the imported objects
    report: dict[str, dict[str, Any]] = {}
    for scenario in [scenario for scenario in SCENARIOS if scenario.__name__ in names]:
        home = folder / scenario.__name__
        home.mkdir()
        try:
            report[scenario.__name__] = {"kills": scenario(home), "problem": None}
        except Exception:
            report[scenario.__name__] = {"kills": 0, "problem": traceback.format_exc()}
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
