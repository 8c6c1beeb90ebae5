"""The preset `unipelt` starts near the base; what it is made of, and where it cannot be."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import assert_near, logits, refusing, shake
from tiny import DECODERS, INSERTED, KINDS, SIMPLE, WITHOUT_INTERFACE, tiny_batch, tiny_model
from torch import Tensor, nn

import unipelt
from unipelt.submodules.adapter import Adapter

TAKES = [family for family in KINDS if family not in (*SIMPLE, *WITHOUT_INTERFACE, *INSERTED)]


def loss(model: Any, family: str) -> float:
    """Of the next token in language models; else of the first class."""
    batch = tiny_batch(family, lengths=(9, 9, 9))
    out, labels = logits(model, batch), batch["input_ids"]
    if out.dim() == 2:
        return float(nn.functional.cross_entropy(out, torch.zeros(len(out), dtype=torch.long)))
    if family in DECODERS:
        out, labels = out[:, :-1], labels[:, 1:]
    else:
        labels = batch["decoder_input_ids"]
    return float(nn.functional.cross_entropy(out.flatten(0, 1), labels.flatten()))


@pytest.mark.parametrize("family", TAKES)
def test_a_fresh_one_hardly_moves_the_loss(family: str) -> None:
    base = tiny_model(family)
    before = loss(base, family)
    moved = {}
    for method in ("unipelt", "unipelt-apl"):
        torch.manual_seed(0)
        model = unipelt.inject(copy.deepcopy(base), method).eval()
        moved[method] = abs(loss(model, family) - before)
    assert moved["unipelt"] <= 0.02
    assert moved["unipelt"] < moved["unipelt-apl"]


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("family", KINDS)
def test_an_adapter_that_starts_at_zero_is_the_base_and_trains(family: str, gate: bool) -> None:
    base, batch = tiny_model(family), tiny_batch(family)
    want = logits(base, batch)
    model = unipelt.inject(base, {"preset": "adapter", "adapter": {"gate": gate, "start": "zero", "bottleneck": 5}})
    assert_near(logits(model, batch), want, 1e-6)
    model(**batch).logits.square().sum().backward()
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    assert adapters
    for adapter in adapters:
        assert adapter.up.weight.grad is not None
        assert adapter.up.weight.grad.any()
    shake(model)
    assert (logits(model, batch) - want).abs().max() > 1e-4


def test_a_start_at_zero_draws_what_a_random_one_draws() -> None:
    """So that all else of a run with the same seed starts alike."""
    found: list[dict[str, Tensor]] = []
    for start in ("normal", "zero"):
        torch.manual_seed(0)
        model = unipelt.inject(tiny_model("bert"), {"preset": "unipelt-apl", "adapter": {"start": start}})
        found.append(model.state_dict())
    assert found[0].keys() == found[1].keys()
    other = {name for name, tensor in found[0].items() if not torch.equal(tensor, found[1][name])}
    assert other == {name for name in found[0] if name.endswith("adapter.up.weight")}


def test_it_is_the_papers_combination_but_for_two_starts() -> None:
    config, paper = unipelt.PRESETS["unipelt"], unipelt.PRESETS["unipelt-apl"]
    assert config.adapter is not None
    assert config.prefix is not None
    parts = {"adapter": replace(config.adapter, start="normal"), "prefix": replace(config.prefix, softmax="shared")}
    assert replace(config, **parts) == paper  # type: ignore[arg-type]
    assert "start" not in paper.to_dict()["adapter"]


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("mpnet", "take the preset unipelt-apl, whose prefix shares the text's softmax"),
        ("bloom", "take a method without one, such as the preset unipelt-al"),
        ("deberta-v2", "take a method without one, such as the preset unipelt-al"),
    ],
)
def test_where_it_cannot_be_a_preset_that_can_is_named(family: str, said: str) -> None:
    model = tiny_model(family)
    with refusing(model, said, error=unipelt.InjectionError):
        unipelt.inject(model, "unipelt")
    unipelt.inject(model, "unipelt-apl" if family == "mpnet" else "unipelt-al")
