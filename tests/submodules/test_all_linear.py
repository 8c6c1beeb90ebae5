"""LoRA on the gate of a feed-forward network, and on every projection of a layer at once."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import bits, logits, refusing, shake, tiny_bert
from inside import fill
from tiny import FAMILIES, GATED, tiny_batch, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import unipelt
from unipelt.config.parts import LINEAR
from unipelt.config.schema import ConfigError
from unipelt.hosts.families import layers_at
from unipelt.submodules.lora import LoRA
from unipelt.submodules.room import placed_terms

ALL_LINEAR: dict[str, Any] = {"preset": "lora", "lora": {"rank": 3, "alpha": 6.0, "places": "all-linear"}}
GATE: dict[str, Any] = {"preset": "lora", "lora": {"rank": 3, "alpha": 6.0, "places": ["gate"]}}
OF_POSITIONS = ("pos_proj", "pos_q_proj")
"""DeBERTa's projections of relative positions, which read no text."""


def linear_modules(model: Any, family: str) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of every projection in the layers of a bare model, by path."""
    paths = {module: path for path, module in model.named_modules()}
    found = {}
    for stack in FAMILIES[family].stacks:
        for layer in layers_at(model.base_model, stack.layers):
            for module in layer.modules():
                if isinstance(module, (nn.Linear, Conv1D)) and not paths[module].endswith(OF_POSITIONS):
                    sizes = module.weight.shape if isinstance(module, Conv1D) else module.weight.shape[::-1]
                    found[paths[module]] = (int(sizes[0]), int(sizes[1]))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_projection_of_every_layer_is_updated(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modules that compute several things have a term for each; counted, saved, loaded, removed and merged."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    base, batch = tiny_model(family), tiny_batch(family)
    before, want_modules = bits(base), linear_modules(base, family)
    plain = logits(base, batch)
    model = unipelt.inject(base, ALL_LINEAR)
    assert ("leaves out attention.self.pos_proj" in caplog.text) == (family == "deberta")
    terms = list(placed_terms(model))
    assert {term.path for term in terms} == want_modules.keys()
    for path, (_, outputs) in want_modules.items():
        assert sum(term.term.outputs.count for term in terms if term.path == path) == outputs
    ranks = {path: 3 * sum(term.path == path for term in terms) for path in want_modules}
    count = sum(ranks[path] * inputs + 3 * outputs for path, (inputs, outputs) in want_modules.items())
    assert unipelt.parameter_counts(model).submodules == {"lora": count}
    shake(model)
    want = logits(model, batch)
    assert (want - plain).abs().max() > 1e-3
    unipelt.save(model, tmp_path)
    assert torch.equal(logits(unipelt.load(tiny_model(family), tmp_path), batch), want)
    merged = unipelt.merge(copy.deepcopy(model))
    torch.testing.assert_close(logits(merged, batch), want, atol=3e-5 * max(1.0, want.abs().max().item()), rtol=0)
    unipelt.remove(model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_the_projections_of_a_llama_are_these() -> None:
    model = unipelt.inject(tiny_model("llama"), ALL_LINEAR)
    assert {term.term.name: term.path for term in placed_terms(model) if ".0." in term.path} == {
        "lora_query": "model.layers.0.self_attn.q_proj",
        "lora_key": "model.layers.0.self_attn.k_proj",
        "lora_value": "model.layers.0.self_attn.v_proj",
        "lora_attention": "model.layers.0.self_attn.o_proj",
        "lora_up": "model.layers.0.mlp.up_proj",
        "lora_gate": "model.layers.0.mlp.gate_proj",
        "lora_down": "model.layers.0.mlp.down_proj",
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gate_is_updated_where_there_is_one_and_refused_by_name_where_not(family: str) -> None:
    base, batch = tiny_model(family), tiny_batch(family)
    if family not in GATED:
        said = "take the place 'up'" if family in ("phi3", "modernbert") else "leave 'gate' out of places"
        with refusing(base, "at 'gate'", said, error=unipelt.InjectionError):
            unipelt.inject(base, GATE)
        return
    plain = copy.deepcopy(base)
    model = unipelt.inject(base, GATE)
    ends = {term.path.rpartition(".")[2] for term in placed_terms(model)}
    assert ends == ({"wi_1"} if family.endswith("t5") else {"gate_proj"})
    shake(model)
    for term in placed_terms(model):
        factors, weight = term.factors(), plain.get_submodule(term.path).weight
        weight.data += 2.0 * factors["B"] @ factors["A"]
    want = logits(plain, batch)
    torch.testing.assert_close(logits(model, batch), want, atol=2e-5 * max(1.0, want.abs().max().item()), rtol=0)


@pytest.mark.parametrize("config", [{}, {"decomposed": True}, {"start": "pissa"}, {"scaling": "rank_stabilised"}])
def test_every_kind_of_update_goes_to_every_projection(config: dict[str, Any]) -> None:
    base, batch = tiny_model("llama"), tiny_batch("llama")
    plain = logits(base, batch)
    model = unipelt.inject(base, {**ALL_LINEAR, "lora": {**ALL_LINEAR["lora"], **config}})
    torch.testing.assert_close(logits(model, batch), plain, atol=1e-5, rtol=0)
    shake(model)
    want = logits(model, batch)
    torch.testing.assert_close(logits(unipelt.merge(model), batch), want, atol=3e-5, rtol=1e-4)


def test_gates_of_every_projection_lead_from_the_model_to_its_update() -> None:
    base, batch = tiny_model("llama"), tiny_batch("llama")
    plain = logits(base, batch)
    model = unipelt.inject(base, {"preset": "lora", "lora": {**ALL_LINEAR["lora"], "gate": True}})
    shake(model)
    counts = unipelt.parameter_counts(model)
    assert counts.gates == {f"lora_{place}": 3 * ((40 if place == "down" else 32) + 1) for place in LINEAR}
    for place in LINEAR:
        assert fill(model, f"gate.lora_{place}.weight", 0.0) == 3
        assert fill(model, f"gate.lora_{place}.bias", -200.0) == 3
    torch.testing.assert_close(logits(model, batch), plain, atol=1e-5, rtol=0)
    for place in LINEAR:
        fill(model, f"gate.lora_{place}.bias", 200.0)
    want = logits(model, batch)
    assert (want - plain).abs().max() > 1e-3
    report = unipelt.fold(model, [batch])
    assert report.merged == 3 * 7
    assert not any(isinstance(module, LoRA) for module in model.modules())
    torch.testing.assert_close(logits(model, batch), want, atol=3e-5, rtol=0)


@pytest.mark.parametrize("places", ["all-linear", ["gate"], ["up"]])
def test_experts_in_one_tensor_are_refused_by_name(places: Any) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = AutoConfig.for_model("mixtral", **sizes, num_key_value_heads=2, num_local_experts=2, vocab_size=60)
    model = AutoModelForCausalLM.from_config(config)
    with refusing(model, "the experts of a layer keep their weights in one tensor", error=unipelt.InjectionError):
        unipelt.inject(model, {"preset": "lora", "lora": {"places": places}})


def test_what_a_configuration_says() -> None:
    config = unipelt.resolve(ALL_LINEAR)
    assert config.to_dict()["lora"]["places"] == ("all-linear",)
    assert unipelt.UniPELTConfig.from_dict(config.to_dict()) == config
    named = unipelt.resolve({"preset": "lora", "lora": {"places": ["gate", "down", "query"]}})
    assert named.lora is not None
    assert named.lora.places == ("query", "down", "gate")
    with pytest.raises(ConfigError, match=r"lora\.places must name .*down, gate, none of them twice, or all-linear al"):
        unipelt.resolve({"preset": "lora", "lora": {"places": ["all-linear", "query"]}})
    with pytest.raises(ConfigError, match=r"houlsby\.places must be query or "):
        unipelt.resolve({"preset": "houlsby", "houlsby": {"places": "all-linear"}})


def test_a_further_submodule_goes_to_the_gate() -> None:
    """(IA)3 multiplies what the projection gives."""
    base, batch = tiny_model("llama"), tiny_batch("llama")
    plain = copy.deepcopy(base)
    model = unipelt.inject(base, {"preset": "ia3", "ia3": {"gate": False, "places": ["gate"]}})
    shake(model)
    for term in placed_terms(model):
        assert term.path.endswith("mlp.gate_proj")
        plain.get_submodule(term.path).weight.data *= 1 + term.term.function.offset.detach()[:, None]
    torch.testing.assert_close(logits(model, batch), logits(plain, batch), atol=2e-5, rtol=0)
    with refusing(bert := tiny_bert(), "at 'gate'", error=unipelt.InjectionError):
        unipelt.inject(bert, {"preset": "ia3", "ia3": {"gate": False, "places": ["gate"]}})
