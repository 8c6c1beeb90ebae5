"""Readers against small files in every layout, the user's own files, and what broken data is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from unipelt.glue.data import DataError, fingerprint, load_files, load_task, split_note
from unipelt.glue.tasks import TASKS

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file of tab-separated rows (or of the given text) below the test's folder."""

    def write_file(name: str, *rows: list[str] | tuple[str, ...], text: str | None = None, end: str = "\n") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = "".join("\t".join(row) + end for row in rows) if text is None else text
        path.write_bytes(content.encode("utf-8"))
        return path

    return write_file


def rows_of(dataset: Dataset) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in dataset]


# GLUE's own layouts

MNLI_HEAD = [
    *("index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse"),
    *("sentence1_parse", "sentence2_parse", "sentence1", "sentence2"),
]
STSB_HEAD = [
    "index",
    "genre",
    "filename",
    "year",
    "old_index",
    "source1",
    "source2",
    "sentence1",
    "sentence2",
]
MRPC_HEAD = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]

# Per task: the files of GLUE's own download, and the rows that each split must give.
OWN_LAYOUT: dict[str, tuple[dict[str, list[list[str]]], dict[str, list[tuple[Any, ...]]]]] = {
    "cola": (
        {
            "train.tsv": [["gj04", "1", "", "The boy ran."], ["gj04", "0", "*", 'Ran "the boy.']],
            "dev.tsv": [["ad03", "0", "*", "The cat are here."]],
            "test.tsv": [["index", "sentence"], ["0", "A new one."]],
        },
        {
            "train": [("The boy ran.", 1), ('Ran "the boy.', 0)],
            "dev": [("The cat are here.", 0)],
            "test": [("A new one.",)],
        },
    ),
    "sst2": (
        {
            "train.tsv": [["sentence", "label"], ["a fine film ", "1"], ["dull", "0"]],
            "dev.tsv": [["sentence", "label"], ["it moves", "1"]],
            "test.tsv": [["index", "sentence"], ["0", "who knows"]],
        },
        {"train": [("a fine film ", 1), ("dull", 0)], "dev": [("it moves", 1)], "test": [("who knows",)]},
    ),
    "mrpc": (
        {
            "train.tsv": [MRPC_HEAD, ["1", "10", "11", 'He said "no.', "He refused."]],
            "dev.tsv": [MRPC_HEAD, ["0", "12", "13", "It rained.", "It snowed."]],
            "test.tsv": [["index", *MRPC_HEAD[1:]], ["0", "14", "15", "One.", "Two."]],
        },
        {
            "train": [('He said "no.', "He refused.", 1)],
            "dev": [("It rained.", "It snowed.", 0)],
            "test": [("One.", "Two.")],
        },
    ),
    "qqp": (
        {
            "train.tsv": [
                ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
                ["7", "1", "2", "Why?", "How?", "0"],
            ],
            "dev.tsv": [
                ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
                ["8", "3", "4", "Who is it?", "Who's it?", "1"],
            ],
            "test.tsv": [["id", "question1", "question2"], ["0", "When?", "Where?"]],
        },
        {
            "train": [("Why?", "How?", 0)],
            "dev": [("Who is it?", "Who's it?", 1)],
            "test": [("When?", "Where?")],
        },
    ),
    "stsb": (
        {
            "train.tsv": [
                [*STSB_HEAD, "score"],
                ["0", "main-news", "file", "2012", "1", "none", "none", "A cat.", "A dog.", "2.500"],
            ],
            "dev.tsv": [
                [*STSB_HEAD, "score"],
                ["0", "main-news", "file", "2012", "2", "none", "none", "A car.", "An auto.", "5.000"],
            ],
            "test.tsv": [STSB_HEAD, ["0", "main-news", "file", "2012", "3", "none", "none", "Up.", "Down."]],
        },
        {
            "train": [("A cat.", "A dog.", 2.5)],
            "dev": [("A car.", "An auto.", 5.0)],
            "test": [("Up.", "Down.")],
        },
    ),
    "mnli": (
        {
            "train.tsv": [
                [*MNLI_HEAD, "label1", "gold_label"],
                [
                    *("0", "1", "1n", "fiction", "( a )", "( b )", "(ROOT a)", "(ROOT b)", "He sat.", "He stood."),
                    *("neutral", "contradiction"),
                ],
            ],
            "dev_matched.tsv": [
                [*MNLI_HEAD, "label1", "label2", "label3", "label4", "label5", "gold_label"],
                [
                    *("0", "2", "2e", "slate", "( a )", "( b )", "(ROOT a)", "(ROOT b)", "She ate.", "She lived."),
                    *("neutral", "neutral", "entailment", "entailment", "entailment", "entailment"),
                ],
            ],
            "test_matched.tsv": [
                MNLI_HEAD,
                ["0", "3", "3e", "slate", "( a )", "( b )", "(ROOT a)", "(ROOT b)", "One.", "Two."],
            ],
            "test_mismatched.tsv": [
                MNLI_HEAD,
                ["0", "4", "4e", "oup", "( a )", "( b )", "(ROOT a)", "(ROOT b)", "Three.", "Four."],
            ],
        },
        {
            "train": [("He sat.", "He stood.", 2)],
            "dev": [("She ate.", "She lived.", 0)],
            "test": [("One.", "Two.")],
            "test_mismatched": [("Three.", "Four.")],
        },
    ),
    "qnli": (
        {
            "train.tsv": [["index", "question", "sentence", "label"], ["0", "Who?", "He did.", "entailment"]],
            "dev.tsv": [
                ["index", "question", "sentence", "label"],
                ["0", "Where?", "It fell.", "not_entailment"],
            ],
            "test.tsv": [["index", "question", "sentence"], ["0", "When?", "In May."]],
        },
        {
            "train": [("Who?", "He did.", 0)],
            "dev": [("Where?", "It fell.", 1)],
            "test": [("When?", "In May.")],
        },
    ),
    "rte": (
        {
            "train.tsv": [
                ["index", "sentence1", "sentence2", "label"],
                ["0", "It is.", "It was.", "not_entailment"],
            ],
            "dev.tsv": [
                ["index", "sentence1", "sentence2", "label"],
                ["0", "All ran.", "One ran.", "entailment"],
            ],
            "test.tsv": [["index", "sentence1", "sentence2"], ["0", "Yes.", "No."]],
        },
        {
            "train": [("It is.", "It was.", 1)],
            "dev": [("All ran.", "One ran.", 0)],
            "test": [("Yes.", "No.")],
        },
    ),
}


