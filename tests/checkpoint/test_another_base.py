"""A base that has the right weights and computes otherwise: a checkpoint is refused, and the field is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import MANIFEST, edit, read, refusing, small, tiny_bert, trained
from tiny import tiny_model
from transformers import PreTrainedModel

import unipelt
from unipelt import CheckpointError


def saved(model: PreTrainedModel, folder: Path, **changes: object) -> Path:
    return unipelt.save(unipelt.inject(model, small("lora", **changes)), folder)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unipelt.save(trained("lora"), tmp_path_factory.mktemp("original") / "checkpoint")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "relu"),
        ("layer_norm_eps", 1e-5),
        ("is_decoder", True),
        ("pad_token_id", 3),
        ("vocab_size", 61),
    ],
)
def test_a_bert_that_computes_otherwise(original: Path, field: str, value: object) -> None:
    model = tiny_bert()
    setattr(model.config, field, value)
    with refusing(model, f"its {field} was ", f" and is {value!r} here", "build the base with the same configuration"):
        unipelt.load(model, original)


def test_an_activation_changes_the_numbers_and_not_one_weight(original: Path) -> None:
    """What the weights' fingerprint cannot see."""
    model = tiny_bert(hidden_act="relu")
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), tiny_bert().parameters(), strict=True))
    with refusing(model, "hidden_act was 'gelu' and is 'relu' here"):
        unipelt.load(model, original)


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("t5", "scale_decoder_outputs", True),
        ("t5", "relative_attention_max_distance", 32),
        ("bart", "scale_embedding", True),
        ("llama", "rope_parameters", {"rope_theta": 500.0, "rope_type": "default"}),
        ("llama", "rms_norm_eps", 1e-3),
        ("gemma2", "attn_logit_softcapping", 30.0),
        ("mistral", "sliding_window", 3),
    ],
)
def test_others_that_compute_otherwise(tmp_path: Path, family: str, field: str, value: object) -> None:
    saved(tiny_model(family), tmp_path)
    model = tiny_model(family)
    if value == getattr(model.config, field):
        value = not value
    setattr(model.config, field, value)
    with refusing(model, f"its {field}"):
        unipelt.load(model, tmp_path)


@pytest.mark.parametrize("family", ["bart", "gemma3_text", "gpt2", "modernbert", "roberta", "t5"])
def test_the_same_base_is_taken(tmp_path: Path, family: str) -> None:
    saved(tiny_model(family), tmp_path)
    unipelt.load(tiny_model(family, dropout=0.3), tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name_or_path", "somewhere/else"),
        ("_name_or_path", "somewhere/else"),
        ("id2label", {0: "no", 1: "yes"}),
        ("use_cache", False),
        ("architectures", ["BertModel"]),
        ("hidden_dropout_prob", 0.5),
        ("classifier_dropout", 0.5),
        ("initializer_range", 1.0),
        ("return_dict", False),
        ("transformers_version", "4.0.0"),
        ("dtype", torch.bfloat16),
        ("problem_type", "regression"),
        ("_attn_implementation", "eager"),
        ("bos_token_id", 7),
        ("eos_token_id", 7),  # the base has none, and is often given one later
        ("chunk_size_feed_forward", 4),
    ],
)
def test_what_changes_no_number_is_not_compared(original: Path, field: str, value: object) -> None:
    model = tiny_bert()
    setattr(model.config, field, value)
    expected = unipelt.load(tiny_bert(), original).state_dict()
    now = unipelt.load(model, original).state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in expected.items())


def test_fields_that_only_one_version_of_transformers_has_are_not_compared(original: Path, tmp_path: Path) -> None:
    manifest = read(original)
    assert manifest["base"]["computation"]["hidden_act"] == "gelu", (
        "a default is kept too: another version may change it"
    )
    manifest["base"]["computation"]["a_field_of_tomorrow"] = "on"
    del manifest["base"]["computation"]["is_decoder"]
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    (tmp_path / "model.safetensors").write_bytes((original / "model.safetensors").read_bytes())
    model: Any = tiny_bert()
    model.config.of_this_version = 3
    unipelt.load(model, tmp_path)


def test_a_checkpoint_of_before_the_computation_was_kept(original: Path, tmp_path: Path) -> None:
    manifest = read(original)
    del manifest["base"]["computation"]
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    (tmp_path / "model.safetensors").write_bytes((original / "model.safetensors").read_bytes())
    unipelt.load(tiny_bert(), tmp_path)
    wrong: list[Any] = [[], "gelu", None]
    for value in wrong:
        edit(tmp_path, "base.computation", value)
        model = tiny_bert()
        with refusing(model, "computation must be a mapping"):
            unipelt.load(model, tmp_path)


def test_a_base_whose_folder_now_computes_otherwise(tmp_path: Path) -> None:
    """Only what differs from the defaults is given to the base again, so another default must not go unseen."""
    tiny_bert().save_pretrained(tmp_path / "base")
    model = type(tiny_bert()).from_pretrained(tmp_path / "base")
    unipelt.save(unipelt.inject(model, small("lora")), tmp_path / "a")
    unipelt.from_pretrained(tmp_path / "a")
    edit(tmp_path / "a", "base.computation.hidden_act", "gelu_new")
    with pytest.raises(CheckpointError, match="its hidden_act was 'gelu_new' and is 'gelu' here"):
        unipelt.from_pretrained(tmp_path / "a")
