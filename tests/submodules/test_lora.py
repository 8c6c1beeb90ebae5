"""Low-rank terms by themselves: which outputs they are added to, how they are scaled, when they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unipelt.config.gate import GateConfig
from unipelt.config.parts import LoRAConfig
from unipelt.injection.hooks import add_terms, put
from unipelt.submodules.entry import Entry, Rows
from unipelt.submodules.forward_pass import AttentionPass, Passes
from unipelt.submodules.lora import LoRA
from unipelt.submodules.outputs import OutputSlice
from unipelt.submodules.room import Port, Room, SubmoduleSet, Wiring

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


def make(rows: OutputSlice, gate: str = "", name: str = "lora_query") -> LoRA:
    """A term without a gate, or with one of its `own` or of the `attention`."""
    torch.manual_seed(0)
    config = LoRAConfig(RANK, ALPHA, bool(gate))
    term = LoRA(name, rows, config)
    down = LoRA.initial_down(INPUTS, config, LIKE)
    term.set_up(down, LIKE, has_start=False, keep_down=gate != "attention")
    term.gate_name = name if gate else ""
    term.in_entry = gate == "attention"
    assert not term.B.any()
    nn.init.normal_(term.B)
    return term


def update(x: Tensor, term: LoRA, places: object, down: Tensor | None = None) -> Tensor:
    """`B A x` at its places, 0 elsewhere."""
    dense = torch.zeros(12, INPUTS)
    dense[list(places)] = term.B @ (term.A if down is None else down)  # type: ignore[call-overload]
    return x @ dense.t()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_the_term_is_added_to_its_outputs(rows: str, shape: tuple[int, ...]) -> None:
    which, places = ROWS[rows]
    assert which.count == len(tuple(places))
    term = make(which)
    x, out = torch.randn(*shape[:-1], INPUTS), torch.randn(*shape[:-1], 12)
    torch.testing.assert_close(term(x, out, None), out + ALPHA / RANK * update(x, term, places))


@pytest.mark.parametrize("rows", ROWS)
def test_a_gate_replaces_the_scale(rows: str) -> None:
    which, places = ROWS[rows]
    x, out = torch.randn(2, 6, INPUTS), torch.randn(2, 6, 12)
    term = make(which, "own")
    term.entry = Entry(INPUTS, ("lora_query",), GateConfig(), LIKE, causal=True)
    nn.init.normal_(term.entry.weight)
    gate = torch.sigmoid(x @ term.entry.weight.t() + term.entry.bias)
    want = out + gate * update(x, term, places)
    torch.testing.assert_close(term(x, out, AttentionPass()), want)
    down = term.A.detach()
    term.entry = Entry(
        INPUTS, ("lora_query",), GateConfig(), LIKE, causal=True, rows=(Rows("lora_query", "lora_query.A", "", down),)
    )
    with torch.no_grad():
        term.entry.weight[:1] = 1.0
    del term.A  # its entry has it
    gate = torch.sigmoid(x.sum(-1, keepdim=True) + term.entry.bias[:1])
    torch.testing.assert_close(term(x, out, AttentionPass()), out + gate * update(x, term, places, down))
    term, now = make(which, "attention"), AttentionPass()
    assert [name for name, _ in term.named_parameters()] == ["B"]
    now.low["lora_query"] = gate * (x @ down.t())
    torch.testing.assert_close(term(x, out, now), out + gate * update(x, term, places, down))
    term = make(which, "own")  # of the attention, without a product
    now.gates["lora_query"] = gate
    torch.testing.assert_close(term(x, out, now), out + gate * update(x, term, places))


@pytest.mark.parametrize("shape", [(2, 6, 12), (40, 40, 12)], ids=["few outputs", "many outputs"])
def test_a_term_in_single_precision_is_added_to_a_projection_in_half(shape: tuple[int, ...]) -> None:
    term = make(OutputSlice(1, 0, 12))
    x, out = torch.randn(*shape[:-1], INPUTS).bfloat16(), torch.randn(shape).bfloat16()
    want = out + (ALPHA / RANK * update(x.float(), term, range(12))).bfloat16()
    for found in (term(x, out, None), torch.no_grad()(term)(x, out, None)):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, want, atol=0.1, rtol=0.02)
    assert term.extra_repr() == "rank=3"
    assert make(OutputSlice(1, 0, 12), "own").extra_repr() == "rank=3, gate=lora_query"


def test_a_call_that_no_gate_belongs_to_is_refused() -> None:
    """Or it would be silently another model."""
    term, x, out = make(OutputSlice(1, 0, 12), "attention"), torch.randn(1, 2, INPUTS), torch.randn(1, 2, 12)
    other = make(OutputSlice(1, 0, 12), "own")
    with pytest.raises(RuntimeError, match="'lora_query' needs the pass of its layer, and was called outside of one"):
        term(x, out, None)
    with pytest.raises(RuntimeError, match="'lora_query' needs the pass of its layer, and was called outside of one"):
        other(x, out, None)
    now, down = AttentionPass(), torch.randn(RANK, INPUTS)
    with pytest.raises(KeyError):
        term(x, out, now)
    with pytest.raises(RuntimeError, match="the gate 'lora_query' was not computed"):
        other(x, out, now)
    now.low["lora_query"] = x @ down.t()
    torch.testing.assert_close(term(x, out, now), out + update(x, term, range(12), down))
    term.once = True  # DeBERTa-v2's projection, of the text first, and then of positions
    torch.testing.assert_close(term(x, out, now), out + update(x, term, range(12), down))
    assert term(x, out, now) is out
    now = AttentionPass(low={"lora_query": x @ down.t()})
    torch.testing.assert_close(term(x, out, now), out + update(x, term, range(12), down))
    plain = make(OutputSlice(1, 0, 12))
    plain.once = True  # without a gate the term belongs to the weight, which projects positions too
    for _ in range(2):
        torch.testing.assert_close(plain(x, out, None), out + ALPHA / RANK * update(x, plain, range(12)))


def test_a_start_is_kaiming_uniform_and_zero() -> None:
    torch.manual_seed(0)
    term, config = LoRA("lora_query", OutputSlice(1, 0, 8), LoRAConfig(50)), LoRAConfig(50)
    term.set_up(LoRA.initial_down(400, config, LIKE), LIKE, has_start=False, keep_down=True)
    bound = 1 / math.sqrt(400)
    assert bound * 0.99 < term.A.abs().max() <= bound
    assert term.A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert term.B.shape == (8, 50)
    assert not term.B.any()


def test_terms_that_share_a_projection_are_added_one_after_the_other() -> None:
    projection: Any = nn.Linear(INPUTS, 12)
    query, value = make(OutputSlice(1, 0, 4)), make(OutputSlice(1, 8, 4), name="lora_value")
    nn.init.normal_(value.B)
    x = torch.randn(2, INPUTS)
    plain = projection(x)
    room = Room(Passes())
    projection.unipelt_port = Port((room,), "both")
    put(projection, add_terms)
    assert torch.equal(projection(x), plain), "a room without a set"
    for names in ((), ("lora_value",), ("lora_value", "lora_query"), ("lora_query", "lora_value")):
        room["default"] = SubmoduleSet(Wiring(outputs={"both": names} if names else {}))
        want = plain
        for name in names:
            term = {"lora_query": query, "lora_value": value}[name]
            room["default"].add_module(name, term)
            want = term(x, want, None)
        torch.testing.assert_close(projection(x), want)
    want = plain.clone()
    want[:, :4] += ALPHA / RANK * x @ (query.B @ query.A).t()
    want[:, 8:] += ALPHA / RANK * x @ (value.B @ value.A).t()
    torch.testing.assert_close(projection(x), want)
    room.active = None
    assert torch.equal(projection(x), plain)
