"""Prompt tuning, against the host itself on embeddings that the prompt was put before by hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import bits, shake, tiny_bert
from conftest import tiny_batch as bert_batch
from tiny import DECODERS, ENCODER_DECODERS, ENCODERS, tiny_batch, tiny_model
from torch import Tensor

import unipelt
from unipelt.pack import Pack, PackError

L = 4
QUICK = (
    "bert",
    "roberta",
    "distilbert",
    "albert",
    "deberta-v2",
    "modernbert",
    "gpt2",
    "bloom",
    "opt",
    "llama",
    "gemma",
)
PROMPT: dict[str, Any] = {"preset": "prompt", "prompt": {"length": L}}


def prompt_of(model: Any) -> Any:
    """The learned vectors."""
    return next(module.embedding for module in model.modules() if isinstance(module, unipelt.Prompt))


def before(base: Any, prompt: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the host is given in place of a batch of ids and mask."""
    text = base.get_input_embeddings()(batch["input_ids"])
    mask = batch["attention_mask"]
    return {
        "inputs_embeds": torch.cat([prompt.expand(len(text), -1, -1), text], dim=1),
        "attention_mask": torch.cat([mask.new_ones(len(mask), L), mask], dim=1),
    }


def check(family: str) -> None:
    base, batch = tiny_model(family, "Model"), tiny_batch(family)
    model = unipelt.inject(copy.deepcopy(base), PROMPT)
    shake(model)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        got = model(**batch, output_hidden_states=True)
        want = base(**before(base, prompt_of(model), batch), output_hidden_states=True)
        without = base(**batch)
    for own, other in zip(got.hidden_states, want.hidden_states, strict=True):
        torch.testing.assert_close(own[real], other[:, L:][real], rtol=0, atol=1e-6)
    torch.testing.assert_close(got[0][real], want[0][:, L:][real], rtol=0, atol=1e-6)
    assert got[0].shape == without[0].shape
    assert (got[0] - without[0])[real].abs().max() > 1e-3
    head = tiny_model(family)  # which may pass by the base model
    want = head(**batch).logits
    unipelt.inject(head, {**PROMPT, "train_head": False})
    assert (head(**batch).logits - want).abs().max() > 1e-3


@pytest.mark.parametrize("family", QUICK)
def test_a_prompt_is_put_before_the_text(family: str) -> None:
    check(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in (*ENCODERS, *DECODERS) if family not in QUICK])
def test_a_prompt_is_put_before_the_text_in_every_other_family(family: str) -> None:
    check(family)


def test_heads_read_the_texts_own_tokens() -> None:
    """BERT's pooler and RoBERTa's head the first; GPT-2's the last; token types and positions are the text's."""
    base: Any = tiny_bert()
    batch = {**bert_batch(), "token_type_ids": torch.ones_like(bert_batch()["input_ids"])}
    model: Any = unipelt.inject(copy.deepcopy(base), {**PROMPT, "train_head": False})
    types = torch.nn.functional.pad(batch["token_type_ids"], (L, 0))
    with torch.no_grad():
        states = base.bert(**before(base, prompt_of(model), batch), token_type_ids=types)[0]
        want = base.classifier(base.bert.pooler(states[:, L:]))
        torch.testing.assert_close(model(**batch).logits, want, rtol=0, atol=1e-6)
        positions = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
        same = model(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"], positions).logits
        assert torch.equal(same, model(**batch).logits)
        for family, place in (("roberta", 0), ("gpt2", -1)):
            other = tiny_model(family, "SequenceClassification")
            batch = tiny_batch(family, lengths=(4,), tokens=4)
            model = unipelt.inject(copy.deepcopy(other), {**PROMPT, "train_head": False})
            states = other.base_model(**before(other, prompt_of(model), batch))[0]
            head = other.classifier(states[:, L:]) if place == 0 else other.score(states[:, place])
            torch.testing.assert_close(model(**batch).logits, head, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "head"), [("bert", "TokenClassification"), ("bert", "MaskedLM"), ("llama", "CausalLM")]
)
def test_outputs_of_tokens_are_as_long_as_the_text(family: str, head: str) -> None:
    batch = tiny_batch(family)
    model: Any = unipelt.inject(tiny_model(family, head), PROMPT)
    out = model(**batch, labels=torch.ones_like(batch["input_ids"]))
    assert out.logits.shape[:2] == batch["input_ids"].shape
    out.loss.backward()
    assert prompt_of(model).grad.abs().min() > 0
    assert {name for name, p in model.named_parameters() if p.requires_grad and "prompt" not in name} == {
        name for name in ("classifier.weight", "classifier.bias") if head == "TokenClassification"
    }


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom", "opt", "gemma3_text"])
def test_generation_with_and_without_a_cache_and_padding(family: str) -> None:
    wide: dict[str, Any] = {} if family != "gemma3_text" else {"sliding_window": 32}
    model: Any = unipelt.inject(tiny_model(family, **wide), PROMPT)
    shake(model)
    ids = tiny_batch(family, lengths=(5, 5, 5), tokens=5)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    cached = model.generate(ids, attention_mask=mask, **options)
    assert cached.shape == (3, 11)
    assert torch.equal(cached, model.generate(ids, attention_mask=mask, use_cache=False, **options))
    assert torch.equal(cached[1:2, 2:], model.generate(ids[1:2, 2:], attention_mask=mask[1:2, 2:], **options))
    beams = model.generate(ids, attention_mask=mask, num_beams=3, **options)
    assert torch.equal(beams, model.generate(ids, attention_mask=mask, num_beams=3, use_cache=False, **options))
    with pytest.raises(ValueError, match="static cache"):
        model.generate(ids, attention_mask=mask, cache_implementation="static", **options)


