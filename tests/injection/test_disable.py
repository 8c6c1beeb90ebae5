"""The base inside `disable`: bit for bit, and the injected model again behind it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import bits, logits, shake, small, tiny_batch, tiny_bert
from torch import nn

import unipelt
from unipelt.submodules.room import rooms


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("method", ["unipelt-apl", "bitfit", "fine-tuning", "prompt"])
def test_the_base_computes_inside_and_the_model_behind(method: str, fails: bool) -> None:
    model: Any = tiny_bert(chunk_size_feed_forward=3)
    # PyTorch multiplies a piece of the states in another order of sums if the weight trains
    model.requires_grad_(method == "fine-tuning")
    base, before = logits(model), bits(model)
    unipelt.inject(model, small(method, **({"prompt": {"length": 3}} if method == "prompt" else {})))
    shake(model)
    layers = model.bert.encoder.layer
    pieces = [layer.chunk_size_feed_forward for layer in layers]
    changed, values = logits(model), bits(model)
    where = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    try:
        with unipelt.disable(model) as same:
            assert same is model
            assert torch.equal(logits(model), base)
            inside = dict(model.named_parameters())
            assert all(torch.equal(inside[name], value) for name, value in before.items())
            assert [layer.chunk_size_feed_forward for layer in layers] == [3, 3, 3]
            assert {room.active for _, room in rooms(model)} <= {None}
            assert not fails, "the block ends here"
    except AssertionError as error:
        if "the block ends here" not in str(error):
            raise
    assert torch.equal(logits(model), changed)
    assert [layer.chunk_size_feed_forward for layer in layers] == pieces
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, values[name]), name
        assert parameter.data_ptr() == where[name], name
    assert not torch.equal(changed, base)


def test_what_was_added_is_needed_and_the_base_as_it_was() -> None:
    model: Any = tiny_bert()
    with pytest.raises(ValueError, match="carries no submodules"), unipelt.disable(model):
        pass
    unipelt.inject(model, "lora")
    shake(model)
    model.classifier.weight = nn.Parameter(torch.ones(5, 32))
    values = bits(model)
    message = r"the parameter 'classifier\.weight' was \(2, 32\) when submodules were added, and has another shape now"
    with pytest.raises(ValueError, match=message), unipelt.disable(model):
        pass
    del model.classifier
    with pytest.raises(ValueError, match="has another shape now"), unipelt.disable(model):
        pass
    assert {room.active for _, room in rooms(model)} == {"default"}
    assert all(torch.equal(parameter, values[name]) for name, parameter in model.named_parameters())


def test_batches_after_the_block_train() -> None:
    model = unipelt.inject(tiny_bert(), small("unipelt-apl"))
    with unipelt.disable(model), torch.no_grad():
        model(**tiny_batch())
    model(**tiny_batch(), labels=torch.tensor([0, 1, 1])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
