"""The outputs of one projection in a module that computes several."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from unipelt.submodules.outputs import OutputSlice, matrix_of, own_outputs, own_rows

COUNT = 12


def places(rows: OutputSlice) -> list[int]:
    """The indices of the outputs, by a loop."""
    group = COUNT // rows.groups
    return [number * group + rows.start + index for number in range(rows.groups) for index in range(rows.size)]


SLICES = [
    OutputSlice(groups, start, size)
    for groups in (1, 2, 3)
    for start in range(COUNT // groups)
    for size in range(1, COUNT // groups - start + 1)
]


def test_projections_overlap_if_they_have_an_output_in_common() -> None:
    assert all(rows.count == len(places(rows)) for rows in SLICES)
    for one, other in itertools.product(SLICES, SLICES):
        if one.groups == other.groups:
            assert one.overlaps(other) == bool({*places(one)} & {*places(other)}), (one, other)
    assert OutputSlice(2, 0, 1).overlaps(OutputSlice(3, 3, 1)), "other groups may overlap"


@pytest.mark.parametrize("rows", SLICES[::7], ids=str)
def test_the_outputs_and_the_weight_of_a_projection(rows: OutputSlice) -> None:
    out = torch.randn(2, rows.count, COUNT)  # as many tokens as the projection has outputs, to tell the two apart
    assert torch.equal(own_outputs(out, rows), out[..., places(rows)])
    linear, transposed = nn.Linear(5, COUNT), Conv1D(COUNT, 5)
    assert torch.equal(own_rows(linear.bias, rows), linear.bias[places(rows)])
    assert torch.equal(matrix_of(linear, rows), linear.weight[places(rows)])
    assert torch.equal(matrix_of(transposed, rows), transposed.weight.t()[places(rows)])
