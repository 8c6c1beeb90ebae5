"""An injected model as a plain one: what is merged computes the same, and what cannot be merged is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import shake
from tiny import tiny_batch, tiny_model
from torch import nn

import unipelt

METHODS: dict[str, Any] = {
    "lora": {"preset": "lora", "lora": {"places": ["query", "value", "key", "attention", "up", "down"]}},
    "dora": {"preset": "lora", "lora": {"decomposed": True}},
    "pissa": {"preset": "lora", "lora": {"start": "pissa"}},
    "ia3": {"preset": "lora", "lora": None, "ia3": {"gate": False}},
    "lora and ia3": {"preset": "lora", "ia3": {"gate": False}},
    "dora and ia3": {"preset": "lora", "lora": {"decomposed": True}, "ia3": {"gate": False}},
    "bitfit": "bitfit",
}


def logits(model: Any, family: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_batch(family)).logits


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "bart", "gpt_neox"])
@pytest.mark.parametrize("method", METHODS)
def test_the_plain_model_computes_the_same(method: str, family: str, tmp_path: Path) -> None:
    base = tiny_model(family)
    before = {name: tuple(parameter.shape) for name, parameter in base.named_parameters()}
    if method == "bitfit" and not any(name.endswith("bias") for name in before):
        pytest.skip("this architecture has no biases")
    model = unipelt.inject(base, METHODS[method])
    shake(model)
    want = logits(model.eval(), family)
    plain = unipelt.merge(model)
    assert plain is model
    assert not hasattr(plain, "unipelt_injection")
    assert {name: tuple(parameter.shape) for name, parameter in plain.named_parameters()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.modules())
    torch.testing.assert_close(logits(plain, family), want, atol=2e-5, rtol=1e-4)
    assert_same_when_read(plain, family, tmp_path)


def assert_same_when_read(plain: Any, family: str, folder: Path) -> None:
    """Check that Transformers reads every tensor as it wrote it, and gives the same logits if a bare base does."""
    kept, exact = [], False
    for model, where in ((tiny_model(family).eval(), folder / "bare"), (plain, folder / "plain")):
        model.save_pretrained(where)
        read = type(model).from_pretrained(where).eval()
        kept = [model.state_dict(), read.state_dict()]
        before, exact = exact, torch.equal(logits(read, family), logits(model, family))
    assert kept[0].keys() == kept[1].keys()
    assert all(torch.equal(kept[1][name], tensor) for name, tensor in kept[0].items())
    assert exact or not before  # Transformers 5.0 loses the frequencies of GPT-NeoX, which no file holds


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("unipelt-al", "depends on the text"),
        ("adapter", "no linear function"),
        ("prefix", "prefix"),
        ("prompt", "prompt"),
        ({"preset": "lora", "lora": {"gate": True}}, "depends on the text"),
    ],
    ids=str,
)
def test_what_cannot_be_merged_is_refused_and_the_model_is_as_it_was(method: Any, said: str) -> None:
    model = unipelt.inject(tiny_model("bert"), method)
    shake(model)
    want, names = logits(model, "bert"), [name for name, _ in model.named_parameters()]
    with pytest.raises(unipelt.MergeError, match=said):
        unipelt.merge(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert torch.equal(logits(model, "bert"), want)


def test_folding_makes_lora_mergeable() -> None:
    model = unipelt.inject(
        tiny_model("bert"), {"preset": "lora", "lora": {"gate": True}, "gate": {"pooling": "static"}}
    )
    shake(model)
    want = logits(model, "bert")
    unipelt.fold(model, [tiny_batch("bert")])
    torch.testing.assert_close(logits(unipelt.merge(model), "bert"), want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "weight",
    [torch.empty(32, 32, device="meta"), torch.zeros(32, 32, dtype=torch.int8)],
    ids=["offloaded", "quantised"],
)
def test_a_weight_without_numbers_to_add_to_is_refused(weight: torch.Tensor) -> None:
    model: Any = unipelt.inject(tiny_model("bert"), "lora")
    attention = model.bert.encoder.layer[1].attention.self
    attention.query.weight = nn.Parameter(weight, requires_grad=False)
    before = attention.value.weight.clone()
    with pytest.raises(unipelt.MergeError, match=r"layer\.1\.attention\.self\.query\.weight is not in memory as plain"):
        unipelt.merge(model)
    assert torch.equal(attention.value.weight, before)


def test_a_shared_weight_is_refused() -> None:
    model: Any = unipelt.inject(tiny_model("bert"), "lora")
    attention = model.bert.encoder.layer[0].attention.self
    other = copy.copy(attention.query)
    model.also = nn.ModuleList([other])
    with pytest.raises(unipelt.MergeError, match="shared"):
        unipelt.merge(model)
