"""Small configurations: what becomes small, and what decides how a model is built and stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel, LlamaConfig, PreTrainedConfig

from unipelt.hosts import shrink
from unipelt.hosts.shrink import CannotShrink, build_small, small_config


def made_small(**settings: Any) -> dict[str, Any]:
    """Return the settings of the small configuration, of those that were given."""
    small = small_config(PreTrainedConfig(**settings)).to_dict()
    return {name: small.get(name) for name in settings}


def test_sizes_become_small_and_what_decides_the_structure_stays() -> None:
    assert made_small(
        hidden_size=4096,
        intermediate_size=1000,
        num_attention_heads=32,
        num_hidden_layers=8,
        vocab_size=50000,
        type_vocab_size=300,
        num_experts=64,
        head_dim=None,
        n_routed_experts=None,
        sliding_window=None,
        hidden_dropout_prob=0.1,
        layer_norm_eps=1e-12,
        hidden_act="gelu",
        use_bias=True,
    ) == {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "vocab_size": 128,
        "type_vocab_size": 300,
        "num_experts": 4,
        "head_dim": 8,
        "n_routed_experts": 4,
        "sliding_window": None,
        "hidden_dropout_prob": 0.0,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "use_bias": True,
    }
    # what is small already stays
    assert made_small(hidden_size=16, vocab_size=70, num_hidden_layers=1, intermediate_size=-1) == {
        "hidden_size": 16,
        "vocab_size": 70,
        "num_hidden_layers": 1,
        "intermediate_size": -1,
    }


@pytest.mark.parametrize(("given", "want"), [(32, 4), (8, 2), (1, 1)])
def test_heads_of_keys_are_as_many_as_queries_or_fewer_or_one(given: int, want: int) -> None:
    assert made_small(num_attention_heads=32, num_key_value_heads=given)["num_key_value_heads"] == want


def test_one_layer_of_each_kind_is_kept() -> None:
    small = made_small(
        num_hidden_layers=6,
        layer_types=[f"{kind}_attention" for kind in ("full", "full", "sliding", "full", "sliding", "linear")],
        moe_layers=[3, 5],
        no_rope_layers=[1, 1, 1, 1, 1, 1],
        block_sizes=[7, 7, 7],
    )
    assert small == {
        "num_hidden_layers": 4,  # layers 0, 2, 3 and 5
        "layer_types": ["full_attention", "sliding_attention", "full_attention", "linear_attention"],
        "moe_layers": [2, 3],
        "no_rope_layers": [1, 1, 1, 1],
        "block_sizes": [7, 7, 7],
    }


def test_positions_are_those_of_short_texts() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 4096}
    small: Any = small_config(LlamaConfig(rope_parameters=yarn, max_position_embeddings=32768))
    assert small.max_position_embeddings == 64
    assert small.rope_parameters["rope_type"] == "default"
    assert small.rope_parameters["rope_theta"] == 5e5
    assert "factor" not in small.rope_parameters


def test_changes_are_of_single_settings() -> None:
    settings: dict[str, Any] = {"hidden_size": 4096, "text_config": {"hidden_size": 4096, "num_hidden_layers": 9}}
    config = PreTrainedConfig(**settings)
    small: Any = small_config(config, {"text_config": {"num_hidden_layers": 3}, "hidden_size": 48})
    assert small.hidden_size == 48
    assert small.text_config == {"hidden_size": 32, "num_hidden_layers": 3}


def test_equal_configurations_give_equal_models_and_draw_no_numbers() -> None:
    config = BertConfig(num_hidden_layers=12)
    state = torch.get_rng_state()
    one, other = build_small(BertModel, config), build_small(BertModel, config)
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert not one.training
    assert config.num_hidden_layers == 12
    assert all(parameter.any() for parameter in one.parameters()), "biases of 0 would hide their effects"


def test_a_type_that_cannot_be_small_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shrink, "MOST_PARAMETERS", 100)
    with pytest.raises(CannotShrink, match=r"^its smallest model has \d+ parameters$"):
        build_small(BertModel, BertConfig())
    with pytest.raises(
        CannotShrink, match=r"^a small BertForSequenceClassification could not be built: KeyError: 'tanhh'"
    ):
        build_small(BertForSequenceClassification, BertConfig(hidden_act="tanhh"))
