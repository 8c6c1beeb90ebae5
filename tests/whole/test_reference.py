"""The fast code against the slow reference that reads like the paper."""

from __future__ import annotations

import pytest
import reference
import torch
from helpers import SIZES, shake, small, tiny_batch, tiny_bert
from torch import Tensor

import unipelt
from unipelt import UniPELTConfig

CASES: dict[str, dict[str, object]] = {
    "unipelt-apl": {},
    "unipelt-ap": {},
    "unipelt-al": {},
    "unipelt-pl": {},
    "unipelt-apl-nogate": {},
    "adapter": {},
    "prefix": {},
    "lora": {},
    "fine-tuning": {},
    "bitfit": {},
}


def method_of(config: UniPELTConfig) -> reference.Method:
    adapter, prefix, lora = config.adapter, config.prefix, config.lora
    return reference.Method(
        adapter=adapter is not None,
        prefix=prefix is not None,
        lora=lora is not None,
        adapter_gate=adapter is not None and adapter.gate,
        prefix_gate=prefix is not None and prefix.gate,
        lora_gate=lora is not None and lora.gate,
        prefix_gating=prefix.gating if prefix is not None else "scale",
        pooling=config.gate.pooling,
        lora_scale=lora.alpha / lora.rank if lora is not None else 2.0,
    )


def slow(model: torch.nn.Module, config: UniPELTConfig, batch: dict[str, Tensor]) -> reference.Output:
    weights = reference.from_release(unipelt.release_state_dict(model))  # type: ignore[arg-type]
    types = torch.zeros_like(batch["input_ids"])
    return reference.classify(
        weights, method_of(config), batch["input_ids"], batch["attention_mask"], types, SIZES["num_attention_heads"]
    )


@pytest.mark.parametrize("pooling", ["masked_mean", "mean"])
@pytest.mark.parametrize("gating", ["scale", "mass"])
@pytest.mark.parametrize("preset", CASES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_agrees_with_the_paper(preset: str, gating: str, pooling: str, attention: str) -> None:
    config = small(preset, gate={"pooling": pooling})
    if config.prefix is not None:
        config = config.updated({"prefix": {"gating": gating}})
    model = unipelt.inject(tiny_bert(attn_implementation=attention), config)
    shake(model)
    batch = tiny_batch()
    expected = slow(model, config, batch)
    if expected.gates:
        with unipelt.record_gates(model) as gates, torch.no_grad():
            out = model(**batch, output_hidden_states=True)
        assert set(gates) == set(expected.gates)
        for name, values in expected.gates.items():
            torch.testing.assert_close(gates[name], values, atol=1e-5, rtol=0)
            assert values.std() > 1e-4, "gates that do not vary test nothing"
    else:
        with torch.no_grad():
            out = model(**batch, output_hidden_states=True)
    torch.testing.assert_close(out.logits, expected.logits, atol=1e-5, rtol=0)
    real = batch["attention_mask"].bool()
    for got, want in zip(out.hidden_states, expected.hidden, strict=True):
        torch.testing.assert_close(got[real], want[real], atol=1e-5, rtol=0)


def test_gradients_agree_with_the_paper() -> None:
    config = small("unipelt-apl", prefix={"gating": "mass"})
    model = unipelt.inject(tiny_bert(), config)
    shake(model)
    batch, labels = tiny_batch(), torch.tensor([0, 1, 0])
    model(**batch, labels=labels).loss.backward()
    release = unipelt.release_state_dict(model)
    leaves = {name: tensor.requires_grad_() for name, tensor in release.items()}
    out = reference.classify(
        reference.from_release(leaves),
        method_of(config),
        batch["input_ids"],
        batch["attention_mask"],
        torch.zeros_like(batch["input_ids"]),
        SIZES["num_attention_heads"],
    )
    torch.nn.functional.cross_entropy(out.logits, labels).backward()
    gradients = unipelt.release_state_dict(model, gradients=True)
    assert len(gradients) > 40
    for name, gradient in gradients.items():
        want = leaves[name].grad
        assert want is not None
        torch.testing.assert_close(gradient, want, atol=1e-4 * float(want.abs().max()), rtol=0, msg=name)
