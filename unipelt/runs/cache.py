"""A cache for the runs of one process: data, token ids, tokenizer and base.

Every entry is kept with the state of its files. The entry is read again if one of these files has changed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unipelt.injection.parameters import kept_names

TASKS = 8
"""The number of datasets to keep, the last used ones. It is the number of tasks in GLUE's tables."""
_TOKENIZERS = 2
_HASHES = 8

Data = TypeVar("Data")
State = tuple[tuple[str, int, int, int], ...]
"""For each file: path, inode, size in bytes, and time of the last change in nanoseconds; -1 for an absent file."""


def state_of(paths: Iterable[str | Path]) -> State:
    """Return the state of these files, sorted by path. An absent file is not an error."""
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
    """Return the paths of the files directly in a folder. Raise `OSError` if the folder does not exist."""
    with os.scandir(folder) as entries:
        return [entry.path for entry in entries if entry.is_file()]


class SharedCache:
    """Cache that the runs of one process share. Give each run the same cache, or a single run a new cache."""

    def __init__(self) -> None:
        self._data: dict[Hashable, tuple[State, Any]] = {}
        self._tokenizers: dict[Hashable, tuple[State, PreTrainedTokenizerBase]] = {}
        self._hashes: dict[Hashable, tuple[State, str]] = {}
        self._base: dict[str, Tensor] = {}
        self._base_state: State = ()

    def data(self, key: Hashable, files: Iterable[str | Path], read: Callable[[], Data]) -> Data:
        """Return the data of these files from the cache, or read the data if the cache lacks them.

        Args:
            key: everything else that determines the data.
            files: the files of the data. There are none if the data cannot change, as on the hub.
            read: function that returns the data.
        """
        return _cached(self._data, key, files, read, TASKS)

    def tokenizer(
        self, key: Hashable, files: Iterable[str | Path], load: Callable[[], PreTrainedTokenizerBase]
    ) -> PreTrainedTokenizerBase:
        """Return the tokenizer of these files from the cache, or load it. All runs get the same object."""
        return _cached(self._tokenizers, key, files, load, _TOKENIZERS)

    def sha256(self, path: str) -> str:
        """Return the SHA-256 of a file, in hexadecimal. Raise `OSError` if the file cannot be read."""
        return _cached(self._hashes, path, [path], lambda: _sha256(path), _HASHES)

    def share_base(self, model: PreTrainedModel, state: State) -> None:
        """Put the frozen base of an injected model into the memory of the previous model's base.

        Only parameters that were loaded from the same files are shared. They are the same numbers, so no number is
        compared. Parameters that started at random are not shared.

        Args:
            model: a model that was just loaded and injected.
            state: the state of the files with its weights. The contents of the files must not change meanwhile.
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
    """Return whether two tensors are in the same memory, so that they are the same numbers."""
    return other is not None and all(
        get(one) == get(other) for get in (Tensor.data_ptr, Tensor.size, Tensor.stride, _dtype, _device)
    )


def _dtype(tensor: Tensor) -> torch.dtype:
    return tensor.dtype


def _device(tensor: Tensor) -> torch.device:
    return tensor.device


def _cached(
    kept: dict[Hashable, Any], key: Hashable, files: Iterable[str | Path], make: Callable[[], Data], most: int
) -> Data:
    """Return the kept value of the key if its files have not changed. Otherwise make the value and keep it."""
    state = state_of(files)
    before, made = kept.pop(key, (None, None))
    if before != state:
        made = make()
    # The state is from before the files were read, so a change meanwhile is seen next time. The entry is put last, so
    # the first entry is the least recently used one.
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
