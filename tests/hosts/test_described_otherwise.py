"""Models of a described type that are built otherwise, and projections that are called on relative positions too."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from helpers import shake, small
from inside import added_to
from tiny import tiny_batch, tiny_config, tiny_model
from torch import Tensor

import unipelt
from unipelt.hosts.families import FAMILIES, family_of
from unipelt.hosts.norms import find_norms


class OtherLayer(transformers.models.llama.modeling_llama.LlamaDecoderLayer):
    """A Llama's layer with another name for its feed-forward network."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.network = self.mlp
        del self.mlp

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states + self.network(self.post_attention_layernorm(hidden_states))


class OtherLlama(transformers.LlamaModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for index in range(len(self.layers)):
            self.layers[index] = OtherLayer(config, index)


def test_a_model_of_a_described_type_with_other_parts_is_described_by_inspection(
    caplog: pytest.LogCaptureFixture,
) -> None:
    known = FAMILIES["llama"]
    torch.manual_seed(0)
    model: Any = OtherLlama(tiny_config("llama")).eval()
    transformers.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            found = family_of(model)
            assert family_of(tiny_model("llama")) is known
    finally:
        transformers.logging.disable_propagation()
    assert caplog.text.count("OtherLlama was described by inspection (layers at layers)") == 1
    assert found.stacks[0].output == "network"
    assert FAMILIES["llama"] is known, "the description of the type stays"
    ids = tiny_batch("llama")["input_ids"]
    before = model(ids)[0]
    unipelt.inject(model, small("unipelt-apl"))
    shake(model)
    assert added_to(model.layers[0]).wiring.outputs["network"] == ("adapter",)
    assert (model(ids)[0] - before).abs().max() > 1e-3
    unipelt.remove(model)
    assert torch.equal(model(ids)[0], before)


@pytest.mark.parametrize("decomposed", [False, True])
def test_only_queries_and_keys_are_called_on_relative_positions(decomposed: bool) -> None:
    places = ["query", "key", "value", "attention", "up"]
    asked: dict[str, Any] = {"preset": "lora", "lora": {"places": places, "decomposed": decomposed, "rank": 2}}
    model: Any = unipelt.inject(tiny_model("deberta-v2"), asked)
    terms = added_to(model.deberta.encoder.layer[0]).terms
    assert {name: term.once for name, term in terms.items()} == {
        f"lora_{place}": place in ("query", "key") for place in places
    }
    assert {name: term.in_attention for name, term in terms.items()} == {
        f"lora_{place}": place != "up" for place in places
    }
    assert not any(term.crosses for term in terms.values())
    other: Any = unipelt.inject(tiny_model("bert"), asked)
    assert not any(term.once for term in added_to(other.bert.encoder.layer[0]).terms.values())


def test_dropout_by_example_goes_with_terms_that_positions_do_not_reach() -> None:
    asked: dict[str, Any] = {"preset": "lora", "gate": {"dropout": 0.5, "dropout_by": "example"}}
    with pytest.raises(unipelt.InjectionError, match="calls a projection for relative positions too"):
        unipelt.inject(tiny_model("deberta-v2"), asked)
    model = unipelt.inject(tiny_model("deberta-v2"), {**asked, "lora": {"places": ["value"]}})
    shake(model)
    assert model.train()(**tiny_batch("deberta-v2")).logits.isfinite().all()


def test_every_norm_of_a_layer_is_numbered_from_one() -> None:
    model: Any = unipelt.inject(tiny_model("gemma2"), "ln_tuning")
    layer = model.model.layers[0]
    assert len(find_norms(layer, 32)) == 4
    assert list(added_to(layer).terms) == [f"ln_tuning_norm{number}" for number in (1, 2, 3, 4)]


@pytest.mark.parametrize("decomposed", [False, True])
def test_keys_and_values_of_cross_attention_read_the_other_stack(decomposed: bool) -> None:
    places = ["query", "key", "value", "attention"]
    asked: dict[str, Any] = {"preset": "lora", "lora": {"places": places, "decomposed": decomposed, "rank": 2}}
    model: Any = unipelt.inject(tiny_model("bart"), asked)
    own = added_to(model.model.decoder.layers[0])
    assert {name: term.crosses for name, term in own.cross.terms.items()} == {
        f"lora_{place}": place in ("key", "value") for place in places
    }
    assert {name: term.crosses for name, term in own.terms.items()} == {f"lora_{place}": False for place in places}


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_description_that_is_right_passes_its_check(family: str) -> None:
    known = FAMILIES[family]
    unipelt.register_family(family, *known.stacks, refused=known.refused)
    assert unipelt.inject(tiny_model(family), small("unipelt-apl")).unipelt_injection is not None


def test_a_norm_that_is_given_two_tensors_is_refused() -> None:
    unipelt.register_family("bert", replace(FAMILIES["bert"].stacks[0], norm="attention.output"))
    message = "attention.output is a BertSelfOutput, which is given 2 tensors, and a norm reads one"
    with pytest.raises(unipelt.InjectionError, match=message):
        unipelt.inject(tiny_model("bert"), small("adapter"))
    unipelt.inject(tiny_model("bert"), small("lora"))  # without an adapter, no norm is asked for
