"""Which outputs of a module are a projection's, where one module computes several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class OutputSlice:
    """Which of a module's outputs are the projection's, where one module computes several.

    The outputs are cut into `groups` of equal size; in each, `size` of them from `start` on are meant.
    """

    groups: int
    start: int
    size: int

    @property
    def count(self) -> int:
        """How many outputs are meant."""
        return self.groups * self.size


def own_rows(outputs: Tensor, rows: OutputSlice) -> Tensor:
    """Those of all outputs of a module, (O, ...), that are the projection's."""
    groups = outputs.unflatten(0, (rows.groups, -1))
    return groups.narrow(1, rows.start, rows.size).flatten(0, 1)


def matrix_of(host: Any, rows: OutputSlice) -> Tensor:
    """A projection's weight as it is now, the rows that are meant: (O, I)."""
    return own_rows(host.weight.t() if isinstance(host, Conv1D) else host.weight, rows)
