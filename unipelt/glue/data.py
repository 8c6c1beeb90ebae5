"""Readers of a task's data: GLUE from the hub or from a folder, or the user's own files.

Every reader returns text columns (strings) and, for a labelled split, `label` (class ids, or float32 scores). No row is
repaired or skipped silently. Data that cannot be read raise `DataError` with file, line, cause and remedy.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, Value

from unipelt.files.messages import shorten, show, show_path
from unipelt.glue.columns import (
    are_scores,
    build,
    check_labels_present,
    check_texts,
    choose_columns,
    is_unlabelled,
    need_column,
    sort_classes,
)
from unipelt.glue.tasks import Task, shorten_name
from unipelt.runs.tables import DataError, Table, read_file, read_lines, read_tsv

__all__ = ["HUB_NAME", "DataError", "fingerprint", "load_files", "load_task", "split_note"]

HUB_NAME = "nyu-mll/glue"

# GLUE's own files have these names of a column. Every reader accepts the hub's name as well.
_FILE_COLUMNS: dict[str, dict[str, tuple[str, ...]]] = {
    "mrpc": {"sentence1": ("#1 String",), "sentence2": ("#2 String",), "label": ("Quality",)},
    "qqp": {"label": ("is_duplicate",)},
    "stsb": {"label": ("score",)},
    "mnli": {"premise": ("sentence1",), "hypothesis": ("sentence2",), "label": ("gold_label",)},
}
_COLA_COLUMNS = ("source", "label", "star", "sentence")
_MRPC_IDS = ("#1 ID", "#2 ID")
_MRPC_TRAIN, _MRPC_TEST, _MRPC_DEV_IDS = "msr_paraphrase_train.txt", "msr_paraphrase_test.txt", "dev_ids.tsv"


def load_task(task: Task, glue_dir: str | Path | None = None, with_test: bool = False) -> DatasetDict:
    """Load a GLUE task.

    The splits are `train` and `dev` (GLUE's dev, for MNLI the matched one). With `with_test` there is also the
    unlabelled `test` (and MNLI's `test_mismatched`), which has only the text columns. Texts are not changed.

    Args:
        task: One of GLUE's tasks.
        glue_dir: A folder with a folder for each task, named as in GLUE's download (`CoLA`, `SST-2`, ...;
            case and hyphens do not matter). The files are GLUE's own, or tidy ones with a header of GLUE's field names
            and one row on each line. Fields are separated by tabs, and quotation marks are plain characters. None
            loads `nyu-mll/glue` from the hub.
        with_test: Whether to load the test split too.

    Returns:
        The splits, with the columns `task.columns` and `label`.

    Raises:
        DataError: Data are missing or have the wrong format.
    """
    splits = ["train", "dev"]
    if with_test:
        splits += [split for split in task.official_rows if split.startswith("test")]
    if glue_dir is None:
        return _load_hub(task, splits)
    folder = find_folder(task, Path(glue_dir))
    return DatasetDict({split: _read_split(task, folder, split) for split in splits})


def load_files(
    train_file: str | Path,
    dev_file: str | Path | None = None,
    test_file: str | Path | None = None,
    text_columns: Sequence[str] | None = None,
    label_column: str = "label",
    label_names: Sequence[str] | None = None,
    regression: bool | None = None,
) -> tuple[Task, DatasetDict]:
    """Load a task from the user's own files: classification or regression over one or two text columns.

    The suffix of a file names its format: `.tsv` (fields separated by tabs, without quoting), `.csv` (with quoting),
    `.json` (a list of objects, or one object on each line), `.jsonl` or `.parquet`. The label column is renamed to
    `label`. The test file may be unlabelled: its label column is absent or empty.

    Args:
        train_file: File with labelled rows.
        dev_file: File with labelled rows.
        test_file: File with labelled or unlabelled rows.
        text_columns: One or two columns. None finds `sentence` or `text`, or a pair such as `sentence1` and
            `sentence2`.
        label_column: The column to predict.
        label_names: The classes, in the order of their ids. The labels are then these names, or ids from 0. None takes
            the sorted classes of the train file. They are sorted as numbers if all are whole numbers.
        regression: Whether the labels are scores. None means regression if all labels are numbers, and at least one is
            not written as a whole number.

    Returns:
        The task, named `custom`, and its splits. Its metrics are accuracy, F1 and Matthews correlation for two
        classes, accuracy and macro F1 for more classes, and Spearman and Pearson for regression. The first metric is
        the primary one.

    Raises:
        DataError: A file cannot be read, a column is absent, or a text or a label is missing or unknown.
        ValueError: The arguments contradict each other.
    """
    if label_names is not None:
        if regression:
            raise ValueError("label_names were given with regression=True, which has no classes; drop one")
        if isinstance(label_names, str) or len(label_names) < 2:
            raise ValueError(f"label_names are {label_names!r}; give a list of at least two names")
    files = {"train": train_file, "dev": dev_file, "test": test_file}
    tables = {split: read_file(Path(file)) for split, file in files.items() if file is not None}
    train = tables["train"]
    columns = choose_columns(train, text_columns, label_column)
    for split, table in tables.items():
        optional = split == "test" and is_unlabelled(table, label_column)
        for column in columns if optional else (*columns, label_column):
            need_column(table, column)
        check_texts(table, columns)
        if not optional:
            check_labels_present(table, label_column)

    labels = train.columns[label_column]
    if regression is None:
        regression = label_names is None and label_column not in train.class_names and are_scores(labels)
    if regression:
        names: tuple[str, ...] = ()
        metrics: tuple[str, ...] = ("spearman", "pearson")
    else:
        names = tuple(label_names or train.class_names.get(label_column) or sort_classes(labels))
        if len(names) < 2:
            raise DataError(
                f"{train.path}: column {show(label_column)} holds the single label {show(names[0])}; "
                "a classifier needs at least two, so check the column or give label_names"
            )
        metrics = ("accuracy", "f1", "matthews_correlation") if len(names) == 2 else ("accuracy", "f1_macro")
    task = Task(
        name="custom",
        columns=columns,
        label_names=names,
        metrics=metrics,
        primary=metrics[0],
        folder="",
    )
    splits = {}
    for split, table in tables.items():
        unlabelled = split == "test" and is_unlabelled(table, label_column)
        splits[split] = build(task, table, None if unlabelled else label_column)
    return task, DatasetDict(splits)


def fingerprint(dataset: Dataset) -> str:
    """Return the SHA-256, in hexadecimal, of the texts and labels of all rows, in order.

    The SHA-256 depends only on the names and values of the text columns and of `label` (scores as float32). The source
    of the rows, the order of the columns, other columns (ids, tokens) and the versions of libraries do not change it.

    Raises:
        ValueError: The data has no text column.
    """
    texts = sorted(
        name
        for name, feature in dataset.features.items()
        if name != "label" and isinstance(feature, Value) and feature.dtype in ("string", "large_string")
    )
    if not texts:
        raise ValueError(
            f"the data has no text column, only {', '.join(dataset.column_names)}; "
            "take the fingerprint before the texts are tokenized and removed"
        )
    names = [*texts, "label"] if "label" in dataset.column_names else texts
    plain = dataset.with_format(None).select_columns(names)
    digest = hashlib.sha256()
    for name in names:
        digest.update(_encode(name))
    for batch in plain.iter(batch_size=1000):
        for row in zip(*(batch[name] for name in names), strict=True):
            digest.update(b"".join(map(_encode, row)))
    return digest.hexdigest()


def _encode(value: Any) -> bytes:
    """Return a value as bytes that no other value has: its type, its length if that varies, and its contents."""
    if isinstance(value, str):
        text = value.encode("utf-8")
        return b"s" + struct.pack("<q", len(text)) + text
    if isinstance(value, float):
        return b"f" + struct.pack("<f", value)
    if value is None:
        return b"n"
    return b"i" + struct.pack("<q", value)


def split_note(task: Task, split: str, rows: int) -> str | None:
    """Return how a split differs from GLUE's official split, such as `"a subset: 3,000 of 392,702 rows"`.

    Returns:
        The note. None if the number of rows is the official one, or if the official number is unknown.
    """
    official = task.official_rows.get(split)
    if official is None or rows == official:
        return None
    if rows < official:
        return f"a subset: {rows:,} of {official:,} rows"
    return f"not the official split: {rows:,} rows, where that has {official:,}"


# GLUE from the hub


def _load_hub(task: Task, splits: Sequence[str]) -> DatasetDict:
    try:
        hub = datasets.load_dataset(HUB_NAME, task.name)
    except Exception as error:  # the hub's client raises many kinds of errors
        raise DataError(
            f"could not load {HUB_NAME} ({task.name}) from the hub: {error}; "
            "connect to the network, or pass --glue_dir with a folder that holds GLUE"
        ) from error
    suffix = "_matched" if task.name == "mnli" else ""
    hub_names = {"train": "train", "dev": f"validation{suffix}", "test": f"test{suffix}"}
    loaded = DatasetDict()
    for split in splits:
        dataset = hub[hub_names.get(split, split)]
        if split.startswith("test"):
            loaded[split] = dataset.select_columns(list(task.columns))
            continue
        loaded[split] = dataset.select_columns([*task.columns, "label"])
        label = dataset.features["label"]
        if not task.is_regression and tuple(label.names) != task.label_names:
            raise DataError(
                f"{HUB_NAME} ({task.name}) has the labels {label.names}, expected {list(task.label_names)}; "
                "pass --glue_dir with a folder that holds GLUE"
            )
    return loaded


# GLUE from a folder


def find_folder(task: Task, root: Path) -> Path:
    """Return the folder of a task in the folder of GLUE. Raise `DataError` if there is none, or more than one."""
    if not os.path.isdir(root):  # unlike Path.is_dir, False for a name that is too long
        raise DataError(f"{show_path(root)} is not a folder; pass --glue_dir with a folder that holds {task.folder}/")
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir())
    found = [entry for entry in folders if shorten_name(entry.name) == task.name]
    exact = [entry for entry in found if entry.name == task.folder]
    if len(exact or found) != 1:
        present = ", ".join(entry.name for entry in folders) or "no folders"
        raise DataError(
            f"{root} must hold one folder {task.folder}, it holds {shorten(present)}; "
            "pass --glue_dir with the folder above that of the task"
        )
    return (exact or found)[0]


def _read_split(task: Task, folder: Path, split: str) -> Dataset:
    labelled = not split.startswith("test")
    file = {"test_mismatched": "test_mismatched.tsv"}.get(split, f"{split}.tsv")
    if task.name == "mnli" and split in ("dev", "test"):
        file = f"{split}_matched.tsv"
    wanted = [*task.columns, "label"] if labelled else list(task.columns)
    path = folder / file
    if task.name == "mrpc" and not path.exists() and (folder / _MRPC_TRAIN).exists():
        table = _read_msr_paraphrase(task, folder, split, wanted)
    else:
        table = _read_glue_file(task, path, wanted)
    return build(task, table, "label" if labelled else None)


def _read_glue_file(task: Task, path: Path, wanted: Sequence[str]) -> Table:
    """Return the wanted columns of a file, in GLUE's own or the tidy layout, under the hub's names."""

    def choose(header: Sequence[str]) -> dict[str, int]:
        chosen = {}
        for column in wanted:
            aliases = (column, *_FILE_COLUMNS.get(task.name, {}).get(column, ()))
            found = [index for index, name in enumerate(header) if name in aliases]
            if len(found) != 1:
                raise DataError(
                    f"{path}, line 1: expected one column {' or '.join(map(repr, aliases))}, "
                    f"the header has {', '.join(header)}; give the file GLUE's field names"
                )
            chosen[column] = found[0]
        return chosen

    return read_tsv(path, choose, bare=_COLA_COLUMNS if task.name == "cola" else ())


def _read_msr_paraphrase(task: Task, folder: Path, split: str, wanted: Sequence[str]) -> Table:
    """Read MRPC from Microsoft's two files. GLUE's dev rows are the rows of the train file in `dev_ids.tsv`."""
    if split == "test":
        return _read_glue_file(task, folder / _MRPC_TEST, wanted)
    pooled = _read_glue_file(task, folder / _MRPC_TRAIN, [*wanted, *_MRPC_IDS])
    ids_path = folder / _MRPC_DEV_IDS
    if not ids_path.exists():
        raise DataError(
            f"{folder} holds {_MRPC_TRAIN} but neither {split}.tsv nor {_MRPC_DEV_IDS}, "
            "which lists GLUE's dev rows; add one of them"
        )
    dev_ids = {tuple(line.split()) for _, line in read_lines(ids_path)}
    row_ids = list(zip(*(pooled.columns[name] for name in _MRPC_IDS), strict=True))
    absent = dev_ids - set(row_ids)
    if absent:
        raise DataError(
            f"{ids_path}: the ids {' '.join(min(absent))} are of no row of {pooled.path}; "
            "take both files from the same download"
        )
    kept = [row for row, ids in enumerate(row_ids) if (ids in dev_ids) == (split == "dev")]
    if not kept:
        raise DataError(f"{ids_path}: no row is left for {split}; take both files from the same download")
    return replace(
        pooled,
        columns={name: [pooled.columns[name][row] for row in kept] for name in wanted},
        places=[pooled.places[row] for row in kept],
    )
