"""What the header of a run says of the user's data, and what an error says of a file of another form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_task import make_quick, quick

from unipelt.glue.data import DataError, load_files
from unipelt.glue.job import prepare
from unipelt.glue.labels import describe_cuts, describe_labels
from unipelt.glue.settings import RunSettings
from unipelt.glue.tasks import Task
from unipelt.runs import device
from unipelt.runs.training import header


def task(*names: str) -> Task:
    metric = "accuracy" if names else "spearman"
    return Task(name="custom", columns=("text",), label_names=names, metrics=(metric,), primary=metric, folder="")


def said(names: tuple[str, ...], labels: list[Any]) -> str:
    return "\n".join(describe_labels(task(*names), np.asarray(labels)))


def test_classes_with_their_rows() -> None:
    assert said(("neg", "pos"), [0, 1, 1]) == "labels  2 classes, with rows in train: neg 1, pos 2"


def test_many_classes() -> None:
    text = said(tuple(f"c{index}" for index in range(20)), list(range(20)))
    assert text.endswith("c11 1 and 8 more")
    assert said(tuple(f"c{index}" for index in range(12)), list(range(12))).endswith("c11 1")


@pytest.mark.parametrize("other", ["pos ", " pos", "Pos", "p os", "POS\u00a0"])
def test_names_that_differ_by_space_or_case(other: str) -> None:
    text = said(("neg", "pos", other), [0, 1, 2])
    assert f"warning: the labels 'pos', {other!r} differ only by space or case" in text
    assert "neg'" not in text


def test_names_that_differ_by_more() -> None:
    assert "warning" not in said(("neg", "pos", "positive"), [0, 1, 2])


def test_classes_without_a_row() -> None:
    assert "no training row has the label 'b', 'd'" in said(("a", "b", "c", "d"), [0, 2, 0])


def test_scores() -> None:
    assert said((), [0.5, 2.0, 3.25, 2.0]) == "labels  regression from 0.5 to 3.25, 3 different scores in train"
    assert "warning: all 2 scores are whole numbers" in said((), [1.0, 2.0, 1.0])


def test_an_escape_in_a_name_is_spelt_out() -> None:
    assert "\x1b" not in said(("a\x1b[2J", "b"), [0, 1])


def test_cuts() -> None:
    assert describe_cuts({"train": (0, 5), "dev": (0, 3)}, 8) == []
    told = "        warning: texts are cut at 8 tokens (max_length): train 2 of 1,500"
    assert describe_cuts({"train": (2, 1500), "dev": (0, 3)}, 8) == [told]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_quick(tmp_path_factory.mktemp("home"))


def test_the_header_of_a_run(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = prepare(RunSettings(**quick(home, output_dir=str(tmp_path / "whole"))))
    lines = header(job, "base", job.task.name, job.labels)
    assert any(line.startswith("labels  2 classes, with rows in train: ") for line in lines)
    assert not any("cut" in line for line in lines)
    monkeypatch.setattr(device, "_fast_bf16", lambda: False)
    assert not any("slower" in line for line in lines)
    slow = prepare(RunSettings(**quick(home, output_dir=str(tmp_path / "slow"), precision="bf16", device="cpu")))
    assert any("bf16 is many times slower" in line for line in header(slow, "base", slow.task.name))
    length = max(len(ids) for ids in job.splits["train"]["input_ids"])
    exact = prepare(RunSettings(**{**quick(home, output_dir=str(tmp_path / "exact")), "max_length": length}))
    assert not any("train" in line and "cut" in line for line in exact.labels), "what just fits is not cut"
    short = prepare(RunSettings(**{**quick(home, output_dir=str(tmp_path / "short")), "max_length": length - 1}))
    longer = sum(len(ids) == length for ids in job.splits["train"]["input_ids"])
    assert f"train {longer:,} of {len(job.splits['train']):,}" in short.labels[-1]


# --- files of another form


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "sentence;label\na;x\nb;y\n", "parted by semicolons"),
        ("a.csv", "sentence\tlabel\na\tx\nb\ty\n", "parted by tabs"),
        ("a.csv", "sentence|label\na|x\nb|y\n", "parted by bars"),
        ("a.csv", "sentence;label\na, or b;x\nb;y\n", "parted by semicolons"),
        ("a.tsv", "sentence,label\na,x\nb,y\n", "parted by commas"),
        ("a.tsv", "sentence;label\na;x\nb;y\n", "parted by semicolons"),
        ("a.csv", "sentence, label\na,x\nb,y\n", "there is ' label', which is 'label' with a space around it"),
        ("a.tsv", "sentence \tlabel\na\tx\nb\ty\n", "there is 'sentence ', which is 'sentence' with a space around it"),
        ("a.csv", "sentence,Label\na,x\nb,y\n", "there is 'Label', which is 'label' with other letters in upper case"),
    ],
)
def test_a_file_of_another_form(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as caught:
        load_files(tmp_path / name)
    assert words in str(caught.value)


def test_a_file_of_one_column_is_not_suspected(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("words\na\nb\n")
    with pytest.raises(DataError) as caught:
        load_files(tmp_path / "a.csv")
    assert "parted by" not in str(caught.value)
    assert "there is" not in str(caught.value)
