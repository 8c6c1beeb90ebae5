"""The rooms of layers: what a set needs, which set a host finds, and the parts of the parameters."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import small, tiny_bert
from inside import added_to
from tiny import tiny_model

import unipelt
from unipelt.submodules.room import own_parameters, own_parts

ALONE: dict[str, Any] = {"preset": "lora", "lora": None}


@pytest.mark.parametrize(
    ("method", "needed"),
    [
        ({"preset": "lora"}, False),
        ({**ALONE, "houlsby": {"gate": False}}, False),
        ({**ALONE, "reft": {"gate": False, "positions": "all"}}, False),
        ({**ALONE, "reft": {"gate": False}}, True),
        ({"preset": "lora", "gate": {"dropout": 0.1}}, True),
        ({"preset": "lora", "lora": {"gate": True}}, True),
        ({"preset": "lora", "lora": {"mixture": {}}}, True),
        ({**ALONE, "ia3": {"gate": True}}, True),
        ({"preset": "prefix"}, True),
    ],
    ids=str,
)
def test_a_layer_has_a_pass_only_if_its_modules_exchange_values(method: dict[str, Any], needed: bool) -> None:
    model: Any = unipelt.inject(tiny_bert(), method)
    for layer in model.bert.encoder.layer:
        assert added_to(layer).needs_pass is needed
        assert bool(layer._forward_pre_hooks) is needed


def test_a_host_finds_the_set_of_its_attention() -> None:
    layer: Any = unipelt.inject(tiny_model("bart"), small()).model.decoder.layers[0]
    added = added_to(layer)
    assert list(added.attentions()) == [added, added.cross]
    for host, part in ((layer.self_attn.q_proj, added), (layer.encoder_attn.q_proj, added.cross)):
        assert host.unipelt_port.part("default") is part
        assert host.unipelt_port.part("another") is None
        assert host.unipelt_port.part(None) is None


@pytest.mark.parametrize("family", ["bert", "bart", "gpt2"])
def test_parts_are_the_parameters_without_rest(family: str) -> None:
    model = unipelt.inject(tiny_model(family), small(ia3={"gate": True}))
    own = list(own_parts(model))
    parameters = own_parameters(model)
    assert {part.full_name for part in own} == parameters.keys()
    assert all(part.parameter is parameters[part.full_name] for part in own)
    assert [part.size for part in own] == [part.tensor.numel() for part in own]
    assert sum(part.size for part in own) == sum(parameter.numel() for parameter in parameters.values())
    assert {part.cross for part in own} == {False, *([True] if family == "bart" else [])}
