"""The size of a vocabulary beside that of the base, and the parameters that hold it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_bert
from tiny import tiny_config
from transformers import BertConfig, BertForMaskedLM, LlavaConfig

from unipelt.hosts.vocabulary import base_vocabulary_sizes, resized_vocabulary, vocabulary_sizes


def test_sizes_are_those_of_the_text_by_field() -> None:
    assert vocabulary_sizes(BertConfig(vocab_size=60)) == {"vocab_size": 60}
    assert vocabulary_sizes(tiny_config("marian", decoder_vocab_size=70)) == {
        "vocab_size": 60,
        "decoder_vocab_size": 70,
    }
    assert vocabulary_sizes(LlavaConfig(text_config=tiny_config("llama"))) == {"vocab_size": 60}


@pytest.mark.parametrize("rows", [58, 60, 64])
def test_what_holds_a_resized_vocabulary_is_known_from_the_bases_file(rows: int, tmp_path: Path) -> None:
    BertForMaskedLM(tiny_bert().config).save_pretrained(tmp_path / "base")
    model: Any = BertForMaskedLM.from_pretrained(tmp_path / "base")
    assert not resized_vocabulary(model)
    model.resize_token_embeddings(rows, mean_resizing=False)
    held = {"bert.embeddings.word_embeddings.weight", "cls.predictions.bias"}
    assert resized_vocabulary(model) == (set() if rows == 60 else held)
    assert base_vocabulary_sizes(model.config, str(tmp_path / "base")) == {"vocab_size": 60}
    for name in ("", str(tmp_path / "nothing")):
        assert base_vocabulary_sizes(model.config, name, local_files_only=True) is None
        model.config._name_or_path = name
        assert not resized_vocabulary(model), "nothing is known of the base"


def test_a_folder_without_a_configuration_tells_no_size(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert base_vocabulary_sizes(BertConfig(vocab_size=60), str(tmp_path)) is None
