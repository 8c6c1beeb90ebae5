"""Low-rank terms by themselves: which outputs they are added to, how they are scaled, when they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from unipelt.config.methods import GateConfig, LoRAConfig
from unipelt.submodules.gate import Gates
from unipelt.submodules.lora import LoRA, add_low_rank
from unipelt.submodules.outputs import OutputSlice

INPUTS, RANK, ALPHA = 5, 3, 7.0
LIKE = torch.zeros(1)
# the outputs of a module with 12, and which of them are meant
ROWS = {
    "all": (OutputSlice(1, 0, 12), range(12)),
    "in front": (OutputSlice(1, 0, 4), range(4)),
    "at the end": (OutputSlice(1, 8, 4), range(8, 12)),
    "of each head, in front": (OutputSlice(2, 0, 2), (0, 1, 6, 7)),
    "of each head, inside": (OutputSlice(3, 1, 2), (1, 2, 5, 6, 9, 10)),
}
SHAPES = ((2, 6), (2, 12, 6), (2, 6, 4), (2, 3, 4, 6))
"""One with as many tokens as outputs, to tell the two apart."""


def make(rows: OutputSlice, gate: bool = False, gates: Gates | None = None) -> LoRA:
    torch.manual_seed(0)
    term = LoRA(INPUTS, rows, LoRAConfig(RANK, ALPHA, gate), LIKE, gates)
    assert not term.B.any()
    nn.init.normal_(term.B)
    return term


def update(x: Tensor, term: LoRA, places: object) -> Tensor:
    """`B A x` at its places, 0 elsewhere."""
    dense = torch.zeros(12, INPUTS)
    dense[list(places)] = term.B @ term.A  # type: ignore[call-overload]
    return x @ dense.t()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_the_term_is_added_to_its_outputs(rows: str, shape: tuple[int, ...]) -> None:
    which, places = ROWS[rows]
    assert which.count == len(tuple(places))
    term = make(which)
    x, out = torch.randn(*shape[:-1], INPUTS), torch.randn(*shape[:-1], 12)
    torch.testing.assert_close(term(x, out), out + ALPHA / RANK * update(x, term, places))


@pytest.mark.parametrize("rows", ROWS)
def test_a_gate_replaces_the_scale(rows: str) -> None:
    which, places = ROWS[rows]
    x, out = torch.randn(2, 6, INPUTS), torch.randn(2, 6, 12)
    gates = Gates(INPUTS, ("gate",), GateConfig(), LIKE, causal=True)
    term = make(which, True, gates)  # of its own
    assert term.low is None
    gate = torch.sigmoid(x @ gates.weight.t() + gates.bias)
    torch.testing.assert_close(term(x, out), out + gate * update(x, term, places))
    term = make(which, True)  # of the attention
    assert term.low is not None
    term.low.put(gate * (x @ term.A.t()))
    torch.testing.assert_close(term(x, out), out + gate * update(x, term, places))


def test_a_call_that_no_gate_belongs_to_is_refused() -> None:
    """Or it would be silently another model."""
    term, x, out = make(OutputSlice(1, 0, 12), True), torch.randn(2, INPUTS), torch.randn(2, 12)
    with pytest.raises(KeyError):
        term(x, out)
    term.skips_ungated_calls = True  # DeBERTa-v2's projection of positions
    assert term(x, out) is out
    assert term.low is not None
    term.low.put(x @ term.A.t())
    torch.testing.assert_close(term(x, out), out + update(x, term, range(12)))


def test_a_start_is_kaiming_uniform_and_zero() -> None:
    torch.manual_seed(0)
    term = LoRA(400, OutputSlice(1, 0, 8), LoRAConfig(50), LIKE, None)
    bound = 1 / math.sqrt(400)
    assert bound * 0.99 < term.A.abs().max() <= bound
    assert term.A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert not term.B.any()


def test_terms_that_share_a_projection_are_added_one_after_the_other() -> None:
    projection = nn.Linear(INPUTS, 12)
    query, value = make(OutputSlice(1, 0, 4)), make(OutputSlice(1, 8, 4))
    x = torch.randn(2, INPUTS)
    plain = projection(x)
    projection.register_forward_hook(add_low_rank)
    assert torch.equal(projection(x), plain)
    projection.lora_value = value
    torch.testing.assert_close(projection(x), value(x, plain))
    projection.lora_query = query
    torch.testing.assert_close(projection(x), query(x, value(x, plain)))
