"""The outputs of one projection in a module that computes several projections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class OutputSlice:
    """The outputs of one projection in a module that computes several projections.

    The module's outputs are `groups` groups of equal size. In each group, the projection has the `size` outputs from
    index `start` on.
    """

    groups: int
    start: int
    size: int

    @property
    def count(self) -> int:
        """The number of the projection's outputs."""
        return self.groups * self.size

    def overlaps(self, other: OutputSlice) -> bool:
        """Return whether two projections of one module have outputs in common."""
        if self.groups != other.groups:
            return True
        return self.start < other.start + other.size and other.start < self.start + self.size


def own_rows(outputs: Tensor, rows: OutputSlice) -> Tensor:
    """Return the rows of a projection, (O, ...), from the rows of its module, (all outputs, ...)."""
    groups = outputs.unflatten(0, (rows.groups, -1))
    return groups.narrow(1, rows.start, rows.size).flatten(0, 1)


def matrix_of(host: Any, rows: OutputSlice) -> Tensor:
    """Return the present weight of a projection, (O, I), from the weight of its module."""
    return own_rows(host.weight.t() if isinstance(host, Conv1D) else host.weight, rows)


def own_outputs(out: Tensor, rows: OutputSlice) -> Tensor:
    """Return the outputs of a projection, (..., O), from the outputs of its module, (..., all outputs)."""
    if rows.count == out.shape[-1]:
        return out
    return out.unflatten(-1, (rows.groups, -1)).narrow(-1, rows.start, rows.size).flatten(-2)