@pytest.mark.parametrize("name", list(TASKS))
def test_glue_s_own_layout(tmp_path: Path, write: Write, name: str) -> None:
    task = TASKS[name]
    files, expected = OWN_LAYOUT[name]
    for file, rows in files.items():
        write(f"{task.folder}/{file}", *rows)
    loaded = load_task(task, tmp_path, with_test=True)
    assert {split: rows_of(dataset) for split, dataset in loaded.items()} == expected
    assert loaded["train"].column_names == [*task.columns, "label"]
    assert loaded["test"].column_names == list(task.columns)
    label = loaded["train"].features["label"]
    assert label == (Value("float32") if task.is_regression else ClassLabel(names=list(task.label_names)))
    assert list(load_task(task, str(tmp_path))) == ["train", "dev"]


@pytest.mark.parametrize("name", list(TASKS))
def test_the_tidy_layout_gives_the_same_rows(tmp_path: Path, write: Write, name: str) -> None:
    task = TASKS[name]
    files, expected = OWN_LAYOUT[name]
    label_name = {"qqp": "is_duplicate", "stsb": "score"}.get(name, "label")
    for split in ("train", "dev"):
        file = "dev_matched.tsv" if (name, split) == ("mnli", "dev") else f"{split}.tsv"
        words = [
            [*row[:-1], str(row[-1]) if task.is_regression else task.file_labels[row[-1]]] for row in expected[split]
        ]
        write(f"{task.folder}/{file}", [*task.columns, label_name], *words)
    loaded = load_task(task, tmp_path)
    assert {split: rows_of(dataset) for split, dataset in loaded.items()} == {
        split: expected[split] for split in ("train", "dev")
    }
    for file, rows in files.items():
        write(f"own/{task.folder}/{file}", *rows)
    assert fingerprint(load_task(task, tmp_path / "own")["train"]) == fingerprint(loaded["train"])


