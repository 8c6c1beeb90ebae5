"""`unipelt status`: what runs, how far, what failed and what is left, from files and locks alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from report_records import make_record

from unipelt.cli import main
from unipelt.glue.settings import RunSettings
from unipelt.records.record import RESULT, write_result
from unipelt.runs import folder as place
from unipelt.runs import moment as moments
from unipelt.runs.folder import CHECKPOINTS, NOW, checkpoint_at, locked
from unipelt.runs.moment import Moment, TrainingProgress, of_checkpoint, read_moment
from unipelt.sweep import State, SweepError, read_sweep, status, write_request
from unipelt.sweep import watch as module
from unipelt.sweep.folder import CLAIM, write_failure
from unipelt.sweep.watch import look

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def state(tmp_path: Path) -> State:
    """A sweep of five runs of which none has begun."""
    path = tmp_path / "grid.yaml"
    path.write_text("grid:\n  - {task: rte, method: lora, seed: 1-5}\n")
    sweep = read_sweep(path)
    write_request(sweep, tmp_path / "out")
    return status(sweep, tmp_path / "out")


def folder_of(state: State, number: int) -> Path:
    folder = Path(str(state.sweep.runs[number].output_dir))
    folder.mkdir(exist_ok=True)
    return folder


def finish(state: State, number: int, seconds: float) -> None:
    settings = state.sweep.runs[number]
    record = make_record(seed=settings.seed) | {"digest": settings.digest()}
    record["seconds"]["total"] = seconds
    write_result(record, folder_of(state, number))


def reach(folder: Path, settings: RunSettings, step: int) -> None:
    """Leave what a training of 30 steps and 3 epochs leaves after a step."""
    place.begin(settings, folder)
    checkpoint = checkpoint_at(folder, step)
    checkpoint.mkdir()
    found = {"global_step": step, "max_steps": 30, "epoch": step / 10, "num_train_epochs": 3}
    (checkpoint / "trainer_state.json").write_text(json.dumps(found))
    place.mark(folder, step, "a digest", finished=False)


def tree(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_sweep_that_runs(state: State, tmp_path: Path) -> None:
    finish(state, 0, seconds=100)
    _, running, starting = (folder_of(state, number) for number in (1, 2, 3))
    write_failure(state.sweep.runs[1], "ValueError: no luck", [])
    reach(running, state.sweep.runs[2], 10)
    now = {"step": 15, "steps": 30, "epoch": 1.5, "epochs": 3, "left": 40.0, "time": 1.0}
    (running / CHECKPOINTS / NOW).write_text(json.dumps(now))
    with locked(running), locked(running / CLAIM), locked(starting / CLAIM):
        before = tree(tmp_path)
        found = look(tmp_path / "out")
        assert tree(tmp_path) == before, "nothing is written"
    names = [Path(str(settings.output_dir)).name for settings in state.sweep.runs]
    # the failed run, the starting one and the waiting one take 100 s each
    assert found.seconds_left == pytest.approx((40 + 300) / 2)
    assert str(found).splitlines() == [
        f"of        {tmp_path / 'grid.yaml'}",
        "runs      1 of 5 finished, 1 failed, 1 running, 1 starting, 1 waiting",
        "left      about 2 min 50 s, an estimate with 2 at a time",
        "",
        f"running   {names[2]}: epoch 1.5 of 3, step 15 of 30, about 0 min 40 s of training left",
        f"starting  {names[3]}",
        f"failed    {names[1]}: ValueError: no luck",
    ]


def test_the_time_left_is_that_of_runs_of_the_same_kind(tmp_path: Path) -> None:
    """A method of which no run has finished takes the mean of all."""
    path = tmp_path / "grid.yaml"
    path.write_text("grid:\n  - {task: rte, method: [lora, bitfit, adapter], seed: [1, 2]}\n")
    sweep = read_sweep(path)
    write_request(sweep, tmp_path / "out")
    state = status(sweep, tmp_path / "out")
    for number, seconds in ((0, 100.0), (1, 100.0), (2, 400.0)):
        finish(state, number, seconds)
    found = look(tmp_path / "out")
    assert found.seconds_left == pytest.approx(400 + 2 * 200)
    assert state.seconds_left(state.left) is None, "it was asked before"
    again = status(sweep, tmp_path / "out")
    assert again.seconds_left(again.left) == pytest.approx(found.seconds_left)


def test_a_sweep_that_was_killed(state: State, tmp_path: Path) -> None:
    reach(folder_of(state, 0), state.sweep.runs[0], 20)
    # of an attempt that went further than its last checkpoint
    now = {"step": 25, "steps": 30, "epoch": 2.5, "epochs": 3, "left": 9.0, "time": 1.0}
    (folder_of(state, 0) / CHECKPOINTS / NOW).write_text(json.dumps(now))
    place.begin(state.sweep.runs[1], folder_of(state, 1))
    assert of_checkpoint(folder_of(state, 0)) == Moment(20, 30, 2.0, 3.0, left=None, time=0.0)
    found = str(look(tmp_path / "out"))
    assert "runs      0 of 5 finished, 2 stopped, 3 waiting\nleft      unknown until a run has finished" in found
    assert f"stopped   {folder_of(state, 0).name}: goes on from epoch 2 of 3, step 20 of 30\n" in found
    assert found.endswith(f"stopped   {folder_of(state, 1).name}: before its first checkpoint")


def test_one_run_and_a_folder_of_runs(tmp_path: Path) -> None:
    settings = RunSettings(task="rte", output_dir=str(tmp_path / "runs" / "one"))
    one = tmp_path / "runs" / "one"
    one.mkdir(parents=True)
    with pytest.raises(SweepError, match=r"holds no run and no sweep.json"):
        look(tmp_path / "runs")
    reach(one, settings, 10)
    for folder in (one, one.parent):
        assert "stopped   one: goes on from epoch 1 of 3, step 10 of 30" in str(look(folder))
    with locked(one):
        assert "running   one: epoch 1 of 3, step 10 of 30" in str(look(one))
    place.clean(one)
    write_result(make_record(), one)
    (one.parent / "notes.txt").write_text("no run")
    (one.parent / "empty").mkdir()
    for folder in (one, one.parent):
        assert str(look(folder)) == f"of        {folder}\nruns      1 of 1 finished"
    (one / RESULT).write_text("{")
    assert "failed    one: " in str(look(one))


def test_the_command(state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path / "out")]) == 0
    assert "runs      0 of 5 finished, 5 waiting" in capsys.readouterr().out
    assert main(["status", str(tmp_path / "nowhere")]) == 2
    assert "there is no folder at" in capsys.readouterr().err


def test_a_watch_ends_with_the_last_run(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        if len(pauses) == 4:
            raise KeyboardInterrupt  # the user has seen enough
        finish(state, len(pauses), seconds=60)
        pauses.append(seconds)

    monkeypatch.setattr(module.time, "sleep", sleep)
    with locked(folder_of(state, 4)):
        reach(folder_of(state, 4), state.sweep.runs[4], 10)
        assert main(["status", str(tmp_path / "out"), "--watch"]) == 0
    assert pauses == [60.0] * 4
    assert "runs      3 of 5 finished, 1 running, 1 waiting\n" in capsys.readouterr().out
    place.clean(folder_of(state, 4))
    finish(state, 4, seconds=60)
    assert main(["status", str(tmp_path / "out"), "--watch"]) == 0
    assert len(pauses) == 4
    assert capsys.readouterr().out.endswith("runs      5 of 5 finished\n")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_watch_of_a_killed_sweep_ends(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(module.time, "sleep", pauses.append)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    assert main(["status", str(tmp_path / "out"), "--watch"]) == 0
    assert pauses == [2.0], "a second look, as a worker does nothing for a moment between two runs"
    printed = capsys.readouterr().out
    assert printed.count("\x1b[H\x1b[J") == (2 if terminal else 0)
    assert printed.count("runs      0 of 5 finished, 5 waiting\n") == 2


# What a run says of itself


def test_a_training_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / CHECKPOINTS).mkdir()
    monkeypatch.setattr(moments, "WRITE_SECONDS", 1e9)
    progress = TrainingProgress(tmp_path, 4, 10, 2, log=lambda line: None)
    progress.update(1.0)
    assert read_moment(tmp_path) is None, "not at every step"
    monkeypatch.setattr(moments, "WRITE_SECONDS", 0.0)
    progress.update(1.2)
    progress.close()
    found = read_moment(tmp_path)
    assert isinstance(found, Moment)
    assert (found.step, found.steps, found.epoch, found.epochs) == (6, 10, 1.2, 2)
    assert found.left is not None
    (tmp_path / CHECKPOINTS / NOW).write_text('{"step": "six"}')
    assert read_moment(tmp_path) is None


def test_a_lock_of_another_user_cannot_be_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locked(tmp_path):
        assert place.is_locked(tmp_path)
    assert place.is_locked(tmp_path) is False
    assert place.is_locked(tmp_path / "nowhere") is False

    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    reach(tmp_path, RunSettings(task="rte", output_dir=str(tmp_path)), 10)
    monkeypatch.setattr(place, "FileLock", refuse)
    assert place.is_locked(tmp_path) is None
    assert str(look(tmp_path)).endswith("step 10 of 30 (its lock cannot be opened, so it may be running)")
