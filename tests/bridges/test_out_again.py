"""A merged model in a folder: the files that other programs want, read by the auto classes and by pipelines.

The conversion of llama.cpp and vLLM read `config.json` with the name of the class, the tokenizer's files and
safetensors, with a tied head left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import shake
from safetensors import safe_open
from tiny import tiny_model
from tiny_task import WORDS, save_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

import unipelt

METHODS: dict[str, Any] = {
    "lora": {"preset": "lora", "lora": {"rank": 3}},
    "dora and ia3": {"preset": "lora", "lora": {"decomposed": True}, "ia3": {"gate": False}},
}


def merged(folder: Path, method: Any, **changes: Any) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Write a merged Llama with its tokenizer; return it, ids, and the logits before it was merged."""
    save_model(folder / "base", "llama")
    ids: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    model = unipelt.inject(tiny_model("llama", vocab_size=len(WORDS), **ids, **changes), method)
    shake(model)
    text = torch.tensor([[2, 14, 15, 16, 17]])
    with torch.no_grad():
        want = model(input_ids=text).logits
    plain = unipelt.merge(model)
    plain.save_pretrained(folder / "plain")
    AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / "plain")
    return plain, text, want


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_the_folder_of_a_language_model(method: str, tied: bool, tmp_path: Path) -> None:
    plain, ids, want = merged(tmp_path, METHODS[method], tie_word_embeddings=tied)
    folder = tmp_path / "plain"
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not names & {"unipelt.json", "adapter_config.json"}
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"
    assert config["tie_word_embeddings"] == tied
    with safe_open(folder / "model.safetensors", "pt") as file:
        held = set(file.keys())
    assert ("lm_head.weight" in held) == (not tied)
    expected = {name for name, _ in tiny_model("llama", tie_word_embeddings=tied).named_parameters()}
    assert held == expected, "no name of ours, and none is missing"
    again = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, want, atol=2e-5, rtol=1e-4)
    say: Any = pipeline("text-generation", str(folder), device="cpu")
    options = {"max_new_tokens": 4, "do_sample": False}
    said = say("the cat sat", return_tensors=True, **options)[0]["generated_token_ids"]
    tokens = say.tokenizer("the cat sat", return_tensors="pt")["input_ids"]
    assert said == plain.generate(tokens, **options)[0].tolist()


def test_a_classifier_in_half_precision_is_one_dtype_again(tmp_path: Path) -> None:
    save_model(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    model: Any = unipelt.inject(base, METHODS["lora"])
    assert model.classifier.weight.dtype == torch.float32, "it trains in float32"
    shake(model)
    ids = torch.tensor([[2, 5, 14, 3]])
    with torch.no_grad():
        want = model.eval()(input_ids=ids).logits.float()
        plain: Any = unipelt.merge(model)
        got = plain(input_ids=ids).logits.float()
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(got, want, atol=0.05, rtol=0.05)
    plain.save_pretrained(tmp_path / "plain")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain").eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits.float(), got)