def write_msr(write: Write, ids: list[list[str]]) -> None:
    """MRPC as Microsoft has it: train and dev pooled, with a byte order mark."""
    write(
        "MRPC/msr_paraphrase_train.txt",
        ["\ufeffQuality", *MRPC_HEAD[1:]],
        ["1", "10", "11", "One.", "Two."],
        ["0", "12", "13", "Three.", "Four."],
        ["1", "14", "15", "Five.", "Six."],
        end="\r\n",
    )
    write(
        "MRPC/msr_paraphrase_test.txt",
        ["\ufeffQuality", *MRPC_HEAD[1:]],
        ["1", "16", "17", "Seven.", "Eight."],
    )
    write("MRPC/dev_ids.tsv", *ids)


def test_mrpc_from_microsoft_s_files(tmp_path: Path, write: Write) -> None:
    write_msr(write, [["12", "13"]])
    loaded = load_task(TASKS["mrpc"], tmp_path, with_test=True)
    assert {split: rows_of(dataset) for split, dataset in loaded.items()} == {
        "train": [("One.", "Two.", 1), ("Five.", "Six.", 1)],
        "dev": [("Three.", "Four.", 0)],
        "test": [("Seven.", "Eight.")],
    }


def test_mrpc_from_microsoft_s_files_needs_the_right_dev_ids(tmp_path: Path, write: Write) -> None:
    write_msr(write, [["12", "13"], ["98", "99"]])
    with pytest.raises(DataError, match=r"dev_ids.tsv: the ids 98 99 are of no row"):
        load_task(TASKS["mrpc"], tmp_path)
    write_msr(write, [["10", "11"], ["12", "13"], ["14", "15"]])
    with pytest.raises(DataError, match=r"no row is left for train"):
        load_task(TASKS["mrpc"], tmp_path)
    (tmp_path / "MRPC/dev_ids.tsv").unlink()
    with pytest.raises(DataError, match=r"neither train.tsv nor dev_ids.tsv"):
        load_task(TASKS["mrpc"], tmp_path)


def test_carriage_returns_byte_order_marks_and_rare_line_breaks(tmp_path: Path, write: Write) -> None:
    write("SST-2/train.tsv", ["\ufeffsentence", "label"], ["one\u2028two\x85three\x0bfour", "1"], end="\r\n")
    write("SST-2/dev.tsv", text="sentence\tlabel\nno line feed at the end\t0")
    loaded = load_task(TASKS["sst2"], tmp_path)
    assert rows_of(loaded["train"]) == [("one\u2028two\x85three\x0bfour", 1)]
    assert rows_of(loaded["dev"]) == [("no line feed at the end", 0)]


@pytest.mark.parametrize("folder", ["SST-2", "sst-2", "SST2", "sst_2"])
def test_the_folder_is_found_in_any_spelling(tmp_path: Path, write: Write, folder: str) -> None:
    for split in ("train", "dev"):
        write(f"{folder}/{split}.tsv", ["sentence", "label"], ["fine", "1"])
    assert len(load_task(TASKS["sst2"], tmp_path)["train"]) == 1


