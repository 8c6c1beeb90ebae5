"""The table of tasks: names, labels, metrics, and what a contradictory task is told."""

from __future__ import annotations

from dataclasses import replace

import pytest

from unipelt.glue.tasks import TASKS, Task, get_task


def test_the_eight_tasks_of_the_paper() -> None:
    assert list(TASKS) == ["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte"]
    assert all(name == task.name for name, task in TASKS.items())


@pytest.mark.parametrize(
    ("name", "primary", "metrics"),
    [
        ("cola", "matthews_correlation", {"matthews_correlation"}),
        ("sst2", "accuracy", {"accuracy"}),
        ("mrpc", "f1", {"f1", "accuracy"}),
        ("qqp", "f1", {"f1", "accuracy"}),
        ("stsb", "spearman", {"spearman", "pearson"}),
        ("mnli", "accuracy", {"accuracy"}),
        ("qnli", "accuracy", {"accuracy"}),
        ("rte", "accuracy", {"accuracy"}),
    ],
)
def test_each_task_is_judged_as_in_the_paper(name: str, primary: str, metrics: set[str]) -> None:
    assert TASKS[name].primary == primary
    assert set(TASKS[name].metrics) == metrics


@pytest.mark.parametrize(
    ("name", "columns", "labels"),
    [
        ("cola", "sentence", "unacceptable acceptable"),
        ("sst2", "sentence", "negative positive"),
        ("mrpc", "sentence1 sentence2", "not_equivalent equivalent"),
        ("qqp", "question1 question2", "not_duplicate duplicate"),
        ("stsb", "sentence1 sentence2", ""),
        ("mnli", "premise hypothesis", "entailment neutral contradiction"),
        ("qnli", "question sentence", "entailment not_entailment"),
        ("rte", "sentence1 sentence2", "entailment not_entailment"),
    ],
)
def test_columns_and_label_order_are_those_of_the_hub(name: str, columns: str, labels: str) -> None:
    task = TASKS[name]
    assert task.columns == tuple(columns.split())
    assert task.label_names == tuple(labels.split())
    assert len(task.file_labels) == len(task.label_names)
    assert task.is_regression == (name == "stsb")
    assert task.num_labels == (len(labels.split()) or 1)


@pytest.mark.parametrize(
    ("name", "folder", "train", "dev", "test"),
    [
        ("cola", "CoLA", 8551, 1043, 1063),
        ("sst2", "SST-2", 67349, 872, 1821),
        ("mrpc", "MRPC", 3668, 408, 1725),
        ("qqp", "QQP", 363846, 40430, 390965),
        ("stsb", "STS-B", 5749, 1500, 1379),
        ("mnli", "MNLI", 392702, 9815, 9796),
        ("qnli", "QNLI", 104743, 5463, 5463),
        ("rte", "RTE", 2490, 277, 3000),
    ],
)
def test_folders_and_sizes_are_those_of_glue(name: str, folder: str, train: int, dev: int, test: int) -> None:
    more = {"test_mismatched": 9847} if name == "mnli" else {}
    assert TASKS[name].folder == folder
    assert TASKS[name].official_rows == {"train": train, "dev": dev, "test": test, **more}


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("SST-2", "sst2"),
        ("sts-b", "stsb"),
        ("MNLI", "mnli"),
        ("CoLA", "cola"),
        ("rte", "rte"),
        ("sts_b", "stsb"),
    ],
)
def test_names_are_found_in_any_spelling(written: str, name: str) -> None:
    assert get_task(written) is TASKS[name]


def test_an_unknown_name_is_told_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'imdb'.*cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte"):
        get_task("imdb")


@pytest.mark.parametrize("name", ["WNLI", "wnli"])
def test_wnli_is_left_out(name: str) -> None:
    with pytest.raises(ValueError, match="WNLI is left out, as in the paper"):
        get_task(name)


def test_tasks_can_be_keys() -> None:
    assert len(set(TASKS.values())) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": ("a", "b", "c")}, "text columns"),
        ({"columns": ("a", "a")}, "text columns"),
        ({"columns": ("label",)}, "both as text and as label"),
        ({"label_names": ("one",)}, "at least two"),
        ({"label_names": ("one", "one")}, "at least two different"),
        ({"metrics": ("bleu",)}, "bleu"),
        ({"metrics": ()}, "choose among"),
        ({"label_names": (), "metrics": ("accuracy",)}, "spearman"),
        ({"label_names": ("a", "b", "c"), "metrics": ("accuracy", "f1")}, "f1_macro"),
        ({"primary": "f1"}, "not among its metrics"),
    ],
)
def test_a_contradictory_task_is_refused(changes: dict[str, tuple[str, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TASKS["sst2"], **changes)  # type: ignore[arg-type]


def test_a_task_of_ones_own() -> None:
    task = Task("mine", ("text",), ("a", "b", "c"), ("accuracy", "f1_macro"), "accuracy", "")
    assert task.num_labels == 3
    assert not task.official_rows
