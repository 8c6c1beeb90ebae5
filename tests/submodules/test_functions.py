"""Functions of terms by themselves: merged into a projection, and in and out of training."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unipelt
from unipelt.config.parts import AdapterConfig, LoRAConfig
from unipelt.submodules.forward_pass import AttentionPass
from unipelt.submodules.outputs import OutputSlice
from unipelt.submodules.register import MODULES, TargetInfo
from unipelt.submodules.term import FunctionTerm, SharedParameters

INPUTS, OUTPUTS = 5, 7
CONFIGS: dict[str, Any] = {
    "ia3": unipelt.IA3Config(),
    "red": unipelt.REDConfig(),
    "dora": LoRAConfig(3, 5.0, decomposed=True),
}


def build(config: Any, host: nn.Linear, weight: Tensor | None = None) -> Any:
    """The function of a term at a projection, moved away from its start."""
    like = torch.empty(0) if weight is None else weight
    spot = TargetInfo(
        "down", INPUTS, OUTPUTS, like, SharedParameters("one"), host, OutputSlice(1, 0, host.out_features)
    )
    made = MODULES[type(config)](config, spot)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_merged_projection_adds_the_term(name: str, bias: bool) -> None:
    torch.manual_seed(0)
    host = nn.Linear(INPUTS, OUTPUTS, bias=bias).requires_grad_(False)
    made, x = build(CONFIGS[name], host), torch.randn(4, INPUTS)
    # the projection as it is, and with the terms that come before this one
    for weight, shift in ((host.weight, host.bias), (host.weight + 0.5, host.bias + 2 if bias else None)):
        y = nn.functional.linear(x, weight, shift)
        merged, moved = made.merged(weight, shift)
        torch.testing.assert_close(nn.functional.linear(x, merged, moved), y + made(x, y))
        merged, moved = made.merged(weight.double(), None if shift is None else shift.double())
        assert merged.dtype == torch.float64
        assert moved is None or moved.dtype == torch.float64
        assert not merged.requires_grad
    assert (moved is None) is (not bias and name != "red")


def test_factors_of_an_input_are_merged_into_the_columns() -> None:
    torch.manual_seed(0)
    made: Any = MODULES[unipelt.IA3Config](
        unipelt.IA3Config(),
        TargetInfo("activation", 5, 5, torch.empty(0), SharedParameters("one"), None, OutputSlice(1, 0, 5)),
    )
    nn.init.normal_(made.offset)
    x, weight = torch.randn(4, 5), torch.randn(7, 5)
    torch.testing.assert_close(x @ made.merged_input(weight).t(), (x + made(x, x)) @ weight.t())
    assert made.merged_input(weight.double()).dtype == torch.float64


@pytest.mark.parametrize(
    "config",
    [LoRAConfig(3, 5.0, decomposed=True, dropout=0.5), LoRAConfig(3, dropout=0.5), AdapterConfig(4, dropout=0.5)],
    ids=["dora", "lora of a mixture", "adapter of a mixture"],
)
def test_dropout_is_of_training_alone(config: Any) -> None:
    torch.manual_seed(0)
    made, x = build(config, nn.Linear(INPUTS, OUTPUTS)), torch.randn(4, INPUTS)
    y = torch.randn(4, OUTPUTS)
    found = made.eval()(x, y)
    assert torch.equal(made(x, y), found)
    torch.manual_seed(1)
    assert not torch.equal(made.train()(x, y), found)
    made.dropout = 0.0
    assert torch.equal(made(x, y), found)


@pytest.mark.parametrize(
    ("gate", "gating", "scale"), [(False, "replace", 2), (True, "replace", 1), (True, "multiply", 2)]
)
def test_lora_of_a_mixture_has_the_scale_of_lora(gate: bool, gating: Any, scale: float) -> None:
    config = LoRAConfig(3, 6.0, gate=gate, gating=gating)
    made, x = build(config, nn.Linear(INPUTS, OUTPUTS)), torch.randn(4, INPUTS)
    torch.testing.assert_close(made(x, torch.zeros(4, OUTPUTS)), scale * x @ made.A.t() @ made.B.t())


def test_the_adapter_of_a_mixture_is_a_bottleneck() -> None:
    made, x = build(AdapterConfig(4), nn.Linear(INPUTS, OUTPUTS)), torch.randn(3, INPUTS)
    low = (x @ made.down.weight.t() + made.down.bias).clamp_min(0)
    torch.testing.assert_close(made(x, torch.zeros(3, OUTPUTS)), low @ made.up.weight.t() + made.up.bias)


def test_a_gated_term_is_added_to_the_text_and_not_to_positions() -> None:
    """DeBERTa-v2 projects the text first, and then its relative positions, which have no gate."""
    rows, gate = OutputSlice(1, 0, OUTPUTS), torch.rand(2, 1, 1)
    term = FunctionTerm("ia3_query", "ia3", rows, build(CONFIGS["ia3"], nn.Linear(INPUTS, OUTPUTS)))
    term.gate_name, term.once = "ia3_query", True
    x, y = torch.randn(2, 3, INPUTS), torch.randn(2, 3, OUTPUTS)
    for _ in range(2):  # in every pass
        now = AttentionPass(gates={"ia3_query": gate})
        torch.testing.assert_close(term(x, y, now), y + gate * term.function(x, y))
        assert term(x, y, now) is y
    term.gate_name = ""  # without a gate the term belongs to the weight, which projects positions too
    for _ in range(2):
        torch.testing.assert_close(term(x, y, None), y + term.function(x, y))


def test_dora_keeps_no_copy_of_the_weight() -> None:
    """The host may exchange its weight, or hold it in another form; then the one of the start must not stay."""
    weight = torch.empty(OUTPUTS, INPUTS)
    made, held = build(CONFIGS["dora"], nn.Linear(INPUTS, OUTPUTS), weight), weakref.ref(weight)
    del weight
    assert held() is None
    assert made.magnitude.shape == (OUTPUTS,)