def test_missing_folders_and_files_are_named(tmp_path: Path, write: Write) -> None:
    with pytest.raises(DataError, match=r"nowhere is not a folder; pass --glue_dir"):
        load_task(TASKS["rte"], tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"must hold one folder RTE, it holds no folders; pass"):
        load_task(TASKS["rte"], tmp_path)
    write("CoLA/train.tsv", ["x"])
    with pytest.raises(DataError, match=r"must hold one folder RTE, it holds CoLA"):
        load_task(TASKS["rte"], tmp_path)
    (tmp_path / "RTE").mkdir()
    with pytest.raises(DataError, match=r"RTE.train.tsv does not exist"):
        load_task(TASKS["rte"], tmp_path)
    (tmp_path / "RTE/train.tsv").mkdir()
    with pytest.raises(DataError, match=r"RTE.train.tsv cannot be read"):
        load_task(TASKS["rte"], tmp_path)


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        (
            "rte",
            [["index", "sentence1", "sentence2", "label"], ["0", "A", "B"]],
            r"line 2: saw 3 .* expected 4",
        ),
        ("rte", [["sentence1", "sentence2", "label"], ["A", "B", "entailment"], []], r"line 3: saw 1 "),
        ("cola", [["gj04", "1", "", "Fine."], ["gj04", "1", "Fine."]], r"line 2: saw 3 .* expected 4"),
        ("sst2", [["sentence", "label"], ["fine", "1", ""]], r"line 2: saw 3 .* expected 2"),
        ("cola", [["gj04", "2", "", "Fine."]], r"line 1: the label is '2', known are 0, 1"),
        (
            "cola",
            [["sentence", "label"], ["Fine.", "1"], ["Bad.", ""]],
            r"line 3: the label is '', known are 0, 1",
        ),
        (
            "mnli",
            [["premise", "hypothesis", "label"], ["A", "B", "-"]],
            r"line 2: the label is '-', known are ent",
        ),
        ("rte", [["sentence1", "sentence2", "label"], ["A", "B", "1"]], r"line 2: the label is '1'"),
        ("stsb", [["sentence1", "sentence2", "score"], ["A", "B", "high"]], r"line 2: the score is 'high'"),
        ("stsb", [["sentence1", "sentence2", "score"], ["A", "B", "nan"]], r"line 2: the score is 'nan'"),
        ("stsb", [["sentence1", "sentence2", "score"], ["A", "B", "5.1"]], r"line 2: .* outside 0 to 5"),
        (
            "qqp",
            [["question1", "is_duplicate"], ["A", "1"]],
            r"'question2', the header has question1, is_dup",
        ),
        ("qqp", [["question1", "question2"], ["A", "B"]], r"'label' or 'is_duplicate', the header has"),
        (
            "rte",
            [["sentence1", "sentence1", "sentence2", "label"], ["A", "A", "B", "x"]],
            r"one column 'sentence1'",
        ),
        ("rte", [["sentence1", "sentence2", "label"]], r"has a header but no rows"),
        ("rte", [], r"train.tsv is empty"),
    ],
)
def test_broken_files_are_told_where_and_why(
    tmp_path: Path, write: Write, name: str, rows: list[list[str]], message: str
) -> None:
    write(f"{TASKS[name].folder}/train.tsv", *rows)
    with pytest.raises(DataError, match=message) as caught:
        load_task(TASKS[name], tmp_path)
    assert "train.tsv" in str(caught.value)


def test_bytes_that_are_not_utf8_are_told_where(tmp_path: Path, write: Write) -> None:
    write("SST-2/train.tsv").write_bytes(b"sentence\tlabel\nfine\t1\ncaf\xe9\t1\n")
    with pytest.raises(DataError, match=r"train.tsv, line 3: byte 0xe9 at position 4 is not UTF-8"):
        load_task(TASKS["sst2"], tmp_path)


# GLUE from the hub


def hub_task(name: str) -> DatasetDict:
    """What the hub would give: its columns, its split names, its order of labels."""
    task = TASKS[name]
    label = Value("float32") if task.is_regression else ClassLabel(names=list(task.label_names))
    features = Features({column: Value("string") for column in task.columns} | {"label": label, "idx": Value("int32")})
    _, expected = OWN_LAYOUT[name]
    suffix = "_matched" if name == "mnli" else ""
    names = {"train": "train", "dev": f"validation{suffix}", "test": f"test{suffix}"}
    splits = DatasetDict()
    for split, rows in expected.items():
        columns: dict[str, list[Any]] = {column: [row[i] for row in rows] for i, column in enumerate(task.columns)}
        columns["label"] = [-1 if split.startswith("test") else row[-1] for row in rows]
        columns["idx"] = list(range(len(rows)))
        splits[names.get(split, split)] = Dataset.from_dict(columns, features=features)
    return splits


@pytest.mark.parametrize("name", list(TASKS))
def test_the_hub_gives_the_same_rows(tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    asked = []

    def load_dataset(*arguments: str) -> DatasetDict:
        asked.append(arguments)
        return hub_task(name)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = TASKS[name]
    loaded = load_task(task, with_test=True)
    assert asked == [("nyu-mll/glue", name)]
    files, expected = OWN_LAYOUT[name]
    assert {split: rows_of(dataset) for split, dataset in loaded.items()} == expected
    for file, rows in files.items():
        write(f"{task.folder}/{file}", *rows)
    own = load_task(task, tmp_path, with_test=True)
    for split in own:
        assert fingerprint(own[split]) == fingerprint(loaded[split])
        assert own[split].features == loaded[split].features


def test_without_a_network_the_folder_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*arguments: str) -> DatasetDict:
        raise ConnectionError("Couldn't reach 'nyu-mll/glue' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"\(rte\) from the hub: Couldn't reach.*pass --glue_dir"):
        load_task(TASKS["rte"])


def test_another_order_of_labels_on_the_hub_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = hub_task("rte").cast_column("label", ClassLabel(names=["not_entailment", "entailment"]))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: other)
    with pytest.raises(DataError, match=r"has the labels \['not_entailment', 'entailment'\]"):
        load_task(TASKS["rte"])


