"""Runs that share a pack: each ends as by itself, goes on after a kill, and fails alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_task import make_quick, quick, write_glue

from unipelt.glue import pack_runs as packed
from unipelt.glue import packed_run as seat
from unipelt.glue.pack_runs import pack_key, run_packed
from unipelt.glue.packed_run import PackedRun
from unipelt.glue.run import run
from unipelt.glue.settings import RunSettings
from unipelt.records.record import read_result, write_result
from unipelt.runs.errors import RunError
from unipelt.runs.folder import CHECKPOINTS, locked

pytestmark = pytest.mark.usefixtures("alone")

RUNS: tuple[dict[str, Any], ...] = (
    {"seed": 1, "patience": 1},
    {"seed": 2, "train_samples": 31, "learning_rate": 3e-3, "warmup_ratio": 0.3},
    {"seed": 3, "data_seed": 1, "dev_samples": 18, "weight_decay": 0.1, "max_grad_norm": 0.1},
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.tsv, dev.tsv and a model without dropout."""
    return make_quick(tmp_path_factory.mktemp("home"), dropout=False)


def settings(home: Path, out: Path, **changes: Any) -> RunSettings:
    return RunSettings(**quick(home, output_dir=str(out), **{"epochs": 3, **changes}))


def quiet(line: str) -> None:
    """No line."""


