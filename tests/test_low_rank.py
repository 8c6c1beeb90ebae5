"""LoRA on any projection, rank-stabilised and decomposed, against weights that it is merged into by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from conftest import shake, tiny_batch, tiny_bert
from test_terms import HOSTS
from tiny import DECODERS, tiny_model
from tiny import tiny_batch as batch_of
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import unipelt
from unipelt.config import PROJECTIONS
from unipelt.gate import Gates
from unipelt.lora import LoRA
from unipelt.parameters import submodule_parameters
from unipelt.term import Term
from unipelt.typed import ConfigError

ALL = list(PROJECTIONS)


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**batch)[0]
    return out


def merged(family: str, base: Any, model: Any, scale: float, decomposed: bool) -> Any:
    """The base with the updates of layer 1 of `model` in its weights."""
    plain = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in dict(plain.named_parameters()):
                plain.get_parameter(name).copy_(parameter)
        for place in ALL:
            host = HOSTS[family][place]
            leaf: Any = plain.get_submodule(host.path)
            term: Any = model.get_submodule(f"{host.path}.lora_{place}")
            term = term.function if decomposed else term
            weight = leaf.weight.t() if isinstance(leaf, Conv1D) else leaf.weight
            rows = slice(None) if host.rows is None else list(host.rows)
            new = weight[rows] + scale * term.B @ term.A
            if decomposed:
                new = term.magnitude[:, None] * new / new.square().sum(1, keepdim=True).sqrt()
            weight[rows] = new
    return plain


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("scaling", ["standard", "rank_stabilised"])
@pytest.mark.parametrize("family", HOSTS)
def test_an_update_is_a_change_of_weights(family: str, scaling: str, decomposed: bool) -> None:
    base, batch = tiny_model(family), batch_of(family)
    lora = {"rank": 3, "alpha": 6.0, "places": ALL, "scaling": scaling, "decomposed": decomposed}
    sides = {"decoder": family in DECODERS, "cross": False}
    model = unipelt.inject(copy.deepcopy(base), {"preset": "lora", "lora": lora, "layers": [1], **sides})
    shake(model)
    want = logits(merged(family, base, model, 6.0 / (3 if scaling == "standard" else math.sqrt(3)), decomposed), batch)
    torch.testing.assert_close(logits(model, batch), want, atol=3e-5 * max(1.0, want.abs().max().item()), rtol=0)
    assert (want - logits(base, batch)).abs().max() > 1e-3


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("family", HOSTS)
def test_a_gate_leads_from_frozen_to_updated(family: str, shared: bool, decomposed: bool) -> None:
    """A gate replaces `alpha / r`, or leads to all that a decomposed update does."""
    base, batch = tiny_model(family), batch_of(family)
    lora = {"rank": 3, "alpha": 6.0, "gate": True, "places": ALL, "decomposed": decomposed}
    sides = {"decoder": family in DECODERS, "cross": False, "train_head": False, "gate": {"shared": shared}}
    model = unipelt.inject(copy.deepcopy(base), {"preset": "lora", "lora": lora, "layers": [1], **sides})
    shake(model)
    for value, want in ((0.0, base), (1.0, merged(family, base, model, 2.0 if decomposed else 1.0, decomposed))):
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, Gates):
                    module.weight.zero_()
                    module.bias.fill_(200.0 if value else -200.0)
        expected = logits(want, batch)
        tolerance = 3e-5 * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(logits(model, batch), expected, atol=tolerance, rtol=0)
    with unipelt.record_gates(model) as record:
        logits(model, batch)
    assert set(record) == {f"lora_{place}" for place in ALL}


def test_what_is_added_and_counted() -> None:
    """tiny_bert has 3 layers, 32 wide, 48 inside."""
    model = unipelt.inject(
        tiny_bert(), {"preset": "lora", "lora": {"rank": 2, "places": ["key", "down"], "gate": True}}
    )
    terms = [module for module in model.modules() if isinstance(module, LoRA)]
    assert len(terms) == 6
    counts = unipelt.parameter_counts(model)
    assert counts.submodules == {"lora": 3 * 2 * (32 + 32 + 48 + 32)}
    assert counts.gates == {"lora_key": 3 * 33, "lora_down": 3 * 49}
    assert not any(hasattr(module, "lora_query") for module in model.modules())

    model = unipelt.inject(tiny_bert(), {"preset": "lora", "lora": {"rank": 2, "decomposed": True}})
    assert unipelt.parameter_counts(model).submodules == {"lora": 3 * 2 * (2 * (32 + 32) + 32)}
    assert sum(isinstance(module, Term) for module in model.modules()) == 6
    assert {kind for kind, _, _ in submodule_parameters(model)} == {"lora"}


def test_a_decomposed_update_starts_as_the_model_itself() -> None:
    base = tiny_bert()
    model = unipelt.inject(copy.deepcopy(base), {"preset": "lora", "lora": {"decomposed": True, "places": ALL}})
    torch.testing.assert_close(logits(model, tiny_batch()), logits(base, tiny_batch()), atol=1e-6, rtol=0)


def test_a_decomposed_update_follows_its_model() -> None:
    """A copy, and the base's weights as they are, not as they were."""
    model: Any = unipelt.inject(tiny_bert(), {"preset": "lora", "lora": {"decomposed": True}})
    shake(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.bert.encoder.layer[0].attention.self.query.weight.mul_(2.0)
    term = other.bert.encoder.layer[0].attention.self.query.lora_query.function
    assert torch.equal(term.spot.matrix(), other.bert.encoder.layer[0].attention.self.query.weight)
    assert not torch.equal(logits(other, tiny_batch()), logits(model, tiny_batch()))
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert logits(half, tiny_batch()).dtype == torch.bfloat16


def test_lengths_count_as_constants_in_the_backward_pass() -> None:
    model: Any = unipelt.inject(tiny_bert(), {"preset": "lora", "lora": {"decomposed": True, "rank": 2}})
    shake(model)
    function = model.bert.encoder.layer[0].attention.self.query.lora_query.function
    x = torch.randn(1, 4, 32)
    weight, bias = function.spot.matrix(), function.spot.bias()
    y = nn.functional.linear(x, weight, bias)
    function(x, y).sum().backward()
    got = function.B.grad.clone()
    length = (weight + function.scale * function.B @ function.A).norm(dim=1).detach()
    free = function.B.detach().clone().requires_grad_()
    updated = (
        function.magnitude.detach()[:, None] * (weight + function.scale * free @ function.A.detach()) / length[:, None]
    )
    nn.functional.linear(x, updated, bias).sum().backward()
    torch.testing.assert_close(got, free.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("gate", [False, True])
def test_updates_of_any_projection_are_folded(gate: bool) -> None:
    model = unipelt.inject(tiny_bert(), {"preset": "lora", "lora": {"rank": 2, "places": ALL, "gate": gate}})
    shake(model, std=0.02)
    want = logits(model, tiny_batch())
    report = unipelt.fold(model, [tiny_batch(), tiny_batch(seed=4)], tolerance=0.2)
    assert report.merged == 3 * len(ALL)
    assert not any(isinstance(module, (LoRA, Gates)) for module in model.modules())
    torch.testing.assert_close(logits(model, tiny_batch()), want, atol=1e-5 if not gate else 5e-3, rtol=0)


@pytest.mark.parametrize("places", [[], ["query", "query"], ["activation"], ["feed_forward", "query"]])
def test_places_that_are_no_projections(places: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"lora\.places must name one or more of query, value, key, attention, up, "):
        unipelt.resolve({"preset": "lora", "lora": {"places": places}})


def test_fields_that_came_later_are_written_only_where_they_differ() -> None:
    assert unipelt.resolve("lora").to_dict()["lora"] == {"rank": 8, "alpha": 16.0, "gate": False}
    config = unipelt.resolve({"preset": "lora", "lora": {"places": ["value", "query"], "decomposed": True}})
    assert config.to_dict()["lora"] == {"rank": 8, "alpha": 16.0, "gate": False, "decomposed": True}