# The user's own files

ROWS = [
    {"sentence": "good, really", "label": "pos"},
    {"sentence": 'a "bad" one', "label": "neg"},
    {"sentence": "NA", "label": "pos"},
]


def write_rows(path: Path, rows: list[dict[str, Any]], features: Features | None = None) -> Path:
    """The same rows in the form that the suffix names."""
    data = Dataset.from_list(rows, features=features)
    if path.suffix == ".tsv":
        lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
        path.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")
    elif path.suffix == ".csv":
        data.to_csv(path, index=False)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    else:
        data.to_parquet(path)
    return path


SUFFIXES = [".tsv", ".csv", ".json", ".jsonl", ".parquet"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_form_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    task, splits = load_files(
        write_rows(tmp_path / f"train{suffix}", ROWS),
        write_rows(tmp_path / f"dev{suffix}", ROWS[:2]),
        write_rows(tmp_path / f"test{suffix}", ROWS[1:]),
    )
    assert task.columns == ("sentence",)
    assert task.label_names == ("neg", "pos")
    assert task.primary == "accuracy"
    assert "f1" in task.metrics
    assert list(splits) == ["train", "dev", "test"]
    assert rows_of(splits["train"]) == [("good, really", 1), ('a "bad" one', 0), ("NA", 1)]
    assert rows_of(splits["dev"]) == rows_of(splits["train"])[:2]
    assert rows_of(splits["test"]) == rows_of(splits["train"])[1:]
    other = load_files(write_rows(tmp_path / "other.jsonl", ROWS))[1]["train"]
    assert fingerprint(splits["train"]) == fingerprint(other)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_scores_are_a_regression_and_whole_numbers_are_classes(tmp_path: Path, suffix: str) -> None:
    pair = {"premise": "a", "hypothesis": "b"}
    task, splits = load_files(write_rows(tmp_path / f"a{suffix}", [pair | {"label": 2.5}, pair | {"label": 4.0}]))
    assert task.is_regression
    assert task.columns == ("premise", "hypothesis")
    assert (task.primary, task.metrics) == ("spearman", ("spearman", "pearson"))
    assert splits["train"].features["label"] == Value("float32")
    assert splits["train"]["label"][:] == [2.5, 4.0]

    labels = [10, 2, 0, 2]
    whole = write_rows(tmp_path / f"b{suffix}", [pair | {"label": label} for label in labels])
    task, splits = load_files(whole)
    assert task.label_names == ("0", "2", "10")
    assert task.metrics == ("accuracy", "f1_macro")
    assert splits["train"]["label"][:] == [2, 1, 0, 1]
    task, splits = load_files(whole, regression=True)
    assert task.is_regression
    assert splits["train"]["label"][:] == [10.0, 2.0, 0.0, 2.0]


def test_given_names_make_classes_of_numbers(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"text": "a", "label": 1.5}, {"text": "b", "label": 2.5}])
    task, splits = load_files(file, label_names=["2.5", "1.5"])
    assert task.label_names == ("2.5", "1.5")
    assert splits["train"]["label"][:] == [1, 0]


def test_digits_parted_by_underscores_are_words(write: Write) -> None:
    task = load_files(write("a.csv", text="text,label\nx,1_0.5\ny,2_0.5\n"))[0]
    assert task.label_names == ("1_0.5", "2_0.5")


def test_truth_values_are_classes(write: Write) -> None:
    rows = '{"text": "a", "label": true}\n{"text": "b", "label": false}\n'
    task, splits = load_files(write("a.jsonl", text=rows))
    assert task.label_names == ("false", "true")
    assert splits["train"]["label"][:] == [1, 0]


def test_a_suffix_may_be_in_capitals(tmp_path: Path) -> None:
    written = write_rows(tmp_path / "a.csv", ROWS)
    assert len(load_files(written.rename(tmp_path / "B.CSV"))[1]["train"]) == 3


