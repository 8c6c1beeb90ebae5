"""The lines of a run's header about its data: the labels, warnings about them, and the number of texts that are cut."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from unipelt.files.messages import printable, show
from unipelt.glue.tasks import Task

_MOST = 12
"""The largest number of classes to list by name."""


def describe_labels(task: Task, labels: np.ndarray) -> list[str]:
    """Return lines on the labels of the training rows, warnings included.

    Args:
        task: the task.
        labels: the class ids or scores of the training rows, (rows,).
    """
    if task.is_regression:
        low, high, kinds = labels.min(), labels.max(), len(np.unique(labels))
        lines = [f"labels  regression from {low:g} to {high:g}, {kinds:,} different scores in train"]
        if bool((labels == np.round(labels)).all()):
            lines.append(
                f"        warning: all {kinds:,} scores are whole numbers; if they are classes, say --regression false"
            )
        return lines
    counts = Counter(labels.tolist())
    names = task.label_names
    listed = ", ".join(f"{_quoted(name)} {counts[index]:,}" for index, name in enumerate(names[:_MOST]))
    more = f" and {len(names) - _MOST:,} more" if len(names) > _MOST else ""
    lines = [f"labels  {len(names):,} classes, with rows in train: {listed}{more}"]
    alike: dict[str, list[str]] = defaultdict(list)
    for name in names:
        alike["".join(name.split()).casefold()].append(name)
    lines += [
        f"        warning: the labels {_several(group)} differ only by space or case; make them one if they are"
        for group in alike.values()
        if len(group) > 1
    ]
    if absent := [name for index, name in enumerate(names) if not counts[index]]:
        lines.append(f"        warning: no training row has the label {_several(absent)}, so it is never learnt")
    return lines


def describe_cuts(cuts: Mapping[str, tuple[int, int]], max_length: int) -> list[str]:
    """Return a line on the texts that are cut, or no line if none is.

    Args:
        cuts: for each split, the number of rows that are cut and the number of all rows.
        max_length: the largest number of tokens of a text.
    """
    told = ", ".join(f"{name} {count:,} of {rows:,}" for name, (count, rows) in cuts.items() if count)
    return [f"        warning: texts are cut at {max_length:,} tokens (max_length): {told}"] if told else []


def _quoted(name: str) -> str:
    """Return the name of a class. A name that is empty, or has unusual space or control characters, is in quotes."""
    return name if name and name == " ".join(printable(name).split()) else show(name)


def _several(names: Sequence[str]) -> str:
    shown = [show(name) for name in names[:_MOST]]
    return ", ".join(shown) + (f" and {len(names) - _MOST:,} more" if len(names) > _MOST else "")
