"""The folder of a run, without the run: who may write to it, which checkpoint counts, what is cleared away."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from unipelt.glue.settings import RunSettings
from unipelt.records.record import RESULT, ResultError
from unipelt.runs import folder as place
from unipelt.runs.errors import RunError
from unipelt.runs.folder import CHECKPOINTS, FOLDED, MODEL, PICTURE, PREDICTIONS, LockedError, checkpoint_at

PROGRESS = Path(CHECKPOINTS) / "progress.json"


@pytest.fixture
def settings(tmp_path: Path) -> RunSettings:
    return RunSettings(task="rte", output_dir=str(tmp_path))


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("something")


def make_checkpoint(folder: Path, step: int, digest: str, *, finished: bool = False) -> Path:
    fill(folder, f"{CHECKPOINTS}/checkpoint-{step}/weights")
    place.mark(folder, step, digest, finished=finished)
    return checkpoint_at(folder, step)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# Locks


def test_a_lock_is_for_one_and_ends_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    with (
        place.locked(folder),
        pytest.raises(LockedError, match=r"another process is running in .*; wait for it"),
        place.locked(folder),
    ):
        pytest.fail("two have it")
    with place.locked(folder):
        pass
    assert names_in(folder) == {".lock"}


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    fill(tmp_path, "run")
    said = r"cannot write to .*run: File exists; choose another output_dir"
    with pytest.raises(RunError, match=said), place.locked(tmp_path / "run"):
        pytest.fail("there is no folder")


# Finished runs


def pretend(monkeypatch: pytest.MonkeyPatch, record: dict[str, Any] | Exception) -> None:
    def read(folder: Path) -> dict[str, Any]:
        if isinstance(record, Exception):
            raise record
        return record

    monkeypatch.setattr(place, "read_result", read)


def test_the_record_of_this_very_run(settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert place.find_finished(settings, tmp_path) is None
    record = {"digest": settings.digest(), "settings": settings.to_dict()}
    pretend(monkeypatch, record)
    assert place.find_finished(settings, tmp_path) is record
    again = RunSettings(**{**settings.to_dict(), "overwrite": True})
    assert place.find_finished(again, tmp_path) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 7}, "(seed is 7 there and 1 here)"),
        ({"epochs": 3, "seed": 7, "batch_size": 2}, ", and 1 more)"),
        ({}, "(paths that lead elsewhere)"),
    ],
)
def test_the_record_of_another_run(
    settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str
) -> None:
    settings = RunSettings(**{**settings.to_dict(), "seed": 1})
    pretend(monkeypatch, {"digest": "0" * 64, "settings": settings.to_dict() | changes})
    with pytest.raises(RunError) as caught:
        place.find_finished(settings, tmp_path)
    assert str(caught.value).startswith(f"{tmp_path} holds the result of other settings (")
    assert said in str(caught.value)
    assert str(caught.value).endswith("; choose another output_dir, or --overwrite it")


def test_a_damaged_record(settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, ResultError("it is damaged"))
    with pytest.raises(RunError, match=r"^it is damaged; choose another output_dir, or --overwrite it$"):
        place.find_finished(settings, tmp_path)


# Beginnings


def test_attempts_and_seconds_add_up(settings: RunSettings, tmp_path: Path) -> None:
    progress = place.begin(settings, tmp_path)
    assert (progress.attempts, set(progress.seconds.values())) == (1, {0.0})
    progress.seconds["train"] = 5.0
    progress.write(tmp_path)
    kept = make_checkpoint(tmp_path, 4, "ours")
    again = place.begin(settings, tmp_path)
    assert (again.attempts, again.seconds["train"], again.settings) == (2, 5.0, settings.digest())
    assert kept.is_dir()
    assert json.loads((tmp_path / PROGRESS).read_text())["attempts"] == 2


@pytest.mark.parametrize("name", [MODEL, PREDICTIONS, CHECKPOINTS])
def test_what_is_of_no_run_is_left_alone(settings: RunSettings, tmp_path: Path, name: str) -> None:
    fill(tmp_path, f"{name}/mine")
    with pytest.raises(RunError, match=f"{name} is there and is of no run; choose another output_dir"):
        place.begin(settings, tmp_path)
    assert names_in(tmp_path) == {name}
    assert names_in(tmp_path / name) == {"mine"}


def test_a_picture_of_no_run_is_left_alone(settings: RunSettings, tmp_path: Path) -> None:
    fill(tmp_path, PICTURE)
    with pytest.raises(RunError, match="is of no run"):
        place.begin(settings, tmp_path)
    assert names_in(tmp_path) == {PICTURE}


def test_a_run_that_was_killed_as_it_began_is_of_this_run(settings: RunSettings, tmp_path: Path) -> None:
    fill(tmp_path, f"{CHECKPOINTS}/.progress.json.abc.tmp")
    assert place.begin(settings, tmp_path).attempts == 1


def test_an_unfinished_run_of_other_settings_is_replaced_where_that_is_asked_for(
    settings: RunSettings, tmp_path: Path
) -> None:
    place.begin(settings, tmp_path)
    gone = make_checkpoint(tmp_path, 4, "theirs")
    other = settings.to_dict() | {"seed": 7}
    with pytest.raises(RunError, match="holds an unfinished run of other settings; choose another output_dir, or --ov"):
        place.begin(RunSettings(**other), tmp_path)
    assert gone.is_dir()
    assert place.begin(RunSettings(**other | {"overwrite": True}), tmp_path).attempts == 1
    assert not gone.exists()


def test_a_damaged_progress_is_replaced_where_that_is_asked_for(settings: RunSettings, tmp_path: Path) -> None:
    for text in ("{", '{"settings": 1, "attempts": 2, "seconds": {}}'):
        place.begin(RunSettings(**{**settings.to_dict(), "overwrite": True}), tmp_path)
        gone = make_checkpoint(tmp_path, 4, "theirs")
        (tmp_path / PROGRESS).write_text(text)
        with pytest.raises(RunError, match=r"progress\.json is damaged: .*; choose another output_dir, or --overwrite"):
            place.begin(settings, tmp_path)
        assert gone.is_dir()
        again = place.begin(RunSettings(**{**settings.to_dict(), "overwrite": True}), tmp_path)
        assert (again.attempts, again.settings) == (1, settings.digest())
        assert not gone.exists()


def test_what_an_attempt_left_beside_its_checkpoints_is_cleared_away(settings: RunSettings, tmp_path: Path) -> None:
    place.begin(settings, tmp_path)
    kept = make_checkpoint(tmp_path, 4, "ours")
    fill(tmp_path, f"{MODEL}/a", f"{PREDICTIONS}/a", f"{FOLDED}/a", PICTURE, f".{PICTURE}.x.tmp", f".{RESULT}.x.tmp")
    fill(tmp_path, "log.txt")
    place.begin(settings, tmp_path)
    assert names_in(tmp_path) == {CHECKPOINTS, "log.txt", ".begun.json"}
    assert kept.is_dir()


def test_a_finished_run_that_is_run_again_begins_anew(settings: RunSettings, tmp_path: Path) -> None:
    place.begin(settings, tmp_path)
    gone = make_checkpoint(tmp_path, 4, "ours", finished=True)
    fill(tmp_path, RESULT)
    assert place.begin(settings, tmp_path).attempts == 1
    assert not gone.exists()
    assert not (tmp_path / RESULT).exists()


# Checkpoints


def test_the_newest_complete_checkpoint_of_this_run(tmp_path: Path) -> None:
    assert place.newest_checkpoint(tmp_path, "ours") is None
    first, second = make_checkpoint(tmp_path, 9, "ours"), make_checkpoint(tmp_path, 10, "ours", finished=True)
    make_checkpoint(tmp_path, 11, "theirs")
    fill(tmp_path, *(f"{CHECKPOINTS}/checkpoint-{step}/weights" for step in ("12", "best", "1x")))
    assert place.newest_checkpoint(tmp_path, "ours") == second
    assert place.is_final(second)
    assert not place.is_final(first)
    for text in ("{", "[1]"):
        (second / "complete.json").write_text(text)
        assert place.newest_checkpoint(tmp_path, "ours") == first
        assert not place.is_final(second)


def test_checkpoints_are_removed_but_for_those_that_are_needed(tmp_path: Path) -> None:
    for step, digest in ((1, "ours"), (2, "theirs"), (3, "theirs")):
        make_checkpoint(tmp_path, step, digest)
    fill(tmp_path, f"{CHECKPOINTS}/checkpoint-4/weights")
    place.remove_checkpoints(tmp_path, keep=(checkpoint_at(tmp_path, 3),), digest="ours")
    assert names_in(tmp_path / CHECKPOINTS) == {"checkpoint-1", "checkpoint-3"}
    place.remove_checkpoints(tmp_path)
    assert not names_in(tmp_path / CHECKPOINTS)
    fill(tmp_path, str(PROGRESS), f"{CHECKPOINTS}/checkpoint-5/weights")
    place.clean(tmp_path)
    assert not names_in(tmp_path)


# Starting over


def lose_all(folder: Path) -> None:
    shutil.rmtree(folder / CHECKPOINTS)


def lose_one(folder: Path) -> None:
    shutil.rmtree(checkpoint_at(folder, 4))


def spoil_one(folder: Path) -> None:
    (checkpoint_at(folder, 4) / "complete.json").unlink()


@pytest.mark.parametrize(
    ("lose", "digest", "said"),
    [
        (lose_all, "ours", "this run had begun, and the folder .*checkpoints is gone"),
        (lose_one, "ours", "this run had a checkpoint, and there is none in .*checkpoints"),
        (spoil_one, "ours", "the checkpoint of the earlier attempt is incomplete"),
        (lambda folder: None, "theirs", "the checkpoints are of other data, or of other weights"),
    ],
)
def test_why_a_run_that_had_begun_starts_over(
    settings: RunSettings, tmp_path: Path, lose: Callable[[Path], None], digest: str, said: str
) -> None:
    progress = place.begin(settings, tmp_path)
    assert place.reason_to_start_over(tmp_path, progress, "ours") is None, "a first attempt"
    progress.seconds["total"] = 3.0
    progress.write(tmp_path)
    make_checkpoint(tmp_path, 4, "ours")
    progress = place.begin(settings, tmp_path)
    assert place.reason_to_start_over(tmp_path, progress, "ours") is None, "its checkpoint is there"
    lose(tmp_path)
    progress = place.begin(settings, tmp_path)
    assert progress.attempts == 3, "attempts are counted even without the folder of checkpoints"
    assert re.fullmatch(f"{said}.*", place.reason_to_start_over(tmp_path, progress, digest) or "")


def test_a_run_that_ended_before_its_first_checkpoint_starts_over(settings: RunSettings, tmp_path: Path) -> None:
    place.begin(settings, tmp_path)
    progress = place.begin(settings, tmp_path)
    assert (
        place.reason_to_start_over(tmp_path, progress, "ours")
        == "the earlier attempt ended before its first checkpoint"
    )
    place.clean(tmp_path)
    assert place.begin(settings, tmp_path).attempts == 1, "a finished run leaves no trace of its attempts"


@pytest.mark.parametrize("text", ["{", "[]", '{"attempts": 3}', '{"settings": 3, "attempts": 3}'])
def test_a_damaged_note_of_a_beginning_is_of_no_run(settings: RunSettings, tmp_path: Path, text: str) -> None:
    (tmp_path / ".begun.json").write_text(text)
    assert place.begin(settings, tmp_path).attempts == 1


def test_what_an_attempt_left_is_of_this_run_without_its_checkpoints(settings: RunSettings, tmp_path: Path) -> None:
    place.begin(settings, tmp_path)
    fill(tmp_path, f"{MODEL}/weights")
    lose_all(tmp_path)
    place.begin(settings, tmp_path)
    assert not (tmp_path / MODEL).exists()
    fill(tmp_path, f"{MODEL}/weights")
    lose_all(tmp_path)
    with pytest.raises(RunError, match="is there and is of no run"):
        place.begin(replace(settings, seed=5), tmp_path)