@pytest.fixture(scope="module")
def alone(home: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The records of runs by themselves."""
    out = tmp_path_factory.mktemp("alone")
    return [run(settings(home, out / str(index), **changes), quiet) for index, changes in enumerate(RUNS)]


def check_same(record: Any, expected: dict[str, Any]) -> None:
    assert isinstance(record, dict), record
    assert record["digest"] == expected["digest"]
    assert record["best"] == expected["best"]
    for ours, theirs in zip(record["evaluations"], expected["evaluations"], strict=True):
        assert ours == {
            **theirs,
            "loss": pytest.approx(theirs["loss"]),
            "train_loss": pytest.approx(theirs["train_loss"]),
        }
    assert record["test"]["metrics"] == expected["test"]["metrics"]
    assert record["test"]["loss"] == pytest.approx(expected["test"]["loss"])
    for name, values in expected["gates"]["values"].items():
        assert record["gates"]["values"][name]["mean"] == pytest.approx(values["mean"], abs=1e-5)
    same = ("task", "data", "parameters", "majority", "seeds", "model", "files", "dev")
    assert {name: record[name] for name in same if name != "dev"} == {
        name: expected[name] for name in same if name != "dev"
    }
    assert record.keys() == expected.keys() | {"packed"}


def check_same_weights(folder: Path, other: Path) -> None:
    ours, theirs = (load_file(place / "model" / "model.safetensors") for place in (folder, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=2e-5, msg=name)


def test_each_ends_as_by_itself(home: Path, tmp_path: Path, alone: list[dict[str, Any]]) -> None:
    runs = [settings(home, tmp_path / str(index), **changes) for index, changes in enumerate(RUNS)]
    lines: list[str] = []
    outcomes = run_packed(runs, places=2, log=lines.append)
    assert next(iter(outcomes)) == str(tmp_path / "0"), "it stops early, and the third takes its place"
    for index, expected in enumerate(alone):
        folder = tmp_path / str(index)
        check_same(outcomes[str(folder)], expected)
        assert outcomes[str(folder)] == read_result(folder)
        assert read_result(folder)["packed"] == {"places": 2}
        assert {path.name for path in folder.iterdir()} == {".lock", "result.json", "model", "gates.png"}
        check_same_weights(folder, Path(expected["settings"]["output_dir"]))
        with locked(folder):
            pass
    assert len([line for line in lines if line.startswith("epoch ")]) == sum(len(item["evaluations"]) for item in alone)
    again = run_packed(runs, places=3, log=quiet)
    assert again == outcomes, "nothing is done twice"


class Kill(BaseException):
    """As of the process."""


def stop_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process end after that many steps of all runs together."""
    update: Callable[..., None] = PackedRun.update
    count = 0

    def counted(seat: Any, loss: torch.Tensor, *args: Any) -> None:
        nonlocal count
        assert not loss.requires_grad, "a loss that is kept holds nothing else of its step"
        count += 1
        if count > steps:
            raise Kill
        update(seat, loss, *args)

    monkeypatch.setattr(PackedRun, "update", counted)


def test_goes_on_after_a_kill(
    home: Path, tmp_path: Path, alone: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "CHECKPOINT_SECONDS", 0.0)
    runs = [settings(home, tmp_path / str(index), **changes) for index, changes in enumerate(RUNS)]
    with monkeypatch.context() as patch:
        stop_after(19, patch)
        with pytest.raises(Kill):
            run_packed(runs, places=3, log=quiet)
    assert not list(tmp_path.glob("*/result.json"))
    steps = {path.name for path in tmp_path.glob(f"*/{CHECKPOINTS}/checkpoint-*")}
    assert steps == {"checkpoint-4", "checkpoint-6"}, "each with its last"
    lines: list[str] = []
    # the first in other company than before
    outcomes = run_packed(runs[1:], places=2, log=lines.append) | run_packed(runs[:1], places=1, log=lines.append)
    assert len([line for line in lines if line.startswith("going on from ")]) == 3
    for index, expected in enumerate(alone):
        check_same(outcomes[str(tmp_path / str(index))], expected)
        assert read_result(tmp_path / str(index))["attempts"] == 2
        check_same_weights(tmp_path / str(index), Path(expected["settings"]["output_dir"]))


def test_a_checkpoint_of_a_pack_is_none_of_a_run_by_itself(
    home: Path, tmp_path: Path, alone: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "CHECKPOINT_SECONDS", 0.0)
    one = settings(home, tmp_path / "0", **RUNS[0])
    with monkeypatch.context() as patch:
        stop_after(5, patch)
        with pytest.raises(Kill):
            run_packed([one], places=1, log=quiet)
    record = run(one, quiet)
    assert record["evaluations"] == alone[0]["evaluations"]
    assert "packed" not in record


def test_one_fails_and_the_others_go_on(home: Path, tmp_path: Path, alone: list[dict[str, Any]]) -> None:
    diverges = settings(home, tmp_path / "diverges", learning_rate=1e30, max_grad_norm=0.0)
    blocked = settings(home, tmp_path / "blocked")
    short = settings(home, tmp_path / "short", train_samples=100_000)
    good = settings(home, tmp_path / "good", **RUNS[0])
    with locked(tmp_path / "blocked"):
        outcomes = run_packed([diverges, blocked, short, good], places=2, log=quiet)
    assert "NaN" in str(outcomes[str(tmp_path / "diverges")])
    assert "another process is running" in str(outcomes[str(tmp_path / "blocked")])
    assert "100,000" in str(outcomes[str(tmp_path / "short")]) or "100000" in str(outcomes[str(tmp_path / "short")])
    check_same(outcomes[str(tmp_path / "good")], alone[0])
    assert not (tmp_path / "diverges" / "result.json").exists()
    with locked(tmp_path / "diverges"):
        pass


def test_dropout_is_drawn_from_the_seed_of_the_first_run(tmp_path: Path) -> None:
    make_quick(tmp_path)
    found = []
    for turn in range(2):
        torch.manual_seed(turn)
        chosen = settings(tmp_path, tmp_path / str(turn), epochs=1, train_samples=24, method="lora")
        [record] = run_packed([chosen], places=1, log=quiet).values()
        assert isinstance(record, dict), record
        found.append(record["evaluations"])
    assert found[0] == found[1]


def test_another_process_that_was_faster(
    home: Path, tmp_path: Path, alone: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the pack loaded a run's data, the run was finished."""
    chosen = settings(home, tmp_path, threads=None, **RUNS[0])
    prepare = seat.prepare

    def slowly(*arguments: Any) -> Any:
        job = prepare(*arguments)
        write_result(alone[0], tmp_path)
        return job

    monkeypatch.setattr(seat, "prepare", slowly)
    assert run_packed([chosen], places=1, log=quiet) == {str(tmp_path): alone[0]}
    assert not (tmp_path / CHECKPOINTS).exists()
    with locked(tmp_path):
        pass


def test_dev_sets_are_cut_into_the_same_batches_for_all(home: Path, tmp_path: Path) -> None:
    """Of as many rows, or of as many tokens as fit what is shared."""

    def seats(**changes: Any) -> Any:
        job = SimpleNamespace(settings=settings(home, tmp_path, **changes), device="cpu")
        return [SimpleNamespace(job=job, lengths=lengths) for lengths in ([9, 5, 4], [8, 7, 6, 3, 2])]

    assert packed._cut(seats(eval_tokens=0, eval_batch_size=2)) == [range(0, 2), range(2, 4), range(4, 5)]
    # of two seats each has half of the budget: 2 rows of 9 tokens, 3 of 6
    assert packed._cut(seats(eval_tokens=40)) == [range(0, 2), range(2, 5)]


def test_which_runs_can_share_a_pack(home: Path, tmp_path: Path) -> None:
    folder = write_glue(tmp_path / "glue")

    def key(task: str, **changes: Any) -> str:
        data = {"task": task, "glue_dir": str(folder), "train_file": None, "dev_file": None}
        return pack_key(settings(home, tmp_path / "out", **data, **changes))

    first = key("rte")
    assert first == key("sst2", seed=7, data_seed=3, train_samples=5, learning_rate=0.5, epochs=9)
    assert first != key("stsb")
    assert first != key("rte", method="lora")
    assert first != key("rte", max_length=20)
    assert first != key("rte", batch_size=3)
    assert first != key("rte", precision="bf16")
    runs = [settings(home, tmp_path / name, method=name) for name in ("lora", "adapter")]
    with pytest.raises(RunError, match="may differ in"):
        run_packed(runs, places=2, log=quiet)
    with pytest.raises(RunError, match="1 place or more"):
        run_packed([], places=0)
    checkpointing = settings(home, tmp_path / "c", gradient_checkpointing=True)
    outcomes = run_packed([checkpointing], places=1, log=quiet)
    assert "gradient checkpointing" in str(outcomes[str(tmp_path / "c")])
    assert not (tmp_path / "c").exists()
