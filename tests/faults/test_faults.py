"""A full disk, a read-only folder, data that vanish, a loss that is NaN, no memory left: said in one sentence.

What was there stays, and once the cause is gone the same command goes on to what nobody disturbed.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import os
import resource
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import shake, tiny_bert
from safetensors.torch import save_file
from tiny_task import make_quick, quick
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import unipelt
from unipelt.checkpoint.manifest import NEXT, WEIGHTS
from unipelt.cli import main
from unipelt.files import atomic
from unipelt.files.atomic import named_write, write_whole
from unipelt.glue import pack_runs as packed
from unipelt.glue.pack_runs import run_packed
from unipelt.glue.packed_run import PackedRun
from unipelt.glue.run import run
from unipelt.glue.settings import RunSettings
from unipelt.records.record import RESULT, read_result, write_result
from unipelt.runs.errors import RunError, RunFailed
from unipelt.runs.folder import CHECKPOINTS, begin
from unipelt.runs.trainer import BatchTrainer
from unipelt.sweep import FAILURE, LOG, read_sweep, status
from unipelt.sweep import pack_workers as packs
from unipelt.sweep.pack_workers import in_packs

pytestmark = pytest.mark.usefixtures("alone")

CAP_DAC_OVERRIDE = 1
STEP = 6  # of eight: a checkpoint has been written after the fourth


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> Iterator[None]:
    """Trainer collects garbage as it begins, and looking at all that was imported takes longer than a run."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, train.tsv and dev.tsv; and a run that nobody disturbs, in `calm`."""
    folder = make_quick(tmp_path_factory.mktemp("home"))
    run(RunSettings(**settings(folder, folder / "calm")), log=silent)
    return folder


