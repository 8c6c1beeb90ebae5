"""A cache for the runs of one process: data, token ids, tokenizer, base.

Everything is kept with the state of the files that it came from, and is read again when one of them has changed.
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
"""Data sets that are kept at a time, those that were used last: as many as GLUE's tables have."""
_TOKENIZERS = 2
_HASHES = 8

Data = TypeVar("Data")
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


class SharedCache:
    """Cache of what the runs of one process share. Give the same to each run, or a new one to a single run."""

    def __init__(self) -> None:
        self._data: dict[Hashable, tuple[State, Any]] = {}
        self._tokenizers: dict[Hashable, tuple[State, PreTrainedTokenizerBase]] = {}
        self._hashes: dict[Hashable, tuple[State, str]] = {}
        self._base: dict[str, Tensor] = {}
        self._base_state: State = ()

    def data(self, key: Hashable, files: Iterable[str | Path], read: Callable[[], Data]) -> Data:
        """The data that `read` reads from these files, if it was not read before.

        Args:
            key: whatever else determines what is read.
            files: none where the data are not in files that can change, as on the hub.
            read: returns what is to be kept.
        """
        return _cached(self._data, key, list(files), read, TASKS)

    def tokenizer(
        self, key: Hashable, files: Iterable[str | Path], load: Callable[[], PreTrainedTokenizerBase]
    ) -> PreTrainedTokenizerBase:
        """The tokenizer that `load` loads from these files, if it was not loaded before; the same for all runs."""
        return _cached(self._tokenizers, key, list(files), load, _TOKENIZERS)

    def sha256(self, path: str) -> str:
        """SHA-256 of a file, in hexadecimal. Raises `OSError`."""
        return _cached(self._hashes, path, [path], lambda: _sha256(path), _HASHES)

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


def _cached(
    kept: dict[Hashable, Any], key: Hashable, files: list[str | Path], make: Callable[[], Data], most: int
) -> Data:
    """The value kept under the key, if its files are as they were; else `make()`, which is then kept."""
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
