"""Every supported architecture: the same promises, on tiny random models."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import SIZES, shake, tiny_batch
from transformers import (
    AutoConfig,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

import unipelt
from unipelt.families import FAMILIES

HEADS = {
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
    "answer": AutoModelForQuestionAnswering,
    "choice": AutoModelForMultipleChoice,
}


def tiny(family: str, head: str = "sequence", attention: str = "sdpa") -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return HEADS[head].from_config(config, attn_implementation=attention).eval()


def batch_for(model: PreTrainedModel, extra: int = 0) -> dict[str, torch.Tensor]:
    batch = tiny_batch()
    pad = model.config.pad_token_id or 0
    batch["input_ids"] = batch["input_ids"].masked_fill(~batch["attention_mask"].bool(), pad)
    return {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, extra), value=pad),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, extra)),
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gating", ["scale", "mass"])
def test_promises(family: str, gating: str, tmp_path: Path) -> None:
    model = tiny(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        plain = model(**batch_for(model)).logits
    unipelt.inject(model, {"preset": "unipelt-apl", "prefix": {"gating": gating}})
    shake(model)
    with torch.no_grad(), unipelt.record_gates(model) as gates:
        out = model(**batch_for(model)).logits
        wider = model(**batch_for(model, extra=6)).logits
    assert set(gates) == {"adapter", "prefix", "lora_query", "lora_value"}
    assert all(values.shape == (6, 3) and values.std() > 1e-4 for values in gates.values())
    assert (out - plain).abs().max() > 1e-3
    torch.testing.assert_close(wider, out, atol=1e-5, rtol=0)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch_for(model)).logits, out, atol=1e-5, rtol=0)
    model.set_attn_implementation("sdpa")
    model(**batch_for(model), labels=torch.tensor([0, 1, 1])).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(**batch_for(model)).logits, out)
        for deploy in (False, True):
            unipelt.save(model, tmp_path, deploy=deploy)
            assert torch.equal(unipelt.load(tiny(family), tmp_path)(**batch_for(model)).logits, out)
    unipelt.remove(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", HEADS)
def test_the_head_trains_and_the_base_does_not(family: str, head: str) -> None:
    model = tiny(family, head)
    unipelt.inject(model, "lora")
    base = f"{model.base_model_prefix}."
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (not name.startswith(base) or "lora_" in name), name


def test_every_family_is_what_its_table_says() -> None:
    for family, stack in FAMILIES.items():
        layer = tiny(family).base_model.get_submodule(stack.layers)[0]  # type: ignore[index]
        assert isinstance(layer.get_submodule(stack.norm), torch.nn.LayerNorm)
