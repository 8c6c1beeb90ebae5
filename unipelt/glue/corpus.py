"""The data of a task: the rows of each split, with a cache of values made from them, such as token ids."""

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
    """The rows of a split as token ids. A row is encoded when it is first needed.

    Args:
        texts: the split, N rows.
        encode: function that makes token ids of rows, of each row independently.
    """

    texts: Dataset
    encode: Callable[[Dataset], Dataset]
    _made: Dataset | None = None
    _place: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))  # index of each row in _made, or -1

    def of(self, rows: np.ndarray | None = None) -> Dataset:
        """Return the token ids of these rows, which must be distinct; by default of all rows, in order."""
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
    """The data of a task, with a cache of values made from them.

    Attributes:
        task: the task.
        splits: the rows of each split, as they were read.
    """

    task: Task
    splits: DatasetDict
    _made: dict[Hashable, Any] = field(default_factory=dict)

    def cached(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return the cached result of `make()` for this key. Do not modify the result."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def texts(self, split: str, labelled: bool = True) -> Dataset:
        """Return all rows of a split, with labels or as texts alone."""
        whole = self.splits[split]
        return whole if labelled else whole.select_columns(list(self.task.columns))

    def fingerprint(self, split: str, labelled: bool = True) -> str:
        """Return the `unipelt.glue.fingerprint` of all rows of a split."""
        found: str = self.cached(("fingerprint", split, labelled), lambda: fingerprint(self.texts(split, labelled)))
        return found
