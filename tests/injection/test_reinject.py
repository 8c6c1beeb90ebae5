"""Submodules replaced by fewer ones: what trained stays, and the model's own attributes are those of the new set."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import bits, logits, shake, small, tiny_bert
from inside import parts

import unipelt
from unipelt.injection.reinject import own_values, reinject
from unipelt.injection.state import injection_of


@pytest.mark.parametrize("training", [True, False])
def test_fewer_submodules_keep_their_values_and_the_state_of_the_model(training: bool, tmp_path: Any) -> None:
    model: Any = tiny_bert()
    before = bits(model)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    unipelt.inject(model, small("unipelt-apl"))
    shake(model)
    model.bert.encoder.layer[0].output.dense.weight.requires_grad_(True)  # by the caller's choice
    model.classifier.bias.requires_grad_(False)
    model.train(training)
    values, state = own_values(model), torch.get_rng_state()
    kept = {name: tensor.clone() for name, tensor in parts(model).items() if "lora" in name}
    others = {n: (p.requires_grad, p.clone()) for n, p in model.named_parameters() if "unipelt" not in n}
    config = small("unipelt-apl", adapter=None, prefix=None)
    with torch.no_grad():
        reinject(model, config, values)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training is training
    assert injection_of(model).config == config
    found = parts(model)
    assert {name for name in kept if name in found} == found.keys()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in found.items())
    for name, parameter in model.named_parameters():
        if name in others:
            assert parameter.requires_grad == others[name][0], name
            assert torch.equal(parameter, others[name][1]), name
        else:
            assert parameter.requires_grad, name
    # Transformers leaves out of a checkpoint what the base holds, and nothing of what was added
    stored = model.state_dict().keys() - model._keys_to_ignore_on_save
    assert stored == {n for n in model.state_dict() if "unipelt" in n or "classifier" in n}
    want = copy.deepcopy(model).eval()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(unipelt.load(tiny_bert(), tmp_path)), logits(want))
    unipelt.remove(model)
    assert all(torch.equal(value, before[name]) for name, value in bits(model).items())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
