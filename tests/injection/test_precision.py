"""Parts of a half-precision model that train in float32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unipelt.injection.precision import widen, widen_input


class Head(nn.Module):
    """Two projections, of which one trains, and a table of float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, dtype=dtype)
        self.last = nn.Linear(4, 2, bias=False, dtype=dtype)
        self.scale = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_modules_that_hold_the_parameters_become_float32_and_take_any_input(dtype: torch.dtype) -> None:
    head = Head(dtype)
    values = head.first.weight.detach().float()
    widen(head, {"first.weight", "scale"})
    assert {name: parameter.dtype for name, parameter in head.named_parameters()} == {
        "scale": torch.float32,
        "first.weight": torch.float32,
        "first.bias": torch.float32,  # as its module computes in one dtype
        "last.weight": dtype,
    }
    assert torch.equal(head.first.weight, values)
    assert head.first(torch.ones(1, 4, dtype=dtype)).dtype == torch.float32
    assert len(head.first._forward_pre_hooks) == 1
    assert not head._forward_pre_hooks
    assert not head.last._forward_pre_hooks
    widen(head, {"first.weight", "last.weight"})
    assert len(head.first._forward_pre_hooks) == 1
    assert head.last.weight.dtype == torch.float32


def test_inputs_without_fractions_and_other_arguments_stay() -> None:
    module = nn.Linear(4, 4, dtype=torch.float64)
    states, ids = torch.ones(1, 4, dtype=torch.float16), torch.ones(1, 4, dtype=torch.long)
    wide, same, word = widen_input(module, (states, ids, "word"))
    assert wide.dtype == torch.float64
    assert same is ids
    assert word == "word"
