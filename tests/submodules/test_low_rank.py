"""LoRA on any projection, rank-stabilised and decomposed, against weights that it is merged into by hand."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import shake, tiny_batch, tiny_bert
from inside import added_to, fill
from submodules.test_terms import HOSTS
from tiny import DECODERS, tiny_model
from tiny import tiny_batch as batch_of
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import unipelt
from unipelt.config.parts import PROJECTIONS
from unipelt.config.schema import ConfigError
from unipelt.submodules.entry import Entry
from unipelt.submodules.lora import LoRA
from unipelt.submodules.room import own_parts, placed_terms
from unipelt.submodules.term import FunctionTerm, Term

ALL = list(PROJECTIONS)


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**batch)[0]
    return out


def factors(model: Any, path: str, name: str) -> dict[str, Tensor]:
    """The parts of the term at a host, wherever they are kept, by their last name: A, B, A0, B0, magnitude."""
    (placed,) = (placed for placed in placed_terms(model) if (placed.path, placed.term.name) == (path, name))
    return {part.rpartition(".")[2]: tensor for part, tensor in placed.factors().items()}


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
            term = factors(model, host.path, f"lora_{place}")
            assert ("magnitude" in term) is decomposed
            weight = leaf.weight.t() if isinstance(leaf, Conv1D) else leaf.weight
            rows = slice(None) if host.rows is None else list(host.rows)
            new = weight[rows] + scale * term["B"] @ term["A"]
            if "A0" in term:
                new -= scale * term["B0"] @ term["A0"]
            if decomposed:
                new = term["magnitude"][:, None] * new / new.square().sum(1, keepdim=True).sqrt()
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


@pytest.mark.parametrize("kind", [{}, {"gating": "multiply"}, {"decomposed": True}])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("family", HOSTS)
def test_a_gate_leads_from_frozen_to_updated(family: str, shared: bool, kind: dict[str, Any]) -> None:
    """A gate replaces `alpha / r` or multiplies it, or leads to all that a decomposed update does."""
    base, batch = tiny_model(family), batch_of(family)
    lora = {"rank": 3, "alpha": 6.0, "gate": True, "places": ALL, **kind}
    sides = {"decoder": family in DECODERS, "cross": False, "train_head": False, "gate": {"shared": shared}}
    model = unipelt.inject(copy.deepcopy(base), {"preset": "lora", "lora": lora, "layers": [1], **sides})
    shake(model)
    open_ = merged(family, base, model, 2.0 if kind else 1.0, "decomposed" in kind)
    for value, want in ((0.0, base), (1.0, open_)):
        for place in ALL:
            assert fill(model, f"gate.lora_{place}.weight", 0.0) == 1
            assert fill(model, f"gate.lora_{place}.bias", 200.0 if value else -200.0) == 1
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
    assert {placed.term.name for placed in placed_terms(model)} == {"lora_key", "lora_down"}
    assert not any("lora_query" in module._modules for module in model.modules())

    model = unipelt.inject(tiny_bert(), {"preset": "lora", "lora": {"rank": 2, "decomposed": True}})
    assert unipelt.parameter_counts(model).submodules == {"lora": 3 * 2 * (2 * (32 + 32) + 32)}
    assert sum(isinstance(module, Term) for module in model.modules()) == 6
    assert all(isinstance(placed.term, FunctionTerm) for placed in placed_terms(model))
    assert {own.part.kind for own in own_parts(model)} == {"lora"}


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
    term = added_to(other.bert.encoder.layer[0]).lora_query.function
    assert torch.equal(term.spot.matrix(), other.bert.encoder.layer[0].attention.self.query.weight)
    assert not torch.equal(logits(other, tiny_batch()), logits(model, tiny_batch()))
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert logits(half, tiny_batch()).dtype == torch.bfloat16


def test_lengths_count_as_constants_in_the_backward_pass() -> None:
    model: Any = unipelt.inject(tiny_bert(), {"preset": "lora", "lora": {"decomposed": True, "rank": 2}})
    shake(model)
    function = added_to(model.bert.encoder.layer[0]).lora_query.function
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
    assert not any(isinstance(module, (LoRA, Entry)) for module in model.modules())
    torch.testing.assert_close(logits(model, tiny_batch()), want, atol=1e-5 if not gate else 5e-3, rtol=0)


# A start at the principal part of the weight (PiSSA)


def pissa(model: Any, **changes: Any) -> Any:
    lora = {"rank": 3, "alpha": 6.0, "start": "pissa", **changes}
    return unipelt.inject(model, {"preset": "lora", "lora": lora})


@pytest.mark.parametrize("gate", [{}, {"gate": True}, {"gate": True, "gating": "multiply"}])
@pytest.mark.parametrize("family", HOSTS)
def test_a_start_is_the_principal_part_of_the_weight(family: str, gate: dict[str, Any]) -> None:
    """Its largest singular values, by those of the rest; and the model starts as itself."""
    base, batch = tiny_model(family), batch_of(family)
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    want = logits(base, batch)
    model = pissa(base, places=ALL, **gate)
    for place in ALL:
        host = HOSTS[family][place]
        leaf, term = model.get_submodule(host.path), factors(model, host.path, f"lora_{place}")
        weight = (leaf.weight.t() if isinstance(leaf, Conv1D) else leaf.weight).detach().double().numpy()
        weight = weight if host.rows is None else weight[list(host.rows)]
        first = (1.0 if gate == {"gate": True} else 2.0) * (term["B0"] @ term["A0"]).double().numpy()
        values = np.linalg.svd(weight, compute_uv=False)
        np.testing.assert_allclose(np.linalg.svd(first, compute_uv=False)[:3], values[:3], rtol=1e-5)
        np.testing.assert_allclose(np.linalg.svd(weight - first, compute_uv=False)[:-3], values[3:], atol=1e-5)
        assert torch.equal(term["A"], term["A0"])
        assert torch.equal(term["B"], term["B0"])
        trains = {
            own.part.name.rpartition(".")[2]: own.parameter.requires_grad
            for own in own_parts(model)
            if own.part.name.startswith(f"lora_{place}.")
        }
        assert trains == {"A": True, "B": True, "A0": False, "B0": False}
    torch.testing.assert_close(logits(model, batch), want, atol=1e-5 * max(1.0, want.abs().max().item()), rtol=0)
    unipelt.remove(model)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("family", HOSTS)
def test_an_update_from_a_start_is_a_change_of_weights(family: str) -> None:
    base, batch = tiny_model(family), batch_of(family)
    lora = {"rank": 3, "alpha": 6.0, "places": ALL, "start": "pissa"}
    sides = {"decoder": family in DECODERS, "cross": False}
    model = unipelt.inject(copy.deepcopy(base), {"preset": "lora", "lora": lora, "layers": [1], **sides})
    shake(model)
    want = logits(merged(family, base, model, 2.0, False), batch)
    torch.testing.assert_close(logits(model, batch), want, atol=5e-5 * max(1.0, want.abs().max().item()), rtol=0)
    assert (want - logits(base, batch)).abs().max() > 1e-3


@pytest.mark.parametrize("shared", [False, True])
def test_a_closed_gate_is_the_model_and_an_open_one_all_of_the_update(shared: bool) -> None:
    base, batch = tiny_bert(), tiny_batch()
    lora = {"rank": 3, "gate": True, "places": ALL, "start": "pissa"}
    config = {"preset": "lora", "lora": lora, "layers": [1], "train_head": False, "gate": {"shared": shared}}
    model = unipelt.inject(copy.deepcopy(base), config)
    shake(model)
    for bias, want in ((-200.0, base), (200.0, merged("bert", base, model, 1.0, False))):
        for place in ALL:
            assert fill(model, f"gate.lora_{place}.weight", 0.0) == fill(model, f"gate.lora_{place}.bias", bias) == 1
        torch.testing.assert_close(logits(model, batch), logits(want, batch), atol=3e-5, rtol=0)


@pytest.mark.parametrize("gate", [False, True])
def test_a_start_is_saved_loaded_folded_and_counted(
    gate: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pissa(tiny_bert(), gate=gate)
    counts = unipelt.parameter_counts(model)
    assert counts.submodules == {"lora": 3 * 2 * 3 * (32 + 32)}
    assert counts.deployed_submodules == {"lora": 2 * 3 * 2 * 3 * (32 + 32)}
    shake(model)
    first = {name: p.clone() for name, p in model.named_parameters() if name.endswith(("A0", "B0"))}
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    model(**tiny_batch(), labels=torch.tensor([0, 1, 1])).loss.backward()
    optimizer.step()
    assert len(first) == 12
    assert all(torch.equal(tensor, model.get_parameter(name)) for name, tensor in first.items())
    model.eval()
    want = logits(model, tiny_batch())
    # what is loaded has its start in its file
    monkeypatch.setattr(torch.linalg, "svd", lambda *args, **options: pytest.fail("a singular value was computed"))
    unipelt.save(model, tmp_path / "trained")
    loaded = unipelt.load(tiny_bert(), tmp_path / "trained")
    assert torch.equal(logits(loaded, tiny_batch()), want)
    assert not any(p.requires_grad for name, p in loaded.named_parameters() if name.endswith(("A0", "B0")))
    report = unipelt.fold(model, [tiny_batch(), tiny_batch(seed=4)], tolerance=1.0, closed=0.0)
    assert report.merged == 6
    folded = logits(model, tiny_batch())
    torch.testing.assert_close(folded, want, atol=2e-2 if gate else 1e-5, rtol=0)
    unipelt.save(model, tmp_path / "folded")
    assert torch.equal(logits(unipelt.load(tiny_bert(), tmp_path / "folded"), tiny_batch()), folded)


def test_weights_that_have_no_such_start_are_named_and_nothing_is_left() -> None:
    model: Any = tiny_bert()
    with pytest.raises(
        unipelt.InjectionError, match=r"query has 32 singular values, and .* takes 33 of them; take a s"
    ):
        pissa(model, rank=33)
    assert not hasattr(model, "unipelt_injection")
    model.bert.encoder.layer[1].attention.self.value.weight.data[0, 0] = math.inf
    with pytest.raises(unipelt.InjectionError, match=r"layer\.1\..*value\.weight is not finite"):
        pissa(model)
    assert not hasattr(model, "unipelt_injection")
    assert not list(own_parts(model))
    query = model.bert.encoder.layer[2].attention.self.query
    query.weight = nn.Parameter(query.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(unipelt.InjectionError, match="query is quantised, and the start pissa needs its weight's num"):
        pissa(model)
    assert not hasattr(model, "unipelt_injection")


def test_what_a_start_does_not_go_with() -> None:
    with pytest.raises(ConfigError, match=r"lora\.start: pissa is of plain updates, and decomposed ones start at zero"):
        unipelt.resolve({"preset": "lora", "lora": {"start": "pissa", "decomposed": True}})
    with pytest.raises(ConfigError, match=r"lora\.start must be zero or pissa, not 'svd'"):
        unipelt.resolve({"preset": "lora", "lora": {"start": "svd"}})
    with pytest.raises(ConfigError, match="decomposed updates keep their scale under a gate; leave gating out"):
        unipelt.resolve({"preset": "lora", "lora": {"gating": "multiply", "decomposed": True}})
    for lora in (
        {"start": "pissa"},
        {"decomposed": True},
        {"places": ["query", "up"]},
        {"gating": "multiply", "gate": True},
    ):
        with pytest.raises(unipelt.CheckpointError, match="the release has plain LoRA of queries and values"):
            unipelt.release_state_dict(unipelt.inject(tiny_bert(), {"preset": "lora", "lora": lora}))


@pytest.mark.parametrize("places", [[], ["query", "query"], ["activation"], ["feed_forward", "query"]])
def test_places_that_are_no_projections(places: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"lora\.places must name one or more of query, value, key, attention, up, "):
        unipelt.resolve({"preset": "lora", "lora": {"places": places}})


def test_fields_that_came_later_are_written_only_where_they_differ() -> None:
    assert unipelt.resolve("lora").to_dict()["lora"] == {"rank": 8, "alpha": 16.0, "gate": False}
    config = unipelt.resolve({"preset": "lora", "lora": {"places": ["value", "query"], "decomposed": True}})
    assert config.to_dict()["lora"] == {"rank": 8, "alpha": 16.0, "gate": False, "decomposed": True}
