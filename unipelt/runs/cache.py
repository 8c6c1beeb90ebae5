"""What the runs of one process have in common, kept from one to the next: data, token ids, tokenizer, base.

Everything is kept with the state of the files that it came from, and is read again when one of them has changed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset, DatasetDict
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unipelt.glue.data import fingerprint
from unipelt.glue.tasks import Task
from unipelt.injection.parameters import kept_names

TASKS = 8
"""Data sets that are kept at a time, those that were used last: as many as GLUE's tables have."""
_TOKENIZERS = 2
_HASHES = 8

State = tuple[tuple[str, int, int, int], ...]
"""Of files: path, inode, size in bytes, and when the contents were last changed, in nanoseconds; -1 if absent."""


def state_of(paths: Iterable[str | Path]) -> State:
    """The state of these files; that one is absent is for its reader to say."""
    states = []
    for path in sorted(map(os.path.abspath, paths)):
        try:
            found = os.stat(path)
        except OSError:
            states.append((path, -1, -1, -1))
        else:
            states.append((path, found.st_ino, found.st_size, found.st_mtime_ns))
    return tuple(states)


def files_in(folder: str | Path) -> list[str]:
    """The files right in a folder. Raises `OSError` if there is no such folder."""
    with os.scandir(folder) as entries:
        return [entry.path for entry in entries if entry.is_file()]


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

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` makes, made once; to be left as it is."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def texts(self, split: str, labelled: bool = True) -> Dataset:
        """All rows of a split, or their texts alone."""
        whole = self.splits[split]
        return whole if labelled else whole.select_columns(list(self.task.columns))

    def fingerprint(self, split: str, labelled: bool = True) -> str:
        """Of all rows of a split, as `unipelt.glue.fingerprint`."""
        found: str = self.once(("fingerprint", split, labelled), lambda: fingerprint(self.texts(split, labelled)))
        return found


class Kept:
    """What runs of one process have in common; give the same to each, or a new one to a run by itself."""

    def __init__(self) -> None:
        self._corpora: dict[Hashable, tuple[State, Corpus]] = {}
        self._tokenizers: dict[Hashable, tuple[State, PreTrainedTokenizerBase]] = {}
        self._hashes: dict[Hashable, tuple[State, str]] = {}
        self._base: dict[str, Tensor] = {}
        self._base_state: State = ()

    def corpus(
        self, key: Hashable, files: Iterable[str | Path], read: Callable[[], tuple[Task, DatasetDict]]
    ) -> Corpus:
        """The data that `read` reads from these files, if it was not read before.

        Args:
            key: whatever else determines what is read.
            files: none where the data are not in files that can change, as on the hub.
            read: returns the task and its splits.
        """
        return _once(self._corpora, key, list(files), lambda: Corpus(*read()), TASKS)

    def tokenizer(
        self, key: Hashable, files: Iterable[str | Path], load: Callable[[], PreTrainedTokenizerBase]
    ) -> PreTrainedTokenizerBase:
        """The tokenizer that `load` loads from these files, if it was not loaded before; the same for all runs."""
        return _once(self._tokenizers, key, list(files), load, _TOKENIZERS)

    def sha256(self, path: str) -> str:
        """SHA-256 of a file, in hexadecimal. Raises `OSError`."""
        return _once(self._hashes, path, [path], lambda: _sha256(path), _HASHES)

    def share_base(self, model: PreTrainedModel, state: State) -> None:
        """Let an injected model's frozen base be in the same memory as that of the model before.

        Only what was loaded counts, and only if it was loaded from the same files: these are the same numbers, so no
        number is compared. What started at random is the model's own.

        Args:
            model: just loaded and injected.
            state: of the files with its weights; their contents do not change meanwhile.
        """
        if state != self._base_state:
            self._base, self._base_state = {}, state
        own = set(kept_names(model))
        for name, parameter in model.named_parameters():
            if name in own or parameter.requires_grad or not getattr(parameter, "_is_hf_initialized", False):
                continue
            base = self._base.setdefault(name, parameter.data)
            if (base.shape, base.dtype) == (parameter.shape, parameter.dtype):
                parameter.data = base


def same_memory(one: Tensor, other: Tensor | None) -> bool:
    """Whether two tensors are the same numbers because they are in the same place."""
    return other is not None and all(
        get(one) == get(other) for get in (Tensor.data_ptr, Tensor.size, Tensor.stride, _dtype, _device)
    )


def _dtype(tensor: Tensor) -> torch.dtype:
    return tensor.dtype


def _device(tensor: Tensor) -> torch.device:
    return tensor.device


def _once(kept: dict[Hashable, Any], key: Hashable, files: list[str | Path], make: Callable[[], Any], most: int) -> Any:
    """What is kept under the key if its files are as they were; else what `make` makes of them now."""
    state = state_of(files)
    before, made = kept.pop(key, (None, None))
    if before != state:
        made = make()
    # with the state before they were read, so that a change meanwhile shows next time; and as the last, so that what
    # was not used for longest is the first
    kept[key] = (state, made)
    while len(kept) > most:
        del kept[next(iter(kept))]
    return made


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if hasattr(hashlib, "file_digest"):
            return hashlib.file_digest(file, "sha256").hexdigest()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
