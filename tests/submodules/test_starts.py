"""The initial values of the submodules' parameters: their distributions, and their type and device."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unipelt
from unipelt.config.parts import AdapterConfig, LoRAConfig, PrefixConfig
from unipelt.submodules.adapter import Adapter
from unipelt.submodules.lora import LoRA
from unipelt.submodules.outputs import OutputSlice
from unipelt.submodules.prefix import Prefix, PrefixNetwork
from unipelt.submodules.reft import orthonormal_rows
from unipelt.submodules.register import MODULES, TargetInfo
from unipelt.submodules.term import SharedParameters

INPUTS, OUTPUTS, WIDTH, TERMS, RANK = 200, 400, 200, 20, 50
NORMAL = ("normal", 0.02)
ZERO = ("uniform", 0.0)


def kaiming(inputs: int) -> tuple[str, float]:
    """Kaiming-uniform with a = sqrt(5)."""
    return "uniform", 1 / math.sqrt(inputs)


def xavier(rows: int) -> tuple[str, float]:
    """Xavier-normal of a tensor (TERMS, rows, columns), as PyTorch counts its inputs and outputs."""
    return "normal", math.sqrt(2 / (TERMS + rows))


BIASES = {"down.bias": ZERO, "up.bias": ZERO}
STARTS: dict[str, tuple[Any, dict[str, tuple[str, float]]]] = {
    "ia3": (unipelt.IA3Config(), {"offset": ZERO}),
    "red": (unipelt.REDConfig(), {"offset": ZERO, "shift": ZERO}),
    "houlsby": (unipelt.HoulsbyConfig(bottleneck=WIDTH), {"down.weight": NORMAL, "up.weight": NORMAL, **BIASES}),
    "parallel": (
        unipelt.ParallelConfig(bottleneck=WIDTH),
        {"down.weight": kaiming(INPUTS), "up.weight": ZERO, **BIASES},
    ),
    "direft": (unipelt.ReFTConfig(variant="direft", rank=RANK), {"up": ZERO, "bias": ZERO}),
    "loreft": (unipelt.ReFTConfig(rank=RANK), {"bias": ZERO}),
    "dora": (LoRAConfig(RANK, decomposed=True), {"A": kaiming(INPUTS), "B": ZERO}),
    "lora of a mixture": (LoRAConfig(RANK), {"A": kaiming(INPUTS), "B": ZERO}),
    "adapter of a mixture": (AdapterConfig(WIDTH), {"down.weight": NORMAL, "up.weight": NORMAL, **BIASES}),
    "zero adapter of a mixture": (
        AdapterConfig(WIDTH, start="zero"),
        {"down.weight": NORMAL, "up.weight": ZERO, **BIASES},
    ),
}


def target(dtype: torch.dtype = torch.float32, device: str = "cpu", own: torch.dtype = torch.float32) -> TargetInfo:
    """The facts about a projection of the type `dtype` whose submodules have the type `own`."""
    torch.manual_seed(0)
    host = nn.Linear(INPUTS, OUTPUTS, dtype=dtype, device=device)
    like = torch.empty(0, dtype=own, device=device)
    rows = OutputSlice(1, 0, OUTPUTS)
    return TargetInfo("down", INPUTS, OUTPUTS, like, SharedParameters("compacter"), host, rows)


def assert_start(values: Tensor, start: tuple[str, float]) -> None:
    """Check that values are drawn from a distribution: normal with a standard deviation, or uniform up to a bound."""
    kind, size = start
    if not size:
        assert not values.any()
        return
    assert abs(values.mean()) < 0.1 * size
    if kind == "uniform":
        assert 0.98 * size < values.abs().max() <= size * (1 + 1e-6)
        assert values.std().item() == pytest.approx(size / math.sqrt(3), rel=0.05)
    else:
        assert values.std().item() == pytest.approx(size, rel=0.05)
        assert values.abs().max() > 2.5 * size


@pytest.mark.parametrize("name", STARTS)
def test_a_submodule_starts_as_its_docstring_says(name: str) -> None:
    config, starts = STARTS[name]
    spot = target()
    made = MODULES[type(config)](config, spot)
    values = dict(made.named_parameters())
    for parameter, start in starts.items():
        assert_start(values.pop(parameter).detach(), start)
    if name == "dora":
        torch.testing.assert_close(values.pop("magnitude"), spot.host.weight.norm(dim=1))
    for parameter in ("down", "basis") if "reft" in name else ():
        if parameter in values:
            rows = values.pop(parameter)
            assert rows.shape == (RANK, OUTPUTS)
            torch.testing.assert_close(rows @ rows.t(), torch.eye(RANK))
            if parameter == "basis":
                assert torch.equal(values.pop("weight"), orthonormal_rows(rows))
    assert not values, "every parameter has a start"


def test_compacter_starts_as_the_authors_release() -> None:
    config, spot = unipelt.CompacterConfig(bottleneck=WIDTH, terms=TERMS, rank=5), target()
    made: Any = MODULES[type(config)](config, spot)
    left = spot.shared.here().left
    assert left.shape == (TERMS, TERMS, TERMS)
    assert_start(left.detach(), ("normal", 0.01))
    for linear, inputs, outputs in ((made.down, OUTPUTS, WIDTH), (made.up, WIDTH, OUTPUTS)):
        assert linear.s.shape == (TERMS, inputs // TERMS, 5)
        assert linear.t.shape == (TERMS, 5, outputs // TERMS)
        for factor in (linear.s, linear.t):
            rows, columns = factor.shape[1:]
            assert_start(factor.detach() * math.sqrt(columns), xavier(rows))
        assert linear.bias.shape == (outputs,)
        assert not linear.bias.any()
    before = left.detach().clone()
    MODULES[type(config)](config, spot)
    assert spot.shared.here().left is left, "the next module takes the same factors"
    assert torch.equal(left, before)


@pytest.mark.parametrize("start", ["normal", "zero"])
def test_an_adapter_starts_near_zero_or_at_zero(start: Any) -> None:
    torch.manual_seed(0)
    adapter = Adapter("adapter", WIDTH)
    adapter.set_up(AdapterConfig(WIDTH, start=start), torch.empty(0))
    assert adapter.down is not None
    assert_start(adapter.down.weight.detach(), NORMAL)
    assert_start(adapter.up.weight.detach(), NORMAL if start == "normal" else ZERO)
    assert not adapter.down.bias.any()
    assert not adapter.up.bias.any()


@pytest.mark.parametrize("start", ["normal", "zero"])
def test_a_prefix_starts_near_zero_or_with_values_of_zero(start: Any) -> None:
    torch.manual_seed(0)
    config = PrefixConfig(30, 100, softmax="own", start=start)
    network: Any = PrefixNetwork(64, 16, 3, config, torch.empty(0))
    for parameter in (network.embedding, network.w1.weight):
        assert_start(parameter.detach(), NORMAL)
    assert not network.w1.bias.any()
    assert not network.w2.bias.any()
    both = network()
    assert both.shape == (3, 2, 30, 16)
    flat = replace(config, reparameterize=False)
    prefix = Prefix(0, "", 400, flat, None, torch.empty(0), by_query=False, gate_name="")
    assert prefix.keys_values is not None
    keys, values = prefix.keys_values.detach()
    assert keys.shape == (30, 400)
    assert_start(keys, NORMAL)
    assert_start(values, NORMAL if start == "normal" else ZERO)
    weight = network.w2.weight.detach().unflatten(0, (3, 2, 16))
    assert_start(weight[:, 0], NORMAL)
    assert_start(weight[:, 1], NORMAL if start == "normal" else ZERO)
    assert both[:, 1].any() == (start == "normal")
    deployed = Prefix(0, "", 400, config, None, torch.empty(0), by_query=False, gate_name="")
    assert deployed.keys_values is not None
    assert not deployed.keys_values.any(), "its values come from a checkpoint"


@pytest.mark.parametrize(("device", "own"), [("cpu", torch.float32), ("cpu", torch.bfloat16), ("meta", torch.float16)])
def test_parameters_have_the_type_and_the_device_that_are_asked_for(device: str, own: torch.dtype) -> None:
    configs = [config for config, _ in STARTS.values()] + [unipelt.CompacterConfig()]
    for config in configs:
        spot = target(torch.bfloat16, device, own)
        made = MODULES[type(config)](config, spot)
        for name, parameter in [*made.named_parameters(), *spot.shared.named_parameters()]:
            assert (parameter.dtype, parameter.device.type) == (own, device), f"{config}: {name}"
            assert parameter.requires_grad
    norm, spot = nn.LayerNorm(8, dtype=torch.bfloat16, device=device), target(torch.bfloat16, device, own)
    config = unipelt.LNTuningConfig()
    made = MODULES[type(config)](config, TargetInfo("norm", 8, 8, spot.weight, spot.shared, norm, spot.rows))
    assert {(p.dtype, p.device.type) for p in made.parameters()} == {(own, device)}
    adapter, lora = Adapter("adapter", 8), LoRA("lora_query", OutputSlice(1, 0, 8), LoRAConfig())
    adapter.set_up(AdapterConfig(4), spot.weight)
    lora.set_up(LoRA.initial_down(8, LoRAConfig(), spot.weight), spot.weight, has_start=True, keep_down=True)
    flat = PrefixConfig(reparameterize=False)
    for added in (
        adapter,
        lora,
        PrefixNetwork(8, 4, 2, PrefixConfig(2, 4), spot.weight),
        Prefix(0, "", 8, flat, None, spot.weight, by_query=False, gate_name=""),
    ):
        assert {(p.dtype, p.device.type) for p in added.parameters()} == {(own, device)}
    assert {name: p.requires_grad for name, p in lora.named_parameters()} == {
        "A": True,
        "B": True,
        "A0": False,
        "B0": False,
    }
