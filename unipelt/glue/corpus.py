"""The data of a task, and what was made of them: each split's rows, and their token ids."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, DatasetDict

from unipelt.glue.data import fingerprint
from unipelt.glue.tasks import Task


@dataclass(eq=False)
class Tokens:
    """The rows of a split as token ids, each made when it is first asked for.

    Args:
        texts: the split, N rows.
        encode: makes token ids of rows, each by itself.
    """

    texts: Dataset
    encode: Callable[[Dataset], Dataset]
    _made: Dataset | None = None
    _place: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))  # in _made of each row, or -1

    def of(self, rows: np.ndarray | None = None) -> Dataset:
        """Token ids of these rows, no row twice; by default of all, in order."""
        if not len(self._place):
            self._place = np.full(len(self.texts), -1)
        if rows is None:
            rows = np.arange(len(self.texts))
        new = rows[self._place[rows] < 0]
        if len(new) or self._made is None:
            made = self.encode(self.texts.select(new))
            before = [] if self._made is None else [self._made]
            self._made = datasets.concatenate_datasets([*before, made])
            self._place[new] = np.arange(len(self._made) - len(new), len(self._made))
        return self._made.select(self._place[rows])


@dataclass(eq=False)
class Corpus:
    """The data of a task, and what was made of it.

    Attributes:
        task: the task.
        splits: the rows of each split, as they were read.
    """

    task: Task
    splits: DatasetDict
    _made: dict[Hashable, Any] = field(default_factory=dict)

    def cached(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Cached `make()` for this key; do not modify the result."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def texts(self, split: str, labelled: bool = True) -> Dataset:
        """All rows of a split, or their texts alone."""
        whole = self.splits[split]
        return whole if labelled else whole.select_columns(list(self.task.columns))

    def fingerprint(self, split: str, labelled: bool = True) -> str:
        """Of all rows of a split, as `unipelt.glue.fingerprint`."""
        found: str = self.cached(("fingerprint", split, labelled), lambda: fingerprint(self.texts(split, labelled)))
        return found