def test_a_row_of_parquet_is_told_by_its_number(tmp_path: Path) -> None:
    rows = [{"text": "x", "label": 1}, {"text": " ", "label": 0}]
    with pytest.raises(DataError, match=r"a\.parquet, row 2: 'text' is missing"):
        load_files(write_rows(tmp_path / "a.parquet", rows))


@pytest.mark.parametrize("text", ["\n {rows}", "\ufeff{rows}\n", "\r\n{rows}\r\n"])
def test_a_list_of_objects_may_stand_between_blanks(write: Write, text: str) -> None:
    file = write("a.json", text=text.format(rows=json.dumps(ROWS, indent=1)))
    assert rows_of(load_files(file)[1]["train"]) == [("good, really", 1), ('a "bad" one', 0), ("NA", 1)]


def test_floats_can_be_classes_when_asked(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"text": "a", "label": 0.0}, {"text": "b", "label": 1.0}])
    task, splits = load_files(file, regression=False)
    assert task.label_names == ("0", "1")
    assert splits["train"]["label"][:] == [0, 1]


def test_given_names_fix_the_order_and_may_be_written_as_ids(tmp_path: Path) -> None:
    task, splits = load_files(write_rows(tmp_path / "a.csv", ROWS), label_names=["pos", "neg", "mixed"])
    assert task.label_names == ("pos", "neg", "mixed")
    assert splits["train"]["label"][:] == [0, 1, 0]
    ids = write_rows(tmp_path / "b.csv", [{"text": "a", "label": 1}, {"text": "b", "label": 0}])
    assert load_files(ids, label_names=["neg", "pos"])[1]["train"]["label"][:] == [1, 0]


def test_class_names_in_parquet_are_kept(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["zebra", "ant"])})
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    train = write_rows(tmp_path / "train.parquet", rows, features)
    test = write_rows(tmp_path / "test.parquet", [{"text": "c", "label": -1}], features)
    task, splits = load_files(train, test_file=test)
    assert task.label_names == ("zebra", "ant")
    assert splits["train"]["label"][:] == [0, 1]
    assert splits["test"].column_names == ["text"]


