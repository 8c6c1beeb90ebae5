"""The texts and images that small models read."""

from __future__ import annotations

from typing import Any

import torch
from tiny import tiny_config, tiny_model
from transformers import AutoModelForSeq2SeqLM, BertModel

from unipelt.hosts.generate import small_of
from unipelt.hosts.inputs import text_batch


def test_a_text_has_padding_at_the_end_of_its_second_row_and_is_the_same_at_every_call() -> None:
    config: Any = tiny_config("bert")
    model: Any = BertModel(config)
    batch = text_batch(model)
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert batch["input_ids"].shape == (2, 9)
    assert batch["input_ids"].max() < model.config.vocab_size
    assert (batch["input_ids"][:, -1] == 2).all(), "the end of a text"
    assert batch["attention_mask"].tolist() == [[1] * 9, [1] * 7 + [0] * 2]
    again = text_batch(model)
    assert all(torch.equal(tensor, again[name]) for name, tensor in batch.items())


def test_a_decoder_has_a_text_of_its_own_unless_the_model_makes_it() -> None:
    model: Any = AutoModelForSeq2SeqLM.from_config(tiny_config("bart"))
    batch = text_batch(model)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "input_ids": (2, 11),
        "attention_mask": (2, 11),
        "decoder_input_ids": (2, 9),
    }
    assert {name: tuple(tensor.shape) for name, tensor in text_batch(model, two=False).items()} == {
        "input_ids": (2, 9),
        "attention_mask": (2, 9),
    }


def test_a_decoder_that_looks_at_an_encoder_gets_its_states() -> None:
    model = tiny_model("bert", "CausalLM", is_decoder=True, add_cross_attention=True)
    states = text_batch(model, crossing=True)["encoder_hidden_states"]
    assert states.shape == (2, 11, 32)
    assert states.requires_grad


def test_an_image_goes_with_each_text_where_a_model_reads_images() -> None:
    images = text_batch(small_of("llava", "ImageTextToText"), images=True)["pixel_values"]
    assert images.shape[:2] == (2, 3)
    assert images.shape[2] == images.shape[3]
    assert "pixel_values" not in text_batch(tiny_model("bert"), images=True)


class Open(BertModel):
    """A model that passes its arguments on by name."""

    def forward(self, **kwargs: Any) -> Any:
        return super().forward(**kwargs)


def test_a_model_that_takes_any_argument_gets_the_text() -> None:
    config: Any = tiny_config("bert")
    model: Any = Open(config)
    assert text_batch(model).keys() == {"input_ids", "attention_mask"}
    assert model.eval()(**text_batch(model))[0].shape == (2, 9, 32)
