"""The columns of a table: choice of the text columns, checks of their values, and conversion to a `Dataset`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value

from unipelt.files.messages import shorten, show
from unipelt.glue.tasks import Task
from unipelt.runs.tables import DataError, Table, name_hint, separator_hint

# Names of text columns that need not be given. A single column counts only if it is not a part of a pair.
_KNOWN_COLUMNS = (
    ("sentence1", "sentence2"),
    ("text1", "text2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("sentence",),
    ("text",),
)


def choose_columns(table: Table, text_columns: Sequence[str] | None, label_column: str) -> tuple[str, ...]:
    """Return the text columns: the given ones, or those with a usual name.

    Raises:
        DataError: No text columns were given, and the usual names give no choice or more than one.
        ValueError: The given names are invalid.
    """
    if text_columns is not None:
        columns = (text_columns,) if isinstance(text_columns, str) else tuple(text_columns)
        if len(columns) not in (1, 2) or len(set(columns)) != len(columns):
            raise ValueError(f"text_columns are {list(columns)}; name one column, or two different ones")
        if label_column in columns:
            raise ValueError(f"{label_column!r} is named as text and as label; name different columns")
        if "label" in columns:
            raise ValueError("'label' is the name that labels are kept under; rename that text column")
        return columns
    present = set(table.names) - {label_column}
    found: list[tuple[str, ...]] = []
    for columns in _KNOWN_COLUMNS:
        if present.issuperset(columns) and not any(set(columns) & set(other) for other in found):
            found.append(columns)
    if len(found) != 1:
        known = dict.fromkeys(column for columns in _KNOWN_COLUMNS for column in columns)
        raise DataError(
            f"{table.path}: cannot tell which columns are the text among {shorten(', '.join(table.names))}; "
            f"name one or two as text_columns{separator_hint(table.names) or name_hint(table.names, list(known))}"
        )
    return found[0]


def need_column(table: Table, column: str) -> None:
    """Raise `DataError` if a table lacks a column."""
    if column not in table.columns:
        raise DataError(
            f"{table.path} has no column {show(column)}, only {shorten(', '.join(table.names))}; name one of these"
            f"{separator_hint(table.names) or name_hint(table.names, [column])}"
        )


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def is_unlabelled(table: Table, label_column: str) -> bool:
    """Return whether the label column is absent or empty."""
    return all(map(_is_missing, table.columns.get(label_column, ())))


def check_texts(table: Table, columns: Sequence[str]) -> None:
    """Raise `DataError` at the first value of these columns that is missing or is not a text."""
    for column in columns:
        for row, value in enumerate(table.columns[column]):
            if _is_missing(value):
                raise DataError(f"{table.place(row)}: {show(column)} is missing; give a text or delete the row")
            if not isinstance(value, str):
                raise DataError(
                    f"{table.place(row)}: {show(column)} holds {show(value):.60}, which is no text; write a string"
                )
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON allows
                raise DataError(
                    f"{table.place(row)}: {show(column)} holds a broken character at position {error.start + 1}; "
                    "correct or delete the row"
                ) from error


def check_labels_present(table: Table, label_column: str) -> None:
    """Raise `DataError` at the first label that is missing, or is neither a word nor a number."""
    for row, value in enumerate(table.columns[label_column]):
        if _is_missing(value):
            raise DataError(f"{table.place(row)}: {show(label_column)} is missing; give a label or delete the row")
        if not isinstance(value, (str, int, float)):
            raise DataError(
                f"{table.place(row)}: {show(label_column)} holds {show(value):.60}; a label is a word or a number"
            )


def _to_float(value: Any) -> float | None:
    """Return the number that a label is or spells. Return None for words and truth values."""
    if isinstance(value, bool) or (isinstance(value, str) and "_" in value):  # float("1_0") is 10
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def are_scores(labels: Sequence[Any]) -> bool:
    """Return whether all labels are numbers, and at least one is not written as a whole number."""
    if any(_to_float(label) is None for label in labels):
        return False
    return any(isinstance(label, float) or (isinstance(label, str) and not _is_whole(label)) for label in labels)


def _is_whole(label: str) -> bool:
    return re.fullmatch(r"[+-]?[0-9]{1,1000}", label) is not None  # Python does not read very long numbers


def _class_text(label: Any) -> str:
    """Return a label as a class name: whole numbers without decimals, truth values in lower case."""
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    return str(label)


def sort_classes(labels: Sequence[Any]) -> list[str]:
    """Return the classes that occur, sorted as numbers if all are whole numbers, else as texts."""
    classes = {_class_text(label) for label in labels}
    if all(map(_is_whole, classes)):
        return sorted(classes, key=lambda label: (int(label), label))
    return sorted(classes)


def build(task: Task, table: Table, label_column: str | None) -> Dataset:
    """Return the rows as a `Dataset`. Raise `DataError` at the first label that the task does not have."""
    values: dict[str, list[Any]] = {column: table.columns[column] for column in task.columns}
    features: dict[str, Any] = {column: Value("string") for column in task.columns}
    if label_column is not None and task.is_regression:
        values["label"] = _read_scores(task, table, label_column)
        features["label"] = Value("float32")
    elif label_column is not None:
        values["label"] = _read_classes(task, table, label_column)
        features["label"] = ClassLabel(names=list(task.label_names))
    return Dataset.from_dict(values, features=Features(features))


def _read_scores(task: Task, table: Table, label_column: str) -> list[float]:
    low, high = task.score_range or (-np.inf, np.inf)
    scores = []
    for row, label in enumerate(table.columns[label_column]):
        value = _to_float(label)
        if value is None or not np.isfinite(value):
            raise DataError(
                f"{table.place(row)}: the score is {show(label):.60}, which is no finite number; correct it"
            )
        if not low <= value <= high:
            raise DataError(
                f"{table.place(row)}: the score is {show(label):.60}, outside {low:g} to {high:g}; correct it"
            )
        scores.append(value)
    return scores


def _read_classes(task: Task, table: Table, label_column: str) -> list[int]:
    ids = {name: index for index, name in enumerate(task.file_labels or task.label_names)}
    if not task.folder and not any(map(_is_whole, ids)):
        # In the user's own files a named class may also be written as its id.
        ids |= {str(index): index for index in range(task.num_labels)}
    labels = []
    for row, label in enumerate(table.columns[label_column]):
        index = ids.get(_class_text(label))
        if index is None:
            known = ", ".join(ids)
            raise DataError(
                f"{table.place(row)}: the label is {show(label):.60}, known are {known:.200}; correct or delete the row"
            )
        labels.append(index)
    return labels