def test_columns_can_be_named(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.csv", [{"q": "x", "a": "y", "gold": "n"}, {"q": "z", "a": "w", "gold": "y"}])
    task, splits = load_files(file, text_columns=["a", "q"], label_column="gold")
    assert (task.columns, task.label_column) == (("a", "q"), "label")
    assert rows_of(splits["train"]) == [("y", "x", 0), ("w", "z", 1)]
    assert splits["train"].column_names == ["a", "q", "label"]


def test_a_question_with_its_sentence_is_a_pair(tmp_path: Path) -> None:
    rows = [
        {"question": "x", "sentence": "y", "label": "n"},
        {"question": "z", "sentence": "w", "label": "y"},
    ]
    assert load_files(write_rows(tmp_path / "a.csv", rows))[0].columns == ("question", "sentence")


def test_an_unlabelled_test_file(tmp_path: Path, write: Write) -> None:
    train = write_rows(tmp_path / "train.csv", ROWS)
    for text in ("sentence\nwho knows\n", "sentence,label\nwho knows,\n"):
        splits = load_files(train, test_file=write("test.csv", text=text))[1]
        assert rows_of(splits["test"]) == [("who knows",)]


def test_csv_fields_may_hold_line_breaks_and_lines_are_still_counted(write: Write) -> None:
    head = 'text,label\n"two\nlines, quoted",a\n\nplain,b\n'
    assert rows_of(load_files(write("a.csv", text=head))[1]["train"]) == [
        ("two\nlines, quoted", 0),
        ("plain", 1),
    ]
    with pytest.raises(DataError, match=r"b.csv, line 6: saw 3 comma-separated fields, expected 2"):
        load_files(write("b.csv", text=head + "one,two,c\n"))
    with pytest.raises(DataError, match=r"c.csv, line 6: 'text' is missing"):
        load_files(write("c.csv", text=head + ",a\n"))
    with pytest.raises(DataError, match=r"d.csv, line 6: not valid CSV"):
        load_files(write("d.csv", text=head + '"open,a\n'))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.xlsx", "x", r"suffix '.xlsx'; give a file named .tsv, .csv, .json, .jsonl, .parquet"),
        ("a.csv", "", "is empty"),
        ("a.csv", "text,label\n", "no rows"),
        ("a.csv", "text,text,label\nx,y,z\n", "'text' stands twice"),
        ("a.csv", "body,label\nx,y\n", "cannot tell which columns are the text among body, label"),
        ("a.csv", "text,sentence,label\nx,y,z\n", "cannot tell which columns are the text"),
        ("a.csv", "text,gold\nx,y\n", "has no column 'label', only text, gold"),
        ("a.csv", "text,label\nx,a\ny,\n", "line 3: 'label' is missing"),
        ("a.csv", "text,label\nx,a\ny,a\n", "single label 'a'"),
        ("a.csv", "text,label\nx,1.5\ny,nan\n", "line 3: the score is 'nan'"),
        ("a.csv", "text,label\nx,1.5\ny,inf\n", "line 3: the score is 'inf', which is no finite number"),
        ("a.tsv", "text\tlabel\nx\n", "line 2: saw 1 tab-separated fields, expected 2"),
        ("a.tsv", "text\tlabel\nx\ta\n \tb\n", "line 3: 'text' is missing"),
        ("a.json", "[]", "no rows"),
        ("a.json", '[{"text": "x", "label": 1},\n{"text": }]', "line 2: not valid JSON"),
        ("a.json", '[{"text": "x", "label": ' + "1" * 5000 + "}]", "a.json: not valid JSON .Exceeds the limit"),
        ("a.json", "[" * 100_000, "a.json: not valid JSON .maximum recursion depth"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"label": ' + "1" * 5000 + "}", "line 2: not valid JSON .Exceeds the"),
        ("a.jsonl", '{"text": ' + "[" * 100_000, "line 1: not valid JSON .maximum recursion depth"),
        ("a.json", '[{"text": "x", "label": 1}, 3]', "row 2: saw 3, expected an object"),
        ("a.jsonl", " \n", "is empty"),
        ("a.jsonl", '{"text": "x", "label": 1}\n\n{"text": \n', "line 3: not valid JSON"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"label": 2}\n', "line 2: 'text' is missing"),
        (
            "a.jsonl",
            '{"text": "x", "label": 1}\n{"text": "y", "label": null}\n',
            "line 2: 'label' is missing",
        ),
        ("a.jsonl", '{"text": 5, "label": 1}\n', "line 1: 'text' holds 5, which is no text"),
        ("a.jsonl", '{"text": "x", "label": [1]}\n', r"line 1: 'label' holds \[1\]"),
        ("a.jsonl", '{"text": "x", "label": 1.5}\n{"text": "y", "label": NaN}\n', "line 2: the score is nan"),
        (
            "a.jsonl",
            '{"text": "x\\ud83d", "label": 1}\n',
            "line 1: 'text' holds a broken character at position 2",
        ),
        ("a.parquet", "no parquet", "cannot be read as parquet"),
    ],
)
def test_broken_files_of_ones_own_are_told_where_and_why(write: Write, name: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_files(write(name, text=text))
    assert name in str(caught.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_file_is_named(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(DataError, match=f"absent{suffix} does not exist"):
        load_files(tmp_path / f"absent{suffix}")


@pytest.mark.parametrize("split", ["dev_file", "test_file"])
def test_a_label_that_the_head_does_not_know_is_refused(tmp_path: Path, split: str) -> None:
    train = write_rows(tmp_path / "train.jsonl", ROWS)
    other = write_rows(tmp_path / "other.jsonl", [ROWS[0], {"sentence": "so so", "label": "mixed"}])
    with pytest.raises(DataError, match=r"other.jsonl, line 2: the label is 'mixed', known are neg, pos"):
        load_files(train, **{split: other})  # type: ignore[arg-type]


def test_every_split_needs_the_columns(tmp_path: Path, write: Write) -> None:
    train = write_rows(tmp_path / "train.csv", ROWS)
    with pytest.raises(DataError, match=r"dev.csv has no column 'sentence', only text, label"):
        load_files(train, write("dev.csv", text="text,label\nx,pos\n"))
    with pytest.raises(DataError, match=r"dev.csv has no column 'label', only sentence"):
        load_files(train, write("dev.csv", text="sentence\nx\n"))
    with pytest.raises(DataError, match=r"train.csv has no column 'title', only sentence, label"):
        load_files(train, text_columns=["title"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text_columns": ["a", "b", "c"]}, "name one column, or two"),
        ({"text_columns": []}, "name one column, or two"),
        ({"text_columns": ["sentence", "sentence"]}, "two different"),
        ({"text_columns": ["label"]}, "named as text and as label"),
        ({"text_columns": ["label"], "label_column": "sentence"}, "rename that text column"),
        ({"label_names": ["a", "b"], "regression": True}, "drop one"),
        ({"label_names": ["a"]}, "at least two names"),
        ({"label_names": "ab"}, "at least two names"),
        ({"label_names": ["neg", "neg", "pos"]}, "at least two different"),
    ],
)
def test_arguments_that_contradict_each_other(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_files(write_rows(tmp_path / "train.csv", ROWS), **arguments)


# Fingerprints and notes


def test_the_fingerprint_is_of_the_contents() -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b"])})
    rows = [{"text": "one", "label": 0}, {"text": "two", "label": 1}]
    plain = Dataset.from_list(rows, features=features)
    reference = fingerprint(plain)
    # Fixed, so that a stored result can be compared with one of a later version.
    assert reference == "39d814c3d699be55487e2056652a3ec506c3168732ce552c7825663a56d0ff30"
    assert fingerprint(Dataset.from_list(rows)) == reference
    assert fingerprint(plain.add_column("idx", [5, 6]).select_columns(["label", "idx", "text"])) == reference
    assert fingerprint(plain.select([1, 0]).select([1, 0])) == reference
    assert fingerprint(plain.with_format("numpy")) == reference

    different = [
        plain.select([1, 0]),
        plain.select([0]),
        plain.remove_columns("label"),
        plain.rename_column("text", "sentence"),
        Dataset.from_list([{"text": "one", "label": 0}, {"text": "two", "label": 0}]),
        Dataset.from_list([{"text": "one ", "label": 0}, {"text": "two", "label": 1}]),
        Dataset.from_list([{"text": "one", "label": 0.0}, {"text": "two", "label": 1.0}]),
    ]
    assert len({reference, *map(fingerprint, different)}) == len(different) + 1


def test_the_fingerprint_does_not_depend_on_the_order_of_the_columns() -> None:
    pair = Dataset.from_dict({"premise": ["x"], "hypothesis": ["y"]})
    assert fingerprint(pair.select_columns(["hypothesis", "premise"])) == fingerprint(pair)
    assert fingerprint(Dataset.from_dict({"premise": ["y"], "hypothesis": ["x"]})) != fingerprint(pair)


def test_the_fingerprint_knows_where_a_text_ends() -> None:
    assert fingerprint(Dataset.from_dict({"a": ["xy"], "b": ["z"]})) != fingerprint(
        Dataset.from_dict({"a": ["x"], "b": ["yz"]})
    )


def test_a_text_that_is_missing_is_not_an_empty_one() -> None:
    found = {fingerprint(Dataset.from_dict({"text": ["a", text]})) for text in ("", None, "n")}
    assert len(found) == 3


def test_scores_have_the_same_fingerprint_in_either_precision() -> None:
    columns = {"text": ["a"], "label": [3.8]}
    types = [Features({"text": Value("string"), "label": Value(kind)}) for kind in ("float32", "float64")]
    first, second = (fingerprint(Dataset.from_dict(columns, features=features)) for features in types)
    assert first == second


def test_the_fingerprint_is_the_same_in_another_process() -> None:
    code = (
        "from datasets import Dataset; from unipelt.glue.data import fingerprint; "
        "print(fingerprint(Dataset.from_dict({'text': ['one', 'zwei \u00e4'], 'label': [0, 1]})))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        check=True,
        text=True,
    )
    here = fingerprint(Dataset.from_dict({"text": ["one", "zwei \u00e4"], "label": [0, 1]}))
    assert run.stdout.strip() == here


def test_tokens_have_no_fingerprint() -> None:
    with pytest.raises(ValueError, match="no text column, only input_ids"):
        fingerprint(Dataset.from_dict({"input_ids": [[1, 2]]}))


def test_a_subset_is_noted() -> None:
    mnli = TASKS["mnli"]
    assert split_note(mnli, "train", 3000) == "a subset: 3,000 of 392,702 rows"
    assert split_note(mnli, "train", 392702) is None
    assert split_note(mnli, "dev", 10000) == "not the official split: 10,000 rows, where that has 9,815"
    assert split_note(mnli, "extra", 5) is None