@pytest.fixture
def said(
    run_glue: ModuleType, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """What calls the script with a run into `tmp_path/run`; returns its exit code and what it says went wrong."""

    def call(**changes: Any) -> tuple[int, str]:
        values = settings(home, tmp_path / "run", **changes)
        code = run_glue.main([word for name, value in values.items() for word in (f"--{name}", str(value))])
        error = capsys.readouterr().err
        assert error.count("\n") == (code != 0), "one line, or none"
        assert error.startswith("run_glue.py: ") or code == 0
        return code, error

    return call


def settings(home: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return quick(home, **{"output_dir": str(out), "method": "lora", **changes})


def silent(line: str) -> None:
    pass


def check_as_calm(folder: Path, home: Path, attempts: int) -> None:
    record, calm = read_result(folder), read_result(home / "calm")
    for name in ("evaluations", "best", "dev", "test", "digest"):
        assert record[name] == calm[name]
    weights = (place / "model" / "model.safetensors" for place in (folder, home / "calm"))
    assert len({path.read_bytes() for path in weights}) == 1
    assert record["attempts"] == attempts


def check_kept(folder: Path) -> None:
    """The checkpoint before the fault is there and counts, and nothing is taken for a result."""
    assert [path.parent.name for path in folder.glob(f"{CHECKPOINTS}/*/complete.json")] == ["checkpoint-4"]
    assert not (folder / RESULT).exists()


# In a step


def too_much() -> torch.Tensor:
    return torch.empty(1 << 55)


def raising(error: BaseException) -> Callable[[], torch.Tensor]:
    def step() -> torch.Tensor:
        raise error

    return step


FAULTS: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "NaN": (
        lambda: torch.tensor(float("nan")),
        "the train loss is nan after epoch 2 (step 8, learning_rate 0.01): training has diverged; lower the learning "
        "rate or use float32; the last good checkpoint is kept, and other settings need another output_dir, or "
        "--overwrite",
    ),
    "infinite": (lambda: torch.tensor(float("inf")), "the train loss is nan after epoch 2 (step 8, "),
    "memory": (raising(MemoryError()), "memory ran out; with more of it free the same command goes on from the last "),
    "memory of a GPU": (
        raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")),
        "memory ran out (CUDA out of memory. Tried to allocate 2 GiB.); with more of it free the same command goes on "
        "from the last finished epoch, with less a run needs a smaller batch_size or max_length",
    ),
    "memory of the host": (too_much, "DefaultCPUAllocator: can't allocate memory"),
    "disk": (raising(OSError(28, "No space left on device")), "No space left on device (free some space): "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_step(
    said: Callable[..., tuple[int, str]], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    make, words = FAULTS[fault]
    with monkeypatch.context() as patch:
        at_step(patch, lambda loss: loss * make())
        code, error = said()
    assert code == 1
    assert error.startswith("run_glue.py: the run failed after it had begun: ")
    assert words in error
    check_kept(tmp_path / "run")
    assert said() == (0, "")
    check_as_calm(tmp_path / "run", home, attempts=2)


def at_step(patch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Have the loss of that step changed."""
    compute: Callable[..., Any] = BatchTrainer.compute_loss
    steps = 0

    def loss(trainer: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        found = compute(trainer, model, *args, **kwargs)
        steps += model.training
        return change(found) if model.training and steps == STEP else found

    patch.setattr(BatchTrainer, "compute_loss", loss)


def test_a_mistake_in_the_code_keeps_its_traceback(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(monkeypatch, raising(RuntimeError("mat1 and mat2 shapes cannot be multiplied")))  # type: ignore[arg-type]
    with pytest.raises(Exception, match=r"cannot be multiplied|positional") as caught:
        run(RunSettings(**settings(home, tmp_path / "run")), log=silent)
    assert not isinstance(caught.value, RunFailed)


def test_dev_outputs_that_are_infinite(
    said: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step: Callable[..., Any] = BatchTrainer.prediction_step

    def infinite(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        loss, logits, labels = step(trainer, *args, **kwargs)
        return (loss * float("inf") if trainer.state.global_step == 8 else loss), logits, labels

    monkeypatch.setattr(BatchTrainer, "prediction_step", infinite)
    code, error = said()
    assert code == 1
    assert "the dev loss is inf after epoch 2 (step 8, learning_rate 0.01)" in error
    check_kept(tmp_path / "run")


def test_no_memory_for_the_model(
    said: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unipelt.glue.job.load_model", lambda *args: too_much())
    code, error = said()
    assert code == 2
    assert "memory ran out while data and model were loaded (" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_one_of_a_pack_diverges(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: float) -> None:
    update = PackedRun.update

    def spoil(seat: Any, each: torch.Tensor, index: int) -> None:
        update(seat, torch.full_like(each, loss) if seat.job.settings.seed == 2 else each, index)

    monkeypatch.setattr(PackedRun, "update", spoil)
    runs = [RunSettings(**settings(home, tmp_path / str(seed), seed=seed)) for seed in (1, 2)]
    outcomes = run_packed(runs, places=2, log=silent)
    assert isinstance(outcomes[str(tmp_path / "1")], dict)
    assert f"the train loss is {loss} after epoch 1 (step 4, learning_rate 0.01)" in str(outcomes[str(tmp_path / "2")])


def test_no_memory_for_a_pack(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_step", lambda *args: too_much())
    runs = [RunSettings(**settings(home, tmp_path / str(seed), seed=seed)) for seed in (1, 2)]
    with pytest.raises(RunFailed, match=r"memory ran out while 2 runs trained in one pack \(.*\); pack fewer"):
        run_packed(runs, places=2, log=silent)
    assert not list(tmp_path.rglob(RESULT))


# A full disk


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file can grow above so many bytes: as on a full disk, the system refuses, whoever writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 1_000, 10_000])
def test_a_run_that_cannot_write(said: Callable[..., tuple[int, str]], home: Path, tmp_path: Path, size: int) -> None:
    """What stands in its way, by size: its first file, its weights, and what PyTorch writes of its optimizer."""
    with files_up_to(size):
        code, error = said()
    assert code == (2 if size == 0 else 1)
    assert "File too large (raise the limit" in error or "cannot be written; where the disk is full, free" in error
    assert str(tmp_path / "run") in error
    assert ("optimizer.pt" in error) == (size == 10_000)
    assert ".cc" not in error, "nobody wants to know of a source file of PyTorch's"
    assert ".tmp" not in error, "of a draft, nobody wants to know"
    assert said() == (0, "")
    check_as_calm(tmp_path / "run", home, attempts=1 if size == 0 else 2)


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Callable[[str], None]]:
    """A disk of that size at the folder; yields what makes it larger."""

    def mount(*options: str) -> None:
        done = subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip("a disk can only be mounted by root, and not in every container")

    folder.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("a disk can only be mounted by root")
    mount("-o", f"size={size}")
    try:
        yield lambda size: mount("-o", f"remount,size={size}")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("size", ["12k", "48k", "72k"])
def test_a_run_on_a_full_disk(said: Callable[..., tuple[int, str]], home: Path, tmp_path: Path, size: str) -> None:
    with small_disk(tmp_path / "run", size) as enlarge:
        code, error = said()
        assert code == 1
        assert "No space left on device (free some space): " in error or "cannot be written; where the disk" in error
        assert "free some space" in error
        assert "; the same command goes on from the last finished epoch" in error
        assert str(tmp_path / "run") in error
        assert ".cc" not in error
        assert not (tmp_path / "run" / RESULT).exists()
        enlarge("8m")
        assert said() == (0, "")
        check_as_calm(tmp_path / "run", home, attempts=2)


def test_a_save_on_a_full_device_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = unipelt.inject(tiny_bert(), "lora")
    unipelt.save(model, tmp_path / "saved")
    before = {path: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    shake(model)
    for name in ("model.safetensors.next", "unipelt.json"):
        draft = tmp_path / "saved" / f".{name}.{os.getpid()}.tmp"

        def full(path: Path, mode: str, draft: Path = draft) -> Any:
            return open("/dev/full", "wb") if path == draft else open(path, mode)

        with monkeypatch.context() as patch:
            patch.setattr(atomic, "open", full, raising=False)
            with pytest.raises(OSError, match=r"No space left on device \(free some space\): ") as caught:
                unipelt.save(model, tmp_path / "saved")
        assert str(tmp_path / "saved" / name) in str(caught.value)
        assert {path: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == before
    unipelt.save(model, tmp_path / "saved")
    assert {path: path.read_bytes() for path in before} != before


@pytest.mark.parametrize("writer", ["PyTorch", "safetensors", "tokenizers", "Python"])
def test_another_librarys_failure_to_write_names_the_file(tmp_path: Path, writer: str) -> None:
    tokenizer = Tokenizer(WordLevel({f"word{index}": index for index in range(3_000)}, unk_token="word0"))
    (tmp_path / "older.json").write_text("{}")
    os.utime(tmp_path / "older.json", (1, 1))

    def write_text(path: Path) -> None:
        with open(path, "w") as file:
            file.write("x" * 100_000)

    write: dict[str, tuple[str, Callable[[Path], object]]] = {
        "PyTorch": ("state.pt", lambda path: torch.save(torch.ones(100_000), path)),
        "safetensors": ("*.safetensors", lambda path: save_file({"weight": torch.ones(100_000)}, path)),
        "tokenizers": ("tokenizer.json", lambda path: tokenizer.save(str(path))),
        "Python": ("state.json", write_text),
    }
    name, do = write[writer]
    refused = pytest.raises(OSError, match=r"free some space|raise the limit")
    with files_up_to(5_000), refused as caught, named_write(tmp_path):
        do(tmp_path / name.replace("*", "model"))
    assert str(tmp_path / name) in str(caught.value)
    assert ".cc" not in str(caught.value)


def test_another_error_stays_what_it_is(tmp_path: Path) -> None:
    for error in (ValueError("(os error 2)"), RuntimeError("shapes differ"), FileNotFoundError(2, "not there", "x")):
        with pytest.raises(type(error)) as caught, named_write(tmp_path):
            raise error
        assert caught.value is error


def test_a_file_that_cannot_take_its_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        write_whole(tmp_path / "file", b"text")
    assert str(caught.value) == f"[Errno 21] Is a directory: '{tmp_path / 'file'}'"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# A folder that cannot be written


class _Rights(ctypes.Structure):
    """What a thread may do beyond its user (capabilities(7)); the first 32 of them."""

    _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]


def _ask_for_rights(call: str, rights: ctypes.Array[_Rights]) -> None:
    libc, version_3, this_thread = ctypes.CDLL(None, use_errno=True), 0x20080522, 0
    if getattr(libc, call)((ctypes.c_uint32 * 2)(version_3, this_thread), rights):
        raise OSError(ctypes.get_errno(), f"{call} failed")


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing in the folder can be written, not even by root, who for the time gives up passing over modes."""
    mode, before, now = folder.stat().st_mode, (_Rights * 2)(), (_Rights * 2)()
    for rights in (before, now):
        _ask_for_rights("capget", rights)
    now[0].effective &= ~(1 << CAP_DAC_OVERRIDE)
    folder.chmod(0o555)
    _ask_for_rights("capset", now)
    try:
        yield
    finally:
        _ask_for_rights("capset", before)
        folder.chmod(mode)


def test_a_read_only_folder_of_a_run(said: Callable[..., tuple[int, str]], home: Path, tmp_path: Path) -> None:
    open_folder = tmp_path / "folder"
    open_folder.mkdir()
    for out in (open_folder, open_folder / "new"):
        with read_only(open_folder):
            code, error = said(output_dir=str(out))
        assert code == 2
        assert str(open_folder) in error
        assert "choose another output_dir" in error
        assert not list(open_folder.iterdir())
    assert said(output_dir=str(open_folder / "new")) == (0, "")


def test_a_finished_run_is_read_where_nothing_can_be_written(said: Callable[..., tuple[int, str]], home: Path) -> None:
    with read_only(home / "calm"):
        assert said(output_dir=str(home / "calm")) == (0, "")


def test_a_read_only_folder_of_a_save(tmp_path: Path) -> None:
    model = unipelt.inject(tiny_bert(), "lora")
    unipelt.save(model, tmp_path / "saved")
    before = {path: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    shake(model)
    with read_only(tmp_path / "saved"), pytest.raises(PermissionError) as caught:
        unipelt.save(model, tmp_path / "saved")
    assert str(caught.value).startswith("[Errno 13] Permission denied (make the folder writable again): ")
    assert ".tmp" not in str(caught.value)
    assert {path: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == before


# Data that vanish


@pytest.mark.parametrize("vanishes", ["train.tsv", "dev.tsv", "model"])
def test_data_that_vanish_before_a_run_and_before_it_goes_on(
    said: Callable[..., tuple[int, str]], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vanishes: str
) -> None:
    (home / vanishes).rename(home / "away")
    try:
        code, error = said()
        assert code == 2
        assert str(home / vanishes) in error
        assert not (tmp_path / "run").exists()
    finally:
        (home / "away").rename(home / vanishes)
    with monkeypatch.context() as patch:
        at_step(patch, interrupt)
        assert said_interrupted(said) == 130
    (home / vanishes).rename(home / "away")
    try:
        code, error = said()
        assert code == 2
        assert str(home / vanishes) in error
        check_kept(tmp_path / "run")
    finally:
        (home / "away").rename(home / vanishes)
    assert said() == (0, "")
    check_as_calm(tmp_path / "run", home, attempts=2)


def interrupt(loss: torch.Tensor) -> torch.Tensor:
    raise KeyboardInterrupt


def said_interrupted(said: Callable[..., tuple[int, str]]) -> int:
    with contextlib.suppress(AssertionError):  # what it says then begins with an empty line
        return said()[0]
    return 130


def test_data_that_vanish_while_a_run_trains(
    said: Callable[..., tuple[int, str]], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = ("train.tsv", "dev.tsv", "model")

    def vanish(loss: torch.Tensor) -> torch.Tensor:
        for name in gone:
            (home / name).rename(home / f"away-{name}")
        return loss

    at_step(monkeypatch, vanish)
    try:
        assert said() == (0, "")
    finally:
        for name in gone:
            (home / f"away-{name}").rename(home / name)
    check_as_calm(tmp_path / "run", home, attempts=1)


# What a kill leaves


def test_a_run_that_was_killed_as_it_began_is_no_strangers(home: Path, tmp_path: Path) -> None:
    """It has made the folder of its checkpoints, and not yet said whose it is."""
    chosen = RunSettings(**settings(home, tmp_path))
    (tmp_path / CHECKPOINTS).mkdir()
    (tmp_path / CHECKPOINTS / ".progress.json.123.tmp").write_text("{")
    assert begin(chosen, tmp_path).attempts == 1
    (tmp_path / CHECKPOINTS / "progress.json").unlink()
    (tmp_path / CHECKPOINTS / "precious").touch()
    with pytest.raises(RunError, match="is there and is of no run"):
        begin(chosen, tmp_path)


def test_a_save_after_one_that_was_killed_keeps_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its manifest had named them, and they had not got their name; then there is no space for the next."""
    model = unipelt.inject(tiny_bert(), "lora")
    unipelt.save(model, tmp_path)
    old = (tmp_path / WEIGHTS).read_bytes()
    shake(model)
    unipelt.save(model, tmp_path)
    new = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).rename(tmp_path / NEXT)
    (tmp_path / WEIGHTS).write_bytes(old)
    monkeypatch.setattr("unipelt.checkpoint.save.write_whole", after_the_first(write_whole))
    with pytest.raises(KeyboardInterrupt):
        unipelt.save(unipelt.inject(tiny_bert(seed=1), "lora"), tmp_path)
    unipelt.load(tiny_bert(), tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == new


def after_the_first(write: Callable[..., None]) -> Callable[..., None]:
    calls = iter((write,))

    def call(*args: Any) -> None:
        for first in calls:
            return first(*args)
        raise KeyboardInterrupt

    return call


# Sweeps


SWEEP = """
model: {home}/model
train_file: {home}/train.tsv
dev_file: {home}/dev.tsv
train_samples: 16
dev_samples: 8
grid:
  - {{method: lora, seed: [1, 2]}}
"""


@pytest.fixture
def sweep(home: Path, tmp_path: Path) -> Path:
    path = tmp_path / "sweep.yaml"
    path.write_text(SWEEP.format(home=home))
    return path


def pretend_finished(home: Path, chosen: RunSettings) -> None:
    record = read_result(home / "calm") | {"settings": chosen.to_dict(), "digest": chosen.digest()}
    Path(str(chosen.output_dir)).mkdir(parents=True, exist_ok=True)
    write_result(record, str(chosen.output_dir))


def test_a_folder_in_the_place_of_a_failure(
    home: Path, sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for chosen in status(read_sweep(sweep), out).sweep.runs:
        pretend_finished(home, chosen)
    path = Path(str(chosen.output_dir)) / FAILURE
    path.mkdir()
    assert main(["sweep", str(sweep), "--out", str(out)]) == 2
    assert capsys.readouterr().err == f"unipelt: {path} cannot be removed: a folder; move it away\n"
    path.rmdir()
    assert main(["sweep", str(sweep), "--out", str(out)]) == 0


@pytest.mark.parametrize("size", [0, 2_000])
def test_a_sweep_on_a_full_disk(
    home: Path, sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    """It cannot write what it is asked for, or what it goes on with; a run that had finished stays as it is."""
    out = tmp_path / "out"
    first = status(read_sweep(sweep), out).sweep.runs[0]
    pretend_finished(home, first)
    before = (Path(str(first.output_dir)) / RESULT).read_bytes()
    with files_up_to(size):
        assert main(["sweep", str(sweep), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("unipelt: [Errno 27] File too large (raise the limit on the size of a file (ulimit -f)): ")
    assert error.count("\n") == 1
    assert ".tmp" not in error
    assert not list(out.rglob("*.tmp"))
    assert (Path(str(first.output_dir)) / RESULT).read_bytes() == before


def test_a_pack_that_dies_where_no_log_can_be_written(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dies:
        stdin, stdout = io.StringIO(), iter(['{"folder": "cut off'])
        wait = staticmethod(lambda: -9)
        __enter__ = __exit__ = lambda self, *error: None

    monkeypatch.setattr(packs, "_open", lambda key, *_: packs._Pack(key, Dies(), io.BytesIO()))  # type: ignore[arg-type]
    chosen = RunSettings(**settings(home, tmp_path / "run"))
    (tmp_path / "run" / LOG).mkdir(parents=True)
    with ThreadPoolExecutor(1) as pool:
        stop = threading.Event()
        future = pool.submit(in_packs(1), chosen, stop)
        try:
            assert "the pack was killed by SIGKILL" in str(future.result(10))
        finally:
            stop.set()
