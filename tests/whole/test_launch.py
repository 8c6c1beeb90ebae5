"""`unipelt run` and the scripts of `examples/`: one run, of the kind that its configuration asks for."""

from __future__ import annotations

import os
import pkgutil
from pathlib import Path
from typing import Any

import pytest
from tiny_task import save_model, write_sentences

from unipelt import cli, launch
from unipelt.glue.settings import RunSettings
from unipelt.records.record import read_result
from unipelt.tasks.settings import QASettings, TranslationSettings


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """The settings of runs that would have been done."""
    found: list[Any] = []
    monkeypatch.setattr(launch, "_start", found.append)
    monkeypatch.chdir(tmp_path)
    return found


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["demo"], RunSettings),
        (["rte-apl", "--seed", "3"], RunSettings),
        (["qa-xquad"], QASettings),
        (["qa-xquad.yaml", "--n_best=5"], QASettings),
        (["translation-multi30k"], TranslationSettings),
        (["--task", "rte"], RunSettings),
        (["--task", "xquad"], QASettings),
        (["--task=multi30k"], TranslationSettings),
        (["--train_file", "a.tsv", "--dev_file", "b.tsv"], RunSettings),
        (["--train_file", "a.json", "--null-threshold", "0.5"], QASettings),
        (["--train_file", "a", "--dev_file", "b", "--source", "de", "--target=en"], TranslationSettings),
        (["--train_file", "a.json", "--kind", "questions"], QASettings),
        (["--kind=translation", "--train_file", "a", "--dev_file", "b"], TranslationSettings),
        (["minilm", "--kind", "questions", "--task", "xquad"], QASettings),
    ],
)
def test_the_configuration_decides_the_kind(words: list[str], kind: type[Any], started: list[Any]) -> None:
    assert cli.main(["run", *words]) == 0
    assert [type(settings) for settings in started] == [kind]


def test_a_file_s_base_decides_too(started: list[Any], tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("task: xquad\n", encoding="utf-8")
    (tmp_path / "mine.yaml").write_text("base: base.yaml\nepochs: 3\n", encoding="utf-8")
    assert cli.main(["run", "mine.yaml", "--seed", "2"]) == 0
    assert isinstance(started[0], QASettings)
    assert (started[0].epochs, started[0].seed, started[0].output_dir) == (3, 2, "runs/mine-seed=2")


@pytest.mark.parametrize(
    ("words", "prepare"),
    [
        (["demo"], None),
        (["qa-xquad"], "unipelt.tasks.qa.prepare"),
        (["translation-multi30k"], "unipelt.tasks.translation.prepare"),
    ],
)
def test_each_kind_has_a_run_of_its_own(
    words: list[str], prepare: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    done: list[Any] = []
    monkeypatch.setattr("unipelt.glue.run.run", lambda settings: done.append(None))
    monkeypatch.setattr("unipelt.runs.run.run", lambda settings, prepare: done.append(prepare))
    assert cli.main(["run", *words]) == 0
    assert done == [prepare and pkgutil.resolve_name(prepare)]


def test_the_libraries_send_no_telemetry_unless_the_user_wants_it(
    started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    cli.main(["run", "demo"])
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "0"
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY")
    cli.main(["run", "demo"])
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"


def test_options_win_and_the_folder_is_named_by_the_configuration(started: list[Any]) -> None:
    assert cli.main(["run", "demo", "--method", "lora"]) == 0
    assert started[0].method == "lora"
    assert started[0].output_dir == "runs/demo-method=lora"
    assert Path(started[0].train_file).is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing"], "no configuration file at nothing, and none of that name comes with the package"),
        (["table1"], "table1.yaml is the file of a sweep; start it by `unipelt sweep CONFIG --out DIR`"),
        (["table4"], "table4.yaml is the file of a benchmark; start it by examples/benchmark.py"),
        (["demo", "--lerning_rate", "1"], "unknown option '--lerning_rate'; did you mean '--learning_rate'?"),
        (["demo", "--kind", "poetry"], "--kind must be classification, questions, translation, not 'poetry'"),
        ([], "there is nothing to train on: name a task (--task rte) or a train_file"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], said: str, started: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("unipelt run: ")
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not started
    assert not list(tmp_path.iterdir())


def test_help_is_that_of_the_kind(capsys: pytest.CaptureFixture[str]) -> None:
    for words, there, not_there in ((["run"], "--glue_dir", "--stride"), (["run", "qa-xquad"], "--stride", "--glue")):
        with pytest.raises(SystemExit, match="0"):
            cli.main([*words, "--help"])
        shown = capsys.readouterr().out
        assert shown.startswith("usage: unipelt run [CONFIG]")
        assert "--kind classification|questions|translation" in shown
        assert there in shown
        assert not_there not in shown


def test_a_run_leaves_what_the_script_leaves(tmp_path: Path, run_glue: Any, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "model")
    for name, rows in (("train", 32), ("dev", 16)):
        write_sentences(tmp_path / f"{name}.tsv", rows, seed=rows)
    text = f"model: {tmp_path}/model\ntrain_file: {tmp_path}/train.tsv\ndev_file: {tmp_path}/dev.tsv\nepochs: 1\n"
    (tmp_path / "mine.yaml").write_text(f"{text}max_length: 16\ndevice: cpu\n", encoding="utf-8")
    words = [str(tmp_path / "mine.yaml"), "--method", "lora"]
    assert cli.main(["run", *words, "--output_dir", str(tmp_path / "one")]) == 0
    assert run_glue.main([*words, "--output_dir", str(tmp_path / "two")]) == 0
    one, two = read_result(tmp_path / "one"), read_result(tmp_path / "two")
    assert one["test"] == two["test"]
    assert "custom · lora" in capsys.readouterr().out
