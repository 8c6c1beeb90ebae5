"""A prefix in an attention outside Transformers' interface (MPNet's), whose text it makes longer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_near, shake, small
from tiny import tiny_batch, tiny_model

import unipelt


@pytest.mark.parametrize("method", ["prefix", "unipelt-apl"])
def test_a_longer_text_takes_a_mask_of_any_shape_or_none(method: str) -> None:
    model: Any = unipelt.inject(tiny_model("mpnet"), small(method))
    shake(model)
    encoder = model.mpnet.encoder
    states = torch.randn(2, 5, 32)
    bias = encoder.compute_position_bias(states)
    padded = torch.zeros(2, 1, 1, 5)
    padded[1, ..., 3:] = torch.finfo(torch.float32).min
    with torch.no_grad():
        got, want = (encoder.layer[0](states, mask, bias)[0] for mask in (padded.expand(2, 1, 5, 5), padded))
        assert_near(got, want)
        none, zeros, short = (
            encoder.layer[0](states[:, :3], mask, bias[..., :3, :3])[0]
            for mask in (None, padded[..., :3], padded[:1, ..., :3])
        )
    assert_near(none, zeros)
    assert_near(short, zeros)
    assert_near(want[1, :3], zeros[1])


def test_attentions_and_states_are_those_of_the_text() -> None:
    model: Any = unipelt.inject(tiny_model("mpnet"), small("unipelt-apl"))
    shake(model)
    with torch.no_grad():
        found = model(**tiny_batch("mpnet"), output_attentions=True, output_hidden_states=True)
    assert {tuple(states.shape) for states in found.hidden_states} == {(3, 9, 32)}
    length = 4
    for weights in found.attentions:
        assert weights.shape[2:] == (9, length + 9)
        assert_near(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert (weights[..., :length] > 0).all()
        assert weights[0, ..., length + 5 :].max() < 1e-6, "padding has no weight"