def test_masks_of_other_shapes_and_layers_by_themselves_are_refused() -> None:
    model: Any = unipelt.inject(tiny_bert(), PROMPT)
    with pytest.raises(RuntimeError, match="BertEncoder was called by itself"):
        model.bert.encoder(torch.zeros(1, 3, 32))
    ids = bert_batch()["input_ids"]
    with pytest.raises(ValueError, match=r"an attention_mask of \(examples, tokens\)"):
        model(input_ids=ids, attention_mask=torch.ones(len(ids), 1, ids.shape[1], ids.shape[1]))


def test_it_starts_at_tokens_and_is_saved_loaded_counted_and_removed(tmp_path: Path) -> None:
    base = tiny_bert()
    there = {name: set(vars(module)) for name, module in base.named_modules()}
    first, table = bits(base), base.get_input_embeddings().weight
    model: Any = unipelt.inject(base, PROMPT)
    assert all((table == row).all(dim=1).any() for row in prompt_of(model))
    counts = unipelt.parameter_counts(model)
    assert counts.submodules == counts.deployed_submodules == {"prompt": L * 32}
    shake(model)
    want = model(**bert_batch()).logits
    unipelt.save(model, tmp_path, deploy=True)
    loaded = unipelt.load(tiny_bert(), tmp_path)
    assert torch.equal(loaded(**bert_batch()).logits, want)
    assert torch.equal(copy.deepcopy(loaded)(**bert_batch()).logits, want)
    unipelt.remove(model)
    assert all(torch.equal(first[name], parameter) for name, parameter in model.named_parameters())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == there
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(**bert_batch()).logits, tiny_bert()(**bert_batch()).logits)
    manifest = json.loads((tmp_path / "unipelt.json").read_text())
    manifest["unipelt"]["prompt"]["length"] = 1_000_000
    (tmp_path / "unipelt.json").write_text(json.dumps(manifest))
    with pytest.raises(unipelt.CheckpointError, match=r"prompt\.length is 1000000, and no tensor has that size"):
        unipelt.load(tiny_bert(), tmp_path)


def test_it_goes_with_other_submodules_and_with_folding() -> None:
    """Gates count its vectors as tokens, and padding as none."""
    config = {"preset": "unipelt-apl", "prompt": {"length": L}}
    model = unipelt.inject(tiny_bert(), config)
    shake(model, std=0.02)
    batch = bert_batch()
    want = model(**batch).logits
    wider = {name: torch.nn.functional.pad(tensor, (0, 3)) for name, tensor in batch.items()}
    torch.testing.assert_close(model(**wider).logits, want, rtol=0, atol=1e-6)
    report = unipelt.fold(model, [batch], tolerance=0.5, closed=0.0)
    assert {gate.outcome for gate in report.gates} == {"merged", "constant"}
    torch.testing.assert_close(model(**batch).logits, want, rtol=0, atol=2e-2)


def test_gates_of_tokens_are_measured_over_real_ones() -> None:
    config = {"preset": "unipelt-al", "prompt": {"length": L}, "gate": {"pooling": "token"}}
    model = unipelt.inject(tiny_bert(), config)
    shake(model)
    batch = bert_batch()
    wider = {name: torch.nn.functional.pad(tensor, (0, 3)) for name, tensor in batch.items()}
    found = [unipelt.fold(copy.deepcopy(model), [data], tolerance=0.0) for data in (batch, wider)]
    for one, other in zip(found[0].gates, found[1].gates, strict=True):
        assert one.mean == pytest.approx(other.mean, abs=1e-6)


def test_it_is_not_packed() -> None:
    """So its runs train one by one."""
    with pytest.raises(PackError, match=r"cannot be packed.*a model with a prompt"):
        Pack(unipelt.inject(tiny_bert(), PROMPT), tokens=12)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model: Any = unipelt.inject(tiny_bert(), PROMPT).train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
        model(**bert_batch(), labels=torch.tensor([0, 1, 1])).loss.backward()
        grads.append(prompt_of(model).grad)
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("family", ENCODER_DECODERS[:2])
def test_models_of_two_stacks_refuse_it_by_name(family: str) -> None:
    model = tiny_model(family)
    with pytest.raises(unipelt.InjectionError, match=f"'{family}' models cannot take a prompt"):
        unipelt.inject(model, PROMPT)
    assert not hasattr(model, "unipelt_injection")


def test_what_else_is_refused() -> None:
    with pytest.raises(unipelt.ConfigError, match=r"prompt\.length must be above 0"):
        unipelt.resolve({"preset": "prompt", "prompt": {"length": 0}})
    with pytest.raises(unipelt.CheckpointError, match="this model a prompt"):
        unipelt.release_state_dict(unipelt.inject(tiny_bert(), PROMPT))
    model: Any = tiny_bert()
    model.bert.prompt = torch.nn.Linear(2, 2)
    with pytest.raises(unipelt.InjectionError, match="has an attribute 'prompt' of its own"):
        unipelt.inject(model, PROMPT)
    assert isinstance(model.bert.prompt, torch.nn.Linear)
    model = tiny_bert()
    table = model.get_input_embeddings()
    table.weight = torch.nn.Parameter(table.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(unipelt.InjectionError, match="the embeddings are quantised"):
        unipelt.inject(model, PROMPT)
    assert (
        unipelt.resolve("lora").to_dict()
        == unipelt.UniPELTConfig.from_dict(unipelt.resolve("lora").to_dict()).to_dict()
    )
    assert "prompt" not in unipelt.resolve("lora").to_dict()
